"""Sight: which objects pictures of the shapes world show, where, and how they look.

Candidates are rendered and compared, nothing is learned. It works on any number of videos at once, on any device;
memory beyond the result does not grow with their frames.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longsana.runtime.gpu import pictures_together
from longsana.shapes.looks import SHADE, tint_of, tinted
from longsana.shapes.markings import find_marking
from longsana.shapes.motion import velocities
from longsana.shapes.scenes import BACKGROUNDS, COLOURS, SHOWN, coverage

CORE = 24
"""Pixels of core that make an object; the smallest of the world's have 130."""
TOLERANCE = 15.0
"""Bytes that any channel may be off: between a VAE's few and the 25 of a shift by a tenth of the range."""
MISFIT = 0.1
"""Largest misfit of a shape, a share of its area: blurred by two pixels it misses itself by 0.08, a diamond a circle by
0.11 to 0.15, an upturned triangle everything by 0.25."""
CROP = 56
"""Side of the square around an object that is compared; no shape of the world, or misjudged for another, is larger."""
NOTHING = 255
RIM = 5
"""Pixels: where the core comes as near to the rim of the picture, a part of a triangle's tip may be cut off."""
BARE = 0.15
"""Share of an object without paint, at least; dots leave two thirds, stripes a third."""


class Seen(NamedTuple):
    """The objects that frames show. The colours of the palette come last: each can be seen as one object.

    background: (B, F) index into BACKGROUNDS, -1 if near none of them.
    core: (B, F, 7) pixels inside of the object of this colour; none below CORE.
    rims: (B, F, 7, 4) whether its core reaches within RIM pixels of the picture's left, top, right and bottom.
    tint: (B, F, 7) place of its hue in the colour's range, see `tinted`; beyond [-1, 1] outside of it.
    off: (B, F, 7) bytes by which its mean colour, but for paint, misses the range, in the worst channel.
    kind: (B, F, 7) index into SHOWN, -1 if it resembles none or comes in several pieces.
    radius: (B, F, 7) half its extent in pixels, if it is of this kind; nan where there is no kind.
    centre: (B, F, 7, 2) x and y in pixels; nan where nothing of this colour is seen.
    marking: (B, F, 7) index into MARKINGS, -1 if it resembles none, or where there is no kind.
    angle: (B, F, 7) radians in [0, pi), of stripes; nan for all other markings.
    size: (height, width) of the picture.
    """

    background: Tensor
    core: Tensor
    rims: Tensor
    tint: Tensor
    off: Tensor
    kind: Tensor
    radius: Tensor
    centre: Tensor
    marking: Tensor
    angle: Tensor
    size: tuple[int, int]

    @property
    def present(self) -> Tensor:
        """(B, F, 7): an object of this colour is there."""
        return self.core >= CORE

    @property
    def velocity(self) -> Tensor:
        """(B, F - 4, 7, 2): pixels a frame to the right and down, over four frames; nan where it is not seen."""
        return velocities(self.centre, self.size, 4)

    @classmethod
    def join(cls, pieces: Sequence[Seen]) -> Seen:
        """Consecutive pieces of the same videos."""
        *tensors, sizes = zip(*pieces, strict=True)
        return cls._make([*(torch.cat(values, dim=1) for values in tensors), sizes[0]])

    def first(self, frames: int) -> Seen:
        """Keep what the first frames show."""
        *tensors, size = self
        return Seen._make([*(values[:, :frames] for values in tensors), size])


def observe(pictures: Tensor) -> Seen:
    """Observe uint8 pictures (B, F, H, W, 3)."""
    shape, size = pictures.shape[:2], pictures.shape[2:4]
    parts = [_observe(part) for part in pictures.flatten(0, 1).split(pictures_together(pictures))]
    fields = [torch.cat(values).unflatten(0, shape) for values in zip(*parts, strict=True)]
    return Seen._make([*fields, (size[0], size[1])])


