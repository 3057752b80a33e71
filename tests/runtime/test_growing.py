"""A video can be watched while it is made, and nothing of that is left in the finished file or beside it."""

from __future__ import annotations

import io
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from longsana.runtime import stop
from longsana.runtime.files import partial_name
from longsana.runtime.video import DRAFTED, VideoWriter

HEIGHT, WIDTH = 64, 96
READER = """
import sys
from contextlib import closing
from pathlib import Path
from longsana.inference.first_picture import GrowingFile, decoded
with closing(GrowingFile(Path(sys.argv[1]))) as file:
    print("open", flush=True)
    for picture in decoded(file):
        sys.stdout.buffer.write(picture.to_ndarray(format="rgb24").tobytes())
        sys.stdout.buffer.flush()
"""


def moving(count: int) -> np.ndarray:
    """Colour ramps, one of which moves, under a texture that moves as well; (count, H, W, 3) uint8."""
    t, y, x = np.mgrid[0:count, 0:HEIGHT, 0:WIDTH]
    ramps = np.stack([x * 200 // (WIDTH - 1), y * 200 // (HEIGHT - 1), (t * 8) % 200], axis=-1)
    texture = np.random.default_rng(0).integers(0, 16, (HEIGHT, WIDTH, 1))
    return (ramps + np.stack([np.roll(texture, shift, axis=1) for shift in range(count)])).astype(np.uint8)


def psnr(pictures: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """The PSNR of each of (F, H, W, 3) pictures, in dB."""
    error = np.square(pictures.astype(float) - frames).mean(axis=(1, 2, 3))
    return np.asarray(10 * np.log10(255**2 / error))


def decode(source: Any) -> np.ndarray:
    with av.open(source, format="mp4") as container:
        return np.stack([picture.to_ndarray(format="rgb24") for picture in container.decode(video=0)])


def kept_file(path: Path, frames: np.ndarray, cuts: int = 3, **settings: Any) -> Path:
    """Write a video, and keep what could be watched of it under another name."""
    kept = path.with_name("kept.mp4")
    usual: dict[str, Any] = {"fps": 16, "crf": 20, "preset": "veryfast", "threads": 3}
    with VideoWriter(path, height=HEIGHT, width=WIDTH, **usual | settings) as video:
        os.link(partial_name(path), kept)
        for part in np.array_split(frames, cuts):
            video.append(part)
    return kept


@contextmanager
def reading(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A second process that gives the pictures of a growing file as bytes."""
    with subprocess.Popen([sys.executable, "-c", READER, str(path)], stdout=subprocess.PIPE, bufsize=0) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"open\n"
            yield process
        finally:
            process.kill()


def taken(process: subprocess.Popen[bytes], count: int) -> np.ndarray:
    """The next pictures, for which nobody needs to wait long."""
    assert process.stdout is not None
    data = b""
    while len(data) < count * HEIGHT * WIDTH * 3:
        assert select.select([process.stdout], [], [], 30)[0], f"{len(data)} bytes of {count} pictures"
        more = process.stdout.read(count * HEIGHT * WIDTH * 3 - len(data))
        assert more, "the file has ended"
        data += more
    return np.frombuffer(data, np.uint8).reshape(count, HEIGHT, WIDTH, 3)


def test_a_second_process_sees_each_picture_as_soon_as_it_is_appended(tmp_path: Path) -> None:
    """The first ones before anything follows them; the others, which the encoder holds back, in order at the end."""
    path, frames = tmp_path / "a.mp4", moving(DRAFTED + 41)
    with ExitStack() as stack:
        with VideoWriter(path, 16, HEIGHT, WIDTH, crf=20, preset="veryfast") as video:
            reader, shown = stack.enter_context(reading(partial_name(path))), 0
            for count in (1, 4, 1, 30, DRAFTED - 36):
                video.append(frames[shown : shown + count])
                assert psnr(taken(reader, count), frames[shown : shown + count]).min() > 35
                shown += count
            assert shown == DRAFTED
            video.append(frames[shown:])
        assert psnr(taken(reader, 41), frames[shown:]).min() > 35
        assert reader.stdout is not None and reader.stdout.read() == b""  # it has seen that the file is finished
        assert reader.wait(timeout=30) == 0
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_what_was_read_is_a_prefix_and_can_be_decoded(tmp_path: Path) -> None:
    path, kept, frames, read = tmp_path / "a.mp4", tmp_path / "kept.mp4", moving(100), []
    with VideoWriter(path, 16, HEIGHT, WIDTH, crf=20, preset="ultrafast", threads=2) as video:
        os.link(partial_name(path), kept)
        for part in np.array_split(frames, 20):
            video.append(part)
            read.append(partial_name(path).read_bytes())
    whole = kept.read_bytes()
    assert all(whole.startswith(content) for content in read) and len(set(read)) > 1
    assert psnr(decode(io.BytesIO(whole)), frames).min() > 30
    # To whoever comes late, or stops in between, it is a shorter video.
    for content in (content for content in read if b"mdat" in content):
        pictures = decode(io.BytesIO(content))
        assert psnr(pictures, frames[: len(pictures)]).min() > 30


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"crf": 0},
        {"preset": "ultrafast", "threads": 1},
        {"preset": "slower", "fps": Fraction(24000, 1001)},
        {"preset": "medium", "fps": 1000},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "usual",
)
@pytest.mark.parametrize("count", [1, DRAFTED, DRAFTED + 1, DRAFTED + 30])
def test_pictures_are_shown_at_their_time_in_both_files(tmp_path: Path, settings: dict[str, Any], count: int) -> None:
    path, frames = tmp_path / "a.mp4", moving(count)
    kept = kept_file(path, frames, **settings)
    for file in (path, kept):
        with av.open(file) as container:
            stream = container.streams.video[0]
            packets = [packet for packet in container.demux(stream) if packet.size]
            rate, base = Fraction(settings.get("fps", 16)), stream.time_base
            assert base is not None
        assert [packet.dts for packet in packets] == sorted({packet.dts for packet in packets})
        assert all(packet.pts >= packet.dts for packet in packets)
        places = [packet.pts * base * rate for packet in packets]
        assert sorted(places) == list(range(count))
        keys = {place for place, packet in zip(places, packets, strict=True) if packet.is_keyframe}
        assert {0, DRAFTED} & set(range(count)) <= keys
    # One stream, from where the draft ends.
    finished, watched = decode(str(path)), decode(str(kept))
    assert len(finished) == len(watched) == count
    assert np.array_equal(finished[DRAFTED:], watched[DRAFTED:])
    assert min(psnr(watched, frames).min(), psnr(finished, frames).min()) > 35


def test_handles_and_threads_go_with_a_writer(tmp_path: Path) -> None:
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    before = held()
    for number in range(3):
        with (
            suppress(KeyError),
            VideoWriter(tmp_path / "a.mp4", 16, HEIGHT, WIDTH, crf=20, preset="ultrafast") as video,
        ):
            video.append(moving(DRAFTED + 2))
            if number == 1:
                raise KeyError
            assert held()[0] > before[0]
        assert held() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("owner", "name"),
    # The encoder is waited for between the first two.
    [(queue.Queue, "put"), (VideoWriter, "_raise_error"), (os, "fsync"), (os, "replace"), (Path, "unlink")],
)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_stop_while_a_file_is_finished_leaves_a_whole_one_or_the_older(
    owner: Any, name: str, after: bool, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, frames, call = tmp_path / "a.mp4", moving(DRAFTED + 5), getattr(owner, name)
    asked: list[int] = []
    path.write_bytes(b"older")

    def interrupted(*arguments: Any, **rest: Any) -> Any:
        result = call(*arguments, **rest) if after else None
        if not asked:
            asked.append(number)
            signal.raise_signal(number)
        return result if after else call(*arguments, **rest)

    threads = threading.active_count()
    with pytest.raises(stop.Stopped), stop.caught():  # noqa: PT012
        with VideoWriter(path, 16, HEIGHT, WIDTH, crf=20, preset="ultrafast", threads=2) as video:
            video.append(frames)
            monkeypatch.setattr(owner, name, interrupted)
        stop.check()
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["a.mp4"]
    assert path.read_bytes() == b"older" or len(decode(str(path))) == len(frames)
    assert threading.active_count() == threads


KILLED = """
import signal, sys, time
from pathlib import Path
import numpy as np
from longsana.runtime import stop
from longsana.runtime.files import remove_unfinished
from longsana.runtime.video import VideoWriter
frames = np.random.default_rng(0).integers(0, 256, (20, 64, 96, 3), dtype=np.uint8)
try:
    with stop.caught(remove_unfinished), VideoWriter(Path(sys.argv[1]), 16, 64, 96, crf=18, preset="medium") as video:
        print("open", flush=True)
        for _ in range(100_000):
            video.append(frames)
except stop.Stopped as stopped:
    sys.exit(stopped.status)
"""


def test_a_stop_while_frames_come_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "a.mp4")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"open\n"
        assert len(os.listdir(tmp_path)) == 2
        time.sleep(0.1)
        process.terminate()
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert os.listdir(tmp_path) == []
