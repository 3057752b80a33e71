"""Does a video of the shapes world show what its caption promised? Rendered and compared, nothing learned.

`observe` looks at pictures and says what is there; `judge` compares that with promises. Both work on any number of
videos at once, on any device, and their memory beyond the result does not grow with the number of frames.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longsana.data.shapes import BACKGROUNDS, COLOURS, KINDS, Promise, coverage
from longsana.evaluation.motion import Course, as_promised, velocities

GROUP = 32
"""Pictures looked at together."""
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


class Seen(NamedTuple):
    """What frames show. The colours of the palette come last: each can be seen as one object.

    background: (B, F) index into BACKGROUNDS, -1 if near none of them.
    core: (B, F, 7) pixels inside of the object of this colour; none below CORE.
    off: (B, F, 7) bytes by which its mean colour misses the palette's, in the worst channel.
    kind: (B, F, 7) index into KINDS, -1 if it resembles none or comes in several pieces.
    radius: (B, F, 7) half its extent in pixels, if it is of this kind; nan where there is no kind.
    centre: (B, F, 7, 2) x and y in pixels; nan where nothing of this colour is seen.
    size: (height, width) of the picture.
    """

    background: Tensor
    core: Tensor
    off: Tensor
    kind: Tensor
    radius: Tensor
    centre: Tensor
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
        """The same of the first frames alone."""
        *tensors, size = self
        return Seen._make([*(values[:, :frames] for values in tensors), size])


def observe(pictures: Tensor) -> Seen:
    """What uint8 pictures (B, F, H, W, 3) show."""
    shape, size = pictures.shape[:2], pictures.shape[2:4]
    parts = [_observe(part) for part in pictures.flatten(0, 1).split(GROUP)]
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

    solid = _solid(_nearest(pictures, palette, ground))
    core = torch.stack([(solid == colour).flatten(1).sum(1) for colour in range(len(palette))], dim=1)
    off = torch.full(core.shape, torch.nan, device=device)
    radius, kind, centre = off.clone(), torch.full_like(core, -1), off[..., None].repeat(1, 1, 2)
    frames, colours = (core >= CORE).nonzero(as_tuple=True)
    for frame, colour in zip(frames.split(GROUP), colours.split(GROUP), strict=True):
        found = _inspect(pictures, solid, ground, frame, colour)
        off[frame, colour] = (found.colour - palette[colour]).abs().amax(-1)
        kind[frame, colour], radius[frame, colour], centre[frame, colour] = found.kind, found.radius, found.centre
    return background, core, off, kind, radius, centre


def _nearest(pictures: Tensor, palette: Tensor, ground: Tensor) -> Tensor:
    """Index of the colour that each pixel (N, H, W) is nearest to, the palette's or then the ground's."""
    candidates = torch.cat([palette.expand(len(pictures), -1, -1), ground[:, None]], dim=1)  # (N, 8, 3)
    pixels = pictures.flatten(1, 2).transpose(1, 2).float()
    # |p - c|² = |p|² - 2 (p·c - |c|²/2): nearest is where the bracket is largest.
    affinity = torch.baddbmm(-candidates.square().sum(-1, keepdim=True) / 2, candidates, pixels)
    best, *others = affinity.unbind(1)
    label = torch.zeros(best.shape, dtype=torch.uint8, device=best.device)
    for index, other in enumerate(others, start=1):  # argmax across planes takes ten times as long on a CPU
        label.masked_fill_(other > best, index)
        best = torch.maximum(best, other)
    return label.unflatten(1, pictures.shape[1:3])


def _solid(label: Tensor) -> Tensor:
    """Labels (N, H, W) whose eight neighbours on the torus have the same one; NOTHING elsewhere.

    A soft edge between two colours passes through others on its way, in a line too thin to have an inside.
    """
    for side in (1, 2):
        same = (label == label.roll(1, side)) & (label == label.roll(-1, side))
        label = label.where(same, NOTHING)
    return label


class Found(NamedTuple):
    """Of M objects: mean colour (M, 3), kind (M,), radius (M,), centre (M, 2)."""

    colour: Tensor
    kind: Tensor
    radius: Tensor
    centre: Tensor


def _inspect(pictures: Tensor, solid: Tensor, ground: Tensor, frame: Tensor, colour: Tensor) -> Found:
    """The objects of these colours in these pictures."""
    height, width = solid.shape[1:]
    inside = solid[frame] == colour[:, None, None]
    rough = torch.stack([_circular_mean(inside.sum(1)), _circular_mean(inside.sum(2))], dim=1)
    sides = [min(CROP, width), min(CROP, height)]
    corner = (rough - torch.tensor(sides, device=rough.device) / 2).round().long()
    local = [torch.arange(side, device=rough.device) for side in sides]
    columns = ((corner[:, :1] + local[0]) % width)[:, None, :]
    rows = ((corner[:, 1:] + local[1]) % height)[:, :, None]
    pixels = pictures[frame[:, None, None], rows, columns].float()  # (M, h, w, 3)
    core = (solid[frame[:, None, None], rows, columns] == colour[:, None, None]).float()

    count = core.sum((1, 2))
    strays = inside.sum((1, 2)) - count
    # The deeper inside, the more a pixel counts: blurred edges and the halved chroma of an mp4 reach into thin rings.
    weight = core * F.avg_pool2d(core[:, None], 3, 1, 1)[:, 0] ** 8
    mean = torch.einsum("mhwc,mhw->mc", pixels, weight / weight.sum((1, 2), keepdim=True).clamp(min=1e-6))
    # Share of each pixel that is the object's, between the ground's colour and its own.
    span = mean - ground[frame]
    share = torch.einsum("mhwc,mc->mhw", pixels - ground[frame][:, None, None], span / span.square().sum(1)[:, None])
    # An edge may lie up to three pixels out of the core; what is farther belongs to others.
    near = F.max_pool2d(F.max_pool2d(core[:, None], (1, 7), 1, (0, 3)), (7, 1), 1, (3, 0))[:, 0]
    share = share.clamp(0, 1) * near
    area = share.sum((1, 2)).clamp(min=1)
    x = (share.sum(1) * (local[0] + 0.5)).sum(1) / area
    y = (share.sum(2) * (local[1] + 0.5)).sum(1) / area

    across, down = local[0] + 0.5 - x[:, None], local[1] + 0.5 - y[:, None]
    radii = (area[:, None] / _unit_areas(area.device)).sqrt()  # (M, kinds)
    misfits = []
    for index, kind in enumerate(KINDS):
        ideal = coverage(kind, across[:, None, :], down[:, :, None], radii[:, index, None, None])
        misfits.append((share - ideal).square().sum((1, 2)) / area)
    misfit, best = torch.stack(misfits, dim=1).min(1)
    known = (misfit <= MISFIT) & (strays < CORE)
    radius = radii.gather(1, best[:, None])[:, 0].where(known, torch.nan)
    centre = (corner + torch.stack([x, y], dim=1)) % rough.new_tensor([width, height])
    return Found(mean, best.where(known, -1), radius, centre)


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
    areas = [coverage(kind, line[None, :], line[:, None], 100.0).sum() / 1e4 for kind in KINDS]
    return torch.stack(areas)


# Verdicts -----------------------------------------------------------------------------------------------------------


class Verdicts(NamedTuple):
    """Whether each frame keeps the promise, (B, F) each: a share in [0, 1]; nan for a video that is not scored.

    colour: promised actors whose colour is seen, and right. kind: those whose colour's object is of their kind.
    background: whether it is the promised one. motion: actors that move as promised, within the second or two around
    the frame; nan in a clip of under 20 frames. persistence: whether all that is promised is there, and nothing else.
    """

    colour: Tensor
    kind: Tensor
    background: Tensor
    motion: Tensor
    persistence: Tensor

    @property
    def adherence(self) -> Tensor:
        """(B, F): mean of all that a caption says, which is all but persistence."""
        return torch.stack([self.colour, self.kind, self.background, self.motion]).nanmean(0)


def judge(seen: Seen, promises: Sequence[Promise | None]) -> Verdicts:
    """Compare what was seen in B videos with their promises; None: outside of the grammar, not scored."""
    batch, frames = seen.background.shape
    assert len(promises) == batch, (len(promises), batch)
    device = seen.core.device
    pairs = [(video, actor) for video, promise in enumerate(promises) for actor in (promise.actors if promise else ())]
    actors = [actor for _, actor in pairs]
    video = torch.tensor([video for video, _ in pairs], dtype=torch.long, device=device)
    colour = torch.tensor([list(COLOURS).index(a.colour) for a in actors], dtype=torch.long, device=device)
    kind = torch.tensor([KINDS.index(a.kind) for a in actors], dtype=torch.long, device=device)
    count = torch.zeros(batch, device=device).index_add(0, video, torch.ones_like(video, dtype=torch.float32))
    count[count == 0] = torch.nan

    def share(kept: Tensor) -> Tensor:
        """(B, F), of what each actor (N, F) keeps."""
        return torch.zeros(batch, frames, device=device).index_add(0, video, kept.float()) / count[:, None]

    there = seen.present[video, :, colour]
    right_colour = there & (seen.off[video, :, colour] <= TOLERANCE)
    right_kind = there & (seen.kind[video, :, colour] == kind[:, None])
    moves = as_promised(seen.centre[video, :, colour], Course.of(actors, device), seen.size)
    grounds = [list(BACKGROUNDS).index(promise.background) if promise else 0 for promise in promises]
    right_ground = seen.background == torch.tensor(grounds, device=device)[:, None]
    # All promised are there with their kinds, and the number of objects is the number promised.
    complete = (share(right_kind) == 1) & (seen.present.sum(-1) == count[:, None])
    unscored = count.isnan()[:, None]
    return Verdicts(
        share(right_colour),
        share(right_kind),
        right_ground.float().masked_fill(unscored, torch.nan),
        share(moves),
        complete.float().masked_fill(unscored, torch.nan),
    )


@dataclass(frozen=True)
class Score:
    """Means over all frames of all scored videos, in [0, 1]; nan where none is scored."""

    colour: float
    kind: float
    background: float
    motion: float
    persistence: float
    adherence: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def score(verdicts: Verdicts) -> Score:
    """Numbers of `judge(seen.first(frames), promises)`: of the whole videos, or of their first frames."""
    means = {name: float(getattr(verdicts, name).nanmean()) for name in (*Verdicts._fields, "adherence")}
    return Score(**means)
