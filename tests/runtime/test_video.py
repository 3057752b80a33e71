"""Videos and texts appear whole or not at all, and no error of the encoder is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from longsana.runtime import files, stop
from longsana.runtime import video as writing
from longsana.runtime.errors import InputError
from longsana.runtime.files import atomic_write_text, partial_name
from longsana.runtime.video import THREADS, WAITING, VideoWriter

HEIGHT, WIDTH = 64, 96


def open_writer(path: Path, crf: int = 18, preset: str = "ultrafast") -> VideoWriter:
    return VideoWriter(path, fps=16, height=HEIGHT, width=WIDTH, crf=crf, preset=preset)


def smooth(count: int) -> np.ndarray:
    """Colour ramps that move; (count, H, W, 3) uint8."""
    t, y, x = np.mgrid[0:count, 0:HEIGHT, 0:WIDTH]
    return np.stack([x * 255 // (WIDTH - 1), y * 255 // (HEIGHT - 1), (t * 8) % 256], axis=-1).astype(np.uint8)


def noise(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, HEIGHT, WIDTH, 3), dtype=np.uint8)


def read(path: Path) -> np.ndarray:
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    pictures = smooth(23)
    with open_writer(tmp_path / "a.mp4") as video:
        video.append(pictures[:11])
        video.append(torch.from_numpy(pictures[11:12]))
        video.append(torch.from_numpy(pictures[12:]).flip(2).flip(2).transpose(1, 2).contiguous().transpose(1, 2))
        assert not (tmp_path / "a.mp4").exists()
    assert os.listdir(tmp_path) == ["a.mp4"]
    assert video.frames == 23
    assert video.size == (tmp_path / "a.mp4").stat().st_size > 0
    error = read(tmp_path / "a.mp4").astype(float) - pictures
    # Each channel by itself: a wrong colour matrix or range shifts some of them by 5 and more.
    assert np.abs(error.mean(axis=(0, 1, 2))).max() < 2
    assert np.sqrt((error**2).mean()) < 5


def test_the_stream_says_what_it_is(tmp_path: Path) -> None:
    with open_writer(tmp_path / "a.mp4") as video:
        video.append(smooth(5))
    with av.open(tmp_path / "a.mp4") as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height, stream.frames) == (WIDTH, HEIGHT, 5)
        assert stream.average_rate == 16
        assert stream.duration * stream.time_base == Fraction(5, 16)
        assert stream.codec_context.colorspace in (5, 6)  # BT.601, as swscale converts


def test_crf_and_preset_reach_the_encoder(tmp_path: Path) -> None:
    sizes = {}
    for crf, preset in ((10, "veryfast"), (40, "veryfast"), (10, "ultrafast")):
        with open_writer(tmp_path / "a.mp4", crf, preset) as video:
            video.append(noise(8))
        sizes[crf, preset] = video.size
    assert sizes[40, "veryfast"] < sizes[10, "veryfast"] / 2
    assert sizes[10, "ultrafast"] != sizes[10, "veryfast"]


@pytest.mark.parametrize(
    ("crf", "preset", "message"),
    [(18, "veryfest", "did you mean 'veryfast'"), (52, "fast", "crf=52"), (-1, "fast", "crf=-1")],
)
def test_settings_x264_does_not_know(tmp_path: Path, crf: int, preset: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_writer(tmp_path / "a.mp4", crf, preset)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("threads", [1, 5, THREADS])
def test_equal_frames_make_equal_files(threads: int, tmp_path: Path) -> None:
    """However they are cut, and whatever else the machine does meanwhile."""
    frames = np.concatenate([smooth(50), noise(14)])
    path, contents = tmp_path / "a.mp4", set()
    for cuts in (1, 4, 64, 1, 7, 3):
        with VideoWriter(path, 16, HEIGHT, WIDTH, crf=20, preset="veryfast", threads=threads) as video:
            for part in np.array_split(frames, cuts):
                video.append(part)
        contents.add(path.read_bytes())
    assert len(contents) == 1


def test_the_index_comes_first(tmp_path: Path) -> None:
    with open_writer(tmp_path / "a.mp4") as video:
        video.append(noise(9))
    content, kinds, position = (tmp_path / "a.mp4").read_bytes(), [], 0
    while position < len(content):
        kinds.append(content[position + 4 : position + 8])
        position += int.from_bytes(content[position : position + 4], "big")
    assert position == len(content)
    assert kinds.index(b"moov") < kinds.index(b"mdat")


def test_an_error_in_the_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="of the caller"), open_writer(tmp_path / "a.mp4") as video:  # noqa: PT012
        video.append(smooth(9))
        raise KeyError("of the caller")
    assert os.listdir(tmp_path) == []
    assert not video._thread.is_alive()


def test_an_error_keeps_the_video_that_was_there(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"older")
    with pytest.raises(KeyError), open_writer(tmp_path / "a.mp4") as video:  # noqa: PT012
        video.append(smooth(9))
        raise KeyError
    assert (tmp_path / "a.mp4").read_bytes() == b"older"
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_a_video_without_frames_is_no_video(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one frame"), open_writer(tmp_path / "a.mp4"):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "fps": (0, -1, float("nan"), float("inf"), 3e9, 1001, True, "16", None),
        "height": (0, -2, 63, 16_386, 64.5, "64", True, None),
        "width": (0, -2, 95, 16_386, 10**30, float("nan")),
        "crf": (-1, 52, 18.5, "18", True, float("nan")),
        "preset": ("", "veryfest", 3, None),
        "threads": (0, -1, 129, 1.5, "2", True),
    }.items(),
)
def test_arguments_out_of_bounds_are_refused_by_name(tmp_path: Path, name: str, values: tuple[Any, ...]) -> None:
    usual: dict[str, Any] = {"fps": 16, "height": HEIGHT, "width": WIDTH, "crf": 18, "preset": "ultrafast"}
    for value in values:
        with pytest.raises(InputError, match=rf"{name}=.*: must be"):
            VideoWriter(tmp_path / "a.mp4", **usual | {name: value})
    assert os.listdir(tmp_path) == []


def test_a_picture_that_ffmpeg_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^height=16384, width=16384: too large; their product must be at most"):
        VideoWriter(tmp_path / "a.mp4", 16, 16_384, 16_384, crf=18, preset="ultrafast")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("fps", [16.0, np.float32(16), np.int64(16), torch.tensor(16), Fraction(16)])
def test_numbers_in_any_form(tmp_path: Path, fps: Any) -> None:
    size: dict[str, Any] = {"height": float(HEIGHT), "width": np.int64(WIDTH), "crf": 18.0, "threads": torch.tensor(2)}
    with VideoWriter(tmp_path / "a.mp4", fps, preset="ultrafast", **size) as video:
        video.append(smooth(3))
    with av.open(tmp_path / "a.mp4") as container:
        assert container.streams.video[0].average_rate == 16


@pytest.mark.parametrize("wrong", [smooth(2)[:, :-2], smooth(2).astype(np.float32), smooth(2)[0], [1, 2], "frames"])
def test_frames_of_another_kind_are_refused(tmp_path: Path, wrong: Any) -> None:
    with (
        pytest.raises(ValueError, match=r"^frames: .*; must be uint8 of shape \(F, 64, 96, 3\)$"),
        open_writer(tmp_path / "a.mp4") as video,
    ):
        video.append(wrong)


def test_a_missing_folder_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_writer(tmp_path / "none" / "a.mp4")


def test_appending_waits_for_the_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    convert = av.VideoFrame.from_numpy_buffer

    def held(*args: object, **rest: object) -> av.VideoFrame:
        go.wait()
        return convert(*args, **rest)

    monkeypatch.setattr(
        "longsana.runtime.video.av.VideoFrame", type("Held", (), {"from_numpy_buffer": staticmethod(held)})
    )
    with open_writer(tmp_path / "a.mp4") as video:
        producer = threading.Thread(target=lambda: [video.append(smooth(1)) for _ in range(8)])
        producer.start()
        producer.join(timeout=0.5)
        assert producer.is_alive()
        assert video.frames <= WAITING + 1
        go.set()
        producer.join(timeout=20)
    assert video.frames == 8
    assert len(read(tmp_path / "a.mp4")) == 8


@pytest.mark.parametrize("at", [0, 3, 39])
def test_an_encoder_error_reaches_a_producer_that_is_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    seen = appended = 0
    convert = av.VideoFrame.from_numpy_buffer
    caught: list[BaseException] = []

    def failing(*args: object, **rest: object) -> av.VideoFrame:
        nonlocal seen
        seen += 1
        time.sleep(0.01)  # so that the queue is full when it happens
        if seen > at:
            raise MemoryError("no frame")
        return convert(*args, **rest)

    def produce() -> None:
        nonlocal appended
        try:
            with open_writer(tmp_path / "a.mp4") as video:
                for _ in range(40):
                    video.append(smooth(1))
                    appended += 1
        except MemoryError as error:
            caught.append(error)

    fake = type("Failing", (), {"from_numpy_buffer": staticmethod(failing)})
    monkeypatch.setattr("longsana.runtime.video.av.VideoFrame", fake)
    producer = threading.Thread(target=produce, daemon=True)
    producer.start()
    producer.join(timeout=30)
    assert not producer.is_alive(), "waits for a dead encoder"
    assert [str(error) for error in caught] == ["no frame"]
    # Promptly: the ones that were waiting, and one under way.
    assert appended <= min(at + WAITING + 2, 40)
    assert os.listdir(tmp_path) == []


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_full_disk_is_an_error_wherever_it_happens(
    tmp_path: Path, limited: Callable[[int], AbstractContextManager[None]]
) -> None:
    path, kept = tmp_path / "a.mp4", tmp_path / "kept.mp4"

    def write(keep: bool = False) -> int:
        rng = np.random.default_rng(0)
        with VideoWriter(path, fps=16, height=96, width=160, crf=18, preset="ultrafast") as video:
            if keep:
                os.link(partial_name(path), kept)
            for _ in range(12):
                video.append(rng.integers(0, 256, (5, 96, 160, 3), dtype=np.uint8))
        return video.size

    size = write(keep=True)
    watched = kept.stat().st_size  # a little more, since each picture says where it stands
    assert size < watched < 1.1 * size
    path.unlink()
    kept.unlink()
    # At once, midway, and in the very last byte of either file.
    for limit in (100, size // 2, size - 1, watched - 1):
        with limited(limit), pytest.raises(OSError, match="File too large"):
            write()
        assert os.listdir(tmp_path) == [], limit
    with limited(watched):
        assert write() == size
    assert len(read(path)) == 60


LONG = """
import os, resource, sys
from pathlib import Path
import numpy as np
from longsana.runtime.video import VideoWriter
peaks, sizes = [], []
for frames in (16, 160):
    frame = np.random.default_rng(0).integers(0, 256, (1, 480, 832, 3), dtype=np.uint8)
    with VideoWriter(Path(sys.argv[1]), fps=16, height=480, width=832, crf=4, preset="ultrafast", threads=2) as video:
        for _ in range(frames):
            video.append(frame := np.roll(frame, 1, axis=-1))
    sizes.append(video.size)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)
