"""Every entry of an LMDB of trajectories, looked at in a process of its own.

LMDB maps its file and trusts it: where the file was cut, or holds other bytes, reading ends the process by a signal.
This file is that process: it needs nothing but lmdb, starts in a tenth of a second, and prints what is wrong.
"""

from __future__ import annotations

import json
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import NamedTuple

SHAPE = "latents_shape"
DATA = "data.mdb"
_MAGIC = 0xBEEFC0DE
_HEADER = 16  # bytes of a page before its content
_META = struct.Struct("<I20xI92xQQ")
"""Fields of a meta page: magic, bytes of a page (as the first of two tables says), the last page, the transaction."""
MOST = 100
"""Entries that are wrong, of which the rest are not counted."""


def latents(index: int) -> str:
    return f"latents_{index}_data"


def prompt(index: int) -> str:
    return f"prompts_{index}_data"


def stored_shape(given: bytes) -> tuple[int, ...]:
    """N, S, T, C, H, W of the entry SHAPE.

    Raises:
        ValueError: it is something else.
    """
    if not re.fullmatch(rb"[1-9][0-9]{0,9}( [1-9][0-9]{0,9}){5}", given):
        raise ValueError(f"{SHAPE} is {given[:60]!r}; it should be six numbers, N S T C H W")
    return tuple(int(number) for number in given.split())


def problem_of(folder: Path) -> str | None:
    """Ask another process what is wrong with the LMDB in a folder: words to follow its path, or None.

    Raises:
        OSError: that process could not be started.
    """
    if (cut := cut_short(folder / DATA, whole_pages=True)) is not None:
        return f"an LMDB that is {cut}; copy it again"
    run = subprocess.run([sys.executable, __file__, str(folder)], capture_output=True, text=True, check=False)
    if run.returncode < 0:
        how = f"reading it ends in {signal.Signals(-run.returncode).name}"
        return f"an LMDB that is {cut_short(folder / DATA) or 'damaged'} ({how}); copy it again"
    if run.returncode > 0:
        return f"not an LMDB that can be read ({(run.stderr.strip().splitlines() or ['no reason given'])[-1]})"
    found: str | None = json.loads(run.stdout)
    return found


def cut_short(file: Path, *, whole_pages: bool = False) -> str | None:
    """Say that a file is shorter than its newest meta page says, or None.

    whole_pages: only where it does not end with a page. Such an end reads as zeros, without a signal; and where pages
        that nothing refers to are missing at its end, a file is whole.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(1 << 17)
    if (first := _meta(head, 0)) is None:
        return None  # no LMDB, which is for its reader to say
    page = first.page_size
    second = _meta(head, page)
    newest = second if second is not None and second.transaction > first.transaction else first
    needed = (newest.last_page + 1) * page
    if size >= needed or (whole_pages and size % page == 0):
        return None
    return f"cut short: {size} bytes of {needed}"


class _Meta(NamedTuple):
    magic: int
    page_size: int
    last_page: int
    transaction: int


def _meta(head: bytes, start: int) -> _Meta | None:
    """The meta page that begins at `start`, if one does."""
    body = head[start + _HEADER : start + _HEADER + _META.size]
    found = _Meta(*_META.unpack(body)) if len(body) == _META.size else None
    return found if found is not None and found.magic == _MAGIC and found.page_size else None


def look(folder: str) -> str | None:
    """Find what is wrong, in this process."""
    import lmdb

    try:
        environment = lmdb.open(folder, readonly=True, lock=False, readahead=False)
        with environment.begin(buffers=True) as transaction:
            wrong = _wrong_entries(lambda key: transaction.get(key.encode()))
    except lmdb.Error as error:
        return f"not an LMDB that can be read ({error})"
    if not wrong:
        return None
    others = f", and {len(wrong) - 1 if len(wrong) < MOST else 'many'} more are wrong" if len(wrong) > 1 else ""
    return f"not an LMDB of trajectories: {wrong[0]}{others}"


def _wrong_entries(get: Callable[[str], memoryview | None]) -> list[str]:
    """The first MOST of them. Of each entry the first and last byte are read: no part of the file is missing."""
    given = get(SHAPE)
    if given is None:
        return [f"no entry {SHAPE}"]
    try:
        count, *item = stored_shape(bytes(given))
    except ValueError as error:
        return [str(error)]
    wrong: list[str] = []
    for index in range(count):
        states, text = get(latents(index)), get(prompt(index))
        if states is None:
            wrong.append(f"no entry {latents(index)}")
        elif len(states) != 2 * prod(item):
            wrong.append(f"{latents(index)} is {len(states)} bytes, {SHAPE} says {2 * prod(item)}")
        else:
            bytes(states[:1]), bytes(states[-1:])
        if text is None:
            wrong.append(f"no entry {prompt(index)}")
        elif not _is_text(bytes(text)):
            wrong.append(f"{prompt(index)} is not UTF-8")
        if len(wrong) >= MOST:
            break
    return wrong


def _is_text(value: bytes) -> bool:
    try:
        value.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


if __name__ == "__main__":
    print(json.dumps(look(sys.argv[1])))
