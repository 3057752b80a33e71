"""The state, all that the network remembers of a video: one value of constant size, whatever the length.

Nothing is stored on a module. `forward` takes a state and returns the next one; the caller keeps it or drops it.
NamedTuples, because FSDP and checkpoint hooks walk outputs as pytrees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longsana.runtime.arguments import Whole
from longsana.runtime.errors import InputError
from longsana.runtime.finite import not_finite

TAILS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes that a network computes in."""
FRAMES = Whole(0, 10**9)
"""Latent frames, or chunks: at 16 pixel frames a second eight years."""


class LayerState(NamedTuple):
    """The memory of one block.

    W entries of sums: that of the first chunks, if there are sinks; then the sum of all others, decayed or not, or with
    a window an entry for each of its chunks, the oldest first.

    kv: (B, W, heads, d, d), index [key, value], float32: sums of rotated relu(k) v^T.
    k_sum: (B, W, heads, d), float32: sums of relu(k), not rotated.
    tail: (B, S, D), model dtype: the last frame that entered the temporal convolution.
    """

    kv: Tensor
    k_sum: Tensor
    tail: Tensor


class CausalState(NamedTuple):
    """The memory of all blocks, layers first, and where the video is.

    frames: latent frames absorbed so far.
    sinks: chunks that the sinks' entry holds so far, at most `num_sink_blocks`; 0 without sinks.

    Its size does not depend on the video's length. 480p, batch 1: 139.8 MB of tail and W times 20.2 MB of sums, with

        W = (num_sink_blocks > 0) + max(num_cached_blocks, 1)

    152.6 MiB for the sum of the whole past, decayed or not; 152.6, 171.9 and 191.2 MiB for windows of 1, 2 and 3
    chunks; 19.3 MiB more with sinks, however many.
    """

    kv: Tensor
    k_sum: Tensor
    tail: Tensor
    frames: int
    sinks: int = 0

    @classmethod
    def empty(
        cls,
        *,
        depth: int,
        batch: int,
        entries: int,
        heads: int,
        head_dim: int,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device | str,
        frames: int = 0,
    ) -> CausalState:
        """No past: W = `entries` zero sums, and the zero frame that a convolution's padding would be.

        `frames` places what follows at a later absolute position; rotation is relative, so the output is the same.
        """
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        return cls(
            kv=torch.zeros(depth, batch, entries, heads, head_dim, head_dim, dtype=sums, device=device),
            k_sum=torch.zeros(depth, batch, entries, heads, head_dim, dtype=sums, device=device),
            tail=torch.zeros(depth, batch, tokens, heads * head_dim, dtype=dtype, device=device),
            frames=frames,
        )

    @classmethod
    def stack(cls, layers: Sequence[LayerState], frames: int, sinks: int = 0) -> CausalState:
        """Join the memories of the blocks, one after the other, to one value."""
        kv, k_sum, tail = (torch.stack(parts) for parts in zip(*layers, strict=True))
        return cls(kv, k_sum, tail, frames, sinks)

    def layers(self) -> Iterator[LayerState]:
        return (LayerState(*parts) for parts in zip(self.kv, self.k_sum, self.tail, strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes of the storages held alive, which a view would make larger than the tensors' own."""
        storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in self[:3]}
        return sum(storages.values())

    def detach(self) -> CausalState:
        return self._replace(kv=self.kv.detach(), k_sum=self.k_sum.detach(), tail=self.tail.detach())

    def settled(self, name: str) -> CausalState:
        """Look at a state; it comes back with whole numbers where they were whole floats.

        name: what messages call it.

        Raises:
            InputError: shapes, dtypes, devices or numbers are none that a state has.
        """
        tensors = {part: getattr(self, part) for part in self._fields[:3]}
        for part, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.layout != torch.strided:
                raise InputError(f"{name}: its {part} is no tensor with numbers in it")
        shapes = {part: tuple(tensor.shape) for part, tensor in tensors.items()}
        heads, dim = shapes["k_sum"][-2:] if len(shapes["k_sum"]) == 5 else (0, 0)
        if shapes["kv"] != (*shapes["k_sum"], dim) or shapes["tail"] != (
            *shapes["kv"][:2],
            *shapes["tail"][2:3],
            heads * dim,
        ):
            told = ", ".join(f"{part} {list(shape)}" for part, shape in shapes.items())
            raise InputError(f"{name}: shapes that do not belong together: {told}")
        if not all(tensor.numel() for tensor in tensors.values()):
            raise InputError(f"{name}: without numbers in it")
        sums = torch.float64 if self.tail.dtype == torch.float64 else torch.float32
        if self.tail.dtype not in TAILS or not self.kv.dtype == self.k_sum.dtype == sums:
            told = ", ".join(f"{part} {tensor.dtype}" for part, tensor in tensors.items())
            raise InputError(f"{name}: dtypes that no state has: {told}")
        if found := not_finite(tensors):
            raise InputError(f"{name}: holds numbers that are not finite ({found[0]})")
        frames = FRAMES.settle(f"{name}: frames", self.frames)
        sinks = FRAMES.settle(f"{name}: sinks", self.sinks)
        if sinks and self.kv.shape[2] < 2:
            raise InputError(f"{name}: {sinks} sinks without an entry of their own")
        return self._replace(frames=frames, sinks=sinks)
