"""Files that others made: what may lie in a file's place, and JSON that is read or refused in one line."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from longsana.runtime.errors import InputError

AGAIN = "download or copy it again"
_STAND_INS = (
    (b"version https://git-lfs", "a git-lfs pointer", "run `git lfs pull`, or download the file itself"),
    (b"<!doctype html", "a web page", "download the file itself"),
    (b"<html", "a web page", "download the file itself"),
    (b"gguf", "a GGUF file, whose quantised weights cannot be used here", "get them as safetensors"),
    (b"\x1f\x8b", "compressed (gzip)", "unpack it first"),
)


class StandIn(NamedTuple):
    """The finding of what lies in a file's place, and what to do about it."""

    what: str
    remedy: str


def stand_in(head: bytes) -> StandIn | None:
    """Recognise a file by its first bytes (24 are enough), if it is none of the kinds that are read here."""
    start = head.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    return next((StandIn(what, remedy) for mark, what, remedy in _STAND_INS if start.startswith(mark)), None)


def refuse_stand_in(path: Path, head: bytes) -> None:
    """Refuse a file with these first bytes that is something else; see `stand_in`.

    Raises:
        InputError: it is.
    """
    if (instead := stand_in(head)) is not None:
        raise InputError(f"{path}: {instead.what}, not the file itself; {instead.remedy}")


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
    refuse_stand_in(path, content[:24])
    try:
        return parse_json(content)
    except ValueError as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); {remedy}") from error


def parse_json(content: bytes | str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Read a JSON text; `pairs` makes its objects, of names and values in their order.

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
    except json.JSONDecodeError as error:
        raise ValueError(" ".join(str(error).split())[:200]) from error
    except ValueError as error:
        raise ValueError(f"a whole number of more than {sys.get_int_max_str_digits()} digits") from error


def check_characters(text: str, where: str) -> None:
    """Refuse a text with characters that no file of words has, which tokenizers fail at or read as something else.

    Raises:
        InputError: it has a NUL or half a character in it; `where` is said first.
    """
    if "\0" in text:
        raise InputError(f"{where}: a NUL character in it; remove it")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InputError(f"{where}: half a character in it (a lone surrogate); write the whole one")


def printable(path: Path | str) -> str:
    """A path, or a message with one, as UTF-8 can have it: bytes of a name that are not UTF-8 as `\\xe9`."""
    return str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def refuse_name(name: str, path: Path | str) -> None:
    """Refuse a file whose name is not UTF-8, so that no list of files, in JSON or in HTML, can have it.

    Raises:
        InputError: it is not; the message begins with `path`.
    """
    if printable(name) != name:
        raise InputError(f"{printable(path)}: its name is not UTF-8; rename it")


def reason_of(error: Exception) -> str:
    """An exception in a few words of one line."""
    if isinstance(told := getattr(error, "strerror", None), str) and told:  # OSError, and what FFmpeg raises
        return told
    return " ".join(str(error).split())[:100] or type(error).__name__
