"""Prompt files: what is asked for, video by video.

Three kinds, told apart by their suffix: text (any other suffix) with one prompt a line; `.jsonl`, one JSON object a
line; `.json`, one object whose keys are the prompts, as the published command reads it, and whose values may be
objects. A prompt may hold a size flag, name a picture to begin with after `<image>`, and be a story of several parts,
each with a picture (`longsana.data.story`). Fields of the objects:

    prompt  the text (.jsonl)           size    [height, width] in pixels
    seed    a whole number              frames  pixel frames of the video
    image   a picture's file, in place of the first part's `<image>`
"""

from __future__ import annotations

import codecs
import dataclasses
import difflib
import hashlib
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from longsana.config import SamplingConfig
from longsana.data.aspect import nearest_size
from longsana.data.story import PICTURE, Mark, read_parts, take_pictures
from longsana.runtime.errors import InputError, nearest
from longsana.runtime.files import expanded
from longsana.runtime.foreign import check_characters, parse_json, reason_of, refuse_stand_in
from longsana.runtime.hub import locate

log = logging.getLogger(__name__)

PUBLISHED_PROMPTS = "vidprom_filtered_extended.txt"
DOWNLOAD = f"hf download gdhe17/Self-Forcing {PUBLISHED_PROMPTS} --local-dir data/longsana"
FLAGS = ("ar", "aspect_ratio", "hw")
FIELDS = ("prompt", "seed", "size", "frames", "image")
SEEDS = (-(2**63), 2**63 - 1)  # as of sampling.seed
_TABLES = (".csv", ".tsv", ".xls", ".xlsx", ".ods", ".parquet", ".arrow", ".yaml", ".yml")
_OF_THE_COMMAND = {
    *(setting.name for setting in dataclasses.fields(SamplingConfig) if setting.name not in FIELDS),
    *("guidance_scale", "num_inference_steps", "step", "flow_shift"),
}
"""Fields that would change a video and are settings of the whole command here, or nothing at all."""
_ALIASES = {
    "height": "size",
    "width": "size",
    "num_frames": "frames",
    "text": "prompt",
    "caption": "prompt",
    **dict.fromkeys(("picture", "image_path", "first_frame"), "image"),
}

_FLAG = re.compile(r"(?<!\S)--(?P<name>[A-Za-z][^\s=]*)(?:[\s=]+(?P<value>[^\s<]*))?")
_BEFORE_A_FLAG = re.compile(rf"(?=\s--(?:{'|'.join(FLAGS)})(?:[\s=]|$))")
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
    """One video to make. Its identity is `text`, `pictures`, `seed` and `repetition`, not its place in the file."""

    line: int  # in the file, from 1; of a .json file the number of the key
    text: str  # the whole line without flags and pictures
    parts: tuple[str, ...]  # the words of each part; one for a video with one prompt
    repetition: int  # 0 for the first line with this text, pictures and seed, 1 for the second, ...
    height: int  # pixels
    width: int
    seed: int | None = None  # None: what the config says
    frames: int | None = None  # pixel frames; None: as above
    marks: tuple[Mark, ...] = ()  # of each part of a story; none between '<split>'
    image: Path | None = None  # the picture that the video begins with
    cuts: Mapping[int, Path] = field(default_factory=dict)  # the pictures that later parts are cut to, by their number

    @property
    def pictures(self) -> dict[int, Path]:
        """The picture that each part begins with, by its number, of those that have one."""
        return ({} if self.image is None else {0: self.image}) | dict(self.cuts)

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


def read_prompts(
    path: str | Path,
    *,
    height: int,
    width: int,
    aspect_ratio_type: str,
    seed: int | None = None,
    frames: int | None = None,
    pictures: bool = False,
    image: Path | None = None,
) -> list[Prompt]:
    """The prompts of a file, in its order; blank ones are skipped and still counted.

    A prompt may hold one flag, `--ar h:w` (or `--aspect_ratio`, `--hw`): the video takes the size of the table
    `aspect_ratio_type` nearest to h / w. Others have the size of their field, or are `height` x `width`.

    A prompt, and each part of a story, may name a picture, which is looked up beside the file and then in the working
    directory.

    seed, frames, image: of prompts that do not say it themselves. pictures: whether prompts may name a picture.

    Raises:
        InputError: the file cannot be read, is of a kind that is not read, has no prompt, or a line is wrong; the
            message says where.
    """
    prompts: list[Prompt] = []
    seen: Counter[tuple[Any, ...]] = Counter()
    path = Path(path)
    for entry in _rows(path):
        where = place(path, entry.number)
        text, ratio = _take_flag(entry.text, where)
        size = entry.size or (height, width)
        if ratio is not None:
            if entry.size is not None:
                raise InputError(f"{where}: both a size flag and the field size; keep one of them")
            if aspect_ratio_type == "none":
                raise InputError(
                    f"{where}: a size flag needs a table; set sampling.aspect_ratio_type or remove the flag"
                )
            size = nearest_size(aspect_ratio_type, ratio)
        try:
            text, named = take_pictures(text)
            if not text:
                raise InputError(f"a {'picture' if named or entry.image else 'size flag'} without a prompt")
            parts, marks = read_parts(text)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        check_words(text, where)
        own_seed = seed if entry.seed is None else entry.seed
        own_frames = frames if entry.frames is None else entry.frames
        if (named or entry.image is not None) and not pictures:
            raise InputError(f"{where}: begins with a picture, which has no meaning here; remove it")
        found = _find_pictures(entry.image, named, path.parent, where)
        own_image = found.pop(0, image)
        known = text, own_seed, own_image, tuple(sorted(found.items()))
        own = entry.number, text, parts, seen[known], *size, own_seed, own_frames, marks, own_image, found
        prompts.append(Prompt(*own))
        seen[known] += 1
    return prompts


