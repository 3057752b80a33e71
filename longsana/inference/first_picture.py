"""A second process that watches a video while it is made, and tells when its first pictures can be seen.

It reads the hidden file beside the video as a player would, demuxes it and decodes it. Nothing heavy is imported here,
so that the process is ready soon and small.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import av

DEMUXER = {"probesize": "32"}
"""FFmpeg looks at some forty pictures, and waits for them, before it gives the first, unless it is told not to."""
POLL = 0.002
"""Seconds between two looks at a file that has not grown."""


class GrowingFile:
    """Reads a file that is being written; at its end it waits until there is more, or until the file's name is gone."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.open("rb", buffering=0)

    def read(self, size: int) -> bytes:
        """Return some of the next bytes, at most `size`; none at the end of what will ever be there."""
        while True:
            # Asked before: what is written until the name goes is read.
            ended = not self._is_there()
            if (data := self._file.read(size)) or ended:
                return data
            time.sleep(POLL)

    def close(self) -> None:
        self._file.close()

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False


def decoded(file: GrowingFile) -> Iterator[av.VideoFrame]:
    """Decode the pictures of a fragmented mp4 while it is written, each as soon as it is there."""
    with av.open(file, "r", format="mp4", options=DEMUXER) as container:
        yield from container.decode(video=0)


class Watcher:
    """Runs the second process, ready when the constructor returns, until the `with` block ends.

    with Watcher() as watcher:
        with VideoWriter(path, ...) as video:
            watcher.watch(partial_name(path), pictures=5)
            ...
        moment = watcher.moment()
    """

    def __init__(self) -> None:
        # Found as here, from whatever folder a script was started.
        paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # a stop at the terminal is for the command, which ends this process
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            text=True,
        )
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def watch(self, path: Path, pictures: int) -> None:
        """Begin to watch a file that is there, until so many pictures have been decoded.

        Raises:
            RuntimeError: it could not be opened.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the answer tells why
            self._process.stdin.write(json.dumps([str(path), pictures]) + "\n")
            self._process.stdin.flush()
        self._answer()

    def moment(self) -> float:
        """Wait for the pictures, and return when the last of them was decoded, on the clock of `time.monotonic`.

        Raises:
            RuntimeError: they could not be decoded, or the file ended before.
        """
        return float(self._answer())

    def close(self) -> None:
        """End the process, whatever it is waiting for."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that watches videos ended with status {self._process.wait()}")
        answer: dict[str, str] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"the process that watches videos failed: {answer['error']}")
        return answer["ok"]


def moment_of(file: GrowingFile, pictures: int) -> float:
    """Decode so many pictures of a growing file, and return when the last of them was there (`time.monotonic`).

    Raises:
        EOFError: the file ended before.
    """
    seen = 0
    for _ in decoded(file):
        seen += 1
        if seen == pictures:
            return time.monotonic()
    raise EOFError(f"the video ended after {seen} of {pictures} pictures")


def main() -> None:
    """Answer each line of stdin, a path and a number of pictures, when the file is open and when they are decoded."""
    asked: queue.Queue[str] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            asked.put(line)
        os._exit(0)  # nobody is left to answer, whatever the other thread waits for

    def answer(**words: str) -> None:
        print(json.dumps(words), flush=True)

    threading.Thread(target=listen, daemon=True).start()
    answer(ok="ready")
    while True:
        path, pictures = json.loads(asked.get())
        try:
            with closing(GrowingFile(Path(path))) as file:
                answer(ok="open")
                answer(ok=repr(moment_of(file, pictures)))
        except Exception as error:
            answer(error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
