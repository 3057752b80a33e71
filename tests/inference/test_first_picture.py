"""The process that watches tells the truth, or fails aloud."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from longsana.inference.first_picture import Watcher
from longsana.runtime.files import partial_name
from longsana.runtime.video import VideoWriter

FRAMES = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), dtype=np.uint8)


def writer(path: Path) -> VideoWriter:
    return VideoWriter(path, 16, 32, 48, crf=20, preset="veryfast")


def test_the_moment_is_that_of_the_last_picture_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with Watcher() as watcher:
        for pictures in (1, 5, 9):
            with writer(path) as video:
                watcher.watch(partial_name(path), pictures)
                if pictures > 1:
                    video.append(FRAMES[: pictures - 1])
                    time.sleep(0.05)
                before = time.monotonic()
                video.append(FRAMES[pictures - 1 : pictures])
                # Nothing else comes, and the file is not finished.
                assert before < watcher.moment() <= time.monotonic()
        process = watcher._process
    assert process.poll() is not None


def test_what_cannot_be_seen_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with Watcher() as watcher:
        with writer(path) as video:
            watcher.watch(partial_name(path), 9)
            video.append(FRAMES[:3])
        with pytest.raises(RuntimeError, match=r"failed: EOFError: the video ended after 3 of 9 pictures$"):
            watcher.moment()
        with pytest.raises(RuntimeError, match="failed: FileNotFoundError"):
            watcher.watch(tmp_path / "none.mp4", 1)
        (tmp_path / "text.mp4").write_text("a text " * 1000)
        watcher.watch(tmp_path / "text.mp4", 1)
        (tmp_path / "text.mp4").unlink()
        with pytest.raises(RuntimeError, match="failed: InvalidDataError"):
            watcher.moment()
        with writer(path) as video:  # and goes on
            watcher.watch(partial_name(path), 3)
            video.append(FRAMES[:3])
        watcher.moment()
        watcher._process.kill()
        with writer(path) as video:
            video.append(FRAMES)
            with pytest.raises(RuntimeError, match="ended with status -9"):
                watcher.watch(partial_name(path), 3)


def test_a_watcher_ends_with_its_block_whatever_it_waits_for(tmp_path: Path) -> None:
    with pytest.raises(KeyError), writer(tmp_path / "a.mp4"), Watcher() as watcher:  # noqa: PT012
        watcher.watch(partial_name(tmp_path / "a.mp4"), 5)
        process = watcher._process
        raise KeyError
    assert process.poll() is not None
