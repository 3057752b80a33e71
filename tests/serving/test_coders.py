"""Chunks that are coded in processes of their own: the bytes are those of a thread, whatever happens to a process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import numpy as np
import psutil
import pytest

from longsana.runtime.fragments import Picture
from longsana.serving.coders import Coders, CodingProcess
from longsana.serving.media import ChunkEncoder
from longsana.serving.studio import Studio
from tests.pipelines.repository import shapes_config
from tests.serving.viewing import order, taken


def pixels(frames: int, height: int = 48, width: int = 80, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


@pytest.fixture
def process() -> Iterator[CodingProcess]:
    process = CodingProcess()
    yield process
    process.close()


def test_a_process_codes_as_a_thread_does(process: CodingProcess) -> None:
    """Chunks of any size, one after the other, larger and smaller ones."""
    for frames, height, width in ((2, 48, 80), (9, 96, 160), (1, 16, 16)):
        chunk, encoder = pixels(frames, height, width), ChunkEncoder(width, height, 16, crf=0, threads=1)
        assert process.code(encoder, chunk) == encoder.code(chunk)


def test_one_that_is_killed_is_started_again(process: CodingProcess) -> None:
    chunk, encoder = pixels(3), ChunkEncoder(80, 48, 16, crf=20, threads=1)
    first = process.code(encoder, chunk)
    os.kill(process._process.pid, signal.SIGKILL)
    assert process.code(encoder, chunk) == first


def test_what_cannot_be_coded_is_an_error_and_the_next_chunk_is_coded(process: CodingProcess) -> None:
    encoder = ChunkEncoder(80, 48, 16, crf=20, threads=1)
    with pytest.raises(RuntimeError, match="chunks cannot be coded: "):
        process.code(ChunkEncoder(81, 48, 16, crf=20, threads=1), pixels(2, width=81))  # x264 wants even widths
    assert process.code(encoder, pixels(2)) == encoder.code(pixels(2))


def test_several_are_coded_at_once_and_nothing_stays() -> None:
    before = set(psutil.Process().children())
    encoder, found, done = ChunkEncoder(80, 48, 16, crf=20, threads=1), {}, threading.Semaphore(0)
    chunks = {seed: pixels(4, seed=seed) for seed in range(6)}
    coders = Coders(2, apart=True)
    for seed in chunks:

        def task(code: object, seed: int = seed) -> None:
            assert callable(code)
            found[seed] = code(encoder, chunks[seed])
            done.release()

        coders.submit(task)
    for _ in chunks:
        assert done.acquire(timeout=60)
    assert len(set(psutil.Process().children()) - before) == 2
    coders.close()
    assert found == {seed: encoder.code(chunk) for seed, chunk in chunks.items()}
    assert set(psutil.Process().children()) == before


def test_a_process_ends_with_whoever_started_it(process: CodingProcess) -> None:
    process._connection.close()  # as the system does
    assert process._process.wait(30) == 0


def test_a_session_of_a_studio_is_coded_so() -> None:
    """To the bytes of one whose studio codes in threads."""
    config, media = shapes_config(), []
    for apart in (False, True):
        with Studio(config, coders_apart=apart) as studio:
            session = studio.start(order(media="mp4"))
            media.append([chunk.data for chunk in taken(session, 2)])
            session.close()
    assert media[0] == media[1]


def test_a_chunk_alone_decides_its_bytes() -> None:
    encoder = ChunkEncoder(80, 48, 16, crf=20, threads=1)
    coded: list[list[Picture]] = [encoder.code(pixels(3, seed=seed)) for seed in (1, 2, 1)]
    assert coded[0] == coded[2] != coded[1]
