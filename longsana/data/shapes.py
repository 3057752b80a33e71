"""The shapes world: captioned videos of one or two moving shapes, drawn from a seed.

A picture is a torus: what leaves it on the right comes in on the left. A scene is a law for all times, so a clip of any
length can be drawn, and a caption is all that was promised: `parse_caption` reads a caption back, and a verifier can
watch a video and say whether the promise was kept.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

HEIGHT, WIDTH, FPS = 96, 160, 16

KINDS = ("circle", "square", "triangle", "cross", "ring")
COLOURS = {
    "red": (220, 45, 40),
    "green": (50, 180, 70),
    "blue": (55, 100, 225),
    "yellow": (225, 200, 50),
    "purple": (165, 70, 205),
    "cyan": (60, 200, 215),
    "white": (225, 225, 225),
}
BACKGROUNDS = {
    "black": (12, 12, 16),
    "gray": (98, 98, 102),
    "navy": (20, 26, 84),
    "brown": (84, 50, 28),
    "teal": (14, 74, 76),
}
"""Colours are sRGB bytes, at most 225: a shift by a tenth of the range is not clipped away."""
SIZES = {"small": 15.0, "big": 20.0}
"""Half the extent of a shape in pixels."""
SPEEDS = {"slowly": 0.7, "quickly": 2.1}
"""Pixels a frame."""
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}
"""(x, y) with y down the picture."""
TURNS = {"clockwise": 1, "counterclockwise": -1}
"""Sense of an orbit, as seen on the screen."""
MOTIONS = (*DIRECTIONS, "bounce", *TURNS, "still")


def is_held_out(kind: str, colour: str, motion: str) -> bool:
    """Whether this combination is kept out of all training: 27 of the 280, each kind, colour and motion among them."""
    return (KINDS.index(kind) + 2 * tuple(COLOURS).index(colour) + 3 * MOTIONS.index(motion)) % 10 == 0


HELD_OUT = tuple((k, c, m) for k in KINDS for c in COLOURS for m in MOTIONS if is_held_out(k, c, m))


@dataclass(frozen=True)
class Actor:
    """What a caption says of one shape. speed is "" of one that is still."""

    size: str
    colour: str
    kind: str
    motion: str
    speed: str


@dataclass(frozen=True)
class Promise:
    """What a caption says."""

    actors: tuple[Actor, ...]
    background: str


class Box(NamedTuple):
    """Part of the picture that an actor keeps to, in pixels."""

    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class Track:
    """Where an actor is: `draws` are four numbers in [0, 1) that decide all that its caption leaves open."""

    actor: Actor
    box: Box
    draws: tuple[float, float, float, float]

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Centre (F, 2), x and y in pixels, at each of the frames."""
        radius, speed = SIZES[self.actor.size], SPEEDS.get(self.actor.speed, 0.0)
        left, top, width, height = self.box
        along, across, phase, slant = self.draws
        margin = radius + 2  # a triangle's tip reaches beyond its radius
        room = np.array([width - 2 * margin, height - 2 * margin])
        room[room == 0] = 1.0  # not 0: it is divided by. Where it is negative, the shape leaves its box
        corner = np.array([left, top]) + margin
        start = corner + room * (along, across)
        time = np.asarray(frames, dtype=float)[:, None]
        motion = self.actor.motion
        if motion in DIRECTIONS:
            direction = np.array(DIRECTIONS[motion])
            # Along its way it may start anywhere; what leaves the box comes in on the other side.
            free = np.where(direction != 0, np.array([width, height]) * (along, across) + (left, top), start)
            return (free - (left, top) + direction * speed * time) % (width, height) + (left, top)
        if motion == "bounce":
            angle = math.radians(35 + 20 * slant)
            signs = np.array([1 if phase < 0.5 else -1, 1 if phase % 0.5 < 0.25 else -1])
            way = (start - corner) + signs * speed * np.array([math.cos(angle), math.sin(angle)]) * time
            return corner + room - np.abs(way % (2 * room) - room)
        if motion in TURNS:
            reach = min(*room / 2, 28.0)
            angle = 2 * math.pi * phase + TURNS[motion] * speed / reach * time
            middle = np.array([left + width / 2, top + height / 2])
            return middle + reach * np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
        return start + 0 * time


