"""The identity of objects: hue, size, kind and marking, now and in a second of the past."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longsana.shapes.looks import MARKINGS
from longsana.shapes.scenes import FPS, SHOWN

TINT_APART = 0.35
"""Tints (of a range from -1 to 1) that are two: 4.2 degrees of hue. Blurred and noisy, 99 % are seen within 0.05."""
SIZE_APART = 0.07
"""Logarithm of radii that are two. Blurred and noisy, 99 % are seen within 0.055, and most of that does not change."""
ANGLE_APART = math.radians(15)
"""Angles of stripes that are two. Blurred and noisy, 99 % are seen within 1.5 degrees."""
STRIPES = MARKINGS.index("stripes")


class Looks(NamedTuple):
    """The looks of N objects in K frames, (N, K) each.

    known: bool, whether it can be said. kind: index into SHOWN. tint: see `Seen`. size: logarithm of the radius in
    pixels. marking: index into MARKINGS. angle: radians, of stripes.
    """

    known: Tensor
    kind: Tensor
    tint: Tensor
    size: Tensor
    marking: Tensor
    angle: Tensor


def recall(looks: Looks, last: Tensor, frames: int = FPS) -> Looks:
    """Summarise the looks of the second that ends with frame `last` (N, K): means, or what is seen most often.

    Frames before the first count as such that say nothing, as those do in which the object was not known.
    """
    striped = looks.known & (looks.marking == STRIPES)
    parts = [
        looks.known[..., None].double(),
        F.one_hot(looks.kind.clamp(min=0), len(SHOWN)) * looks.known[..., None],
        F.one_hot(looks.marking.clamp(min=0), len(MARKINGS)) * (looks.known & (looks.marking >= 0))[..., None],
        torch.stack([looks.tint.where(looks.known, 0), looks.size.where(looks.known, 0)], dim=-1),
        # Stripes at 0 and at 180 degrees are the same: the mean is taken of doubled angles.
        torch.stack([(2 * looks.angle).cos().where(striped, 0), (2 * looks.angle).sin().where(striped, 0)], dim=-1),
    ]
    totals = F.pad(torch.cat(parts, dim=-1).cumsum(1), (0, 0, 1, 0))
    after = (last + 1).clamp(min=0)
    ends, starts = (
        index[..., None].expand(-1, -1, totals.shape[-1]) for index in (after, (after - frames).clamp(min=0))
    )
    sums = totals.gather(1, ends) - totals.gather(1, starts)
    count, kinds, markings, means, turns = sums.split([1, len(SHOWN), len(MARKINGS), 2, 2], dim=-1)
    tint, size = (means / count.clamp(min=1)).float().unbind(-1)
    marking = markings.argmax(-1).where(markings.sum(-1) > 0, -1)
    angle = (torch.atan2(turns[..., 1], turns[..., 0]) / 2).float()
    return Looks(count[..., 0] > 0, kinds.argmax(-1), tint, size, marking, angle)


def alike(now: Looks, then: Looks) -> Tensor:
    """Tell whether objects (N, F) are those that they were, (N, F) or (N, 1): bool; False where either is not known."""
    turned = ((now.angle - then.angle + math.pi / 2) % math.pi - math.pi / 2).abs()
    return (
        (now.known & then.known)
        & (now.kind == then.kind)
        & ((now.tint - then.tint).abs() <= TINT_APART)
        & ((now.size - then.size).abs() <= SIZE_APART)
        & (now.marking == then.marking)
        & ((now.marking != STRIPES) | (turned <= ANGLE_APART))
        & (now.marking >= 0)
    )
