"""An mp4 that is encoded in the background while the next frames are made, and can be watched meanwhile."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import av
import numpy as np
from av.video.codeccontext import VideoCodecContext
from av.video.frame import PictureType
from torch import Tensor

from longsana.runtime import stop
from longsana.runtime.arguments import Number, OneOf, Rule, Whole, checked
from longsana.runtime.errors import InputError, did_you_mean
from longsana.runtime.files import move_into_place, naming, open_exclusive, partial_name, unfinished, write_all
from longsana.runtime.fragments import FragmentedMP4
from longsana.runtime.h264 import describe, frame_of, picture_of, zerolatency_encoder

PRESETS = (
    "ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo",
)  # fmt: skip
MAX_CRF = 51
MOST_PIXELS = 1 << 27
"""A picture's, for FFmpeg, which lets eight times its width and some more times its height fit into 31 bits."""
WIDEST = 16_384
THREADS = 16
"""An encoder's threads where nothing else is said; 24 are no faster on 16 cores."""
MUXER = {"movflags": "+faststart"}
X264 = "mbtree=0"
DRAFTED = 49
"""Frames at the beginning that a second encoder codes for who watches, without look-ahead. The finished file's encoder,
whose threads and look-ahead hold about 32 frames back, codes them for that file, and begins anew after them."""
DRAFT_X264 = "sps-id=1"  # beside the other encoder's parameter sets
WAITING = 2  # appended arrays held while the encoder is busy; then `append` waits


WRITER: dict[str, Rule] = {
    "fps": Number(above=0, most=1000),
    **dict.fromkeys(("height", "width"), Whole(2, WIDEST)),
    "crf": Whole(0, MAX_CRF),
    "preset": OneOf(PRESETS),
    "threads": Whole(1, 128),
}
"""Rules of a writer's arguments."""


def check_preset(preset: str) -> None:
    """Refuse (InputError) a preset that x264 does not have."""
    if preset not in PRESETS:
        raise InputError(
            f"video.preset={preset}: x264 has no such preset{did_you_mean(preset, PRESETS)}; "
            f"known: {', '.join(PRESETS)}"
        )


