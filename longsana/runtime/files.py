"""Files that appear whole under their final name, or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from longsana.runtime.errors import InputError


def expanded(path: str | Path) -> Path:
    """A path that somebody typed, with the home folder for `~`.

    Raises:
        InputError: `~user` of a user that there is not.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{path}: not found: there is no such user") from error


_unfinished: set[Path] = set()


def partial_name(path: Path) -> Path:
    """Where `path` is written until it is whole: hidden, beside it, and the same on each run."""
    return path.with_name(f".{path.stem}.partial{path.suffix}")


@contextmanager
def unfinished(partial: Path) -> Iterator[None]:
    """Inside the block this process writes a partial file, which goes if the process has to end at once."""
    _unfinished.add(partial)
    try:
        yield
    finally:
        _unfinished.discard(partial)


def remove_unfinished() -> None:
    """Remove the files and folders that this process is writing, for an end at once."""
    for partial in list(_unfinished):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def open_exclusive(path: Path) -> BinaryIO:
    """Open an empty file for writing that no other process writes; the lock goes with the file or the process.

    Raises:
        BlockingIOError: another process is writing it.
    """
    while True:
        # Not opened with "wb": that would empty what another process is writing.
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise BlockingIOError(f"{path}: another command is writing this file") from error
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate()
            return file
        file.close()  # its writer has just finished and moved it away


def move_into_place(partial: Path, path: Path) -> None:
    """Rename a finished, synced file; durable when this returns."""
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 `text`; readers see the old file or the new one, also after a crash or a full disk.

    Raises:
        OSError: it could not be written; `path` is as it was.
    """
    path = Path(path)
    partial = partial_name(path)
    with unfinished(partial):
        try:
            with open(partial, "w", encoding="utf-8", newline="") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            move_into_place(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_exclusive(path: Path, content: bytes) -> None:
    """Write a file that no other process is writing: whole and synced to disk, or not at all.

    Raises:
        BlockingIOError: another process is writing it.
        OSError: it could not be written; `path` is as it was.
    """
    partial = partial_name(path)
    with open_exclusive(partial) as stream, unfinished(partial):
        try:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
            move_into_place(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def check_writable(folder: Path, option: str = "--work_dir") -> None:
    """Make the folder, which `option` names, where it is missing, and make sure that files can be written there.

    Raises:
        InputError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{folder}: cannot be written to ({error.strerror}); choose another {option}") from error
