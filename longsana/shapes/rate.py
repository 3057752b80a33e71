"""The learning rate of the small world's own parts."""

from __future__ import annotations

import math


def warm_cosine(step: int, total: int) -> float:
    """Share of the full rate at this step: a warm-up over 50 steps, then a cosine down to a fiftieth."""
    return min(1.0, (step + 1) / 50) * (0.51 + 0.49 * math.cos(math.pi * min(step / total, 1.0)))