print(*sizes, *peaks)
"""


def test_a_long_file_is_finished_in_constant_memory(tmp_path: Path) -> None:
    """Its index comes first, before all that was written."""
    done = run(LONG, tmp_path / "a.mp4")
    small, large, before, after = map(int, done.stdout.split())
    assert large > 9 * small > 60e6
    assert after - before < (large - small) / 10


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from longsana.runtime.video import VideoWriter
with VideoWriter(Path(sys.argv[1]), fps=16, height=64, width=96, crf=18, preset="ultrafast") as video:
    for _ in range(10):
        video.append(np.zeros((8, 64, 96, 3), np.uint8))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_rerun_after_a_kill_cleans_up(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    assert run(KILLED, path).returncode == -signal.SIGKILL
    left = os.listdir(tmp_path)
    assert sorted(left) == [".a.partial.mp4", ".a.whole.mp4"]
    with open_writer(path) as video:
        video.append(smooth(3))
    assert os.listdir(tmp_path) == ["a.mp4"]
    assert len(read(path)) == 3


# --- text files -------------------------------------------------------------------------------------------------------


def test_text_is_written_as_it_is(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "a.json", "{}")
    atomic_write_text(str(tmp_path / "a.json"), "über\r\nzwei\n")
    assert (tmp_path / "a.json").read_bytes() == "über\r\nzwei\n".encode()
    assert os.listdir(tmp_path) == ["a.json"]


def test_text_that_cannot_be_written_leaves_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic_write_text(tmp_path / "a.json", "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic_write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_two_writers_never_share_a_file(tmp_path: Path) -> None:
    with open_writer(tmp_path / "a.mp4") as first:
        first.append(smooth(8))
        with pytest.raises(BlockingIOError, match="another command"):
            open_writer(tmp_path / "a.mp4")
        first.append(smooth(8))
    assert len(read(tmp_path / "a.mp4")) == 16
    with open_writer(tmp_path / "a.mp4") as second:
        second.append(smooth(4))
    assert len(read(tmp_path / "a.mp4")) == 4


@pytest.mark.parametrize("runs", [True, False], ids=["a command", "others"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_while_the_header_is_written_is_obeyed_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: int, runs: bool
) -> None:
    """FFmpeg's callback cannot be unwound: what is raised in it would be a traceback on stderr, and lost."""
    write, asked = os.write, []

    def interrupted(handle: int, data: Any) -> int:
        if not asked:
            asked.append(number)
            signal.raise_signal(number)
        return write(handle, data)

    class Told(BaseException):
        pass

    def tell(signal_number: int, frame: Any) -> None:
        raise Told

    def make() -> None:
        monkeypatch.setattr(os, "write", interrupted)
        VideoWriter(tmp_path / "a.mp4", fps=16, height=32, width=48, crf=18, preset="veryfast")

    before = signal.signal(number, tell)
    try:
        with pytest.raises(stop.Stopped if runs else Told), stop.caught() if runs else nullcontext():
            make()
    finally:
        monkeypatch.undo()
        signal.signal(number, before)
    assert asked == [number] and capfd.readouterr().err == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("owner", "name"), [(writing, "open_exclusive"), (threading.Thread, "start")])
