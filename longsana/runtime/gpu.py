"""Facts about this process's GPU."""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

log = logging.getLogger(__name__)

CAPABILITY = (8, 0)
"""Compute capability from which on NVIDIA's tensor cores multiply bfloat16 (A100)."""

TOGETHER, PIXELS = 32, 1 << 24
"""Pictures that a CPU's caches hold, and pixels that fill a GPU, of which each launch costs as much for fewer."""


def pictures_together(pictures: Tensor) -> int:
    """Count how many of these pictures (..., H, W, 3) to look at together, on the device where they are."""
    if pictures.device.type == "cpu":
        return TOGETHER
    height, width = pictures.shape[-3:-1]
    return max(TOGETHER, PIXELS // (height * width))


def shortcoming() -> str | None:
    """Say of this process's GPU, if its compute capability is below 8.0, which that is; to follow "needs"."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return None
    found = torch.cuda.get_device_capability()
    if found >= CAPABILITY:
        return None
    needed, own = ((".".join(map(str, version))) for version in (CAPABILITY, found))
    return f"compute capability {needed}, and {torch.cuda.get_device_name()} has {own}"


@cache
def has_bfloat16() -> bool:
    """Tell whether this process's GPU, if there is one, multiplies bfloat16; say once if float32 takes its place."""
    if short := shortcoming():
        log.warning("float32 in the place of bfloat16, which needs %s; float16 where a setting says so", short)
    return short is None
