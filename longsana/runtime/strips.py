"""Contact sheets: a row of pictures for each of several films, with a line of words above it."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from longsana.runtime.files import whole_file

COLUMNS = 6
"""Pictures of a film."""
HEIGHT, GAP, LINE = 96, 4, 16
NARROWEST, WIDEST = 640, 4096
"""Pixels of a sheet's side: room for words, and the most, beyond which its pictures are made smaller."""
FONTS = ("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf")
"""Fonts for words of any language, of the system, before those of libraries, which know fewer letters."""


class Row(NamedTuple):
    """Pictures (H, W, 3), uint8, of one size, and what stands above them."""

    words: str
    pictures: Sequence[np.ndarray]


def evenly(count: int, wanted: int) -> list[int]:
    """Choose at most so many of numbers below `count`, evenly spread, the first and the last among them."""
    if count <= wanted:
        return list(range(count))
    return [round(place * (count - 1) / max(wanted - 1, 1)) for place in range(wanted)]


def write_sheet(rows: Iterable[Row], path: Path) -> None:
    """Write a PNG of rows of pictures, each `HEIGHT` pixels high, or less where they would be too wide together.

    Words that are too long for a line are cut.
    """
    lines = [row for row in rows if row.pictures]
    scaled = [[_scaled(picture, len(row.pictures)) for picture in row.pictures] for row in lines]
    width = max([NARROWEST, *(sum(one.width + GAP for one in row) + GAP for row in scaled)])
    sheet = Image.new("RGB", (width, sum(LINE + row[0].height + 2 * GAP for row in scaled) or 1), "white")
    draw, font, top = ImageDraw.Draw(sheet), _font(), 0
    for row, pictures in zip(lines, scaled, strict=True):
        draw.text((GAP, top + 1), _cut(" ".join(row.words.split()), font, width - 2 * GAP), fill="black", font=font)
        top, left = top + LINE, GAP
        for picture in pictures:
            sheet.paste(picture, (left, top))
            left += picture.width + GAP
        top += pictures[0].height + 2 * GAP
    with whole_file(path) as partial:
        sheet.save(partial, format="PNG")


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    library = find_spec("matplotlib")
    own = [str(Path(library.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf")] if library and library.origin else []
    for name in (*FONTS, *own):
        with suppress(OSError):
            return ImageFont.truetype(name, 11)
    return ImageFont.load_default(11)


def _cut(words: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(words) <= width:
        return words
    # The longest beginning that has room.
    end = bisect_right(range(len(words)), width, key=lambda end: math.ceil(font.getlength(f"{words[:end]}..."))) - 1
    return f"{words[:end]}..."


def _scaled(picture: np.ndarray, beside: int) -> Image.Image:
    scale = min(HEIGHT / picture.shape[0], (WIDEST / beside - GAP) / picture.shape[1])
    size = max(round(scale * picture.shape[1]), 1), max(round(scale * picture.shape[0]), 1)
    return Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR)


class Strip:
    """Pictures spread evenly over a film in pieces, whose length nobody says; it keeps few, and small ones."""

    def __init__(self, columns: int = COLUMNS) -> None:
        self._columns, self._every, self._count = columns, 1, 0
        self._kept: list[np.ndarray] = []
        self._last: np.ndarray | None = None

    def add(self, pictures: Iterable[np.ndarray]) -> None:
        """Take the next pictures, (H, W, 3), uint8."""
        for picture in pictures:
            if self._count % self._every == 0:
                self._kept.append(self._small(picture))
            if len(self._kept) > 4 * self._columns:
                self._kept, self._every = self._kept[::2], 2 * self._every
            self._count, self._last = self._count + 1, picture

    def pictures(self) -> list[np.ndarray]:
        """The first one, the last one, and those between them."""
        kept = self._kept
        if self._last is not None and (self._count - 1) % self._every:
            kept = [*kept, self._small(self._last)]
        return [kept[place] for place in evenly(len(kept), self._columns)]

    def _small(self, picture: np.ndarray) -> np.ndarray:
        return np.asarray(_scaled(picture, self._columns))
