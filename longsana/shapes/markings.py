"""Markings that are painted on objects: pictures of all are compared with what is seen of an object."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from longsana.shapes.looks import MARKINGS, painted
from longsana.shapes.scenes import SHOWN, signed_distance

SIDE, REACH = 32, 1.15
"""Samples a side of the picture in which markings are compared, and half its extent in radii of the object."""
INSET = 0.1
"""Radii from the edge of the object that are left out: there its own edge is seen."""
ANGLES = 36
"""Angles of stripes that are compared, 5 degrees apart; between them a parabola decides."""
FAINT = 0.22
"""Standard deviation of the darkness (0 bare, 1 painted) below which an object is plain."""
LIKENESS = 0.6
"""Correlation with a marking below which it is none of ours."""


def find_marking(darkness: Tensor, place: Tensor, radius: Tensor, kind: Tensor) -> tuple[Tensor, Tensor]:
    """Index (M,) into MARKINGS, or -1, and the angle (M,) of stripes in [0, pi), else nan.

    darkness: (M, h, w) of crops, 0 where bare, 1 where painted. place: (M, 2) the object's x and y in the crop, in
    pixels. radius: (M,) pixels. kind: (M,) index into SHOWN.
    """
    height, width = darkness.shape[1:]
    line = _line(darkness.device)
    half = darkness.new_tensor([width, height]) / 2
    spots = (place[:, None] + radius[:, None, None] * line[:, None]) / half - 1  # (M, S, 2)
    grid = torch.stack(torch.broadcast_tensors(spots[:, None, :, 0], spots[:, :, None, 1]), dim=-1)
    seen = F.grid_sample(darkness[:, None], grid, align_corners=False)[:, 0].flatten(1)
    pictures, masks = _templates(darkness.device)
    pictures, mask = pictures[kind], masks[kind]
    count = mask.sum(1, keepdim=True)
    seen = (seen - (seen * mask).sum(1, keepdim=True) / count) * mask
    strength = (seen.square().sum(1) / count[:, 0]).sqrt()
    likeness = torch.einsum("mjs,ms->mj", pictures, seen / seen.norm(dim=1, keepdim=True).clamp(min=1e-6))
    best, which = likeness.max(1)
    striped = which < ANGLES
    marking = torch.where(striped, MARKINGS.index("stripes"), MARKINGS.index("dots")).where(best >= LIKENESS, -1)
    marking = marking.where(strength >= FAINT, MARKINGS.index("plain"))
    angle = _between(likeness[:, :ANGLES]) * (math.pi / ANGLES) % math.pi
    return marking, angle.where(marking == MARKINGS.index("stripes"), torch.nan)


def _between(values: Tensor) -> Tensor:
    """Locate the largest of values (M, J) on a circle, in steps: the summit of a parabola through three of them."""
    top = values.argmax(1)
    before, at, after = (values.gather(1, ((top + step) % values.shape[1])[:, None])[:, 0] for step in (-1, 0, 1))
    bend = (before - 2 * at + after).clamp(max=-1e-6)
    return top + (0.5 * (before - after) / bend).clamp(-0.5, 0.5)


def _line(device: torch.device) -> Tensor:
    """Place samples, in radii (S,)."""
    return ((torch.arange(SIDE, device=device) + 0.5) / SIDE * 2 - 1) * REACH


@lru_cache
def _templates(device: torch.device) -> tuple[Tensor, Tensor]:
    """Pictures (kinds, J, S²) of stripes at all angles, then of dots, of mean 0 and norm 1; where to look, (kinds, S²).

    Drawn at a radius of 15 pixels, the edges of paint are as soft as there.
    """
    line = _line(device) * 15.0
    x, y = line[None, :], line[:, None]
    angles = [math.pi * index / ANGLES for index in range(ANGLES)]
    drawn = [painted("stripes", x, y, 15.0, angle) for angle in angles] + [painted("dots", x, y, 15.0, 0.0)]
    pictures = torch.stack(drawn).flatten(1)
    masks = torch.stack([signed_distance(kind, x, y, 15.0) < -INSET * 15.0 for kind in SHOWN]).flatten(1).float()
    inside = pictures * masks[:, None]
    inside = (inside - inside.sum(-1, keepdim=True) / masks.sum(-1)[:, None, None]) * masks[:, None]
    return inside / inside.norm(dim=-1, keepdim=True), masks
