"""Frames of the engine, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import torch

from longsana.sampling.engine import Frames


def by_chunk(frames: Iterable[Frames]) -> list[Frames]:
    """Join what comes of a chunk piece by piece, as a video's first one does; what is wanted after it comes last."""
    chunks = [list(pieces) for _, pieces in groupby(frames, key=lambda piece: piece.chunk)]
    return [
        pieces[-1]._replace(
            latents=torch.cat([piece.latents for piece in pieces], dim=2),
            pixels=torch.cat([piece.pixels for piece in pieces], dim=1),
        )
        for pieces in chunks
    ]