def test_a_stop_while_a_file_is_begun_leaves_none(
    owner: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right after its name is there, and right after its thread is: nobody else knows of either yet."""
    begin, threads = getattr(owner, name), threading.active_count()

    def interrupted(*arguments: Any) -> Any:
        begun = begin(*arguments)
        signal.raise_signal(signal.SIGTERM)
        return begun

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(stop.Stopped), stop.caught():
        open_writer(tmp_path / "a.mp4")
    assert os.listdir(tmp_path) == []
    deadline = time.monotonic() + 20
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.001)
    assert threading.active_count() == threads


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_while_the_encoder_ends_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """What it writes to is closed after it; closed before, the process would die of it."""
    code, release, ends = VideoWriter._code, VideoWriter._release, threading.Event()
    order: list[str] = []

    def coding(video: VideoWriter, array: np.ndarray) -> None:
        code(video, array)
        ends.wait()  # for the writer's block, which has ended
        signal.pthread_kill(threading.main_thread().ident or 0, number)
        time.sleep(0.3)
        order.append("coded")

    def releasing(video: VideoWriter) -> None:
        release(video)
        order.append("released")

    monkeypatch.setattr(VideoWriter, "_code", coding)
    monkeypatch.setattr(VideoWriter, "_release", releasing)
    with pytest.raises(stop.Stopped), stop.caught(), open_writer(tmp_path / "a.mp4") as video:  # noqa: PT012
        video.append(smooth(9))
        ends.set()
    assert order == ["coded", "released"] and os.listdir(tmp_path) == []


def test_a_second_signal_while_the_first_unwinds_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes before requests are held for the writer's end."""
    held, threads = stop.held, threading.active_count()

    def interrupted() -> AbstractContextManager[None]:
        monkeypatch.setattr(stop, "held", held)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), open_writer(tmp_path / "a.mp4") as video:  # noqa: PT012
        video.append(smooth(9))
        monkeypatch.setattr(stop, "held", interrupted)
    assert threading.active_count() == threads
    assert os.listdir(tmp_path) in ([], ["a.mp4"])
