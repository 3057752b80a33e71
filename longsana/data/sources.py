"""Films with captions as people have them: files in folders, or WebDatasets, which are tars of files.

A film's name is its path below the folder; in a tar that of the tar, and then the member's. What lies beside it has its
name but for the suffix, and so no two films may share that.
"""

from __future__ import annotations

import csv
import io
import sys
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from longsana.runtime.errors import InputError
from longsana.runtime.files import expanded, files_below
from longsana.runtime.foreign import check_characters, parse_json, printable, read_bytes, reason_of
from longsana.runtime.hub import stream_sha256

FILMS = (".mp4", ".webm", ".mov")
BESIDE, NAMES = "beside", "names"
"""Where captions are, if not in a file of them."""
FILE_KEYS = ("file", "file_name", "video", "path")
CAPTION_KEYS = ("caption", "text", "prompt")
"""Columns of a CSV, and keys of JSON."""


class Place(NamedTuple):
    """A file; or of a tar the member that begins at byte `offset`, `size` bytes of it."""

    path: Path
    offset: int | None = None
    size: int = 0

    def read(self) -> bytes:
        """The content.

        Raises:
            InputError: it cannot be read.
        """
        if self.offset is None:
            return read_bytes(self.path)
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                return file.read(self.size)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({reason_of(error)})") from error

    def sha256(self) -> str:
        """SHA-256 in hex of the content.

        Raises:
            OSError: it cannot be read.
        """
        with self.path.open("rb") as file:
            file.seek(self.offset or 0)
            return stream_sha256(file, sys.maxsize if self.offset is None else self.size)


class Source(NamedTuple):
    """A film, and its caption, which is empty where the name is not UTF-8: that film is a broken one.

    file_name: its name as the file system or the tar has it; see `printable`.
    """

    file_name: str
    caption: str
    place: Place

    @property
    def name(self) -> str:
        """The name for lists and messages."""
        return printable(self.file_name)

    def open(self) -> Path | BinaryIO:
        """A file, or one that is open: of a tar's member its content."""
        return self.place.path if self.place.offset is None else io.BytesIO(self.place.read())

    @property
    def where(self) -> str:
        """The file, and of a tar the member, for messages."""
        path = printable(self.place.path)
        return path if self.place.offset is None else f"{path} ({self.name})"

    @property
    def stamp(self) -> list[int]:
        """Bytes, and the time of the last change, by which another file of this name is noticed; none of no file."""
        try:
            state = self.place.path.stat()
        except OSError:
            return []
        return [state.st_size if self.place.offset is None else self.place.size, state.st_mtime_ns]


def find_sources(folder: Path, captions: str | Path = BESIDE) -> list[Source]:
    """Every film of a folder, or of a tar, with its caption, in order of their names.

    captions: `beside`, as NAME.txt, or in NAME.json; `names`, the film's own without suffix, its underscores
        spaces; or a CSV or JSON Lines file with a film and a caption a line.

    Raises:
        InputError: there is none, two have one name, a film has no caption, or a caption no film; or what says so
            cannot be read.
    """
    found = dict(sorted(_walk(folder)))
    films = {name: place for name, place in found.items() if name.lower().endswith(FILMS)}
    if not films:
        raise InputError(f"{folder}: no clips in it; give a folder of {', '.join(FILMS)}, or of a WebDataset's tars")
    stems: dict[str, str] = {}
    for name in films:
        if (other := stems.setdefault(_stem(name), name)) != name:
            raise InputError(f"{folder}: two clips of one name, {other} and {name}; rename or remove one")
    if captions == NAMES:
        texts = {stem: PurePosixPath(stem).name.replace("_", " ") for stem in stems}
    elif captions == BESIDE:
        texts = _beside(folder, found, stems)
    else:
        texts = _listed(expanded(captions), stems)
    without = [name for stem, name in stems.items() if not texts.get(stem, "").strip() and printable(name) == name]
    if without:
        others = f" (and {len(without) - 1} more)" if len(without) > 1 else ""
        remedy = (
            f"write {_stem(without[0])}.txt, or say where captions are: --captions names, or a CSV or JSON Lines file"
            if captions == BESIDE
            else f"add it to {captions}"
        )
        raise InputError(f"{folder / without[0]}: a clip without a caption{others}; {remedy}")
    sources = []
    for stem, name in stems.items():
        caption = " ".join(texts[stem].split()) if printable(name) == name else ""
        check_characters(caption, f"{folder / name}: its caption")
        sources.append(Source(name, caption, films[name]))
    return sources


