"""The shapes world: captions say what is drawn, and what is drawn does what the caption says."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from longsana.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    HEIGHT,
    HELD_OUT,
    KINDS,
    LANES,
    MOTIONS,
    SHOWN,
    SIZES,
    SPEEDS,
    TURNS,
    WIDTH,
    Actor,
    Box,
    Scene,
    Track,
    coverage,
    draw_scene,
    is_held_out,
    parse_caption,
    prompts,
    render,
    signed_distance,
)

CAPTION = "a small red circle moves slowly to the right on a black background"
ALONE = [(motion, speed) for motion in MOTIONS for speed in ([""] if motion == "still" else SPEEDS)]


def lone(
    motion: str,
    speed: str = "quickly",
    *,
    kind: str = "circle",
    size: str = "big",
    draws: tuple[float, float, float, float] = (0.3, 0.6, 0.1, 0.8),
) -> Scene:
    actor = Actor(size, "white", kind, motion, "" if motion == "still" else speed)
    return Scene((Track(actor, Box(0, 0, WIDTH, HEIGHT), draws),), "black", "")


def mass(pictures: Tensor) -> Tensor:
    """Share (F, H, W) of each pixel that is not background, of a lone white shape before black."""
    values = (pictures[0, 0] + 1) * 127.5
    return (values - BACKGROUNDS["black"][0]) / (COLOURS["white"][0] - BACKGROUNDS["black"][0])


def places(pictures: Tensor) -> np.ndarray:
    """Where on the torus (F, 2), x and y in pixels, the mass is."""
    found = []
    for dim, period in ((1, WIDTH), (2, HEIGHT)):
        profile = mass(pictures).sum(dim=dim).double().numpy()
        angles = 2 * math.pi * (np.arange(period) + 0.5) / period
        found.append(np.angle(profile @ np.exp(1j * angles)) * period / (2 * math.pi) % period)
    return np.stack(found, axis=1)


def steps(positions: np.ndarray) -> np.ndarray:
    """From frame to frame the shorter way around the torus."""
    size = np.array([WIDTH, HEIGHT])
    return (np.diff(positions, axis=0) + size / 2) % size - size / 2


# Scenes


def test_a_scene_is_a_function_of_seed_and_index() -> None:
    np.random.seed(0)  # noqa: NPY002
    first = {(seed, index, held): draw_scene(seed, index, held_out=held) for seed, index, held in keys()}
    np.random.seed(1)  # noqa: NPY002
    again = {(seed, index, held): draw_scene(seed, index, held_out=held) for seed, index, held in reversed(keys())}
    assert first == again
    laws = {scene.tracks for scene in first.values()}
    assert len(laws) == len(first), "no two scenes are one"


def keys() -> list[tuple[int, int, bool]]:
    return list(itertools.product((0, 1, 77), range(40), (False, True)))


def test_the_size_of_the_picture_changes_where_things_are_and_not_what_they_are() -> None:
    for index in range(50):
        large, small = draw_scene(0, index), draw_scene(0, index, size=(64, 64))
        assert large.caption == small.caption
        assert [track.box for track in large.tracks] != [track.box for track in small.tracks]


@pytest.mark.parametrize("held_out", [False, True])
def test_captions_parse_back_to_the_promise(held_out: bool) -> None:
    for index in range(3000):
        scene = draw_scene(3, index, held_out=held_out)
        assert parse_caption(scene.caption) == scene.promise, scene.caption
        assert parse_caption(f"  {scene.caption}\n") == scene.promise


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "a cat walks along a street",
        "a small red circle",
        "a small red circle on a black background",
        "a small red circle moves slowly to the right",  # no background
        "on a black background",
        CAPTION.replace("red", "pink"),
        CAPTION.replace("small", "tiny"),
        CAPTION.replace("small ", ""),
        CAPTION.replace("circle", "star"),
        CAPTION.replace("slowly ", ""),
        CAPTION.replace("slowly", "gently"),
        CAPTION.replace("to the right", "to the front"),
        CAPTION.replace("black", "red"),
        CAPTION.replace("black", "blackish"),
        CAPTION.replace("on a", "on the"),
        CAPTION.replace("a small", "one small"),
        CAPTION.upper(),
        CAPTION + "..",
        CAPTION + " on a black background",
        CAPTION + ". motion score: 10.",
        CAPTION + " and nothing else",
        "perhaps " + CAPTION,
        f"{CAPTION}, {CAPTION}",
        f"a small red square stays still while {CAPTION}",  # two of one colour
        f"a small blue square stays still, {CAPTION}",
        f"a small blue square stays still and a big green ring does not move and {CAPTION}",
        "a small blue square stays quickly still on a black background",
    ],
)
def test_text_outside_the_grammar_promises_nothing(text: str) -> None:
    assert parse_caption(text) is None


def test_the_texts_that_are_near_misses_are_near() -> None:
    promise = parse_caption(CAPTION)
    assert promise is not None
    assert promise.actors == (Actor("small", "red", "circle", "right", "slowly"),)
    assert promise.background == "black"
    two = parse_caption(f"A small blue square stays still while {CAPTION}.")
    assert two is not None
    assert two.actors == (Actor("small", "blue", "square", "still", ""), *promise.actors)


def test_held_out_combinations_are_few_and_leave_every_word() -> None:
    assert len(HELD_OUT) == len(set(HELD_OUT)) == 27
    rest = set(itertools.product(KINDS, COLOURS, MOTIONS)) - set(HELD_OUT)
    for place, words in enumerate((KINDS, COLOURS, MOTIONS)):
        assert {combination[place] for combination in HELD_OUT} == set(words)
        assert {combination[place] for combination in rest} == set(words)
    # And every pair of words is seen in training: what is new is that the three come together.
    for one, other in itertools.combinations(range(3), 2):
        words = [(KINDS, tuple(COLOURS), MOTIONS)[place] for place in (one, other)]
        assert {(combination[one], combination[other]) for combination in rest} == set(itertools.product(*words))


def test_training_never_shows_what_is_held_out() -> None:
    for index in range(4000):
        assert not any(is_held_out(a.kind, a.colour, a.motion) for a in draw_scene(1, index).promise.actors)


def test_a_held_out_scene_shows_one_combination_first() -> None:
    seen = set()
    for index in range(2000):
        first, *others = draw_scene(1, index, held_out=True).promise.actors
        assert (first.kind, first.colour, first.motion) in HELD_OUT
        assert not any(is_held_out(other.kind, other.colour, other.motion) for other in others)
        seen.add((first.kind, first.colour, first.motion))
    assert seen == set(HELD_OUT)


def test_scenes_use_every_word_and_both_counts() -> None:
    promises = [draw_scene(2, index).promise for index in range(2000)]
    actors = [actor for promise in promises for actor in promise.actors]
    assert {actor.size for actor in actors} == set(SIZES)
    assert {actor.colour for actor in actors} == set(COLOURS)
    assert {actor.kind for actor in actors} == set(KINDS)
    assert {(actor.motion, actor.speed) for actor in actors} == set(ALONE)
    assert {promise.background for promise in promises} == set(BACKGROUNDS)
    assert 0.3 < sum(len(promise.actors) == 2 for promise in promises) / len(promises) < 0.4


@pytest.mark.parametrize("held_out", [False, True])
def test_prompts_are_distinct_captions_in_order(held_out: bool) -> None:
    some = prompts(5, 300, held_out=held_out)
    assert len(set(some)) == len(some) == 300
    assert some[0] == draw_scene(5, 0, held_out=held_out).caption
    assert prompts(5, 20, held_out=held_out) == some[:20]
    assert prompts(6, 20, held_out=held_out) != some[:20]
    for caption in some:
        promise = parse_caption(caption)
        assert promise is not None
        first = promise.actors[0]
        assert is_held_out(first.kind, first.colour, first.motion) == held_out


# Pictures


def test_colours_are_told_apart_and_can_be_shifted() -> None:
    for one, other in itertools.combinations(COLOURS.values(), 2):
        assert math.dist(one, other) > 80
    for colour, background in itertools.product(COLOURS.values(), BACKGROUNDS.values()):
        assert math.dist(colour, background) > 80
    for one, other in itertools.combinations(BACKGROUNDS.values(), 2):
        assert math.dist(one, other) > 40
    assert max(byte for colour in (*COLOURS.values(), *BACKGROUNDS.values()) for byte in colour) <= 230


def test_pictures_are_of_the_promised_colours() -> None:
    for index in range(40):
        scene = draw_scene(0, index)
        pictures = (render([scene], range(0, 80, 40))[0] + 1) * 127.5
        values = {tuple(value) for value in pictures.round().flatten(1).unique(dim=1).t().int().tolist()}
        assert values >= {BACKGROUNDS[scene.background], *(COLOURS[actor.colour] for actor in scene.promise.actors)}
        assert float(pictures.min()) >= -1e-3
        assert float(pictures.max()) <= 230


def test_pieces_equal_the_whole() -> None:
    scenes = [draw_scene(0, index) for index in range(12)]
    whole = render(scenes, range(20))
    assert whole.shape == (12, 3, 20, HEIGHT, WIDTH)
    assert whole.dtype == torch.float32
    assert torch.equal(torch.cat([render(scenes, range(7)), render(scenes, range(7, 20))], dim=2), whole)
    assert torch.equal(render(scenes, range(3, 20, 4)), whole[:, :, 3::4])
    for index, scene in enumerate(scenes):
        assert torch.equal(render([scene], range(20)), whole[index : index + 1])


def test_a_clip_begins_anywhere_and_has_any_length() -> None:
    size = (64, 64)
    scenes = [draw_scene(0, index, size=size) for index in range(2)]
    minute = render(scenes, range(961), size=size)
    assert minute.shape == (2, 3, 961, 64, 64)
    assert torch.equal(render(scenes, range(953, 961), size=size), minute[:, :, 953:])
    assert torch.isfinite(minute).all()
    assert torch.isfinite(render(scenes, range(10**6, 10**6 + 1), size=size)).all()


@pytest.mark.parametrize("kind", SHOWN)
def test_what_leaves_on_the_right_comes_in_on_the_left(kind: str) -> None:
    covered = mass(render([lone("right", "slowly", kind=kind)], range(60, 210)))
    areas = covered.sum(dim=(1, 2))
    assert float((areas / areas.mean() - 1).abs().max()) < 0.02
    left, right = covered[:, :, 0].sum(dim=1) > 0, covered[:, :, -1].sum(dim=1) > 0
    assert bool((left & right).any()), "it is cut by the edge"
    assert int(left.nonzero()[0]) > int(right.nonzero()[0]), "it reaches the right edge first"
    assert bool((~left & ~right).any())


@pytest.mark.parametrize("kind", SHOWN)
@pytest.mark.parametrize("size", SIZES)
def test_a_shape_is_as_large_as_its_size_and_centred(kind: str, size: str) -> None:
    scene = lone("still", kind=kind, size=size, draws=(0.5, 0.5, 0, 0))
    pictures = render([scene], range(1))
    # Alike in size, so that "small" and "big" can be told apart of any kind.
    assert float(mass(pictures).sum()) / SIZES[size] ** 2 == pytest.approx(2.1, rel=0.5)
    assert places(pictures)[0] == pytest.approx([WIDTH / 2, HEIGHT / 2], abs=0.6)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("speed", SPEEDS)
def test_what_goes_straight_goes_there_at_its_speed(direction: str, speed: str) -> None:
    moved = steps(places(render([lone(direction, speed)], range(150))))
    expected = np.array(DIRECTIONS[direction]) * SPEEDS[speed]
    assert np.abs(moved - expected).max() < 0.05


def test_right_is_right_and_up_is_up() -> None:
    assert DIRECTIONS["right"][0] > 0 > DIRECTIONS["left"][0]
    assert DIRECTIONS["down"][1] > 0 > DIRECTIONS["up"][1], "row 0 is the top of the picture"


@pytest.mark.parametrize("speed", SPEEDS)
def test_a_bounce_is_straight_between_edges(speed: str) -> None:
    for phase in (0.1, 0.3, 0.6, 0.9):
        moved = steps(places(render([lone("bounce", speed, draws=(0.3, 0.6, phase, 0.8))], range(200))))
        lengths = np.linalg.norm(moved, axis=1)
        assert np.median(lengths) == pytest.approx(SPEEDS[speed], rel=0.02)
        assert lengths.max() < SPEEDS[speed] * 1.05
        assert ({-1, 1} == set(np.sign(moved[:, 1]))) or speed == "slowly"
        for axis in (0, 1):
            straight = np.abs(moved[:, axis])
            assert (np.abs(straight - np.median(straight)) < 0.05).mean() > 0.9, "only at an edge is it turned"


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("speed", SPEEDS)
def test_an_orbit_goes_round_as_a_clock_does_or_against(turn: str, speed: str) -> None:
    positions = places(render([lone(turn, speed)], range(300)))
    moved = steps(positions)
    middle = (positions[1:] + positions[:-1]) / 2
    top, bottom = middle[:, 1] < HEIGHT / 2 - 5, middle[:, 1] > HEIGHT / 2 + 5
    assert top.any()
    assert bottom.any()
    # The hand of a clock goes to the right when it is up.
    sense = 1 if turn == "clockwise" else -1
    assert (sense * moved[top, 0] > 0).all()
    assert (sense * moved[bottom, 0] < 0).all()
    assert np.linalg.norm(moved, axis=1) == pytest.approx(SPEEDS[speed], abs=0.1)
    radii = np.linalg.norm(positions - (WIDTH / 2, HEIGHT / 2), axis=1)
    assert np.ptp(radii) < 0.2


@pytest.mark.parametrize("kind", SHOWN)
def test_still_means_identical_frames(kind: str) -> None:
    pictures = render([lone("still", kind=kind)], range(0, 900, 90))
    assert torch.equal(pictures, pictures[:, :, :1].expand_as(pictures))


def reach(kind: str, size: str) -> tuple[float, float, float, float]:
    """How far a shape extends from its centre to the left, right, top and bottom."""
    grid = torch.linspace(-30, 30, 601)
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    inside = signed_distance(kind, x, y, SIZES[size]) <= 1e-4
    return -float(x[inside].min()), float(x[inside].max()), -float(y[inside].min()), float(y[inside].max())


def test_bounce_and_orbit_stay_inside_the_picture() -> None:
    rng = np.random.default_rng(0)
    for kind, size in itertools.product(SHOWN, SIZES):
        left, right, top, bottom = reach(kind, size)
        for motion in ("bounce", *TURNS, "still"):
            for _ in range(5):
                scene = lone(motion, kind=kind, size=size, draws=tuple(rng.random(4)))
                x, y = scene.tracks[0](np.arange(2000)).T
                assert x.min() >= left - 0.01 and x.max() <= WIDTH - right + 0.01, (kind, size, motion)
                assert y.min() >= top - 0.01 and y.max() <= HEIGHT - bottom + 0.01, (kind, size, motion)


def covered_by(track: Track, frames: range) -> Tensor:
    """Pixels (F, H, W) that the track's shape covers any part of, on the torus; not by way of `render`."""
    x, y = torch.from_numpy(track(np.asarray(frames))).float().unbind(-1)
    columns = (torch.arange(WIDTH) + 0.5 - x[:, None] + WIDTH / 2) % WIDTH - WIDTH / 2
    rows = (torch.arange(HEIGHT) + 0.5 - y[:, None] + HEIGHT / 2) % HEIGHT - HEIGHT / 2
    return coverage(track.actor.kind, columns[:, None, :], rows[:, :, None], SIZES[track.actor.size]) > 0


