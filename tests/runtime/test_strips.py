"""Pictures that stand for a film, and values that threads make ahead."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longsana.runtime.later import ahead
from longsana.runtime.strips import COLUMNS, GAP, HEIGHT, LINE, NARROWEST, Row, Strip, evenly, write_sheet


@pytest.mark.parametrize("count", [1, 2, 6, 7, 100, 1000])
def test_a_strip_is_of_the_whole_film_however_it_comes(count: int) -> None:
    film = [np.full((HEIGHT, 8, 3), number * 255 // max(count - 1, 1), np.uint8) for number in range(count)]
    strips = []
    for cut in (1, 7, count):
        strip = Strip()
        for start in range(0, count, cut):
            strip.add(film[start : start + cut])
        strips.append([int(picture[0, 0, 0]) for picture in strip.pictures()])
        assert len(strip._kept) <= 4 * COLUMNS
    assert strips[0] == strips[1] == strips[2]
    shown = strips[0]
    assert len(shown) == min(count, COLUMNS) and shown[0] == 0 and (count == 1 or shown[-1] == 255)
    if count >= COLUMNS:
        assert all(abs(step - 255 / (COLUMNS - 1)) < 255 / COLUMNS for step in np.diff(shown))


def test_numbers_are_spread_evenly() -> None:
    assert evenly(3, 6) == [0, 1, 2] and evenly(0, 6) == [] and evenly(9, 1) == [0]
    assert evenly(101, 6) == [0, 20, 40, 60, 80, 100]


def test_a_sheet_has_a_row_for_each_film(tmp_path: Path) -> None:
    red, blue = (np.full((48, 80, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
    write_sheet([Row("one", [red, blue]), Row("none", []), Row("two\nlines", [blue])], tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.size == (NARROWEST, 2 * (LINE + HEIGHT + 2 * GAP))
        row = LINE + HEIGHT + 2 * GAP
        found = [sheet.getpixel((left, top)) for left, top in ((9, LINE + 9), (180, LINE + 9), (9, row + LINE + 9))]
    assert found == [(255, 0, 0), (0, 0, 255), (0, 0, 255)]


def test_words_are_of_any_language_and_end_where_the_sheet_does(tmp_path: Path) -> None:
    def line(words: str) -> np.ndarray:
        write_sheet([Row(words, [np.zeros((48, 80, 3), np.uint8)] * 5)], tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as sheet:
            assert sheet.width == 5 * (160 + GAP) + GAP
            return np.asarray(sheet)[:LINE].min(2)

    letters = [line(letter).tobytes() for letter in "üïéжя"]
    assert len(set(letters)) == 5, "a letter that a font lacks looks like any other"
    long = line("word " * 200)
    assert long[:, :-30].min() < 100 and long[:, -GAP:].min() == 255
    assert np.array_equal(long, line("word " * 199)) and not np.array_equal(long, line("word " * 5))


def test_threads_work_ahead_and_keep_the_order() -> None:
    begun: list[int] = []
    second = threading.Event()

    def make(number: int) -> int:
        begun.append(number)
        if number == 1:
            second.set()
        assert second.wait(10), "nobody works ahead"
        if number == 7:
            raise ValueError("seven")
        return number * number

    made = ahead(make, range(8), 3)
    assert [next(made) for _ in range(7)] == [0, 1, 4, 9, 16, 25, 36]
    assert len(begun) <= 7 + 3
    with pytest.raises(ValueError, match="seven"):
        next(made)
