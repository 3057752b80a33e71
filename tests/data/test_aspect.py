"""The aspect tables, and the nearest entry."""

from __future__ import annotations

import math

import pytest

from longsana.data.aspect import ASPECT_RATIOS, nearest_size
from longsana.runtime.errors import InputError

TABLES = tuple(ASPECT_RATIOS)


@pytest.mark.parametrize(
    ("table", "ratio", "size"),
    [
        ("ASPECT_RATIO_VIDEO_480_MS", 9 / 16, (480, 832)),
        ("ASPECT_RATIO_VIDEO_480_MS", 16 / 9, (832, 480)),
        ("ASPECT_RATIO_VIDEO_480_MS", 1.0, (624, 624)),
        ("ASPECT_RATIO_VIDEO_480_MS", 3 / 4, (560, 720)),
        ("ASPECT_RATIO_VIDEO_480_MS", 0.01, (448, 896)),
        ("ASPECT_RATIO_VIDEO_480_MS", 100.0, (896, 448)),
        ("ASPECT_RATIO_VIDEO_720_MS_DIV32", 9 / 16, (704, 1280)),
        ("ASPECT_RATIO_VIDEO_720_MS_DIV32", 4 / 3, (1088, 832)),
    ],
)
def test_nearest_size(table: str, ratio: float, size: tuple[int, int]) -> None:
    assert nearest_size(table, ratio) == size


@pytest.mark.parametrize("table", TABLES)
def test_every_key_finds_its_own_entry_and_describes_it(table: str) -> None:
    for ratio, (height, width) in ASPECT_RATIOS[table].items():
        assert nearest_size(table, ratio) == (height, width)
        assert math.isclose(height / width, ratio, abs_tol=0.07)  # 1280 / 704 is listed as 1.75


def test_sizes_suit_the_networks() -> None:
    # 8 pixels a latent and 2 latents a token; the 720p VAE makes 32 pixels a latent.
    for table, multiple in zip(TABLES, (16, 32), strict=True):
        assert all(side % multiple == 0 for size in ASPECT_RATIOS[table].values() for side in size)


@pytest.mark.parametrize("ratio", [0.0, -1.0, math.nan, math.inf])
def test_a_ratio_must_be_a_positive_number(ratio: float) -> None:
    with pytest.raises(InputError, match="positive"):
        nearest_size(TABLES[0], ratio)


def test_an_unknown_table_is_named_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"ASPECT_RATIO_VIDEO_480.*did you mean 'ASPECT_RATIO_VIDEO_480_MS'"):
        nearest_size("ASPECT_RATIO_VIDEO_480", 1.0)
