"""Clips that the small world's own parts learn from and are tested with, and the error of pictures of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from longsana.flow.noise import keyed_generator
from longsana.runtime.errors import InputError
from longsana.runtime.stop import Stopped, deferred
from longsana.shapes.remembered import WORLDS, WorldName
from longsana.shapes.scenes import render

DIFFERS = 0.04
"""Distance, in a range of 2, from the ground's colour beyond which a pixel belongs to a shape or its edge."""
DRAWN_TOGETHER = 64
"""Clips of a pool that are drawn at a time."""


@dataclass(frozen=True)
class PhasesConfig:
    """Settings of training on clips. steps to widths have an entry a phase.

    world: whose scenes it is trained on and tested with.
    """

    world: WorldName = "shapes"
    seed: int = 0
    steps: tuple[int, ...] = (400, 700, 200, 50)
    clips: tuple[int, ...] = (256, 48, 24, 12)  # a step
    frames: tuple[int, ...] = (1, 17, 81, 81)  # a clip; 4n + 1
    heights: tuple[int, ...] = (64, 64, 64, 96)
    widths: tuple[int, ...] = (64, 64, 96, 160)
    pool: tuple[int, ...] = ()  # clips that are drawn before a phase, of which its steps take some; none: each its own
    object_weight: float = 1.0  # of errors on shapes and two pixels around them, for 1 elsewhere
    edge_weight: float = 0.0  # of errors of differences between neighbouring pixels
    cuda_graphs: bool = True  # on a GPU: steps are recorded and replayed
    lr: float = 1.2e-3
    average: float = 0.998  # of the weights that are kept
    test_clips: int = 32  # held-out clips
    test_frames: int = 81


def check_phases(config: PhasesConfig, *, pooled: bool = False) -> None:
    """Refuse lists of which one has not an entry for each phase. pooled: there must be pools.

    Raises:
        InputError: the first that has not.
    """
    for name in ("clips", "frames", "heights", "widths", "pool"):
        given: Sequence[int] = getattr(config, name)
        if len(given) != len(config.steps) and (given or name != "pool" or pooled):
            raise InputError(f"{name}={list(given)}: must have {len(config.steps)} entries, as steps has")


def clips_of(config: PhasesConfig, phase: int, step: int, count: int, device: torch.device) -> Tensor:
    """Pictures (count, 3, F, H, W) in [-1, 1] of a phase's size and length, which a number of a step says."""
    size = config.heights[phase], config.widths[phase]
    return draw_clips(config.seed, step, count, config.frames[phase], size, device, config.world)


def draw_clips(
    seed: int, step: int, count: int, frames: int, size: tuple[int, int], device: torch.device, world: WorldName
) -> Tensor:
    """(count, 3, frames, H, W). Single frames are four moments of a scene each: to draw scenes would take longer."""
    moments = 4 if frames == 1 else 1
    scenes = [WORLDS[world](seed + 1, step * 1024 + number, size=size) for number in range(-(-count // moments))]
    if moments == 1:
        return render(scenes, range(frames), size=size, device=device)
    pictures = render(scenes, range(0, 80, 80 // moments), size=size, device=device)
    return pictures.transpose(1, 2).flatten(0, 1)[:count, :, None]


def draw_pool(config: PhasesConfig, phase: int, device: torch.device) -> Iterator[Tensor]:
    """Pictures (B, 3, F, H, W) of a phase's pool, some at a time; their scenes are those of no step.

    Raises:
        Stopped: there was a request to stop, which steps of training would put off until the pool, minutes on a CPU,
            is there; the steps before it have been saved.
    """
    first, whole = sum(config.steps) + sum(config.pool[:phase]), config.pool[phase]
    with deferred() as asked:
        for start in range(0, whole, DRAWN_TOGETHER):
            yield clips_of(config, phase, first + start, min(DRAWN_TOGETHER, whole - start), device)
            if number := asked():
                raise Stopped(number)


def choose(config: PhasesConfig, phase: int, step: int, part: str) -> Tensor:
    """Places (clips,) in a phase's pool of the clips that a step takes; part: the name of what is trained."""
    rng = keyed_generator(config.seed, step, f"{part} clips")
    return torch.randint(config.pool[phase], (config.clips[phase],), generator=rng)


def films(
    world: WorldName, seed: int, count: int, frames: int, device: torch.device, *, held_out: bool, batch: int
) -> Iterator[Tensor]:
    """Pictures (B, 3, frames, H, W) of the seed's first `count` scenes, at most `batch` at a time."""
    for first in range(0, count, batch):
        indices = range(first, min(first + batch, count))
        scenes = [WORLDS[world](seed, index, held_out=held_out) for index in indices]
        yield render(scenes, range(frames), device=device)


def to_bytes(pictures: Tensor) -> Tensor:
    """Pictures in [-1, 1], of any shape, as videos have them: uint8."""
    return (pictures * 127.5 + 127.5).round().byte()


def from_bytes(pictures: Tensor) -> Tensor:
    """Pictures in [-1, 1], float32, of uint8 of any shape."""
    return pictures.float() / 127.5 - 1


def objects(pictures: Tensor) -> Tensor:
    """Mask shapes and two pixels around them: 1 of pictures (B, 3, F, H, W), else 0; (B, 1, F, H, W)."""
    ground = pictures[..., ::4, ::4].flatten(2).median(dim=2).values  # shapes cover less than half
    differs = (pictures - ground[..., None, None, None]).abs().amax(1, keepdim=True) > DIFFERS
    return F.max_pool3d(differs.float(), (1, 5, 5), stride=1, padding=(0, 2, 2))


def pixel_error(wrong: Tensor, mask: Tensor | None, object_weight: float, edge_weight: float) -> Tensor:
    """Error, a scalar, of pictures that are off by `wrong` (B, 3, F, H, W).

    It is a weighted mean over pixels: of the absolute error, and edge_weight times that of differences to the right and
    down. mask: of `objects`, (B, 1, F, H, W), which weigh `object_weight`; None where that is 1.
    """
    if mask is None and not edge_weight:
        return wrong.abs().mean()
    weight = torch.ones_like(wrong[:, :1]) if mask is None else 1 + (object_weight - 1) * mask
    weight = weight / weight.mean()
    error = (wrong.abs() * weight).mean()
    for side in (3, 4):
        count = weight.shape[side] - 1
        both = torch.minimum(weight.narrow(side, 0, count), weight.narrow(side, 1, count))
        error = error + edge_weight / 2 * (wrong.diff(dim=side).abs() * both).mean()
    return error