def test_two_shapes_never_meet() -> None:
    pairs = set()
    index = 0
    while len(pairs) < 150:
        scene = draw_scene(4, index)
        index += 1
        if len(scene.tracks) == 2:
            frames = range(index % 19, 1000, 19)
            one, other = (covered_by(track, frames) for track in scene.tracks)
            assert not bool((one & other).any()), scene.caption
            pairs.add((index, *(track.actor.motion for track in scene.tracks)))
    assert {(one, other) for _, one, other in pairs} >= set(itertools.product(LANES[0], repeat=2))
    assert {motion for _, *both in pairs for motion in both} == set(MOTIONS)


def test_two_extreme_shapes_in_neighbouring_lanes_do_not_meet() -> None:
    """The tallest against the tallest, as near as the draws allow; also around the edge of the torus."""
    for kinds in itertools.product(SHOWN, repeat=2):
        tracks = [
            Track(
                Actor("big", colour, kind, "right", speed),
                Box(0, number * HEIGHT / 2, WIDTH, HEIGHT / 2),
                (0.5, across, 0, 0),
            )
            for number, (colour, kind, speed, across) in enumerate(
                zip(("red", "blue"), kinds, ("slowly", "quickly"), (1 - 1e-9, 0.0), strict=True)
            )
        ]
        frames = range(0, 115, 2)  # one overtakes the other
        assert not bool((covered_by(tracks[0], frames) & covered_by(tracks[1], frames)).any()), kinds
        around = [
            Track(track.actor, track.box, (0.5, across, 0, 0))
            for track, across in zip(tracks, (0, 1 - 1e-9), strict=True)
        ]
        assert not bool((covered_by(around[0], frames) & covered_by(around[1], frames)).any()), kinds
