"""Live sessions on a GPU: their memory, what becomes of one that has none, and recorded passes."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from longsana.config import InferenceConfig
from longsana.serving.session import Session
from longsana.serving.studio import Studio
from longsana.serving.values import Chunk, End, Limits
from tests.pipelines.repository import shapes_config
from tests.serving.viewing import OTHER, PROMPT, WAIT, order, pictures, settled, taken

pytestmark = pytest.mark.gpu

SMALL: dict[str, Any] = {"vae.decoder": "full", "vae.latents_per_call": 2, "sampling.chunk_frames": 2}


@pytest.fixture(scope="module")
def config() -> InferenceConfig:
    return shapes_config(**SMALL)


@pytest.fixture(scope="module")
def studio(config: InferenceConfig) -> Iterator[Studio]:
    with Studio(config, "cuda") as studio:
        yield studio


def rested(studio: Studio) -> int:
    """Bytes that are in use once the worker has nothing to do."""
    settled(studio)
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def two_videos(studio: Studio) -> list[np.ndarray]:
    """Two sessions in turns, one of which is told another prompt."""
    sessions = [studio.start(order(seed=1)), studio.start(order(seed=2, prompt=OTHER, chunk_frames=3))]
    chunks: list[list[Chunk]] = [[], []]
    for number in range(8):
        for own, session in zip(chunks, sessions, strict=True):
            own += taken(session, 1)
        if number == 4:
            sessions[0].change(OTHER)
    found = [pictures(session, own) for session, own in zip(sessions, chunks, strict=True)]
    for session in sessions:
        session.close()
    return found


def test_replayed_sessions_show_the_same(studio: Studio) -> None:
    """To the bit; captions, lengths and viewers alternate."""
    plain = two_videos(studio)
    with Studio(shapes_config(**SMALL, **{"sampling.cuda_graphs": True}), "cuda") as recorded:
        for first, second in zip(plain, two_videos(recorded), strict=True):
            assert np.array_equal(first, second)
        known = getattr(recorded._maker._passes, "_known")  # noqa: B009 (of a ReplayedNetwork)
        assert sum(one.recording is not None for one in known) >= 2


def test_memory_is_counted_and_does_not_grow(studio: Studio) -> None:
    """What the figures say is what the GPU holds beside the networks; after the last session nothing stays."""
    two_videos(studio)  # the libraries' workspaces are there from then on
    empty = rested(studio)
    session = studio.start(order())
    held = []
    for _ in range(30):
        taken(session, 2)
        held.append((rested(studio) - empty, studio.figures().memory_bytes))
    assert len(set(held[5:])) == 1
    allocated, counted = held[-1]
    assert 0.9 * allocated <= counted <= allocated
    session.close()
    assert rested(studio) <= empty + 4 * studio._maker._text.cache_info().maxsize * (1 << 20)
    assert studio.figures().memory_bytes == 0


def failed(session: Session) -> End:
    while not isinstance(piece := session.take(WAIT), End):
        assert piece is not None
    return piece


def test_without_memory_a_session_ends_and_no_other(config: InferenceConfig) -> None:
    """The GPU really has none: the process is held to little more than it uses."""
    limits = Limits(most_pixels=4096 * 4096, memory_bytes=1 << 40, pass_seconds=math.inf)
    with Studio(config, "cuda", limits=limits) as studio:
        undisturbed = studio.start(order(seed=1))
        expected = pictures(undisturbed, taken(undisturbed, 6))
        undisturbed.close()
        healthy = studio.start(order(seed=1))
        chunks = taken(healthy, 2)
        rested(studio)
        torch.cuda.empty_cache()
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (1 << 29)) / total)
        try:
            large = studio.start(order(height=2048, width=2048, prompt=PROMPT))
            end = failed(large)
            assert end.reason == "failed" and end.message.startswith("out of memory on the GPU")
            chunks += taken(healthy, 2)
            again = studio.start(order(seed=1))
            assert np.array_equal(pictures(again, taken(again, 2)), expected[: 9 + 8])
            again.close()
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        chunks += taken(healthy, 2)
        assert np.array_equal(pictures(healthy, chunks), expected)
        assert studio.figures().failures == 1
