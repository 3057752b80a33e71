"""What the network remembers of a video: one value of constant size, whatever the length.

Nothing is stored on a module. `forward` takes a state and returns the next one; the caller keeps it or drops it.
NamedTuples, because FSDP and checkpoint hooks walk outputs as pytrees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from longsana.runtime.errors import InputError
from longsana.runtime.files import whole_file
from longsana.runtime.foreign import reason_of


class LayerState(NamedTuple):
    """What one block remembers.

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
    """What all blocks remember, layers first, and where the video is.

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
        """What the blocks remember, one after the other, as one value."""
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

    def save(self, path: str | Path) -> None:
        """Write a file that is whole or not there.

        Raises:
            OSError: it could not be written; `path` is as it was.
        """
        tensors = {name: getattr(self, name).contiguous() for name in self._fields[:3]}
        with whole_file(path) as partial:
            save_file(tensors, partial, metadata={"frames": str(self.frames), "sinks": str(self.sinks)})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> CausalState:
        """A state that was saved.

        Raises:
            InputError: the file is none, or damaged.
        """
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                parts = {name: file.get_tensor(name) for name in cls._fields[:3]}
                numbers = file.metadata()  # of files from before there were sinks, frames alone
                return cls(**parts, frames=int(numbers["frames"]), sinks=int(numbers.get("sinks", 0)))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not a saved state of a video, or damaged ({reason_of(error)})") from error
