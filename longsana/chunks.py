"""The division of a clip of latent frames into chunks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

ImageFirst = Literal["absorb", "pin"]
"""A way for a video to begin with a picture: as a chunk of one latent, or as the first latent of the first chunk."""
Absorb = Literal["clean", "last_step"]
"""Where the state after a chunk comes from: a pass over its clean latents at t = 0, or the pass of its last step."""


@dataclass(frozen=True)
class ChunkPlan:
    """The lengths of consecutive chunks, in latent frames."""

    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"chunk lengths {self.lengths}: need at least one chunk, each of at least one frame")

    @classmethod
    def split(cls, frames: int, size: int, first_chunk: int = 0) -> ChunkPlan:
        """Chunks of `size` frames; the remainder goes to the first: 21 by 10 is (11, 10).

        first_chunk: frames of the first chunk; then the remainder is a last chunk of its own, shorter than the others,
            however short: 21 by 10 after 3 is (3, 10, 8), and after 10 it is (10, 10, 1). 0: as above.

        A clip shorter than one chunk, the first if that has a length of its own, is a single chunk.
        """
        if frames < 1 or size < 1 or first_chunk < 0:
            raise ValueError(
                f"cannot cut {frames} frames into chunks of {size} after {first_chunk}: must be at least 1, 1 and 0"
            )
        if first_chunk:
            whole, rest = divmod(max(frames - first_chunk, 0), size)
            return cls((min(first_chunk, frames), *[size] * whole, *[rest] * (rest > 0)))
        count = max(frames // size, 1)
        return cls((frames - (count - 1) * size, *[size] * (count - 1)))

    @classmethod
    def after_picture(cls, frames: int, size: int, first_chunk: int = 0) -> ChunkPlan:
        """A chunk of one frame, a picture's, and `frames` - 1 more as `split` does: 21 by 10 is (1, 10, 10)."""
        return cls((1, *cls.split(frames - 1, size, first_chunk).lengths))

    @classmethod
    def with_picture(cls, frames: int, size: int, first: ImageFirst, first_chunk: int = 0) -> ChunkPlan:
        """The chunks of a clip that begins with a picture: the first is it ("absorb"), or begins with it ("pin").

        first_chunk: see `split`; an absorbed picture stands before that chunk, a pinned one is the first frame of it.
        """
        apart = first == "absorb" and frames > 1
        return (cls.after_picture if apart else cls.split)(frames, size, first_chunk)

    @classmethod
    def going_on(cls, frames: int, size: int, first_chunk: int = 0) -> ChunkPlan:
        """The chunks of what is added to a video whose first chunk was as `first_chunk` says; see `split`.

        None of them is the video's first: where that had a length of its own all have `size` frames, and what remains
        is a shorter last one, so that a video which goes on after any whole chunk has the chunks of the uncut one.
        """
        return cls.split(frames, size, size if first_chunk else 0)

    def resized(self, chunk: int, frames: int) -> ChunkPlan:
        """The plan with so many frames in this chunk; the others keep their lengths."""
        return ChunkPlan((*self.lengths[:chunk], frames, *self.lengths[chunk + 1 :]))

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
