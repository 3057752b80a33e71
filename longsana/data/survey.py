"""A look at films before they become clips: what each shows, which of them are broken, and what all of them are like.

Every film is decoded once, by any number of processes; what was found stays in the folder of the results, so that a
survey that was stopped goes on, and one that is over is not made again.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from tqdm import tqdm

from longsana.data.films import film_frames, fitted, told_of_film
from longsana.data.sources import Source
from longsana.runtime.distributed import World
from longsana.runtime.errors import InputError
from longsana.runtime.files import atomic_write_text, naming, write_all
from longsana.runtime.foreign import printable, refuse_name
from longsana.runtime.later import ahead
from longsana.runtime.strips import COLUMNS, Row, evenly, write_sheet

FILES = "files.jsonl"
THUMBNAIL = 64
"""Pixels of the shorter side of the pictures whose change is measured."""
SHEET = 16
"""Clips on the contact sheet."""


class Facts(NamedTuple):
    """The findings about a film.

    stamp: see `Source.stamp`. sha256: of the file; empty of one that cannot be read. frames: at the rate `fps`. height,
    width: in pixels, upright. motion: mean change of its pixels a second, a share of their range. problem: why it
    cannot be read, or None.
    """

    name: str
    stamp: list[int]
    fps: float
    sha256: str
    frames: int = 0
    height: int = 0
    width: int = 0
    motion: float = 0.0
    problem: str | None = None

    @property
    def seconds(self) -> float:
        return self.frames / self.fps


class Span(NamedTuple):
    """A clip: `frames` frames of a film from frame `first` on, at the rate of its survey; `sha256` is the film's."""

    source: Source
    first: int
    frames: int
    fps: float
    sha256: str

    def read(self, height: int, width: int) -> np.ndarray:
        """Its pictures, (F, height, width, 3), uint8: of each the largest middle part of that shape, scaled.

        Raises:
            InputError: the file is another one than when it was surveyed.
        """
        with told_of_film(self.source.where):
            try:
                pictures = self._fitted(self.first, 0, height, width)
            except (ValueError, av.FFmpegError):
                # It cannot be sought; from its beginning on the survey has read all of it.
                pictures = self._fitted(0, self.first, height, width)
        if len(pictures) < self.frames:
            raise InputError(f"{self.source.where}: has changed since it was surveyed; start the same command again")
        return np.stack(pictures)

    def _fitted(self, start: int, left_out: int, height: int, width: int) -> list[np.ndarray]:
        """Read from frame `start` on, leave so many out, and fit the others to (height, width)."""
        frames = film_frames(self.source.open(), self.fps, start)
        return [fitted(picture, height, width) for picture in islice(frames, left_out, left_out + self.frames)]