def _walk(folder: Path) -> Iterator[tuple[str, Place]]:
    """Files below a folder by name, and members of tars among them; hidden ones are left out."""
    if folder.is_file() and folder.suffix == ".tar":
        yield from _members(folder, "")
        return
    for path in files_below(folder):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".tar":
            yield from _members(path, f"{name}/")
        else:
            yield name, Place(path)


def _members(path: Path, prefix: str) -> Iterator[tuple[str, Place]]:
    seen = set()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                if member.name in seen:
                    raise InputError(f"{path}: two members of one name, {member.name}; remove one")
                seen.add(member.name)
                yield f"{prefix}{member.name}", Place(path, member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"{path}: cannot be read as a WebDataset's tar ({reason_of(error)}); copy it again") from error


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _beside(folder: Path, found: Mapping[str, Place], stems: Mapping[str, str]) -> dict[str, str]:
    texts: dict[str, str] = {}
    said = {_stem(name) for name in found if name.lower().endswith(".txt")}
    for name, place in found.items():
        suffix = PurePosixPath(name).suffix.lower()
        if suffix not in (".txt", ".json") or (suffix == ".json" and _stem(name) in said):
            continue
        if _stem(name) not in stems:
            if suffix == ".json" and place.offset is None:
                continue  # in a folder it is anything; in a tar a sample
            raise InputError(f"{folder / name}: a caption without a clip; add the clip, or remove it")
        if suffix == ".json":
            sidecar = _json(_text(place, f"{folder / name}"), f"{folder / name}")
            if isinstance(parts := sidecar.get("parts"), list) and len(parts) > 1:
                raise InputError(
                    f"{folder / name}: a story of {len(parts)} parts, of which a clip shows some; "
                    "cut the film at them, or remove both"
                )
            texts[_stem(name)] = _value(sidecar, CAPTION_KEYS) or ""
        else:
            texts[_stem(name)] = _text(place, f"{folder / name}")
    return texts


def _listed(path: Path, stems: Mapping[str, str]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for line, row in _rows(path):
        name, caption = _value(row, FILE_KEYS), _value(row, CAPTION_KEYS)
        if name is None or caption is None:
            wanted = f"{'/'.join(FILE_KEYS)} and {'/'.join(CAPTION_KEYS)}"
            raise InputError(f"{path}, line {line}: needs a film and a caption; name the columns {wanted}")
        name = str(PurePosixPath(name))  # ./NAME too
        stem = _stem(name) if name.lower().endswith(FILMS) else name
        if stem not in stems or (stem != name and stems[stem] != name):
            raise InputError(f"{path}, line {line}: a caption without a clip, {name}; paths are those below the folder")
        if stem in texts:
            raise InputError(f"{path}, line {line}: a second caption of {name}; remove one")
        texts[stem] = caption
    return texts


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    """Rows of a CSV with a head, or of JSON Lines, each with its line."""
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise InputError(f"--captions {path}: must be {BESIDE}, {NAMES}, or a .csv or .jsonl file")
    text = _text(Place(path), str(path))
    if path.suffix.lower() == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield number, _json(line, f"{path}, line {number}")
        return
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: cannot be read as CSV ({error})") from error


def _text(place: Place, where: str) -> str:
    try:
        return place.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 (byte {error.start}); save it as UTF-8") from error


def _json(text: str, where: str) -> Mapping[str, object]:
    try:
        parsed = parse_json(text)
    except ValueError as error:
        raise InputError(f"{where}: cannot be read as JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise InputError(f"{where}: must be a JSON object with a caption")
    return parsed


def _value(row: Mapping[str, object], keys: tuple[str, ...]) -> str | None:
    return next((text for key in keys if isinstance(text := row.get(key), str)), None)
