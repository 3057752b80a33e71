"""The sizes a video may have, by aspect ratio (method.md 6.4)."""

from __future__ import annotations

import math

from longsana.runtime.errors import InputError, did_you_mean

ASPECT_RATIOS: dict[str, dict[float, tuple[int, int]]] = {
    "ASPECT_RATIO_VIDEO_480_MS": {
        0.5: (448, 896),
        0.57: (480, 832),
        0.68: (528, 768),
        0.78: (560, 720),
        1.0: (624, 624),
        1.13: (672, 592),
        1.29: (720, 560),
        1.46: (768, 528),
        1.67: (816, 496),
        1.75: (832, 480),
        2.0: (896, 448),
    },
    "ASPECT_RATIO_VIDEO_720_MS_DIV32": {
        0.5: (672, 1344),
        0.57: (704, 1280),
        0.68: (800, 1152),
        0.78: (832, 1088),
        1.0: (960, 960),
        1.13: (1024, 896),
        1.29: (1088, 832),
        1.46: (1152, 800),
        1.67: (1248, 736),
        1.75: (1280, 704),
        2.0: (1344, 672),
    },
}
"""Table name to {height / width: (height, width)}, in pixels. The keys are rounded: 480 / 832 is 0.577."""


def nearest_size(table_name: str, ratio: float) -> tuple[int, int]:
    """The (height, width) whose key lies nearest to `ratio` = height / width.

    Raises:
        InputError: no such table, or a ratio that is not a positive number.
    """
    if table_name not in ASPECT_RATIOS:
        raise InputError(
            f"no aspect ratio table '{table_name}'{did_you_mean(table_name, ASPECT_RATIOS)}; "
            f"known: {', '.join(ASPECT_RATIOS)}"
        )
    if not (math.isfinite(ratio) and ratio > 0):
        raise InputError(f"aspect ratio {ratio}: must be a positive number, height / width")
    table = ASPECT_RATIOS[table_name]
    return table[min(table, key=lambda key: abs(key - ratio))]