def _observe(pictures: Tensor) -> tuple[Tensor, ...]:
    """The tensors of `Seen`, of pictures (N, H, W, 3)."""
    device = pictures.device
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32, device=device)
    grounds = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32, device=device)
    # Shapes cover at most a quarter; every fourth pixel is enough for a median.
    ground = pictures[:, ::2, ::2].flatten(1, 2).float().median(1).values  # (N, 3)
    wrong, background = (ground[:, None] - grounds).abs().amax(-1).min(1)
    background = background.where(wrong <= TOLERANCE, -1)

    label, shaded = _nearest(pictures, palette, ground)
    solid = _solid(label)
    core = torch.stack([(solid == colour).flatten(1).sum(1) for colour in range(len(palette))], dim=1)
    unseen = torch.full(core.shape, torch.nan, device=device)
    rims = torch.zeros((*core.shape, 4), dtype=torch.bool, device=device)
    tint, off, radius, angle = (unseen.clone() for _ in range(4))
    centre, kind, marking = unseen[..., None].repeat(1, 1, 2), torch.full_like(core, -1), torch.full_like(core, -1)
    fields = (rims, tint, off, kind, radius, centre, marking, angle)
    frames, colours = (core >= CORE).nonzero(as_tuple=True)
    group = pictures_together(pictures)
    for frame, colour in zip(frames.split(group), colours.split(group), strict=True):
        found = _inspect(pictures, solid, shaded, ground, palette, frame, colour)
        for field, values in zip(fields, found, strict=True):
            field[frame, colour] = values
    return background, core, *fields