def _find_pictures(field: str | None, named: Mapping[int, str], folder: Path, where: str) -> dict[int, Path]:
    """Look up the pictures that a prompt's parts name, by number, and the one of its field, which is the first's."""
    if field is not None and 0 in named:
        raise InputError(f"{where}: both '{PICTURE}' and the field image; keep one of them")
    own = {**named, **({} if field is None else {0: field})}
    return {number: _find_picture(name, folder, where) for number, name in own.items()}


def _find_picture(name: str, folder: Path, where: str) -> Path:
    """Look up a picture that a prompt names: beside its file, then in the working directory."""
    try:
        given = expanded(name)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    found = next((path for path in (folder / given, given) if os.path.exists(path)), None)
    if found is None:
        looked = "" if given.is_absolute() else f", neither in {folder} nor in the working directory"
        raise InputError(f"{where}: {name}: no such picture{looked}")
    return found


def training_prompts(path: str | Path, what: str = "data.data_path", *, pictures: bool = False) -> list[str]:
    """The prompts of a file without blank ones; flags, `<split>` and a story's marks are words of theirs.

    path: tried from the working directory and then from the repository root; or hf://owner/repo/file.
    what: the setting that names it, or what else it is, for errors.
    pictures: prompts may name a picture; see `training_pictures`.

    Raises:
        InputError: the file is missing, empty, of a kind that is not read, or a line of it is wrong, or has fields
            that mean nothing in training.
    """
    return [entry.text for entry in _training_entries(_training_file(path, what), pictures=pictures)]


class Pictured(NamedTuple):
    """The picture of a training prompt. where: the prompt is, for errors."""

    where: str
    path: Path


def training_pictures(path: str | Path, what: str = "data.data_path") -> list[Pictured]:
    """The pictures that the prompts of a file name, one for each of `training_prompts`, which also says what is read.

    Raises:
        InputError: a prompt names none, or one that is not there; or see `training_prompts`.
    """
    file, found = _training_file(path, what), []
    for entry in _training_entries(file, pictures=True):
        where = place(file, entry.number)
        if entry.image is None:
            raise InputError(
                f"{where}: names no picture ('words{PICTURE}path'); with train.image_probability above 0 every prompt "
                "needs one that its videos may begin with"
            )
        found.append(Pictured(where, _find_picture(entry.image, file.parent, where)))
    return found


def _training_file(path: str | Path, what: str) -> Path:
    try:
        return locate(str(path), what)
    except InputError as error:
        if Path(path).name == PUBLISHED_PROMPTS:
            raise InputError(f"{error}; the published prompts: `{DOWNLOAD}`") from error
        raise


def aligned_prompts(path: str | Path, what: str, others: str | Path) -> list[str]:
    """The prompts of a file of which line i belongs to line i of the run's, `others`; see `training_prompts`.

    what: the setting that names the file, for errors.

    Raises:
        InputError: they have other numbers of prompts, or one is blank where the other is not; or see
            `training_prompts`.
    """
    own = _training_entries(locate(str(path), what))
    beside = _training_entries(locate(str(others), "data.data_path"), pictures=True)
    if len(own) != len(beside):
        raise InputError(
            f"{what}={path}: {len(own)} prompt{'s' if len(own) != 1 else ''}, where data.data_path={others} has "
            f"{len(beside)}; write line i of the one for line i of the other"
        )
    for entry, other in zip(own, beside, strict=True):
        if entry.number != other.number:
            raise InputError(
                f"{what}={path}: line {min(entry.number, other.number)} is blank here or in data.data_path={others}, "
                "and not in both; write line i of the one for line i of the other"
            )
    return [entry.text for entry in own]


