"""Motions are told apart from the tracks alone: hundreds of them, with centres that tremble."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from longsana.shapes import scenes as shapes
from longsana.shapes.motion import Course, as_promised
from longsana.shapes.scenes import MOTIONS, Actor

SIZE = (shapes.HEIGHT, shapes.WIDTH)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tracks() -> tuple[list[Actor], torch.Tensor]:
    """Actors, and their centres (N, 161, 2)."""
    drawn = [track for index in range(200) for track in shapes.draw_scene(77, index).tracks]
    centres = np.stack([track(np.arange(161)) for track in drawn])
    return [track.actor for track in drawn], torch.from_numpy(centres).float()


def trembling(centres: torch.Tensor, pixels: float) -> torch.Tensor:
    return centres + pixels * torch.randn(centres.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("pixels", "least"), [(0, 1.0), (0.1, 1.0), (0.3, 0.99)])
def test_promises_that_are_kept(tracks, pixels, least):
    actors, centres = tracks
    assert as_promised(trembling(centres, pixels), Course.of(actors, CPU), SIZE).mean() >= least


@pytest.mark.parametrize("motion", MOTIONS)
def test_promises_of_another_motion(tracks, motion):
    actors, centres = tracks
    speed = "" if motion == "still" else "slowly"
    others = [replace(actor, motion=motion, speed=speed and (actor.speed or speed)) for actor in actors]
    wrong = torch.tensor([actor.motion != motion for actor in actors])
    kept = as_promised(trembling(centres, 0.1), Course.of(others, CPU), SIZE)[wrong].mean(1)
    # From wall to wall in a narrow room a quick bounce is at times as round as an orbit.
    assert kept.mean() < 0.01
    assert kept.max() < 0.5


def test_a_bounce_turns_at_walls():
    """Not in the middle of nowhere, and it does not pass them."""
    bounce = [Actor("small", "red", "circle", "bounce", "slowly")]
    course = Course.of(bounce, CPU)
    time = torch.arange(161.0)
    through = torch.stack([20 + 0.5 * time, (80 + 0.5 * time) % shapes.HEIGHT], dim=1)[None]
    zigzag = torch.stack([20 + 0.5 * time, 42 + 0.5 * ((time % 48) - 24).abs()], dim=1)[None]
    assert as_promised(through, course, SIZE)[0, :20].sum() == 0
    assert as_promised(zigzag, course, SIZE).sum() == 0


def test_what_is_not_seen_does_not_move(tracks):
    """A flicker of one frame is forgiven, a second is not."""
    actors, centres = tracks
    course = Course.of(actors, CPU)
    flicker, gone = centres.clone(), centres.clone()
    flicker[:, 80] = torch.nan
    gone[:, 60:100] = torch.nan
    assert as_promised(flicker, course, SIZE).mean() > 0.97
    kept = as_promised(gone, course, SIZE)
    assert kept[:, 60:100].sum() == 0
    assert kept[:, :30].mean() > 0.99
    assert as_promised(centres[:, :19], course, SIZE).isnan().all()
    assert as_promised(centres[:, :20], course, SIZE).mean() > 0.97
