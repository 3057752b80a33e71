"""Scenes with a kind of shape that the shapes world does not have, for a LoRA to learn from few clips.

All else is as in `draw_scene`: what is not a bar in them is of the world's own kinds.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from longsana.shapes.scenes import (
    BACKGROUNDS,
    HEIGHT,
    NEW_KIND,
    WIDTH,
    Scene,
    Track,
    describe,
    draw_actor,
    draw_actors,
    draw_layout,
    pick,
)

SERIES = 4
"""Last number of the generator's seed: no other series of scenes has it."""


def draw_bars(seed: int, index: int, *, held_out: bool = False, size: tuple[int, int] = (HEIGHT, WIDTH)) -> Scene:
    """Scene `index` of the seed's endless series; its first shape is a bar.

    held_out: False: no actor is a held-out combination. True: the bar is one.
    size: (height, width) of the picture.
    """
    rng = np.random.default_rng((seed, index, held_out, SERIES))
    motions, boxes = draw_layout(rng, size)
    actors = draw_actors(lambda: replace(draw_actor(rng, motions), kind=NEW_KIND), 1, held_out=held_out)
    while len(actors) < len(boxes):
        (other,) = draw_actors(lambda: draw_actor(rng, motions), 1, held_out=False)
        if other.colour != actors[0].colour:
            actors.append(other)
    tracks = tuple(Track(actor, box, tuple(rng.random(4))) for actor, box in zip(actors, boxes, strict=True))
    background = pick(rng, tuple(BACKGROUNDS))
    return Scene(tracks, background, describe(rng, actors, background))
