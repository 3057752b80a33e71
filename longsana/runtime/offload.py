"""Modules that take turns on a GPU: the weights of one are there, those of the others wait in the host's memory."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

ALIGNED = 512
"""Bytes that the place of each tensor is a multiple of."""


class Turns:
    """The modules that share a device, of which at most one is there.

    device: where they work. What a module computes with another's weights away is the same to the bit.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._parts: list[Part] = []

    def __len__(self) -> int:
        return len(self._parts)

    def add(self, module: nn.Module, without: nn.Module | None = None) -> Part:
        """Let a module take part, whose weights are on the device; they go to the host until it is its turn.

        without: a part of it whose weights are none of these.
        """
        part = Part(module, self, without)
        self._parts.append(part)
        return part

    def give(self, part: Part) -> None:
        """Bring the weights of a part, after those of all others have left."""
        if not part.is_there:
            for other in self._parts:
                other.leave()
            part.arrive()


class Part:
    """A module among `Turns`. Its weights are tensors of the host while it waits, which can be read but not run."""

    def __init__(self, module: nn.Module, turns: Turns, without: nn.Module | None = None) -> None:
        self._turns = turns
        others = set() if without is None else {id(tensor) for tensor in _tensors(without)}
        self._tensors = [tensor for tensor in _tensors(module) if id(tensor) not in others]
        self._waiting = host_copies(self._tensors, pinned=turns.device.type == "cuda")
        self.is_there = True
        self.leave()

    @property
    def device(self) -> torch.device:
        """The device that it works on."""
        return self._turns.device

    def bring(self) -> None:
        """Have the weights on the device, and those of the other parts on the host."""
        self._turns.give(self)

    @contextmanager
    def there(self) -> Iterator[None]:
        """Have the weights on the device inside, and on the host afterwards."""
        self.bring()
        try:
            yield
        finally:
            self.leave()

    def arrive(self) -> None:
        """Copy the weights to the device, in the order of what is launched after this."""
        for tensor, waiting in zip(self._tensors, self._waiting, strict=True):
            tensor.data = waiting.to(self._turns.device, non_blocking=True, copy=True)
        self.is_there = True

    def leave(self) -> None:
        """Let go of the weights on the device: nobody changes them, so that nothing is copied back."""
        if self.is_there:
            for tensor, waiting in zip(self._tensors, self._waiting, strict=True):
                tensor.data = waiting
            self.is_there = False


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def host_copies(tensors: list[Tensor], *, pinned: bool) -> list[Tensor]:
    """Copies of tensors, of any shape, dtype and dense layout, in one stretch of the host's memory.

    pinned: a GPU reads it at its full speed. PyTorch's own pinned memory comes in powers of two, up to twice as much.
    """
    places, end = [], 0
    for tensor in tensors:
        places.append(end)
        end += -(-tensor.numel() * tensor.itemsize // ALIGNED) * ALIGNED
    stretch = torch.empty(end, dtype=torch.uint8, device="cpu")
    if pinned and end:
        _pin(stretch)
    copies = []
    for tensor, place in zip(tensors, places, strict=True):
        flat = stretch[place : place + tensor.numel() * tensor.itemsize].view(tensor.dtype)
        copy = flat.as_strided(tensor.shape, _dense_strides(tensor), flat.storage_offset())
        copies.append(copy.copy_(tensor.detach()))
    return copies


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """The tensor's own strides where its numbers lie side by side in any order, as those of weights do."""
    return torch.empty_like(tensor, device="meta").stride()


def _pin(stretch: Tensor) -> None:
    runtime, address = torch.cuda.cudart(), stretch.data_ptr()
    if error := int(runtime.cudaHostRegister(address, stretch.nbytes, 0)):
        gigabytes = stretch.nbytes / 1e9
        log.warning("%.1f GB of the host cannot be pinned (CUDA's error %d): copies are slower", gigabytes, error)
        return
    weakref.finalize(stretch.untyped_storage(), runtime.cudaHostUnregister, address).atexit = False