class VideoWriter:
    """Writes H.264 (yuv420p) to `path`, which appears when the `with` block has ended well, synced to disk.

    Until then two hidden files beside it grow, the one that will be moved there and one that can be watched
    (`partial_name`): an mp4 in fragments, to which each picture is added as soon as it is coded. The first `DRAFTED`
    are coded for it alone, without delay; the others are those of the finished file. An exception, in the block or in
    the encoder, removes both files and leaves whatever was at `path` before. After the block `frames` and `size`
    (bytes) describe the file, so a sidecar written next is there only if its video is.

        with VideoWriter(path, fps=16, height=480, width=832, crf=18, preset="veryfast") as video:
            for frames in chunks:
                video.append(frames)
        atomic_write_text(sidecar, ...)

    The file has its index first, so that a browser shows it while it loads. With equal frames, settings, threads and
    x264 it is equal to the byte: x264's macroblock tree, whose result depends on the threads' timing, is off.

    fps: frames a second, at most 1000; of a fraction with a denominator up to 1001 (23.976, 24000 / 1001), that
    fraction. height, width: even pixel counts, at most `WIDEST` each and `MOST_PIXELS` together. crf: 0 (lossless) to
    51. preset: one of `PRESETS`. threads: the encoder's, at most 128.

    Raises:
        InputError: an argument has another value; the message names it.
        OSError: the file cannot be opened.
    """

    @checked(WRITER)
    def __init__(
        self, path: str | Path, fps: float, height: int, width: int, crf: int, preset: str, threads: int = THREADS
    ) -> None:
        if height % 2 or width % 2:
            raise InputError(f"height={height}, width={width}: must be even")
        if height * width > MOST_PIXELS:
            raise InputError(
                f"height={height}, width={width}: too large; their product must be at most {MOST_PIXELS:,}"
            )
        self.path = Path(path)
        self.frames = 0  # appended so far
        self.size = 0  # bytes of the finished file
        self._shape = (height, width, 3)
        self._whole = whole_name(self.path)
        self._coded = 0  # frames that both encoders have
        self._hidden = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            undo.callback(self._hidden.close)
            with stop.held():  # in the middle of it, a stop would leave a file that nobody knows of
                watched = self._hidden.enter_context(_hidden_file(partial_name(self.path)))
                # A Python file: av's own do not report a write error of the last buffer when they close.
                self._file = self._hidden.enter_context(_hidden_file(self._whole))
            self._container = av.open(_Output(self._file, self._whole), "w", format="mp4", options=MUXER)
            options = {"crf": str(crf), "preset": preset, "x264-params": X264}
            rate = Fraction(fps).limit_denominator(1001)
            self._stream = self._container.add_stream("libx264", rate=rate, options=options)
            # A frame a thread: av's default, a slice of each, is a third slower on two cores.
            # Each thread holds a frame back, so that many would keep a first chunk from the disk.
            self._stream.thread_type, self._stream.codec_context.thread_count = "FRAME", threads
            describe(self._stream.codec_context, width, height)
            with stop.held():  # FFmpeg calls `_Output`, out of which nothing can be raised but by a line on stderr
                self._container.start_encoding()
            self._draft: VideoCodecContext | None = zerolatency_encoder(
                width, height, rate, crf, threads, x264=DRAFT_X264
            )
            headers = [bytes(encoder.extradata or b"") for encoder in (self._stream.codec_context, self._draft)]
            self._watched = FragmentedMP4(partial(write_all, watched.fileno()), width, height, rate, headers)
            self._queue: queue.Queue[np.ndarray | None] = queue.Queue(WAITING)
            self._error: BaseException | None = None
            self._stopped = False
            self._at_work = threading.Lock()  # held until the thread has nothing left to do
            self._at_work.acquire()
            self._thread = threading.Thread(target=self._encode, name="video encoder", daemon=True)
            undo.callback(self._queue.put, None)  # a thread that has begun ends
            self._thread.start()
            undo.pop_all()

    def append(self, frames: Tensor | np.ndarray) -> None:
        """Queue (F, H, W, 3) uint8 frames, which must stay as they are. Waits while the encoder is behind.

        Raises:
            ValueError: they are none.
            OSError and others: what went wrong in the encoder since the last call.
        """
        # Not copied: at 480p a copy of a chunk takes 16 ms, for which a GPU waits.
        array = np.ascontiguousarray(frames.numpy(force=True) if isinstance(frames, Tensor) else frames)
        if (array.dtype, array.shape[1:]) != (np.uint8, self._shape):
            needed = ", ".join(map(str, self._shape))
            raise ValueError(f"frames: {array.dtype} of shape {array.shape}; must be uint8 of shape (F, {needed})")
        self._queue.put(array)
        self._raise_error()
        self.frames += len(array)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._stopped = error is not None
            self._queue.put(None)
            # Not its join: before Python 3.13 one that a signal interrupts takes the thread for one that has ended,
            # and the container would be closed while the thread writes to it. Nor an event, which is written in Python
            # and may be interrupted with its own lock held; a lock is taken or it is not.
            self._at_work.acquire()
            if error is None:
                self._raise_error()
                if not self.frames:
                    raise ValueError(f"{self.path}: a video needs at least one frame")
                os.fsync(self._file.fileno())
                self.size = os.fstat(self._file.fileno()).st_size
                move_into_place(self._whole, self.path)
        finally:
            try:
                with stop.held():
                    self._release()
            except BaseException:  # of a second signal, before they were held
                with stop.held():
                    self._release()
                raise

    def _encode(self) -> None:
        """The thread. After an error it goes on emptying the queue, so that `append` never waits for a dead encoder."""
        while (array := self._queue.get()) is not None:
            try:
                self._code(array)
            except BaseException as error:
                self._error = error
        try:
            if self._coded and not self._ended:
                self._add(self._stream.encode(None))
                self._container.close()
        except BaseException as error:
            self._error = error
        self._at_work.release()

    @property
    def _ended(self) -> bool:
        return self._stopped or self._error is not None

    def _code(self, array: np.ndarray) -> None:
        """Code frames (F, H, W, 3): for who watches first."""
        if self._draft is not None:
            for place, pixels in enumerate(array[: DRAFTED - self._coded], self._coded):
                if self._ended:
                    return
                for packet in self._draft.encode(frame_of(pixels, place)):
                    self._watched.add(picture_of(packet))
        for pixels in array:
            if self._ended:
                return
            frame = frame_of(pixels, self._coded)
            if self._coded == DRAFTED:
                frame.pict_type, self._draft = PictureType.I, None  # an IDR, from which its pictures are watched
            self._add(self._stream.encode(frame))
            self._coded += 1

    def _add(self, packets: Sequence[av.Packet]) -> None:
        for packet in packets:
            picture = picture_of(packet)  # before the muxer changes its time
            self._container.mux(packet)
            if picture.place >= DRAFTED:
                self._watched.add(picture)

    def _raise_error(self) -> None:
        if self._error is not None:
            with naming(self.path):
                raise self._error

    def _release(self) -> None:
        """Remove and close what is left, once the thread has ended, whatever interrupted the wait for it.

        Inside `stop.held`: none of the signals that ask for a stop interrupts the join.
        """
        self._stopped = True
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        # Before it is closed, so that its index is not moved for nothing.
        self._whole.unlink(missing_ok=True)
        # A video that is given up cannot be closed properly, and the reason is being raised already.
        with contextlib.suppress(Exception):
            self._container.close()
        self._draft = None  # and its threads
        self._hidden.close()


def whole_name(path: Path) -> Path:
    """Name the place of what will be moved to `path`, beside the file that can be watched: hidden as well."""
    return path.with_name(f".{path.stem}.whole{path.suffix}")


@contextlib.contextmanager
def _hidden_file(path: Path) -> Iterator[BinaryIO]:
    """Have a file for this writer alone, which goes with the block."""
    file = open_exclusive(path)
    try:
        with unfinished(path):
            yield file
    finally:
        try:
            path.unlink(missing_ok=True)  # while it is locked: nobody else's
        finally:
            with contextlib.suppress(OSError):
                file.close()


class _Output:
    """A file as FFmpeg writes it: by its path it reads it again, to move the index to the front.

    Nothing is kept back from that reader; and what a full disk refused is not tried again by a seek, whose error PyAV
    would drop.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.name, self._handle = str(path), file.fileno()

    def write(self, data: bytes) -> int:
        """Write all of it, or raise."""
        left = memoryview(data)
        while left:
            left = left[os.write(self._handle, left) :]
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return os.lseek(self._handle, offset, whence)

    def tell(self) -> int:
        return os.lseek(self._handle, 0, os.SEEK_CUR)
