"""Coders of chunks: threads, or processes beside which a GPU's kernels are launched without waiting.

A thread that codes takes Python's lock several times a picture, and whoever launches kernels waits for it each time:
beside four such threads the chunks of eight viewers at 720p took 0.83 s to make, and 0.52 beside one (H200, 16 cores).
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue

import numpy as np

from longsana.runtime.fragments import Picture
from longsana.serving.media import ChunkEncoder

Code = Callable[[ChunkEncoder, np.ndarray], list[Picture]]
"""Codes a chunk's pictures, as `ChunkEncoder.code` does."""


class Coders:
    """Codes several chunks at once, until it is closed.

    count: chunks at once. apart: in processes of their own, to the same bytes.
    """

    def __init__(self, count: int, *, apart: bool) -> None:
        self._idle: SimpleQueue[CodingProcess] | None = None
        with ExitStack() as undo:
            if apart:
                self._idle = SimpleQueue()
                for _ in range(count):
                    self._idle.put(process := CodingProcess())
                    undo.callback(process.close)
            self._threads = ThreadPoolExecutor(count, "encoder of chunks")
            undo.callback(self._threads.shutdown)
            self._undo = undo.pop_all()

    def submit(self, task: Callable[[Code], object]) -> None:
        """Have a thread call a task with what codes."""
        self._threads.submit(task, self._code)

    def close(self) -> None:
        """End threads and processes once they have done what they were asked."""
        self._undo.close()

    def _code(self, encoder: ChunkEncoder, pixels: np.ndarray) -> list[Picture]:
        if self._idle is None:
            return encoder.code(pixels)
        process = self._idle.get()  # there is one for each thread
        try:
            return process.code(encoder, pixels)
        finally:
            self._idle.put(process)


class CodingProcess:
    """A process that codes chunks, one at a time, and a file in memory through which pictures come and go.

    It ends with whoever started it. One that was ended meanwhile is started again.
    """

    def __init__(self) -> None:
        self._file = _file_in_memory()
        self._map = _Map(self._file)
        self._start()

    def code(self, encoder: ChunkEncoder, pixels: np.ndarray) -> list[Picture]:
        """Code the pictures (F, H, W, 3), uint8, of a chunk; see `ChunkEncoder.code`.

        Raises:
            RuntimeError: they cannot be coded, or the process was ended twice.
        """
        self._map.pixels(pixels.shape)[:] = pixels
        for _ in range(2):
            try:
                self._connection.send((encoder, pixels.shape))
                coded = self._connection.recv()
            except (EOFError, OSError):
                self._end()
                self._start()
            else:
                break
        else:
            raise RuntimeError("the process that codes chunks was ended twice; is there enough memory?")
        if isinstance(coded, str):
            raise RuntimeError(f"chunks cannot be coded: {coded}")
        data = iter(self._map.pieces(pixels.nbytes, [size for size, *_ in coded]))
        return [Picture(next(data), place, is_key) for _, place, is_key in coded]

    def close(self) -> None:
        """End the process, and give its memory back."""
        self._end()
        self._map.close()
        os.close(self._file)

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        descriptors = self._file, theirs.fileno()
        call = f"from longsana.serving.coders import serve; serve{descriptors}"
        self._process = subprocess.Popen(
            [sys.executable, "-c", call],
            pass_fds=descriptors,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # who stops a server from a terminal stops it alone; it ends this one
        )
        theirs.close()

    def _end(self) -> None:
        self._connection.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve(file: int, connection: int) -> None:
    """Code what comes, as the process, until nobody is there any more. file, connection: descriptors."""
    asked, shared = Connection(connection), _Map(file)
    while True:
        try:
            encoder, shape = asked.recv()
        except EOFError:
            return
        try:
            pixels = shared.pixels(shape)
            coded = encoder.code(pixels)
            shared.write(pixels.nbytes, [picture.data for picture in coded])
        except Exception as error:
            asked.send(f"{type(error).__name__}: {error}")
        else:
            asked.send([(len(picture.data), picture.place, picture.is_key) for picture in coded])


class _Map:
    """A file, seen as memory; it grows as is needed."""

    def __init__(self, file: int) -> None:
        self._file, self._seen = file, mmap.mmap(-1, mmap.PAGESIZE)

    def close(self) -> None:
        self._seen.close()

    def pixels(self, shape: tuple[int, ...]) -> np.ndarray:
        """The pictures at its start, uint8."""
        size = int(np.prod(shape))
        return np.frombuffer(self._room(size), np.uint8, size).reshape(shape)

    def write(self, place: int, pieces: list[bytes]) -> None:
        """Write pieces, one after the other, from a place on."""
        room = self._room(place + sum(map(len, pieces)))
        for piece in pieces:
            room[place : place + len(piece)] = piece
            place += len(piece)

    def pieces(self, place: int, sizes: list[int]) -> list[bytes]:
        """Read what `write` has written there, in another process too."""
        room, pieces = self._room(place + sum(sizes)), []
        for size in sizes:
            pieces.append(room[place : place + size])
            place += size
        return pieces

    def _room(self, size: int) -> mmap.mmap:
        if len(self._seen) < size:
            if os.fstat(self._file).st_size < size:
                os.ftruncate(self._file, size)
            # What was seen goes when the last array of it does.
            self._seen = mmap.mmap(self._file, os.fstat(self._file).st_size)
        return self._seen


def _file_in_memory() -> int:
    """A descriptor of a file that has no name."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("chunk")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
