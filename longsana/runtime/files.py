"""Files that appear whole under their final name, or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from longsana.runtime.errors import InputError


def partial_name(path: Path) -> Path:
    """Where `path` is written until it is whole: hidden, beside it, and the same on each run."""
    return path.with_name(f".{path.stem}.partial{path.suffix}")


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
    try:
        with open(partial, "w", encoding="utf-8", newline="") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        move_into_place(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def check_writable(folder: Path) -> None:
    """Make the folder where it is missing, and make sure that files can be written there.

    Raises:
        InputError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{folder}: cannot be written to ({error.strerror}); choose another --work_dir") from error