def look_at(source: Source, fps: float) -> Facts:
    """Decode a film to its end, at so many frames a second."""
    facts, count, change, shape = Facts(source.name, source.stamp, fps, ""), 0, 0.0, (0, 0)
    before: np.ndarray | None = None
    try:
        refuse_name(source.file_name, source.where)
        with told_of_film(source.where):
            for picture in film_frames(source.open(), fps):
                shape = picture.shape[:2]
                small = picture[:: (step := max(min(shape) // THUMBNAIL, 1)), ::step].astype(np.int16)
                if before is not None and before.shape != small.shape:
                    raise ValueError("its pictures are of several sizes")
                change += 0.0 if before is None else float(np.abs(small - before).mean()) / 255
                count, before = count + 1, small
            if not count:
                raise ValueError("there is no picture in it")
            facts = facts._replace(sha256=source.place.sha256())
    except InputError as error:
        return facts._replace(problem=printable(str(error)))
    motion = change * fps / max(count - 1, 1)
    return facts._replace(frames=count, height=shape[0], width=shape[1], motion=round(motion, 6))


def survey(sources: Sequence[Source], fps: float, folder: Path, world: World, threads: int) -> list[Facts]:
    """Look at films together with the other processes, which all call this.

    What was found is in hidden files of the folder until `write_found` or `forget_found`.

    Raises:
        OSError: they cannot be written.
    """
    stamps = {source.name: source.stamp for source in sources}
    known = world.broadcast({facts.name: facts for facts in _known(folder, fps, stamps)} if world.is_main else {})
    missing = [source for source in sources if source.name not in known]
    mine = missing[world.rank :: world.size]
    own, path = [], _part(folder, world.rank)
    with tqdm(total=len(mine), desc="survey", unit="film", disable=None if world.is_main else True) as bar:
        with naming(path), path.open("ab", buffering=0) as log:
            for facts in ahead(lambda source: look_at(source, fps), mine, threads):
                write_all(log.fileno(), _line(facts))
                own.append(facts)
                bar.update()
    found = known | {facts.name: facts for part in world.gather(own) for facts in part}
    return [found[source.name] for source in sources]


def write_found(found: Sequence[Facts], folder: Path) -> None:
    """Write what a survey has found to files.jsonl of its folder, in place of what was there."""
    atomic_write_text(folder / FILES, b"".join(map(_line, found)).decode())
    forget_found(folder)


def forget_found(folder: Path) -> None:
    """Remove what a survey has found in a folder since files.jsonl was written."""
    for part in folder.glob(f".{FILES}.*"):
        part.unlink()


def _part(folder: Path, rank: int) -> Path:
    return folder / f".{FILES}.{rank:05d}"


def _line(facts: Facts) -> bytes:
    return (json.dumps(facts._asdict(), ensure_ascii=False) + "\n").encode()


def _known(folder: Path, fps: float, stamps: dict[str, list[int]]) -> Iterator[Facts]:
    """Read what was found before of films that are as they were. A line that was not finished is none."""
    for path in (folder / FILES, *folder.glob(f".{FILES}.*")):
        with contextlib.suppress(OSError):
            for line in path.read_bytes().splitlines():
                with contextlib.suppress(ValueError, TypeError):
                    facts = Facts(**json.loads(line))
                    if facts.fps == fps and stamps.get(facts.name) == facts.stamp:
                        yield facts


def spans(sources: Sequence[Source], found: Sequence[Facts], frames: int) -> list[tuple[Facts, Span]]:
    """Cut films into clips: from the first frame on, one after another; what is left at the end is none."""
    return [
        (facts, Span(source, first, frames, facts.fps, facts.sha256))
        for source, facts in zip(sources, found, strict=True)
        if facts.problem is None
        for first in range(0, facts.frames - frames + 1, frames)
    ]


def write_summary(
    found: Sequence[Facts], clips: Sequence[tuple[Span, tuple[int, int]]], frames: int, folder: Path
) -> str:
    """Write summary.json, summary.md and contact_sheet.png to a folder; returns the text.

    clips: each with its (height, width) of pixels.
    """
    whole = [facts for facts in found if facts.problem is None]
    broken = {facts.name: facts.problem for facts in found if facts.problem is not None}
    short = [facts.name for facts in whole if facts.frames < frames]
    rows = {
        "seconds": _spread(facts.seconds for facts in whole),
        "motion a second": _spread(facts.motion for facts in whole),
    }
    sizes = Counter(f"{facts.height}x{facts.width}" for facts in whole)
    made = Counter(f"{height}x{width}" for _, (height, width) in clips)
    record = {
        "films": len(found), "clips": len(clips), "frames of a clip": frames, "broken": broken, "too short": short,
        **rows, "sizes of films": dict(sizes.most_common()), "sizes of clips": dict(made.most_common()),
    }  # fmt: skip
    text = f"Films: {len(found)}; broken: {len(broken)}; shorter than a clip: {len(short)}. "
    text += f"Clips of {frames} frames: {len(clips)}.\n"
    if whole:
        text += "\n| of a film | least | 10 % | median | 90 % | most |\n|---|--:|--:|--:|--:|--:|\n"
        for name, spread in rows.items():
            text += f"| {name} | {' | '.join(f'{value:.3g}' for value in spread.values())} |\n"
    for title, counts in (("films", sizes), ("clips", made)):
        most = ", ".join(f"{size} ({count})" for size, count in counts.most_common(12))
        text += f"\nSizes of {title}, height x width: {most or 'none'}.\n"
    text += "".join(f"\n* {reason}" for reason in broken.values())
    text += "".join(f"\n* {name}: shorter than a clip" for name in short)
    atomic_write_text(folder / "summary.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    atomic_write_text(folder / "summary.md", text.rstrip() + "\n")
    if clips:
        write_sheet(_sheet([clips[place] for place in evenly(len(clips), SHEET)]), folder / "contact_sheet.png")
    else:
        (folder / "contact_sheet.png").unlink(missing_ok=True)
    return text


def _sheet(chosen: Iterable[tuple[Span, tuple[int, int]]]) -> Iterator[Row]:
    for span, size in chosen:
        pictures = span.read(*size)
        yield Row(
            f"{span.source.name}, {span.first / span.fps:.1f} s: {span.source.caption}",
            [pictures[place] for place in evenly(len(pictures), COLUMNS)],
        )


def _spread(values: Iterable[float]) -> dict[str, float]:
    ordered = sorted(values)
    shares = {"least": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "most": 1.0}
    return {name: ordered[round(share * (len(ordered) - 1))] for name, share in shares.items() if ordered}
