"""The motion of objects against their captions, from where their centres were seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longsana.shapes.scenes import DIRECTIONS, MOTIONS, SIZES, TURNS, Actor, around

SHORT, LONG = 16, 32
"""Frames that a verdict looks at: one second of rest, two of a way: for one, a slow orbit is not far from straight.
What travels gets one, for a big and quick one is not longer in view between the upper and the lower rim."""
PACES = {"": (-1.0, 0.35), "slowly": (0.35, 1.4), "quickly": (1.4, 2.8)}
"""Pixels a frame that are nearer to this word (0, 0.7, 2.1) than to the next one."""
STRAIGHT = 0.95
"""Share of the way that must lead in the promised direction: 18 degrees off is wrong."""
CURVE = (15.5, 34.0)
"""Radius of an orbit in pixels; the world's are 18 to 28."""
DIAGONAL = (math.radians(27), math.radians(63))
"""Slope of a bounce; the world's are 35 to 55 degrees."""
BEND = 0.13
"""Radians that a straight way may seem to bend in a second; the slowest orbit turns by 0.4."""
LEAP = 0.7
"""Pixels a frame, over four frames, that no pace may exceed its word by: a leap by three to six pixels."""
VISIBLE = 0.75
"""Share of the frames that must show the object."""


class Course(NamedTuple):
    """Promises of N actors, as tensors: motion, an index into MOTIONS; pace (low, high); radius, pixels; travels."""

    motion: Tensor
    low: Tensor
    high: Tensor
    radius: Tensor
    travels: Tensor

    @classmethod
    def of(cls, actors: Sequence[Actor], device: torch.device) -> Course:
        rows = [
            (MOTIONS.index(actor.motion), *PACES[actor.speed], SIZES[actor.size], actor.travels) for actor in actors
        ]
        values = torch.tensor(rows, dtype=torch.float32, device=device).reshape(-1, 5)
        motion, low, high, radius, travels = values.unbind(1)
        return cls(motion.long(), low[:, None], high[:, None], radius[:, None], travels[:, None].bool())


def as_promised(centre: Tensor, course: Course, size: tuple[int, int], excused: Tensor | None = None) -> Tensor:
    """Judge whether actors move as promised around each frame: (N, F) of 0 and 1; nan in a clip of under 20 frames.

    centre: (N, F, 2), x and y in pixels, nan where the object is not seen. size: (height, width) of the picture.
    excused: (N, F) bool, where one who travels is cut or away; nan there, and where it is in view for under a second.
    """
    frames = centre.shape[1]
    if frames < 20:
        return centre.new_full(centre.shape[:2], torch.nan)
    short, long = min(SHORT, frames), min(LONG, frames)
    verdicts = {
        **dict.fromkeys(DIRECTIONS, _on_frames(_straight(centre, course, size, long), long, frames)),
        "bounce": _on_frames(_bounce(centre, course, size, long), long, frames),
        **dict.fromkeys(TURNS, _on_frames(_orbit(centre, course, size, long), long, frames)),
        "still": _on_frames(_still(centre, course, size, short), short, frames),
    }
    every = torch.stack([verdicts[motion] for motion in MOTIONS])  # (motions, N, F)
    verdict = every[course.motion, torch.arange(len(centre), device=centre.device)].float()
    if excused is None:
        return verdict
    return _between_absences(_straight(centre, course, size, short), excused).where(course.travels, verdict)


def velocities(centre: Tensor, size: tuple[int, int], lag: int) -> Tensor:
    """Pixels a frame (N, F - lag, ..., 2) of centres (N, F, ..., 2), over `lag` frames: their noise, near 0.1, is
    divided by it."""
    x, y = (centre[:, lag:] - centre[:, :-lag]).unbind(-1)
    return torch.stack([around(x, size[1]), around(y, size[0])], dim=-1) / lag


def _windows(values: Tensor, size: int) -> Tensor:
    return values.unfold(1, size, 1)


def _steady(velocity: Tensor, course: Course, window: int) -> Tensor:
    """Judge whether it is seen throughout and never leaps; (N, windows), of a velocity over four frames."""
    paces = _windows(velocity.norm(dim=-1), window - 4)
    seen = paces.isfinite().float().mean(-1) >= VISIBLE
    return seen & (paces.nan_to_num(0).amax(-1) < course.high + LEAP)


