"""The shapes world: captioned videos of one or two moving shapes, drawn from a seed.

A picture is a torus: what leaves it on the right comes in on the left. Only what *travels* is out of view for a while
between the two. A scene is a law for all times, so a clip of any length can be drawn, and a caption is all that was
promised: `parse_caption` reads a caption back, and a verifier can watch a video and say whether the promise was kept.

`draw_scene` draws scenes whose captions say everything. `longsana/shapes/remembered.py` draws those in which shapes
have looks that no caption tells, and travel.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longsana.shapes.looks import MARKINGS, SHADE, Look, painted, tinted

HEIGHT, WIDTH, FPS = 96, 160, 16

KINDS = ("circle", "square", "triangle", "cross", "ring")
NEW_KIND = "bar"
"""A kind that no scene of `draw_scene` has, and that nothing that ships was trained on: `longsana/shapes/bars.py`."""
SHOWN = (*KINDS, NEW_KIND)
"""All kinds that can be said, drawn and told apart."""
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
    """Tell whether a combination is kept out of all training: 27 of 280, each kind, colour and motion among them.

    Of the new kind, too.
    """
    return (SHOWN.index(kind) + 2 * tuple(COLOURS).index(colour) + 3 * MOTIONS.index(motion)) % 10 == 0


HELD_OUT = tuple((k, c, m) for k in KINDS for c in COLOURS for m in MOTIONS if is_held_out(k, c, m))


@dataclass(frozen=True)
class Actor:
    """The words of a caption for one shape. speed is "" if it is still.

    travels: it leaves the view, and comes back on the other side; for motions among DIRECTIONS alone.
    """

    size: str
    colour: str
    kind: str
    motion: str
    speed: str
    travels: bool = False


@dataclass(frozen=True)
class Promise:
    """The content of a caption."""

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
    """The path of an actor: `draws` are four numbers in [0, 1) that decide all that its caption leaves open.

    look: None: of the palette's colour and the nominal size. away: frames that one who travels is out of view.
    """

    actor: Actor
    box: Box
    draws: tuple[float, float, float, float]
    look: Look | None = None
    away: float = 0.0

    @property
    def radius(self) -> float:
        """Half the extent in pixels."""
        return SIZES[self.actor.size] if self.look is None else self.look.radius

    @property
    def margin(self) -> float:
        """Pixels from the centre within which all of it lies; a triangle's tip reaches beyond its radius."""
        return self.radius + max(2.0, self.radius / 10)

    @property
    def paint(self) -> tuple[str, float]:
        """Its marking, and the angle of stripes in radians."""
        return ("plain", 0.0) if self.look is None else (self.look.marking, self.look.angle)

    @property
    def colour(self) -> tuple[float, ...]:
        """Its bytes, but for paint."""
        own = COLOURS[self.actor.colour]
        return own if self.look is None else tuple(tinted(torch.tensor(own), torch.tensor(self.look.tint)).tolist())

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Centre (F, 2), x and y in pixels, at each of the frames; out of the box while it is out of view."""
        speed, margin = SPEEDS.get(self.actor.speed, 0.0), self.margin
        left, top, width, height = self.box
        along, across, phase, slant = self.draws
        room = np.array([width - 2 * margin, height - 2 * margin])
        room[room == 0] = 1.0  # not 0: it is divided by. Where it is negative, the shape leaves its box
        corner = np.array([left, top]) + margin
        start = corner + room * (along, across)
        time = np.asarray(frames, dtype=float)[:, None]
        motion = self.actor.motion
        if motion in DIRECTIONS:
            direction = np.array(DIRECTIONS[motion])
            if self.actor.travels:
                way = self._way(time, float(np.abs(direction) @ (width, height)))
                ahead = direction.sum() > 0
                moving = np.array([left, top]) + (way if ahead else np.array([width, height]) - way)
                return np.where(direction != 0, moving, start)
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

    def _way(self, time: np.ndarray, length: float) -> np.ndarray:
        """Pixels gone since it came in at the rim, at these frames, of one who travels across so many pixels.

        In the first frame it is in view, and stays so for a second. Most begin near the side where they leave.
        """
        speed, margin = SPEEDS[self.actor.speed], self.margin
        room = max(length - 2 * margin - FPS * speed, 0.0)
        period = length + 2 * margin + self.away * speed
        return (2 * margin + room * self.draws[0] ** 0.25 + speed * time) % period - margin


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
    motions, boxes = draw_layout(rng, size)
    actors = draw_actors(lambda: draw_actor(rng, motions), len(boxes), held_out=held_out)
    tracks = tuple(Track(actor, box, tuple(rng.random(4))) for actor, box in zip(actors, boxes, strict=True))
    background = pick(rng, tuple(BACKGROUNDS))
    return Scene(tracks, background, describe(rng, actors, background))


def draw_layout(rng: np.random.Generator, size: tuple[int, int]) -> tuple[Sequence[str], list[Box]]:
    """List motions that the shapes of a scene may have, and each one's part of a picture of (height, width)."""
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
    return motions, boxes


def draw_actors(draw: Callable[[], Actor], count: int, *, held_out: bool) -> list[Actor]:
    """So many actors of different colours. held_out: the first is a held-out combination; none of the others is."""
    actors: list[Actor] = []
    while len(actors) < count:
        actor = draw()
        wanted = held_out and not actors
        same_colour = any(other.colour == actor.colour for other in actors)
        if is_held_out(actor.kind, actor.colour, actor.motion) == wanted and not same_colour:
            actors.append(actor)
    return actors


