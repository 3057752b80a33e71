"""The division of a clip of latent frames into chunks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

ImageFirst = Literal["absorb", "pin"]
"""A way for a video to begin with a picture: as a chunk of one latent, or as the first latent of the first chunk."""


@dataclass(frozen=True)
class ChunkPlan:
    """The lengths of consecutive chunks, in latent frames."""

    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"chunk lengths {self.lengths}: need at least one chunk, each of at least one frame")

    @classmethod
    def split(cls, frames: int, size: int) -> ChunkPlan:
        """Chunks of `size` frames; the remainder goes to the first: 21 by 10 is (11, 10).

        A clip shorter than one chunk is a single chunk.
        """
        if frames < 1 or size < 1:
            raise ValueError(f"cannot cut {frames} frames into chunks of {size}: both must be at least 1")
        count = max(frames // size, 1)
        return cls((frames - (count - 1) * size, *[size] * (count - 1)))

    @classmethod
    def after_picture(cls, frames: int, size: int) -> ChunkPlan:
        """A chunk of one frame, a picture's, and `frames` - 1 more in chunks of `size`: 21 by 10 is (1, 10, 10)."""
        return cls((1, *cls.split(frames - 1, size).lengths))

    @classmethod
    def with_picture(cls, frames: int, size: int, first: ImageFirst) -> ChunkPlan:
        """The chunks of a clip that begins with a picture: the first is it ("absorb"), or begins with it ("pin")."""
        return cls.after_picture(frames, size) if first == "absorb" and frames > 1 else cls.split(frames, size)

    @property
    def frames(self) -> int:
        return sum(self.lengths)

    @property
    def starts(self) -> tuple[int, ...]:
        """First frame of each chunk."""
        return tuple(accumulate(self.lengths[:-1], initial=0))

    def slices(self) -> list[slice]:
        return [slice(start, start + n) for start, n in zip(self.starts, self.lengths, strict=True)]

    def __len__(self) -> int:
        return len(self.lengths)