@dataclass(frozen=True)
class Scene:
    tracks: tuple[Track, ...]
    background: str
    caption: str

    @property
    def promise(self) -> Promise:
        return Promise(tuple(track.actor for track in self.tracks), self.background)


# Scenes -------------------------------------------------------------------------------------------------------------

TWO = 0.35
"""Share of scenes with two shapes."""
LANES = (("right", "left", "still"), ("up", "down", "bounce", *TURNS, "still"))
"""Motions of two shapes: one above the other, each along its row; or side by side. So they never meet."""


def draw_scene(seed: int, index: int, *, held_out: bool = False, size: tuple[int, int] = (HEIGHT, WIDTH)) -> Scene:
    """Scene `index` of the seed's endless series.

    held_out: False: no actor is a held-out combination. True: the first is one.
    size: (height, width) of the picture.
    """
    rng = np.random.default_rng((seed, index, held_out))
    height, width = size
    count = 2 if rng.random() < TWO else 1
    lane = int(rng.integers(2))
    motions = MOTIONS if count == 1 else LANES[lane]
    boxes = [
        Box(0, 0, width, height)
        if count == 1
        else Box(0, number * height / 2, width, height / 2)
        if lane == 0
        else Box(number * width / 2, 0, width / 2, height)
        for number in range(count)
    ]
    if count == 2 and rng.random() < 0.5:
        boxes.reverse()
    actors: list[Actor] = []
    while len(actors) < count:
        actor = _draw_actor(rng, motions)
        wanted = held_out and not actors
        same_colour = any(other.colour == actor.colour for other in actors)
        if is_held_out(actor.kind, actor.colour, actor.motion) == wanted and not same_colour:
            actors.append(actor)
    tracks = tuple(Track(actor, box, tuple(rng.random(4))) for actor, box in zip(actors, boxes, strict=True))
    background = _pick(rng, tuple(BACKGROUNDS))
    return Scene(tracks, background, _caption(rng, actors, background))


def _draw_actor(rng: np.random.Generator, motions: Sequence[str]) -> Actor:
    motion = _pick(rng, motions)
    return Actor(
        size=_pick(rng, tuple(SIZES)),
        colour=_pick(rng, tuple(COLOURS)),
        kind=_pick(rng, KINDS),
        motion=motion,
        speed="" if motion == "still" else _pick(rng, tuple(SPEEDS)),
    )


def _pick(rng: np.random.Generator, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]


# Captions -----------------------------------------------------------------------------------------------------------

VERBS = {
    **{side: (f"moves {{}} to the {side}", f"drifts {{}} to the {side}") for side in ("right", "left")},
    "up": ("moves {} up", "rises {}"),
    "down": ("moves {} down", "sinks {}"),
    "bounce": ("bounces {} off the edges", "bounces {} around"),
    **{turn: (f"circles {{}} {turn}", f"orbits {{}} {turn}") for turn in TURNS},
    "still": ("stays still", "does not move"),
}
PLACES = ("on a {} background", "in front of a {} wall")
ONE = ("{0} {place}", "{place}, {0}")
BOTH = ("{0} while {1} {place}", "{0} and {1} {place}", "{place}, {0} while {1}")


def _caption(rng: np.random.Generator, actors: Sequence[Actor], background: str) -> str:
    said = [
        f"a {actor.size} {actor.colour} {actor.kind} {_pick(rng, VERBS[actor.motion]).format(actor.speed)}"
        for actor in actors
    ]
    sentence = _pick(rng, ONE if len(actors) == 1 else BOTH).format(*said, place=_pick(rng, PLACES).format(background))
    return sentence if rng.random() < 0.5 else sentence[0].upper() + sentence[1:] + "."


def _pattern() -> tuple[re.Pattern[str], re.Pattern[str], dict[str, tuple[str, str]]]:
    """How an actor and a place are said, and the (motion, speed) of each way to say a motion."""
    said = {
        verb.format(speed): (motion, "" if motion == "still" else speed)
        for motion, verbs in VERBS.items()
        for verb in verbs
        for speed in SPEEDS
    }
    actor = "a ({}) ({}) ({}) ({})".format(*("|".join(words) for words in (SIZES, COLOURS, KINDS, said)))
    place = "|".join(words.format(f"({'|'.join(BACKGROUNDS)})") for words in PLACES)
    return re.compile(actor), re.compile(place), said


