"""The world in which the past matters: what leaves comes back, and looks are what no caption tells."""

from __future__ import annotations

import hashlib
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from longsana.data.clips import any_scene, remembered_scene, turning_scene
from longsana.shapes.looks import MARKINGS, RADII, SHADE, TINT, Look, painted, tint_of, tinted
from longsana.shapes.remembered import AWAY, WORLDS, draw_remembered
from longsana.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    FPS,
    HEIGHT,
    HELD_OUT,
    KINDS,
    MOTIONS,
    SIZES,
    SPEEDS,
    TURNS,
    WIDTH,
    Actor,
    Box,
    Scene,
    Track,
    draw_scene,
    is_held_out,
    parse_caption,
    prompts,
    render,
    signed_distance,
)

CHUNK = 40
"""Pixel frames of a chunk of ten latents."""
PALETTE = torch.tensor(list(COLOURS.values()), dtype=torch.float32)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_remembered(2, index) for index in range(1000)]


@pytest.fixture(scope="module")
def travellers(scenes: list[Scene]) -> list[Track]:
    return [track for scene in scenes for track in scene.tracks if track.actor.travels]


def in_view(track: Track, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether any of it is in the picture, and whether all of it is, (F,) each; by brute force."""
    grid = torch.linspace(-1.2, 1.2, 121)
    inside = signed_distance(track.actor.kind, grid[None, :], grid[:, None], 1.0) <= 0
    points = torch.stack(torch.broadcast_tensors(grid[None, :], grid[:, None]), dim=-1)[inside].numpy() * track.radius
    places = track(frames)[:, None] + points
    seen = ((places >= 0) & (places <= (WIDTH, HEIGHT))).all(-1)
    return seen.any(1), seen.all(1)


# The old series


OLD = {
    "shapes": (any_scene, "64ee0e34520217ab", "083ea38a2e7675af"),
    "turning_shapes": (turning_scene, "a9554368462e4656", "c084c3a7f2f0eb07"),
    "held out": (
        lambda seed, index, size: draw_scene(seed, index, held_out=True, size=size),
        "0182878be15f7b70",
        "b0a1a9da6344405d",
    ),
}
"""Draws, and digests of captions and of pictures, both written at commit 3377696, before this world was."""


@pytest.mark.parametrize("name", OLD)
def test_the_old_series_is_what_it_was(name: str) -> None:
    draw, captions, pictures = OLD[name]
    drawn = [draw(1, index, (HEIGHT, WIDTH)) for index in range(24)]
    assert digest("\n".join(scene.caption for scene in drawn).encode()) == captions
    levels = ((render(drawn, range(0, 81, 27)) + 1) * 127.5).round().to(torch.uint8)
    assert digest(levels.numpy().tobytes()) == pictures


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def test_the_split_is_what_it_was() -> None:
    assert digest(repr(HELD_OUT).encode()) == "561af61121d99f41"
    assert digest("\n".join(prompts(0, 64, held_out=True)).encode()) == "981f1bfddaaa6e7c"


# Scenes


def test_a_scene_is_a_function_of_seed_and_index_and_of_no_other_series() -> None:
    keys = list(itertools.product((0, 1, 77), range(30), (False, True)))
    first = [draw_remembered(seed, index, held_out=held) for seed, index, held in keys]
    assert [draw_remembered(seed, index, held_out=held) for seed, index, held in keys] == first
    assert len({scene.tracks for scene in first}) == len(first)
    same = [
        scene.caption == draw_scene(seed, index, held_out=held).caption
        for scene, (seed, index, held) in zip(first, keys, strict=True)
    ]
    assert not any(same)


@pytest.mark.parametrize("held_out", [False, True])
def test_captions_say_what_is_drawn(held_out: bool) -> None:
    for index in range(1500):
        scene = draw_remembered(3, index, held_out=held_out)
        assert parse_caption(scene.caption) == scene.promise, scene.caption
        first, *others = scene.promise.actors
        assert is_held_out(first.kind, first.colour, first.motion) == held_out
        assert not any(is_held_out(other.kind, other.colour, other.motion) for other in others)
        assert len({actor.colour for actor in scene.promise.actors}) == len(scene.tracks)


def test_the_caption_of_one_who_travels() -> None:
    caption = "A small red circle travels slowly up while a big blue ring moves quickly up on a black background."
    promise = parse_caption(caption)
    assert promise is not None
    assert promise.actors[0] == Actor("small", "red", "circle", "up", "slowly", travels=True)
    assert promise.actors[1] == Actor("big", "blue", "ring", "up", "quickly")
    assert parse_caption(caption.replace("travels", "goes")) is None
    assert parse_caption("a small red circle travels slowly around on a black background") is None


def test_scenes_use_every_word_and_marking(scenes: list[Scene]) -> None:
    tracks = [track for scene in scenes for track in scene.tracks]
    actors = [track.actor for track in tracks]
    assert {(actor.motion, actor.travels) for actor in actors} == {
        *((motion, False) for motion in MOTIONS),
        *((motion, True) for motion in DIRECTIONS),
    }
    for name, words in (("kind", KINDS), ("colour", COLOURS), ("size", SIZES)):
        assert {getattr(actor, name) for actor in actors} == set(words)
    assert {actor.speed for actor in actors if actor.travels} == set(SPEEDS)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    shares = [np.mean([track.paint[0] == marking for track in tracks]) for marking in MARKINGS]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.04)


def test_looks_fill_their_ranges_and_leave_none(scenes: list[Scene]) -> None:
    for word, (least, most) in RADII.items():
        radii = np.array([track.radius for scene in scenes for track in scene.tracks if track.actor.size == word])
        assert least <= radii.min() < least + 0.1
        assert most - 0.1 < radii.max() <= most
        others = [SIZES[other] for other in SIZES if other != word]
        assert (np.abs(radii - SIZES[word]) < min(abs(radii[:, None] - others).min(1))).all(), "nearest to its word"
    tints = np.array([track.look.tint for scene in scenes for track in scene.tracks if track.look])
    assert -1 <= tints.min() < -0.98
    assert 0.98 < tints.max() <= 1
    angles = [track.look.angle for scene in scenes for track in scene.tracks if track.look]
    assert np.histogram(angles, bins=6, range=(0, math.pi))[0].min() > len(angles) / 8
    assert all(track.look for scene in scenes for track in scene.tracks)


def test_in_most_scenes_something_leaves_the_view(scenes: list[Scene], travellers: list[Track]) -> None:
    share = np.mean([any(track.actor.travels for track in scene.tracks) for scene in scenes])
    assert 0.65 < share < 0.8
    away = np.array([track.away for track in travellers])
    assert AWAY[0] <= away.min() < away.max() <= AWAY[1]
    assert 0.3 < np.mean(away > CHUNK) < 0.4
    # In clips of five seconds, on which a base model is trained, some come back.
    back = [in_view(track, np.arange(81)) for track in travellers[:200]]
    assert 0.2 < np.mean([whole[-1] and not seen.all() for seen, whole in back]) < 0.6
    assert all(track.away == 0 for scene in scenes for track in scene.tracks if not track.actor.travels)


def test_all_can_be_seen_for_a_second_before_any_of_it_leaves(scenes: list[Scene]) -> None:
    for scene in scenes[:300]:
        for track in scene.tracks:
            if track.actor.travels or track.actor.motion not in DIRECTIONS:
                assert in_view(track, np.arange(FPS + 1))[1].all(), scene.caption


# Travels


def test_it_is_out_of_view_for_as_long_as_the_scene_says(travellers: list[Track]) -> None:
    for track in travellers[:24]:
        seen, whole = in_view(track, np.arange(1200))
        absences = [len(list(group)) for there, group in itertools.groupby(seen) if not there]
        # Its margin is wider than it is: up to 2.6 pixels on either side, and a frame more or less.
        slack = 2 * (track.margin - 0.5 * track.radius) / SPEEDS[track.actor.speed]
        for frames in absences[:-1]:
            assert track.away - 1 <= frames <= track.away + 1 + slack
        assert len(absences) >= 2
        assert whole.any()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("speed", SPEEDS)
def test_it_comes_back_on_the_other_side_and_goes_on(direction: str, speed: str) -> None:
    track = traveller(direction, speed)
    frames = np.arange(600)
    path = track(frames)
    across, along = (1, 0) if direction in ("left", "right") else (0, 1)
    assert np.ptp(path[:, across]) == 0, "on its line"
    steps = np.diff(path[:, along]) * sum(DIRECTIONS[direction])
    onward = np.abs(steps - SPEEDS[speed]) < 1e-9
    assert (~onward).sum() >= 1
    length = (WIDTH, HEIGHT)[along]
    assert steps[~onward] == pytest.approx(-(length + 2 * track.margin + (track.away - 1) * SPEEDS[speed]))
    seen, _ = in_view(track, frames)
    jumps = np.flatnonzero(~onward)
    assert not seen[jumps].any() and not seen[jumps + 1].any(), "it jumps where nobody sees it"


def traveller(
    direction: str = "right", speed: str = "quickly", *, away: float = 20.0, look: Look | None = None
) -> Track:
    actor = Actor("small", "white", "circle", direction, speed, travels=True)
    return Track(actor, Box(0, 0, WIDTH, HEIGHT), (0.3, 0.6, 0.1, 0.8), look, away)


def pictures(track: Track, frames: range) -> Tensor:
    """Bytes (F, H, W, 3), not rounded."""
    return (render([Scene((track,), "black", "")], frames)[0].permute(1, 2, 3, 0) + 1) * 127.5


def test_nothing_is_seen_of_it_while_it_is_away() -> None:
    track = traveller(look=Look(0.4, 14.0, "stripes", 0.7))
    ground = torch.tensor(BACKGROUNDS["black"]).float()
    seen, whole = in_view(track, np.arange(200))
    shown = ((pictures(track, range(200)) - ground).abs() > 1).any(-1).flatten(1)
    # Its edge is soft by half a pixel: in the frame before or after it may just be seen.
    gone = ~seen & ~np.roll(seen, 1) & ~np.roll(seen, -1)
    assert gone.sum() > 15
    assert not shown[torch.from_numpy(gone)].any()
    assert shown[torch.from_numpy(whole)].any(1).all()
    areas = shown.sum(1).numpy()
    assert (areas[seen & ~whole] < areas[whole].max()).all()
    # Never in two pieces, as it would be on the torus.
    columns = ((pictures(track, range(200)) - ground).abs() > 1).any(-1).any(1)
    assert not (columns[:, 0] & columns[:, -1]).any()


def test_it_comes_back_as_it_was() -> None:
    speed = SPEEDS["quickly"]
    track = traveller(look=Look(-0.8, 15.0, "stripes", 1.2))
    # A whole period in whole frames: pictures can be compared to the bit of a byte.
    period = math.ceil((WIDTH + 2 * track.margin) / speed + 20)
    track = replace(track, away=period - (WIDTH + 2 * track.margin) / speed)
    first, again = pictures(track, range(30)), pictures(track, range(period, period + 30))
    assert (first - again).abs().max() < 0.1
    assert (first[0] - first[29]).abs().max() > 50


def test_two_shapes_never_meet(scenes: list[Scene]) -> None:
    pairs = [scene for scene in scenes if len(scene.tracks) == 2][:60]
    for scene in pairs:
        alone = [replace(scene, tracks=(track,)) for track in scene.tracks]
        clips = [render([part], range(0, 400, 19)) for part in alone]
        ground = torch.tensor(BACKGROUNDS[scene.background]) / 127.5 - 1
        first, second = ((clip - ground[None, :, None, None, None]).abs().amax(1) > 1e-3 for clip in clips)
        assert not (first & second).any(), scene.caption


# Looks


def test_a_tint_turns_the_hue_and_nothing_else() -> None:
    import colorsys

    for name, colour in COLOURS.items():
        own = torch.tensor(colour).float()
        for tint in (-1.0, -0.4, 0.0, 0.7, 1.0):
            seen = tinted(own, torch.tensor(tint))
            assert tint_of(seen, own).item() == pytest.approx(tint, abs=1e-4)
            if name != "white":
                before, after = (colorsys.rgb_to_hsv(*(value / 255).tolist()) for value in (own, seen))
                turned = ((after[0] - before[0] + 0.5) % 1 - 0.5) * 360
                assert turned == pytest.approx(TINT * tint, abs=0.01)
                assert after[1:] == pytest.approx(before[1:], abs=1e-5)
                assert tint_of(SHADE * seen, own).item() == pytest.approx(tint, abs=1e-4), "in shadow, too"
        assert tinted(own, torch.tensor(0.0)).tolist() == pytest.approx(colour)


def test_no_tint_comes_near_another_colour() -> None:
    """Nor does its paint come near a background, or another's paint."""
    ends = [tinted(PALETTE, torch.full((len(PALETTE),), tint)) for tint in (-1.0, -0.5, 0.0, 0.5, 1.0)]
    grounds = torch.tensor(list(BACKGROUNDS.values())).float()
    candidates = torch.cat([PALETTE, SHADE * PALETTE])
    own = torch.arange(len(PALETTE))
    for colours in ends:
        for values in (colours, SHADE * colours):
            distance = torch.cdist(values, candidates)
            nearest = distance.argmin(1) % len(PALETTE)
            assert (nearest == own).all()
            others = distance.clone()
            others[own, own], others[own, own + len(own)] = torch.inf, torch.inf
            assert (others.amin(1) > 1.3 * distance.amin(1)).all()
            assert (torch.cdist(values, grounds).amin(1) > 1.3 * distance.amin(1)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("marking", MARKINGS)
def test_paint_stays_on_its_shape(kind: str, marking: str) -> None:
    look = Look(0.0, 15.0, marking, 0.6)
    actor = Actor("small", "cyan", kind, "still", "")
    scene, bare = (
        Scene((Track(actor, Box(0, 0, WIDTH, HEIGHT), (0.5, 0.5, 0, 0), each),), "black", "")
        for each in (look, replace(look, marking="plain"))
    )
    one, other = (((render([each], range(1))[0, :, 0] + 1) * 127.5) for each in (scene, bare))
    differs = (one - other).abs().amax(0) > 1
    ground = torch.tensor(BACKGROUNDS["black"]).float()[:, None, None]
    shape = (other - ground).abs().amax(0) > 1
    assert not (differs & ~shape).any()
    share = float(differs.sum() / shape.sum())
    assert (share == 0) if marking == "plain" else 0.2 < share < 0.7
    inner = (other - torch.tensor(COLOURS["cyan"]).float()[:, None, None]).abs().amax(0) < 1
    above = (one[:, inner] - SHADE * torch.tensor(COLOURS["cyan"])[:, None]).amax(0)
    assert above.min() >= -0.1
    assert bool((above < 0.1).any()) == (marking != "plain")


def test_stripes_turn_with_their_angle() -> None:
    line = torch.linspace(-20, 20, 81)
    x, y = line[None, :], line[:, None]
    upright = painted("stripes", x, y, 15.0, 0.0)
    assert torch.equal(upright, upright[:1].expand_as(upright)), "across x at angle 0"
    torch.testing.assert_close(painted("stripes", x, y, 15.0, math.pi / 2), upright.T, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        painted("stripes", x, y, 15.0, 0.3), painted("stripes", x, y, 15.0, 0.3 + math.pi), atol=1e-4, rtol=0
    )
    # At 45 degrees the line across leads down to the right: on the screen, clockwise.
    slanted = painted("stripes", x, y, 15.0, math.pi / 4)
    assert slanted[40 + 10, 40 + 10] == 1 and slanted[40 - 10, 40 + 10] == 0
    with pytest.raises(ValueError, match="marking=checks: must be one of plain"):
        painted("checks", x, y, 15.0, 0.0)


# Clips


def test_worlds_and_sources_have_the_scenes_of_their_names() -> None:
    assert remembered_scene(5, 7, (64, 64)) == draw_remembered(5, 7, size=(64, 64))
    assert WORLDS["remembered_shapes"](5, 7, held_out=True) == draw_remembered(5, 7, held_out=True)
    assert WORLDS["shapes"] is draw_scene
    texts = prompts(0, 40, held_out=True, draw=draw_remembered)
    assert texts[0] == draw_remembered(0, 0, held_out=True).caption
    assert len(set(texts)) == 40


def test_turning_scenes_keep_their_looks() -> None:
    drawn = [turning_scene(2, index, (HEIGHT, WIDTH), remembered_scene) for index in range(120)]
    turning = [any(track.actor.motion in ("bounce", *TURNS) for track in scene.tracks) for scene in drawn]
    assert all(turning[index] for index in range(120) if index % 4)
    assert all(track.look for scene in drawn for track in scene.tracks)
    assert [scene.tracks[0].look for scene in drawn[::4]] == [
        draw_remembered(2, i).tracks[0].look for i in range(0, 120, 4)
    ]
