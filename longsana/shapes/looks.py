"""Looks of a shape that a caption leaves open: its exact tint, its exact size, and what is painted on it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TINT = 12.0
"""Degrees of hue from a colour of the palette to either end of its range. The nearest two, cyan and blue, are 38 apart;
what stays between their ranges is twice what a video may miss a hue by."""
WHITE_TINT = (30.0, 8.0)
"""Bytes that white, which has no hue, loses at the ends of its range: of red (cool) or of blue (warm), and of green."""
RADII = {"small": (13.0, 16.5), "big": (18.0, 21.0)}
"""Least and largest radius in pixels that a word for a size allows. Between two rows of the picture there is room for
21; rings of 13 are 6 pixels thick."""
MARKINGS = ("plain", "stripes", "dots")
SHADE = 0.65
"""Brightness of paint, a share of the shape's own. Less, and paint on red or green would be lost on brown or teal."""
STRIPE = 0.5
"""Width of each of the two stripes, and distance of their middles from the shape's, in radii: they are 6.5 to 10.5
pixels wide, near the 8 of a latent."""
DOTS = ((0.64, 0.0), (-0.64, 0.0), (0.0, 0.64), (0.0, -0.64))
DOT = 0.27
"""Middles of the dots and their radius, in radii of the shape: where all kinds but the triangle have a body."""


@dataclass(frozen=True)
class Look:
    """The looks of one shape, all the time.

    tint: in [-1, 1], the place of its hue in its colour's range. radius: pixels, within its word's `RADII`.
    marking: one of MARKINGS. angle: radians in [0, pi) from the x axis to the line across the stripes, clockwise on
    the screen; it means nothing for other markings.
    """

    tint: float
    radius: float
    marking: str = "plain"
    angle: float = 0.0


def tinted(colour: Tensor, tint: Tensor) -> Tensor:
    """Bytes (..., 3), float32, of palette colours (..., 3) with these tints (...): the hue turned by TINT degrees each.

    Value and saturation stay. White, which has none, becomes warmer or cooler.
    """
    hue, largest, span = _hue(colour)
    sextant = ((hue + TINT * tint) / 60)[..., None]
    # The distance of a channel from the hue, in sextants: below 1 it is full, above 2 empty.
    turn = (sextant + torch.tensor([5.0, 3.0, 1.0], device=colour.device)) % 6
    ramp = torch.minimum(turn, 4 - turn).clamp(0, 1)
    turned = largest[..., None] - span[..., None] * ramp
    cool, warm = tint.clamp(min=0), (-tint).clamp(min=0)
    most, less = WHITE_TINT
    loss = torch.stack([most * cool, less * (cool + warm), most * warm], dim=-1)
    return torch.where(span[..., None] < 1, colour - loss, turned)


def tint_of(seen: Tensor, colour: Tensor) -> Tensor:
    """The tints (...) that bytes (..., 3) have as shades of palette colours (..., 3); beyond 1, out of the range.

    Neither shadow nor loss of saturation changes it, but for white, where bytes count.
    """
    hue, largest, _ = _hue(seen)
    own, _, span = _hue(colour)
    red, _, blue = seen.unbind(-1)
    white = (blue - red) / WHITE_TINT[0] * colour.amax(-1) / largest.clamp(min=1)
    return torch.where(span < 1, white, ((hue - own + 180) % 360 - 180) / TINT)


def _hue(colour: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hue in degrees, largest channel, and largest minus smallest, of bytes (..., 3)."""
    red, green, blue = colour.float().unbind(-1)
    largest, smallest = torch.maximum(red, green).maximum(blue), torch.minimum(red, green).minimum(blue)
    span = largest - smallest
    divisor = span.clamp(min=1e-6)
    sextant = torch.where(
        largest == red,
        (green - blue) / divisor,
        torch.where(largest == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    return sextant * 60, largest, span


def painted(marking: str, x: Tensor, y: Tensor, radius: Tensor | float, angle: Tensor | float) -> Tensor:
    """Share in [0, 1] of each pixel that carries the paint of a marking, on a shape whose centroid is the origin.

    x, y: pixels right and down, of any shapes that broadcast with radius (pixels) and angle (radians).

    Raises:
        ValueError: the marking is not one of MARKINGS.
    """
    if marking == "plain":
        return torch.zeros_like(x + y)
    if marking == "stripes":
        angle = torch.as_tensor(angle, device=x.device)
        across = (x * angle.cos() + y * angle.sin()).abs()
        distance = (across - STRIPE * radius).abs() - STRIPE / 2 * radius
        return (0.5 - distance).clamp(0, 1)
    if marking == "dots":
        nearest = torch.full_like(x + y, math.inf)
        for right, down in DOTS:
            nearest = torch.minimum(nearest, torch.hypot(x - right * radius, y - down * radius))
        return (0.5 - (nearest - DOT * radius)).clamp(0, 1)
    raise ValueError(f"marking={marking}: must be one of {', '.join(MARKINGS)}")
