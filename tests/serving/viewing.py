"""What tests do with sessions: order, take pieces, and compare them with a stream of the pipeline."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from longsana.pipelines.video import LongSanaVideoChunk, LongSanaVideoPipeline
from longsana.serving.session import Session
from longsana.serving.studio import Studio
from longsana.serving.values import Chunk, Order
from tests.pipelines.repository import OTHER, PROMPT, SIZE

PLAIN = Order(PROMPT, seed=11, pace=False, media="pixels")
THIRD = "A small green triangle moves to the right on a black background."
WAIT = 60.0
"""Seconds after which a test gives a piece up."""

__all__ = ["OTHER", "PLAIN", "PROMPT", "SIZE", "THIRD", "followed", "order", "pictures", "settled", "streamed", "taken"]


def order(**changes: Any) -> Order:
    return replace(PLAIN, **changes)


def taken(session: Session, count: int) -> list[Chunk]:
    found = []
    for _ in range(count):
        piece = session.take(WAIT)
        assert isinstance(piece, Chunk), piece
        found.append(piece)
    return found


def settled(studio: Studio) -> None:
    """Wait until the worker has nothing to do."""
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        with studio.lock:
            if not studio._busy and not any(session.wants() for session in studio._sessions.values()):
                return
        time.sleep(0.01)
    raise AssertionError("the worker never came to rest")


def pictures(session: Session, chunks: Sequence[Chunk]) -> np.ndarray:
    """Pictures (F, H, W, 3) of pieces of plain pixels."""
    data = b"".join(chunk.data for chunk in chunks)
    return np.frombuffer(data, np.uint8).reshape(-1, session.height, session.width, 3)


def streamed(pipe: LongSanaVideoPipeline, count: int, prompt: Any = PROMPT, **options: Any) -> np.ndarray:
    """Pictures (F, H, W, 3), uint8, of the first chunks of a stream."""
    return shown(followed(pipe, count, prompt, **options))


def followed(pipe: LongSanaVideoPipeline, count: int, prompt: Any = PROMPT, **options: Any) -> list[LongSanaVideoChunk]:
    own: dict[str, Any] = {"chunk_frames": 2, "generator": torch.Generator().manual_seed(11), "output_type": "pil"}
    own = {} if "state" in options else own | SIZE
    stream = pipe.stream(prompt, **{"output_type": "pil", "chunk_frames": 2} | own | options)
    chunks = list(islice(stream, count))
    stream.close()  # type: ignore[attr-defined]
    return chunks


def shown(chunks: Sequence[LongSanaVideoChunk]) -> np.ndarray:
    return np.stack([np.asarray(picture) for chunk in chunks for picture in chunk.frames[0]])
