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
from longsana.runtime.foreign import reason_of


class LayerState(NamedTuple):
    """What one block remembers. W is 1 (the sum of the whole past) or the window in chunks (one entry each).

    kv: (B, W, heads, d, d), index [key, value], float32: sums of rotated relu(k) v^T.
    k_sum: (B, W, heads, d), float32: sums of relu(k), not rotated.
    tail: (B, S, D), model dtype: the last frame that entered the temporal convolution.
    """

    kv: Tensor
    k_sum: Tensor
    tail: Tensor


class CausalState(NamedTuple):
    """The same for all blocks, layers first, and the number of latent frames absorbed so far.

    480p, batch 1: 20.2 MB of sums and 139.8 MB of tail, 152.6 MiB together.
    """

    kv: Tensor
    k_sum: Tensor
    tail: Tensor
    frames: int

    @classmethod
    def empty(
        cls,
        *,
        depth: int,
        batch: int,
        window: int,
        heads: int,
        head_dim: int,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device | str,
        frames: int = 0,
    ) -> CausalState:
        """No past: zero sums, and the zero frame that a convolution's padding would be.

        `frames` places what follows at a later absolute position; rotation is relative, so the output is the same.
        """
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        return cls(
            kv=torch.zeros(depth, batch, window, heads, head_dim, head_dim, dtype=sums, device=device),
            k_sum=torch.zeros(depth, batch, window, heads, head_dim, dtype=sums, device=device),
            tail=torch.zeros(depth, batch, tokens, heads * head_dim, dtype=dtype, device=device),
            frames=frames,
        )

    @classmethod
    def stack(cls, layers: Sequence[LayerState], frames: int) -> CausalState:
        kv, k_sum, tail = (torch.stack(parts) for parts in zip(*layers, strict=True))
        return cls(kv, k_sum, tail, frames)

    def layers(self) -> Iterator[LayerState]:
        return (LayerState(*parts) for parts in zip(self.kv, self.k_sum, self.tail, strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes of the storages held alive, which a view would make larger than the tensors' own."""
        storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in self[:3]}
        return sum(storages.values())

    def detach(self) -> CausalState:
        return CausalState(self.kv.detach(), self.k_sum.detach(), self.tail.detach(), self.frames)

    def save(self, path: str | Path) -> None:
        tensors = {name: getattr(self, name).contiguous() for name in self._fields[:3]}
        save_file(tensors, path, metadata={"frames": str(self.frames)})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> CausalState:
        """A state that was saved.

        Raises:
            InputError: the file is none, or damaged.
        """
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                parts = {name: file.get_tensor(name) for name in cls._fields[:3]}
                return cls(**parts, frames=int(file.metadata()["frames"]))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not a saved state of a video, or damaged ({reason_of(error)})") from error
