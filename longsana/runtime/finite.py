"""One look at numbers before they become pictures, files or somebody's result."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def not_finite(values: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors, of any shape and floating-point dtype, that hold a number which is not finite.

    Waits for the GPU where they are on one.
    """
    device = next((tensor.device for tensor in values.values()), torch.device("cpu"))
    return _found(values, _extremes(values, device))


def require_finite(what: str, values: Mapping[str, Tensor]) -> None:
    """Make sure that all numbers of some tensors, of any shape, are finite; see `not_finite`.

    what: where they belong, such as "chunk 3".

    Raises:
        FloatingPointError: they are not; the message names the first tensor.
    """
    _judge(what, not_finite(values))


def to_host(pictures: Tensor, what: str, values: Mapping[str, Tensor]) -> Tensor:
    """Copy pictures of any shape and dtype to the host, after a look at the numbers that they were made of.

    What is not a number would become a black picture. On a GPU the look is one pass over the numbers, whose result
    comes with the pictures: nobody waits twice. what, values: see `require_finite`.

    Raises:
        FloatingPointError: a number is not finite.
    """
    extremes = _extremes(values, pictures.device)
    if pictures.is_cuda:
        # Pinned memory, which a GPU fills ten times faster than other memory.
        told, host = (
            torch.empty(part.shape, dtype=part.dtype, device="cpu", pin_memory=True) for part in (extremes, pictures)
        )
        told.copy_(extremes, non_blocking=True)
        host.copy_(pictures)  # waits, also for what was asked before
        extremes, pictures = told, host
    _judge(what, _found(values, extremes))
    return pictures


def _extremes(values: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """(tensors, 2), float32, on `device`: the least and largest number of each, NaN if one of its numbers is."""
    looks = [torch.zeros(0, 2, dtype=torch.float32, device=device)]
    for tensor in values.values():
        if tensor.numel():
            looks.append(torch.stack(tensor.detach().aminmax()).to(device, torch.float32)[None])
        else:
            looks.append(torch.zeros(1, 2, dtype=torch.float32, device=device))
    return torch.cat(looks)


def _found(values: Mapping[str, Tensor], extremes: Tensor) -> list[str]:
    judged = zip(values, extremes.tolist(), strict=True)
    return [name for name, numbers in judged if not all(map(math.isfinite, numbers))]


def _judge(what: str, found: list[str]) -> None:
    if found:
        raise FloatingPointError(f"{what}: {found[0]} are not finite; check weights and dtype")