def _training_entries(file: Path, *, pictures: bool = False) -> list[_Entry]:
    """The prompts of a file, none of which has fields that mean nothing in training. pictures: one may be named."""
    entries = _entries(file)
    for entry in entries:
        if entry.image is not None and not pictures:
            raise InputError(
                f"{place(file, entry.number)}: begins with a picture, which has no meaning in training, but in "
                "data.data_path with train.image_probability above 0; remove it"
            )
        if own := [name for name in FIELDS[1:] if name != "image" and getattr(entry, name) is not None]:
            raise InputError(
                f"{place(file, entry.number)}: the field {own[0]} has no meaning in training, which draws its noise "
                "by train.seed and has one size and length; remove it"
            )
    return entries


def place(path: Path, number: int) -> str:
    """A prompt of a file, for messages."""
    return f"{path}, {'key' if path.suffix.lower() == '.json' else 'line'} {number}"


def check_words(text: str, where: str) -> None:
    """Refuse a prompt that is no text, or asks for what is no text.

    Raises:
        InputError: it has a NUL or half a character in it, or begins with a picture; `where` is said first.
    """
    check_characters(text, where)
    if PICTURE in text:
        raise InputError(f"{where}: asks for a video that begins with a picture ('{PICTURE}'); remove it")


class _Entry(NamedTuple):
    """A prompt as it is written; fields that it lacks are None. number: see `Prompt.line`."""

    number: int
    text: str
    seed: int | None = None
    size: tuple[int, int] | None = None
    frames: int | None = None
    image: str | None = None


def _entries(path: Path) -> list[_Entry]:
    """The prompts that are not blank, of one part each, whose picture is taken out of their text."""
    entries = [_split_picture(path, entry) for entry in _rows(path)]
    for entry in entries:
        check_words(entry.text, place(path, entry.number))
    return entries


def _rows(path: Path) -> list[_Entry]:
    """The prompts that are not blank, stripped, as they are written."""
    kind = path.suffix.lower()
    if kind in _TABLES:
        raise InputError(
            f"{path}: {kind} files are not read; write the prompts one a line into a .txt, or as objects "
            '{"prompt": ...} one a line into a .jsonl'
        )
    content = _read(path)
    unused: set[str] = set()
    if kind == ".json":
        found, how = list(_of_object(path, content, unused)), "write each as a key of the object"
    elif kind in (".jsonl", ".ndjson"):
        found, how = list(_of_lines(path, content, unused)), 'write an object {"prompt": ...} a line'
    else:
        _refuse_json(path, content)
        found, how = [_Entry(*line) for line in _lines(path, content)], "write one prompt a line"
    entries = [entry for entry in found if entry.text or entry.image]
    if not entries:
        raise InputError(f"{path}: no prompts in this file; {how}")
    if unused:
        log.info("%s: these fields change nothing here: %s", path, ", ".join(sorted(unused)))
    return entries


def _split_picture(path: Path, entry: _Entry) -> _Entry:
    """Take a picture out of a prompt's text, `words<image>path`; a size flag may stand on either side."""
    words, *pictures = entry.text.split(PICTURE)
    if not pictures:
        return entry
    where = place(path, entry.number)
    if len(pictures) > 1:
        raise InputError(f"{where}: '{PICTURE}' stands {len(pictures)} times in it; a video begins with one picture")
    if entry.image is not None:
        raise InputError(f"{where}: both '{PICTURE}' and the field image; keep one of them")
    name, *flags = _BEFORE_A_FLAG.split(pictures[0])
    if not name.strip():
        raise InputError(f"{where}: no path after '{PICTURE}'; write the picture's file there")
    return entry._replace(text="".join([words.strip(), *flags]), image=name.strip())


def _of_object(path: Path, content: bytes, unused: set[str]) -> Iterator[_Entry]:
    """The keys of an object; a key that comes twice is two prompts."""
    try:
        pairs = parse_json(content, _Pairs)
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(pairs, _Pairs):
        raise InputError(
            f"{path}: a JSON {type(pairs).__name__}; expected an object whose keys are the prompts; for a list write "
            "an object a line into a .jsonl"
        )
    for number, (text, value) in enumerate(pairs, start=1):
        fields: Iterable[tuple[str, Any]] = ()
        if isinstance(value, _Pairs):
            fields = value
        elif value is not None:
            unused.add("values that are no objects")
        yield _entry(place(path, number), number, [("prompt", text), *fields], unused)


def _of_lines(path: Path, content: bytes, unused: set[str]) -> Iterator[_Entry]:
    for number, line in _lines(path, content):
        where = place(path, number)
        try:
            value = parse_json(line, _Pairs)
        except ValueError as error:
            raise InputError(f"{where}: not JSON: {error}") from error
        if not isinstance(value, _Pairs):
            raise InputError(f'{where}: a JSON {type(value).__name__}; expected an object, {{"prompt": ...}}')
        yield _entry(where, number, value, unused)