def _on_frames(verdict: Tensor, window: int, frames: int) -> Tensor:
    """Each frame takes the verdict of the window around it; at the ends, of the first and the last."""
    index = (torch.arange(frames, device=verdict.device) - window // 2).clamp(0, verdict.shape[1] - 1)
    return verdict[:, index]


def _between_absences(verdict: Tensor, excused: Tensor) -> Tensor:
    """Each frame (N, F) takes the verdict (N, windows) of the window nearest around it that nothing excused is in."""
    frames = excused.shape[1]
    count = verdict.shape[1]
    window = frames - count + 1
    free = torch.where(_windows(excused, window).any(-1), torch.nan, verdict.float())
    result = torch.full(excused.shape, torch.nan, device=verdict.device)
    for before in sorted(range(window), key=lambda before: abs(before - window // 2)):
        own = F.pad(free, (before, frames - count - before), value=torch.nan)
        result = torch.where(result.isnan(), own, result)
    return result.masked_fill(excused, torch.nan)


def _still(centre: Tensor, course: Course, size: tuple[int, int], window: int) -> Tensor:
    """Judge whether it keeps to its place; (N, windows)."""
    velocity = velocities(centre, size, 4)
    pace = _windows(velocity.norm(dim=-1), window - 4).nanmean(-1)
    return _steady(velocity, course, window) & (pace < course.high)


def _straight(centre: Tensor, course: Course, size: tuple[int, int], window: int) -> Tensor:
    """Judge whether it goes in its direction at its pace, without a bend; (N, windows)."""
    velocity = velocities(centre, size, 4)
    ways = centre.new_tensor([DIRECTIONS.get(motion, (0, 0)) for motion in MOTIONS])[course.motion]
    pace = _windows(velocity.norm(dim=-1), window - 4).nanmean(-1)
    along = _windows((velocity * ways[:, None]).sum(-1), window - 4).nanmean(-1)
    half = (window - 4) // 2
    means = velocity.unfold(1, half, 1).nanmean(-1)
    a, b = means[:, : pace.shape[1]], means[:, -pace.shape[1] :]
    fits = _steady(velocity, course, window) & (pace > course.low) & (pace < course.high)
    return fits & (along > STRAIGHT * pace) & (_angle(a, b).abs() < BEND)


def _angle(a: Tensor, b: Tensor) -> Tensor:
    """Radians from a to b (..., 2); with y down the picture, positive is clockwise."""
    return torch.atan2(a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0], (a * b).sum(-1))


def _orbit(centre: Tensor, course: Course, size: tuple[int, int], window: int) -> Tensor:
    """Judge whether it turns steadily the promised way; (N, windows)."""
    lag = window // 3
    velocity = velocities(centre, size, lag)
    angle = _angle(velocity[:, :-lag], velocity[:, lag:])
    sense = centre.new_tensor([TURNS.get(motion, 0) for motion in MOTIONS])[course.motion]
    angle = angle * sense[:, None]
    turn = _windows(angle, window - 2 * lag).nanmean(-1)
    smooth = min(4, window - 2 * lag)  # neighbours come from other centres: their noise is averaged out
    turns = _windows(_windows(angle, smooth).nanmean(-1), window - 2 * lag - smooth + 1)
    even = (turns.nan_to_num(torch.inf).amin(-1) > 0.5 * turn) & (turns.nan_to_num(0).amax(-1) < 1.6 * turn)
    # What is seen is a chord; the arc over it is longer.
    half = (turn / 2).clamp(1e-3, 1.5)
    pace = _windows(velocity.norm(dim=-1), window - lag).nanmean(-1) * half / half.sin()
    curve = pace * lag / turn.clamp(min=1e-3)
    fits = (pace > course.low) & (pace < course.high) & (curve > CURVE[0]) & (curve < CURVE[1])
    return fits & even & _steady(velocities(centre, size, 4), course, window)


def _bounce(centre: Tensor, course: Course, size: tuple[int, int], window: int) -> Tensor:
    """Judge whether it goes diagonally, straight but for turns at walls; (N, windows)."""
    velocity = velocities(centre, size, 4)
    half = (window - 4) // 2
    # Turning at a wall changes signs alone, and the few steps across the turn do not move a median.
    folded = velocity.abs().unfold(1, half, 1).nanmedian(-1).values  # (N, F - 4 - half + 1, 2)
    count = centre.shape[1] - window + 1
    first, second = folded[:, :count], folded[:, -count:]
    slopes = [torch.atan2(part[..., 1], part[..., 0]) for part in (first, second)]
    pace = ((first + second) / 2).norm(dim=-1)
    fits = (pace > course.low) & (pace < course.high) & ((slopes[0] - slopes[1]).abs() < BEND)
    for slope in slopes:
        fits &= (slope > DIAGONAL[0]) & (slope < DIAGONAL[1])
    astray = _windows(_turns_astray(centre, velocity, course, size).float(), window - 8).amax(-1)
    return fits & (astray == 0) & _steady(velocity, course, window)


def _turns_astray(centre: Tensor, velocity: Tensor, course: Course, size: tuple[int, int]) -> Tensor:
    """Find where it turns away from any wall, or passes one; (N, F - 8), of the frame in the middle.

    Walls are the sides of the picture and, where two shapes share it, the middle.
    """
    before, after, middle = velocity[:, :-4], velocity[:, 4:], centre[:, 4:-4]
    period, reach = centre.new_tensor([size[1], size[0]]), course.radius[..., None] + 2
    walls = torch.stack([*torch.broadcast_tensors(reach, period - reach, period / 2 - reach, period / 2 + reach)])
    gap = (middle - walls[:, :, :1]).abs().amin(0)
    # The frame in the middle is up to four frames from the turn.
    far = gap > 3 + 4 * torch.maximum(before.abs(), after.abs())
    passed = (middle < reach - 3) | (middle > period - reach + 3)
    return ((before * after < 0) & far | passed).any(-1)
