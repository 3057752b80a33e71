"""Folders of videos in the names, and with the lists of prompts, that VBench and VBench-Long read.

So has it the package vbench 0.1.5 (`VBench.build_full_info_json`, `VBenchLong.build_full_info_json`): videos of its
standard prompts are `PROMPT-0.mp4` to `PROMPT-4.mp4`, in one folder; own ones have any names, and a JSON file says the
prompt of each. Any other names, as of a benchmark that is not known here, are made by a pattern.
"""

from __future__ import annotations

import json
import os
import shutil
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from longsana.evaluation.videos import REPAIR, describe
from longsana.runtime.errors import InputError
from longsana.runtime.files import whole_folder
from longsana.runtime.foreign import read_bytes, read_json

NAMES = {"standard": "{prompt}-{number}.mp4", "custom": "{path}.mp4"}
"""Patterns of names, by layout. prompt: the video's. number: among the videos of its prompt, from 0. line: of its
prompt's file, from 1. path: below the folder, `-` for `/`, without suffix."""
FIELDS = ("prompt", "number", "line", "path")
CUSTOM = (
    *("subject_consistency", "background_consistency", "motion_smoothness", "dynamic_degree"),
    *("aesthetic_quality", "imaging_quality"),
)
"""The dimensions that VBench measures on own videos."""
LONGEST = 255
"""Bytes of a file's name."""
VIDEOS, PROMPTS, LIST, INFO = "videos", "prompts.json", "prompts.txt", "full_info.json"


class Named(NamedTuple):
    """A video, its prompt, and its name for VBench."""

    path: Path
    prompt: str
    name: str


def check_names(names: str) -> None:
    """Refuse a pattern that makes no names.

    Raises:
        InputError: it has other fields than `FIELDS`, or does not make the name of an mp4.
    """
    try:
        if unknown := _fields(names) - {*FIELDS}:
            raise ValueError(f"unknown field {sorted(unknown)[0]!r}")
        name = names.format(prompt="prompt", number=0, line=1, path="path")
        if "/" in name or name.startswith(".") or not name.endswith(".mp4"):
            raise ValueError("not the name of an mp4")
    except (ValueError, KeyError) as error:
        known = ", ".join(f"{{{field}}}" for field in FIELDS)
        raise InputError(f"--names {names}: {error}; it may have {known}, as in {{line:04d}}_{{number}}.mp4") from error


def named(videos: Sequence[Path], folder: Path, names: str, prompts: Path | None = None) -> list[Named]:
    """Name videos of a folder by a pattern, see `NAMES`.

    prompts: a file whose line stands for the line that a video was made of, as the short form of an extended prompt.

    Raises:
        InputError: a video is no mp4, has no sidecar or another's name; or its prompt is not in the file, or no name.
    """
    lines = None if prompts is None else _lines(prompts)
    count: Counter[str] = Counter()
    found: dict[str, Named] = {}
    for path in videos:
        if path.suffix != ".mp4":
            raise InputError(f"{path}: VBench reads mp4; convert it, or remove it")
        prompt = _prompt(path, lines, prompts)
        line = _line(path) if "line" in _fields(names) else None
        own = path.relative_to(folder).with_suffix("").as_posix().replace("/", "-")
        name = names.format(prompt=prompt, number=count[prompt], line=line, path=own)
        if "/" in name or len(name.encode()) > LONGEST:
            what = "prompt" if "prompt" in _fields(names) else "path"
            raise InputError(
                f"{path}: its {what} cannot be a file's name ({'a / in it' if '/' in name else 'too long'}); give "
                "short prompts by --prompts, or use --layout custom"
            )
        count[prompt] += 1
        if name in found:
            raise InputError(f"{path}: two clips of one name, {name}, with {found[name].path}; rename one")
        found[name] = Named(path, prompt, name)
    return list(found.values())


def missing(exported: Sequence[Named], full_info: Path, samples: int) -> list[str]:
    """List the names that VBench's own list of prompts asks for, `samples` of each prompt, and nobody has made.

    Raises:
        InputError: the file is no such list, or a video's prompt is not in it.
    """
    entries = read_json(full_info)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "prompt_en" in entry for entry in entries):
        raise InputError(f"{full_info}: no list of prompts (prompt_en); give the package's VBench_full_info.json")
    prompts = dict.fromkeys(str(entry["prompt_en"]) for entry in entries)
    if surplus := [video for video in exported if video.prompt not in prompts]:
        others = f" (and {len(surplus) - 1} more)" if len(surplus) > 1 else ""
        raise InputError(
            f"{surplus[0].path}: its prompt is not in {full_info}{others}; give the list's own by --prompts, or leave "
            "--full_info out"
        )
    there = {video.name for video in exported}
    wanted = [f"{prompt}-{number}.mp4" for prompt in prompts for number in range(samples)]
    return [name for name in wanted if name not in there]


def write(exported: Sequence[Named], out: Path) -> None:
    """Write the videos, linked where the disk can, and their prompts in three forms into a folder, whole or not at all.

    Raises:
        OSError: it could not be written.
    """
    with whole_folder(out) as partial:
        (partial / VIDEOS).mkdir(parents=True)
        for video in exported:
            _link(video.path, partial / VIDEOS / video.name)
        distinct = list(dict.fromkeys(video.prompt for video in exported))
        (partial / LIST).write_text("".join(f"{prompt}\n" for prompt in distinct), encoding="utf-8")
        _write_json(partial / PROMPTS, {video.name: video.prompt for video in exported})
        _write_json(partial / INFO, [{"prompt_en": prompt, "dimension": list(CUSTOM)} for prompt in distinct])


def _prompt(path: Path, lines: Sequence[str] | None, prompts: Path | None) -> str:
    prompt = describe(path).prompt
    if prompt is None:
        raise InputError(f"{path}: no sidecar says its prompt; give the folder that inference wrote its videos to")
    if lines is None:
        return prompt
    line = _line(path)
    if line > len(lines) or not lines[line - 1].strip():
        raise InputError(f"{path}: was made of line {line}, which {prompts} does not have; give the file of its lines")
    return lines[line - 1].strip()


def _line(path: Path) -> int:
    line = read_json(path.with_suffix(".json"), REPAIR).get("line")
    if not isinstance(line, int) or line < 1:
        raise InputError(f"{path}: its sidecar does not say of which line of a file it was made; {REPAIR}")
    return line


def _fields(names: str) -> set[str]:
    return {field for _, field, _, _ in string.Formatter().parse(names) if field is not None}


def _lines(path: Path) -> list[str]:
    try:
        return read_bytes(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from error


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path.resolve(), target)
    except OSError:  # another disk, or one without links
        shutil.copy2(path, target)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
