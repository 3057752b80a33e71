"""Files that others made: what may lie in a file's place, and JSON that is read or refused in one line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longsana.runtime.errors import InputError

AGAIN = "download or copy it again"
_STAND_INS = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself; run `git lfs pull`, or download the file"),
    (b"<!doctype html", "a web page, not the file that it links to; download the file itself"),
    (b"<html", "a web page, not the file that it links to; download the file itself"),
    (b"gguf", "a GGUF file, whose quantised weights cannot be used here; get the weights as safetensors"),
    (b"\x1f\x8b", "compressed (gzip); unpack it first"),
)


def stand_in(head: bytes) -> str | None:
    """What a file with these first bytes (24 are enough) is in place of what was wanted, and what to do; or None."""
    start = head.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    return next((what for mark, what in _STAND_INS if start.startswith(mark)), None)


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in its name
        raise InputError(f"{path}: cannot be read ({reason_of(error)})") from error


def read_json(path: Path, remedy: str = AGAIN) -> Any:
    """The content of a JSON file in UTF-8.

    remedy: what to do where it is damaged, for the message.

    Raises:
        InputError: the file cannot be read, or is not JSON.
    """
    content = read_bytes(path)
    if (instead := stand_in(content[:24])) is not None:
        raise InputError(f"{path}: {instead}")
    try:
        return parse_json(content)
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); {remedy}") from error


def parse_json(content: bytes | str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """What a JSON text says; `pairs` makes its objects, of names and values in their order.

    Raises:
        ValueError: it is no JSON; the message is one line.
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        return json.loads(text, object_pairs_hook=pairs)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except ValueError as error:
        raise ValueError(" ".join(str(error).split())[:200]) from error


def reason_of(error: Exception) -> str:
    """An exception in a few words of one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:100] or type(error).__name__
