"""The world in which the past matters: looks that no caption tells, on shapes that leave the view and come back.

A caption says "a big red ring travels quickly to the right". Which red, how big exactly and whether it is striped is
seen in the first second; then it leaves, and only who remembers can show the same one again. How long it stays away is
a property of the scene, which no caption tells either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from longsana.shapes.looks import MARKINGS, RADII, Look
from longsana.shapes.scenes import (
    BACKGROUNDS,
    DIRECTIONS,
    HEIGHT,
    SPEEDS,
    WIDTH,
    Actor,
    Scene,
    Track,
    describe,
    draw_actor,
    draw_actors,
    draw_layout,
    draw_scene,
    pick,
)

AWAY = (8.0, 96.0)
"""Least and most frames out of view, half a second to six; the logarithm is drawn evenly, so that more than a third
stay away for more than a chunk of 40 frames."""
TRAVELLERS = 0.8
"""Share of those with a direction who leave the view; the others come in where they go out, as ever."""
QUICK = 0.75
"""Share of the travellers who are quick: a slow one is on its way for half a minute."""
MARKED = {"plain": 0.25, "stripes": 0.5, "dots": 0.25}
"""Share of each marking: stripes have most to remember."""
SERIES = 3
"""Last number of the generator's seed: no other series of scenes has it."""


def draw_remembered(seed: int, index: int, *, held_out: bool = False, size: tuple[int, int] = (HEIGHT, WIDTH)) -> Scene:
    """Scene `index` of the seed's endless series. In every second one at least something travels.

    held_out: False: no actor is a held-out combination. True: the first is one; the split is that of `draw_scene`.
    size: (height, width) of the picture.
    """
    rng = np.random.default_rng((seed, index, held_out, SERIES))
    while True:
        motions, boxes = draw_layout(rng, size)
        actors = draw_actors(lambda: _draw_actor(rng, motions), len(boxes), held_out=held_out)  # noqa: B023
        if index % 2 == 0 or any(actor.travels for actor in actors):
            break
    tracks = tuple(
        Track(actor, box, tuple(rng.random(4)), _draw_look(rng, actor), _draw_away(rng) if actor.travels else 0.0)
        for actor, box in zip(actors, boxes, strict=True)
    )
    background = pick(rng, tuple(BACKGROUNDS))
    return Scene(tracks, background, describe(rng, actors, background))


def _draw_actor(rng: np.random.Generator, motions: Sequence[str]) -> Actor:
    actor = draw_actor(rng, motions)
    if actor.motion not in DIRECTIONS or rng.random() >= TRAVELLERS:
        return actor
    slow, quick = SPEEDS
    return replace(actor, travels=True, speed=quick if rng.random() < QUICK else slow)


def _draw_look(rng: np.random.Generator, actor: Actor) -> Look:
    marking = str(rng.choice(MARKINGS, p=[MARKED[name] for name in MARKINGS]))
    return Look(rng.uniform(-1, 1), rng.uniform(*RADII[actor.size]), marking, rng.uniform(0, math.pi))


def _draw_away(rng: np.random.Generator) -> float:
    least, most = AWAY
    return least * (most / least) ** rng.random()


WorldName = Literal["shapes", "remembered_shapes"]
WORLDS: dict[WorldName, Callable[..., Scene]] = {"shapes": draw_scene, "remembered_shapes": draw_remembered}
"""What draws the scenes of each small world, by its name: functions as `draw_scene` is one."""