def _nearest(pictures: Tensor, palette: Tensor, ground: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the colour that each pixel (N, H, W) is nearest to, and whether to the darker one of its paint.

    Colours are the palette's, and then the ground's.
    """
    count = len(palette)
    fixed = torch.cat([palette, SHADE * palette]).expand(len(pictures), -1, -1)
    candidates = torch.cat([fixed, ground[:, None]], dim=1)  # (N, 15, 3)
    pixels = pictures.flatten(1, 2).transpose(1, 2).float()
    # |p - c|² = |p|² - 2 (p·c - |c|²/2): nearest is where the bracket is largest.
    affinity = torch.baddbmm(-candidates.square().sum(-1, keepdim=True) / 2, candidates, pixels)
    best, *others = affinity.unbind(1)
    label = torch.zeros(best.shape, dtype=torch.uint8, device=best.device)
    for index, other in enumerate(others, start=1):  # argmax across planes takes ten times as long on a CPU
        label.masked_fill_(other > best, index)
        best = torch.maximum(best, other)
    label = label.unflatten(1, pictures.shape[1:3])
    shaded = (label >= count) & (label < 2 * count)
    return label - count * (label >= count).to(torch.uint8), shaded


def _solid(label: Tensor) -> Tensor:
    """Labels (N, H, W) whose eight neighbours on the torus have the same one; NOTHING elsewhere.

    A soft edge between two colours passes through others on its way, in a line too thin to have an inside.
    """
    for side in (1, 2):
        same = (label == label.roll(1, side)) & (label == label.roll(-1, side))
        label = label.where(same, NOTHING)
    return label


class Found(NamedTuple):
    """The fields of `Seen`, from `rims` on, of M objects."""

    rims: Tensor
    tint: Tensor
    off: Tensor
    kind: Tensor
    radius: Tensor
    centre: Tensor
    marking: Tensor
    angle: Tensor


def _inspect(
    pictures: Tensor, solid: Tensor, shaded: Tensor, ground: Tensor, palette: Tensor, frame: Tensor, colour: Tensor
) -> Found:
    """The objects of these colours in these pictures."""
    height, width = solid.shape[1:]
    inside = solid[frame] == colour[:, None, None]
    columns, rows = inside.any(1), inside.any(2)
    rims = torch.stack(
        [part.any(1) for part in (columns[:, :RIM], rows[:, :RIM], columns[:, -RIM:], rows[:, -RIM:])], dim=1
    )
    rough = torch.stack([_circular_mean(inside.sum(1)), _circular_mean(inside.sum(2))], dim=1)
    sides = [min(CROP, width), min(CROP, height)]
    corner = (rough - torch.tensor(sides, device=rough.device) / 2).round().long()
    local = [torch.arange(side, device=rough.device) for side in sides]
    across = ((corner[:, :1] + local[0]) % width)[:, None, :]
    down = ((corner[:, 1:] + local[1]) % height)[:, :, None]
    pixels = pictures[frame[:, None, None], down, across].float()  # (M, h, w, 3)
    core = (solid[frame[:, None, None], down, across] == colour[:, None, None]).float()
    paint = shaded[frame[:, None, None], down, across].float() * core

    strays = inside.sum((1, 2)) - core.sum((1, 2))
    deep = F.avg_pool2d(core[:, None], 3, 1, 1)[:, 0]
    mean = _mean_colour(pixels, core, paint, deep)
    share = _shares(pixels, core, paint, deep, mean, ground[frame])
    area = share.sum((1, 2)).clamp(min=1)
    x = (share.sum(1) * (local[0] + 0.5)).sum(1) / area
    y = (share.sum(2) * (local[1] + 0.5)).sum(1) / area

    right, below = local[0] + 0.5 - x[:, None], local[1] + 0.5 - y[:, None]
    radii = (area[:, None] / _unit_areas(area.device)).sqrt()  # (M, kinds)
    misfits = []
    for index, kind in enumerate(SHOWN):
        ideal = coverage(kind, right[:, None, :], below[:, :, None], radii[:, index, None, None])
        misfits.append((share - ideal).square().sum((1, 2)) / area)
    misfit, best = torch.stack(misfits, dim=1).min(1)
    known = (misfit <= MISFIT) & (strays < CORE)
    radius = radii.gather(1, best[:, None])[:, 0]
    place = torch.stack([x, y], dim=1)
    darkness = (1 - (pixels * mean[:, None, None]).sum(-1) / mean.square().sum(-1)[:, None, None]) / (1 - SHADE)
    marking, angle = find_marking(darkness, place, radius, best)
    tint = tint_of(mean, palette[colour])
    nearest = tinted(palette[colour], tint.clamp(-1, 1))
    return Found(
        rims,
        tint,
        (mean - nearest).abs().amax(-1),
        best.where(known, -1),
        radius.where(known, torch.nan),
        (corner + place) % rough.new_tensor([width, height]),
        marking.where(known, -1),
        angle.where(known, torch.nan),
    )


def _shares(pixels: Tensor, core: Tensor, paint: Tensor, deep: Tensor, mean: Tensor, ground: Tensor) -> Tensor:
    """Share of each pixel that is the object's, (M, h, w), between the ground's colour and its own, darker near paint.

    pixels (M, h, w, 3); core, paint, deep (M, h, w); mean and ground (M, 3): colours of the object and around it.
    """
    heart = (deep > 0.99).float()
    local_paint = F.avg_pool2d((heart * paint)[:, None], 9, 1, 4) / F.avg_pool2d(heart[:, None], 9, 1, 4).clamp(
        min=1e-6
    )
    own = mean[:, None, None] * (1 - (1 - SHADE) * local_paint[:, 0, :, :, None])
    span = own - ground[:, None, None]
    share = ((pixels - ground[:, None, None]) * span).sum(-1) / span.square().sum(-1)
    # An edge may lie up to three pixels out of the core; what is farther belongs to others.
    near = F.max_pool2d(F.max_pool2d(core[:, None], (1, 7), 1, (0, 3)), (7, 1), 1, (3, 0))[:, 0]
    return torch.maximum(share.clamp(0, 1) * near, heart)


def _mean_colour(pixels: Tensor, core: Tensor, paint: Tensor, deep: Tensor) -> Tensor:
    """Mean bytes (M, 3) of crops (M, h, w, 3) within cores (M, h, w), without what is painted.

    The deeper inside, the more a pixel counts: blurred edges and the halved chroma of an mp4 reach into thin rings.
    """
    bare = core - paint
    # Something that is dark all over is no paint.
    bare = torch.where(bare.sum((1, 2), keepdim=True) > BARE * core.sum((1, 2), keepdim=True), bare, core)
    weight = bare * (F.avg_pool2d(bare[:, None], 3, 1, 1)[:, 0] * deep) ** 4
    return torch.einsum("mhwc,mhw->mc", pixels, weight / weight.sum((1, 2), keepdim=True).clamp(min=1e-6))


def _circular_mean(weights: Tensor) -> Tensor:
    """Mean position (M,) on a circle of L pixels, with these weights (M, L)."""
    length = weights.shape[1]
    angle = (torch.arange(length, device=weights.device) + 0.5) * (2 * math.pi / length)
    weights = weights.float()
    return torch.atan2(weights @ angle.sin(), weights @ angle.cos()) * length / (2 * math.pi) % length


@lru_cache
def _unit_areas(device: torch.device) -> Tensor:
    """Area of each kind at radius 1."""
    line = torch.arange(-150, 150, device=device) + 0.5
    areas = [coverage(kind, line[None, :], line[:, None], 100.0).sum() / 1e4 for kind in SHOWN]
    return torch.stack(areas)