_ACTOR, _PLACE, _SAID = _pattern()


def parse_caption(caption: str) -> Promise | None:
    """What a caption of this world promises; None of a text outside of its grammar."""
    text = caption.strip().removesuffix(".")
    text = text[:1].lower() + text[1:]
    actors = tuple(Actor(size, colour, kind, *_SAID[verb]) for size, colour, kind, verb in _ACTOR.findall(text))
    places = [name for names in _PLACE.findall(text) for name in names if name]
    if "{" in text:
        return None
    frame = _PLACE.sub("{place}", _ACTOR.sub("{}", text))
    frames = {re.sub(r"\{\d\}", "{}", form) for form in (*ONE, *BOTH)}
    if frame not in frames or len({actor.colour for actor in actors}) != len(actors):
        return None
    return Promise(actors, places[0])


# Pictures -----------------------------------------------------------------------------------------------------------


def signed_distance(kind: str, x: Tensor, y: Tensor, radius: Tensor | float) -> Tensor:
    """Pixels from the edge of a shape whose centroid is the origin, negative inside; corners are not rounded."""
    if kind == "circle":
        return torch.hypot(x, y) - 0.95 * radius
    if kind == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.82 * radius
    if kind == "triangle":
        slope = math.sqrt(3) / 2
        return torch.maximum(slope * x.abs() - 0.5 * y, y) - 0.55 * radius
    if kind == "cross":
        long, short = radius, 0.36 * radius
        upright = torch.maximum(x.abs() - short, y.abs() - long)
        level = torch.maximum(x.abs() - long, y.abs() - short)
        return torch.minimum(upright, level)
    if kind == "ring":
        return (torch.hypot(x, y) - 0.76 * radius).abs() - 0.24 * radius
    raise ValueError(f"kind={kind}: must be one of {', '.join(KINDS)}")


def coverage(kind: str, x: Tensor, y: Tensor, radius: Tensor | float) -> Tensor:
    """Share of each pixel that the shape covers, in [0, 1]."""
    return (0.5 - signed_distance(kind, x, y, radius)).clamp(0, 1)


def render(
    scenes: Sequence[Scene],
    frames: range,
    *,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    device: torch.device | str = "cpu",
) -> Tensor:
    """Pictures (B, 3, F, H, W), float32 in [-1, 1], of the scenes at these frames."""
    height, width = size
    palette = torch.tensor([BACKGROUNDS[scene.background] for scene in scenes], dtype=torch.float32, device=device)
    pictures = palette[:, :, None, None, None].expand(-1, -1, len(frames), height, width).clone()
    rows, columns = torch.arange(height, device=device) + 0.5, torch.arange(width, device=device) + 0.5
    times = np.asarray(frames)
    for number in range(max(len(scene.tracks) for scene in scenes)):
        for kind in KINDS:
            chosen = [
                index
                for index, scene in enumerate(scenes)
                if number < len(scene.tracks) and scene.tracks[number].actor.kind == kind
            ]
            if not chosen:
                continue
            tracks = [scenes[index].tracks[number] for index in chosen]
            centres = np.stack([track(times) for track in tracks])
            x, y = torch.from_numpy(centres).to(device, torch.float32).unbind(-1)  # (N, F)
            radius = torch.tensor([SIZES[track.actor.size] for track in tracks], device=device)[:, None, None, None]
            colour = torch.tensor([COLOURS[track.actor.colour] for track in tracks], device=device)
            covered = coverage(
                kind,
                around(columns - x[..., None], width)[:, :, None, :],
                around(rows - y[..., None], height)[:, :, :, None],
                radius,
            )[:, None]
            where = torch.tensor(chosen, device=device)
            pictures[where] = torch.lerp(pictures[where], colour[:, :, None, None, None].float(), covered)
    return pictures / 127.5 - 1


def around(distance: Tensor, period: float) -> Tensor:
    """The shortest signed distance on a circle of this length."""
    return (distance + period / 2) % period - period / 2


def prompts(seed: int, count: int, *, held_out: bool) -> list[str]:
    """Different captions, in order of their index; see `draw_scene`."""
    found: dict[str, None] = {}
    index = 0
    while len(found) < count:
        found[draw_scene(seed, index, held_out=held_out).caption] = None
        index += 1
    return list(found)