class _Pairs(list[tuple[str, Any]]):
    """The names and values of a JSON object, in order."""


def _entry(where: str, number: int, pairs: Iterable[tuple[str, Any]], unused: set[str]) -> _Entry:
    """A prompt of its fields; names of those that mean nothing are added to `unused`."""
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise InputError(f"{where}: the field {name} is given twice")
        fields[name] = value
    for name in fields:
        if name not in FIELDS:
            _check_unknown(name, fields, where)
            unused.add(name)
    text = fields.get("prompt")
    if not isinstance(text, str):
        there = f"it has {', '.join(list(fields)[:5]) or 'none'}" if text is None else f"it is {text!r:.40}"
        raise InputError(f"{where}: needs a text in the field prompt; {there}")
    size = fields.get("size")
    if size is not None and not (isinstance(size, list) and not isinstance(size, _Pairs) and len(size) == 2):
        raise InputError(f"{where}: size={size!r:.40}: must be [height, width], as in [480, 832]")
    return _Entry(
        number,
        text.strip(),
        _whole(where, "seed", fields.get("seed"), *SEEDS),
        None if size is None else (_side(where, size[0]), _side(where, size[1])),
        _whole(where, "frames", fields.get("frames"), 1),
        _file(where, fields.get("image")),
    )


def _check_unknown(name: str, fields: dict[str, Any], where: str) -> None:
    """Refuse a field that asks for something which would be ignored; what is said of it else may stay."""
    lower = name.lower()
    meant = _ALIASES.get(lower) or next(iter(difflib.get_close_matches(lower, FIELDS, n=1, cutoff=0.75)), None)
    if meant is not None and fields.get(meant) is None:
        raise InputError(f"{where}: unknown field {name} (did you mean '{meant}'?); there are {', '.join(FIELDS)}")
    if lower in _OF_THE_COMMAND:
        raise InputError(
            f"{where}: the field {name} cannot be honoured for one prompt; give it to the command, for all of them"
        )


def _file(where: str, value: Any) -> str | None:
    """A path, or None."""
    if value is not None and (not isinstance(value, str) or not value.strip() or "\0" in value):
        raise InputError(f"{where}: image={value!r:.40}: must be the path of a picture")
    return value


def _side(where: str, value: Any) -> int:
    side = _whole(where, "size", value, 1)
    if side is None:
        raise InputError(f"{where}: size: must be [height, width], as in [480, 832]")
    return side


def _whole(where: str, name: str, value: Any, least: int, most: float = float("inf")) -> int | None:
    """A whole number, also as JSON's 7.0, or None."""
    if value is None:
        return None
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
    if not whole or not least <= value <= most:
        up_to = f" to {most}" if most < float("inf") else " or more"
        raise InputError(f"{where}: {name}={value!r:.40}: must be a whole number, {least}{up_to}")
    return int(value)


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise InputError(f"{path}: a directory; expected a text file with one prompt a line")
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such prompt file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {reason_of(error)}") from error
    refuse_stand_in(path, content[:24])
    before, nul, _ = content.partition(b"\0")
    if nul:
        number = max(len(before.splitlines()), 1) + before.endswith(b"\n")
        raise InputError(f"{path}, line {number}: not UTF-8: a NUL byte in it (UTF-16?); save the file as UTF-8")
    return content.removeprefix(codecs.BOM_UTF8)


def _lines(path: Path, content: bytes) -> list[tuple[int, str]]:
    """The lines that are not blank, stripped, and their numbers in the file."""
    lines = []
    # Decoded one by one, so that a bad byte can be blamed on its line.
    for number, raw in enumerate(content.splitlines(), start=1):
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}, line {number}: not UTF-8 (byte 0x{raw[error.start]:02x} at {error.start}); "
                "save the file as UTF-8"
            ) from error
        if line:
            lines.append((number, line))
    return lines


def _refuse_json(path: Path, content: bytes) -> None:
    """Refuse JSON under the name of a text file, whose lines would be taken for prompts."""
    if not content.lstrip().startswith((b"{", b"[")):
        return
    for whole, suffix in ((content.strip().splitlines()[0], ".jsonl"), (content, ".json")):
        try:
            found = parse_json(whole)
        except ValueError:
            continue
        if isinstance(found, dict | list):
            raise InputError(f"{path}: holds JSON, not a prompt a line; name such a file {suffix}")


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
    """Tell whether `--name` is a size flag; words that are not even like one are text."""
    if name in FLAGS:
        return True
    if similar := nearest(name.lower(), FLAGS):
        raise InputError(f"{where}: unknown flag --{name} (did you mean --{similar[0]}?)")
    return False
