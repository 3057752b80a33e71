"""Prompt files: one prompt a line, with optional size flags and `<split>` between the parts of one video.

A .json file is an object whose keys are the prompts, as the published command reads it.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from longsana.data.aspect import nearest_size
from longsana.runtime.errors import InputError, nearest
from longsana.runtime.hub import locate

SPLIT = "<split>"
PICTURE = "<image>"
PUBLISHED_PROMPTS = "vidprom_filtered_extended.txt"
DOWNLOAD = f"hf download gdhe17/Self-Forcing {PUBLISHED_PROMPTS} --local-dir data/longsana"
FLAGS = ("ar", "aspect_ratio", "hw")

_FLAG = re.compile(r"(?<!\S)--(?P<name>[A-Za-z][^\s=]*)(?:[\s=]+(?P<value>[^\s<]*))?")
_RATIO = re.compile(r"([0-9]+(?:\.[0-9]+)?):([0-9]+(?:\.[0-9]+)?)")
_SLUG_LENGTH = 50
# Windows opens a device instead of a file of this name, whatever its suffix.
_DEVICES = {
    "con",
    "prn",
    "aux",
    "nul",
    *(f"{name}{digit}" for name in ("com", "lpt") for digit in range(1, 10)),
}


@dataclass(frozen=True)
class Prompt:
    """One video to make. Its identity is `text` and `repetition`, not its place in the file."""

    line: int  # in the file, from 1
    text: str  # the whole line without flags
    parts: tuple[str, ...]  # the text split at '<split>'; one for a video with one prompt
    repetition: int  # 0 for the first line with this text, 1 for the second, ...
    height: int  # pixels
    width: int

    @property
    def slug(self) -> str:
        """A file name: ASCII words joined by "-", 1 to 50 characters. Different prompts may share one."""
        plain = unicodedata.normalize("NFKD", " ".join(self.parts)).encode("ascii", "ignore").decode().lower()
        words = re.findall(r"[a-z0-9]+", plain)
        slug = "-".join(words)
        if len(slug) > _SLUG_LENGTH:
            # One character more, so that a word which ends at the limit stays whole.
            slug = slug[: _SLUG_LENGTH + 1].rpartition("-")[0] or slug[:_SLUG_LENGTH]
        if not slug or slug in _DEVICES:
            return f"prompt-{hashlib.sha256(self.text.encode()).hexdigest()[:10]}"
        return slug


def read_prompts(path: str | Path, *, height: int, width: int, aspect_ratio_type: str) -> list[Prompt]:
    """The prompts of a UTF-8 text file or of a .json file, in its order; blank ones are skipped and still counted.

    A line may hold one flag, `--ar h:w` (or `--aspect_ratio`, `--hw`): the video takes the size of the table
    `aspect_ratio_type` nearest to h / w. Other lines are `height` x `width`.

    Raises:
        InputError: the file cannot be read, has no prompt, or a line is wrong; the message says where.
    """
    prompts: list[Prompt] = []
    seen: Counter[str] = Counter()
    path = Path(path)
    is_json = path.suffix == ".json"
    for number, line in _keys(path) if is_json else _lines(path):
        where = f"{path}, {'key' if is_json else 'line'} {number}"
        if PICTURE in line:
            raise InputError(f"{where}: asks for a video that begins with a picture ('{PICTURE}'); remove it")
        text, ratio = _take_flag(line, where)
        size = (height, width)
        if ratio is not None:
            if aspect_ratio_type == "none":
                raise InputError(
                    f"{where}: a size flag needs a table; set sampling.aspect_ratio_type or remove the flag"
                )
            size = nearest_size(aspect_ratio_type, ratio)
        parts = tuple(part.strip() for part in text.split(SPLIT))
        if not all(parts):
            reason = f"a part beside '{SPLIT}' is empty" if SPLIT in text else "a size flag without a prompt"
            raise InputError(f"{where}: {reason}")
        prompts.append(Prompt(number, text, parts, seen[text], *size))
        seen[text] += 1
    return prompts


def training_prompts(path: str | Path) -> list[str]:
    """The lines of a UTF-8 text file without blank ones; a line is one prompt whatever is in it.

    path: tried from the working directory and then from the repository root; or hf://owner/repo/file.

    Raises:
        InputError: the file is missing, empty, or a line of it is not UTF-8.
    """
    try:
        file = locate(str(path), "data.data_path")
    except InputError as error:
        if Path(path).name == PUBLISHED_PROMPTS:
            raise InputError(f"{error}; the published prompts: `{DOWNLOAD}`") from error
        raise
    return [line for _, line in _lines(file)]


def with_motion(text: str, score: int | None, *, high: bool = False) -> str:
    """The text with the suffix that the network was trained on (facts 5); unchanged where the score is None.

    high: with a score of 0 or less, whether much motion is wanted.
    """
    if score is None:
        return text
    return f"{text.strip()} motion score: {score}." if score > 0 else f"{text} {'high' if high else 'low'} motion"


def parts_per_chunk(parts: int, chunks: int) -> list[int]:
    """For each chunk of a video, which of its prompt's parts (from 0) it shows: even stretches, in order.

    Raises:
        InputError: there are more parts than chunks.
    """
    if parts > chunks:
        raise InputError(
            f"{parts} parts between '{SPLIT}' for a video of {chunks} chunk{'s' if chunks != 1 else ''}: "
            "each part needs a chunk; use fewer parts or more frames"
        )
    return [chunk * parts // chunks for chunk in range(chunks)]


def _keys(path: Path) -> list[tuple[int, str]]:
    """The keys of a JSON object that are not blank, stripped, and their numbers."""
    try:
        content = json.loads(_read(path))
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: a JSON {type(content).__name__}; expected an object whose keys are the prompts")
    keys = [(number, key.strip()) for number, key in enumerate(content, start=1) if key.strip()]
    if not keys:
        raise InputError(f"{path}: no prompts in this file; write each as a key of the object")
    return keys


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise InputError(f"{path}: a directory; expected a text file with one prompt a line")
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such prompt file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, stripped, and their numbers in the file."""
    content = _read(path)
    lines = []
    # Decoded one by one, so that a bad byte can be blamed on its line.
    for number, raw in enumerate(content.removeprefix(codecs.BOM_UTF8).splitlines(), start=1):
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}, line {number}: not UTF-8 (byte 0x{raw[error.start]:02x} at {error.start}); "
                "save the file as UTF-8"
            ) from error
        if line:
            lines.append((number, line))
    if not lines:
        raise InputError(f"{path}: no prompts in this file; write one prompt a line")
    return lines


def _take_flag(line: str, where: str) -> tuple[str, float | None]:
    """The line without its size flag, and h / w if it had one."""
    found = [match for match in _FLAG.finditer(line) if _is_flag(match["name"], where)]
    if not found:
        return line, None
    if len(found) > 1:
        raise InputError(f"{where}: more than one size flag ({', '.join('--' + m['name'] for m in found)})")
    (flag,) = found
    value = _RATIO.fullmatch(flag["value"] or "")
    height, width = (float(number) for number in value.groups()) if value else (0.0, 0.0)
    if not (height > 0 and width > 0):
        raise InputError(f"{where}: --{flag['name']} {flag['value'] or ''}: expected height:width, as in --ar 9:16")
    text = f"{line[: flag.start()].rstrip()} {line[flag.end() :].lstrip()}"
    return text.strip(), height / width


def _is_flag(name: str, where: str) -> bool:
    """Whether `--name` is a size flag; words that are not even like one are text."""
    if name in FLAGS:
        return True
    if similar := nearest(name.lower(), FLAGS):
        raise InputError(f"{where}: unknown flag --{name} (did you mean --{similar[0]}?)")
    return False