def draw_actor(rng: np.random.Generator, motions: Sequence[str]) -> Actor:
    """One with any of these motions, which does not travel."""
    motion = pick(rng, motions)
    return Actor(
        size=pick(rng, tuple(SIZES)),
        colour=pick(rng, tuple(COLOURS)),
        kind=pick(rng, KINDS),
        motion=motion,
        speed="" if motion == "still" else pick(rng, tuple(SPEEDS)),
    )


def pick(rng: np.random.Generator, items: Sequence[str]) -> str:
    """One of the items, each as likely."""
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
TRAVELS = {side: (VERBS[side][0].replace("moves", "travels"),) for side in DIRECTIONS}
"""Said of what leaves the view and comes back on the other side, still on its way."""
PLACES = ("on a {} background", "in front of a {} wall")
ONE = ("{0} {place}", "{place}, {0}")
BOTH = ("{0} while {1} {place}", "{0} and {1} {place}", "{place}, {0} while {1}")


def describe(rng: np.random.Generator, actors: Sequence[Actor], background: str) -> str:
    """A caption, in one of the ways to say it."""
    said = []
    for actor in actors:
        verb = pick(rng, (TRAVELS if actor.travels else VERBS)[actor.motion])
        said.append(f"a {actor.size} {actor.colour} {actor.kind} {verb.format(actor.speed)}")
    sentence = pick(rng, ONE if len(actors) == 1 else BOTH).format(*said, place=pick(rng, PLACES).format(background))
    return sentence if rng.random() < 0.5 else sentence[0].upper() + sentence[1:] + "."


def _pattern() -> tuple[re.Pattern[str], re.Pattern[str], dict[str, tuple[str, str, bool]]]:
    """Tables of how actors and places are said, and of the (motion, speed, travels) of each way to say a motion."""
    said = {
        verb.format(speed): (motion, "" if motion == "still" else speed, travels)
        for travels, table in ((False, VERBS), (True, TRAVELS))
        for motion, verbs in table.items()
        for verb in verbs
        for speed in SPEEDS
    }
    actor = "a ({}) ({}) ({}) ({})".format(*("|".join(words) for words in (SIZES, COLOURS, SHOWN, said)))
    place = "|".join(words.format(f"({'|'.join(BACKGROUNDS)})") for words in PLACES)
    return re.compile(actor), re.compile(place), said


_ACTOR, _PLACE, _SAID = _pattern()


def parse_caption(caption: str) -> Promise | None:
    """Read what a caption of this world promises; None of a text outside of its grammar."""
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
    if kind == "bar":
        return torch.maximum(x.abs() - radius, y.abs() - 0.42 * radius)
    raise ValueError(f"kind={kind}: must be one of {', '.join(SHOWN)}")


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
        for kind, marking in itertools.product(SHOWN, MARKINGS):
            chosen = [
                index
                for index, scene in enumerate(scenes)
                if number < len(scene.tracks)
                and (scene.tracks[number].actor.kind, scene.tracks[number].paint[0]) == (kind, marking)
            ]
            if not chosen:
                continue
            tracks = [scenes[index].tracks[number] for index in chosen]
            centres = np.stack([track(times) for track in tracks])
            x, y = torch.from_numpy(centres).to(device, torch.float32).unbind(-1)  # (N, F)
            wraps = torch.tensor([not track.actor.travels for track in tracks], device=device)[:, None, None]
            across = _offsets(columns, x, width, wraps)[:, :, None, :]
            down = _offsets(rows, y, height, wraps)[:, :, :, None]
            radius = torch.tensor([track.radius for track in tracks], device=device)[:, None, None, None]
            colour = torch.tensor([track.colour for track in tracks], device=device).float()[:, :, None, None, None]
            if marking != "plain":
                angle = torch.tensor([track.paint[1] for track in tracks], device=device)[:, None, None, None]
                colour = colour * (1 - (1 - SHADE) * painted(marking, across, down, radius, angle))[:, None]
            covered = coverage(kind, across, down, radius)[:, None]
            where = torch.tensor(chosen, device=device)
            pictures[where] = torch.lerp(pictures[where], colour, covered)
    return pictures / 127.5 - 1


def to_bytes(pictures: Tensor) -> Tensor:
    """Round pictures (B, 3, F, H, W) in [-1, 1] to (B, F, H, W, 3), uint8."""
    return ((pictures + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)


def _offsets(line: Tensor, place: Tensor, length: float, wraps: Tensor) -> Tensor:
    """Signed pixels (N, F, L) from places (N, F) to a line's pixels (L,), the shorter way around where one wraps."""
    distance = line - place[..., None]
    return torch.where(wraps, around(distance, length), distance)


def around(distance: Tensor, period: float) -> Tensor:
    """The shortest signed distance on a circle of this length, for distances of any shape."""
    return (distance + period / 2) % period - period / 2


def prompts(seed: int, count: int, *, held_out: bool, draw: Callable[..., Scene] = draw_scene) -> list[str]:
    """Different captions, in order of their index. draw: `draw_scene` of this world or another."""
    return [scene.caption for scene in distinct_scenes(seed, count, held_out=held_out, draw=draw)]


def distinct_scenes(seed: int, count: int, *, held_out: bool, draw: Callable[..., Scene] = draw_scene) -> list[Scene]:
    """The first scene of each of `prompts`."""
    found: dict[str, Scene] = {}
    index = 0
    while len(found) < count:
        scene = draw(seed, index, held_out=held_out)
        found.setdefault(scene.caption, scene)
        index += 1
    return list(found.values())
