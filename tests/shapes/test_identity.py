"""What a video goes on with is what it has shown: passed on ground truth, failed for each fault planted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from longsana.shapes import scenes as shapes
from longsana.shapes.identity import ANGLE_APART, SIZE_APART, TINT_APART
from longsana.shapes.looks import MARKINGS, TINT, Look
from longsana.shapes.remembered import draw_remembered
from longsana.shapes.scenes import COLOURS, KINDS, Actor, Scene, Track
from longsana.shapes.sight import Seen, observe
from longsana.shapes.verifier import Verdicts, all_in_view, judge, score
from tests.shapes.films import pictures, through_vae, watch

LEAST = {False: 0.99, True: 0.97}
"""Share that must be right on ground truth, and blurred with noise."""
STRIPED = Look(0.3, 15.0, "stripes", 0.7)
STILL = Actor("small", "red", "square", "still", "")
TRAVELLER = Actor("small", "blue", "circle", "right", "quickly", travels=True)
BACK = 75
"""A frame by which the traveller has come in again, wholly."""


def remembered(count: int, seed: int) -> list[Scene]:
    """As many held-out ones as ordinary ones."""
    return [draw_remembered(seed, index // 2, held_out=index % 2 == 1) for index in range(count)]


def lone(actor: Actor, look: Look | None, background: str = "navy", away: float = 12.0) -> Scene:
    box = shapes.Box(0, 0, shapes.WIDTH, shapes.HEIGHT)
    return Scene((Track(actor, box, (0.5, 0.5, 0.2, 0.5), look, away if actor.travels else 0.0),), background, "")


def cut(*parts: tuple[Scene, range]) -> torch.Tensor:
    """A clip (1, F, H, W, 3) of these scenes, one after another."""
    return torch.cat([pictures([scene], len(frames), frames.start) for scene, frames in parts], dim=1)


def verdicts(clip: torch.Tensor, actor: Actor, background: str = "navy") -> Verdicts:
    return judge(observe(clip), [shapes.Promise((actor,), background)])


def changed(scene: Scene, actor: Actor | None = None, **look: object) -> Scene:
    track = scene.tracks[0]
    own = replace(track.look, **look) if look else track.look
    return replace(scene, tracks=(replace(track, actor=actor or track.actor, look=own),))


# What is right ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def truth() -> tuple[list[Scene], Seen]:
    drawn = remembered(16, seed=7)
    return drawn, watch(drawn, frames=129)


def promises(drawn: Sequence[Scene]) -> list[shapes.Promise]:
    return [scene.promise for scene in drawn]


def test_the_truth_is_what_it_was_and_comes_back_as_it_was(truth: tuple[list[Scene], Seen]) -> None:
    drawn, seen = truth
    verdict = judge(seen, promises(drawn))
    result = score(verdict).as_dict()
    assert min(result.values()) >= LEAST[False], result
    assert verdict.returns.isfinite().any(1).sum() >= 6, "some have come back"
    leaves = torch.tensor([any(track.actor.travels for track in scene.tracks) for scene in drawn])
    assert verdict.returns[~leaves].isnan().all()
    assert not verdict.identity[~leaves].isnan().any()


def test_blur_and_noise_do_not_make_another_of_it() -> None:
    drawn = remembered(6, seed=9)
    verdict = judge(watch(drawn, frames=129, vae=True), promises(drawn))
    result = score(verdict).as_dict()
    assert min(result.values()) >= LEAST[True], result
    assert verdict.returns.isfinite().any(1).sum() >= 3


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("vae", [False, True])
def test_many_are_what_they_were(vae: bool) -> None:
    drawn = remembered(200, seed=8)
    verdict = judge(watch(drawn, frames=161, vae=vae), promises(drawn))
    result = score(verdict).as_dict()
    assert min(result.values()) >= LEAST[vae], result
    assert verdict.returns.isfinite().any(1).sum() >= 60


def test_a_long_video_in_pieces_and_its_prefix() -> None:
    drawn = [lone(TRAVELLER, STRIPED)]
    pieces = [observe(pictures(drawn, min(64, 321 - start), start)) for start in range(0, 321, 64)]
    seen = Seen.join(pieces)
    result = judge(seen, promises(drawn))
    assert min(score(result).as_dict().values()) >= LEAST[False]
    assert result.returns.isfinite().diff().sum() >= 4, "it comes back more than once"
    short = judge(observe(pictures(drawn, 100)), promises(drawn))
    for name, values in zip(Verdicts._fields, judge(seen.first(100), promises(drawn)), strict=True):
        torch.testing.assert_close(values, getattr(short, name), equal_nan=True)


def test_the_old_world_is_what_it_was_and_nothing_leaves_it() -> None:
    drawn = [shapes.draw_scene(5, index, held_out=index % 2 == 1) for index in range(8)]
    verdict = judge(watch(drawn), promises(drawn))
    assert verdict.identity.mean() >= LEAST[False]
    assert verdict.returns.isnan().all()
    assert all_in_view(watch(drawn[:4]), promises(drawn[:4])).all()


def test_what_is_seen_of_looks(truth: tuple[list[Scene], Seen]) -> None:
    drawn, seen = truth
    wholly = all_in_view(seen, promises(drawn))
    striped = 0
    for index, scene in enumerate(drawn):
        for track in scene.tracks:
            own = index, wholly[index], list(COLOURS).index(track.actor.colour)
            assert (seen.tint[own] - track.look.tint).abs().max() < 0.05
            assert (seen.radius[own] / track.radius - 1).abs().max() < 0.05
            assert (seen.marking[own] == MARKINGS.index(track.look.marking)).all()
            assert seen.off[own].max() < 3
            if track.look.marking == "stripes":
                turned = (seen.angle[own] - track.look.angle + math.pi / 2) % math.pi - math.pi / 2
                assert turned.abs().max() < math.radians(2)
                striped += 1
            else:
                assert seen.angle[own].isnan().all()
    assert striped > 8


def test_what_is_away_has_no_colour_to_judge(truth: tuple[list[Scene], Seen]) -> None:
    """And is not missed by persistence, nor counted as a drift of the picture's looks."""
    drawn, seen = truth
    verdict, wholly = judge(seen, promises(drawn)), all_in_view(seen, promises(drawn))
    alone = torch.tensor([len(scene.tracks) == 1 for scene in drawn])
    assert (~wholly[alone]).sum() > 100
    for name in ("colour", "kind", "motion", "identity"):
        assert getattr(verdict, name)[alone][~wholly[alone]].isnan().all(), name
    assert (verdict.persistence[alone][~wholly[alone]] == 1).all()


# Other than at first ------------------------------------------------------------------------------------------------


def spoiled(clip: torch.Tensor) -> list[torch.Tensor]:
    return [clip, through_vae(clip)]


@pytest.mark.parametrize("colour", list(COLOURS))
@pytest.mark.parametrize("tint", [-0.6, 0.6])
def test_a_hue_that_shifts_by_a_tenth(colour: str, tint: float) -> None:
    """A tenth of the circle, 36 degrees, either way; of white, which has none, a tenth of the range of bytes."""
    scene = lone(replace(STILL, colour=colour), replace(STRIPED, tint=tint), "black")
    shift = (25.5 / 30 if colour == "white" else 36 / TINT) * (1 if tint < 0 else -1)
    for clip in spoiled(cut((scene, range(17)), (changed(scene, tint=tint + shift), range(17, 22)))):
        seen = verdicts(clip, scene.tracks[0].actor, "black").identity[0]
        assert seen.tolist() == [1.0] * 17 + [0.0] * 5


@pytest.mark.parametrize("colour", list(COLOURS))
def test_a_hue_that_is_another_within_the_range(colour: str) -> None:
    """Six degrees, which its colour's word allows, and a shift that nobody would see."""
    scene = lone(replace(STILL, colour=colour), replace(STRIPED, tint=-0.3), "gray")
    for shift, kept in ((0.5, 0.0), (0.12, 1.0)):
        for clip in spoiled(cut((scene, range(17)), (changed(scene, tint=-0.3 + shift), range(17, 20)))):
            seen = verdicts(clip, scene.tracks[0].actor, "gray")
            assert seen.identity[0, 17:].tolist() == [kept] * 3
            assert seen.colour.min() == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("marking", MARKINGS)
def test_a_size_that_changes_by_a_tenth(kind: str, marking: str) -> None:
    scene = lone(replace(STILL, kind=kind), replace(STRIPED, marking=marking))
    for factor, kept in ((1.1, 0.0), (1 / 1.1, 0.0), (1.02, 1.0)):
        other = changed(scene, radius=15.0 * factor)
        for clip in spoiled(cut((scene, range(17)), (other, range(17, 20)))):
            assert verdicts(clip, scene.tracks[0].actor).identity[0, 17:].tolist() == [kept] * 3, factor


@pytest.mark.parametrize("kind", KINDS)
def test_a_marking_that_turns(kind: str) -> None:
    """By two degrees a frame: from the eighth on it is another, and after half a turn it is what it was."""
    scene = lone(replace(STILL, kind=kind), STRIPED)
    turning = [(changed(scene, angle=0.7 + math.radians(2 * n)), range(16 + n, 17 + n)) for n in range(1, 91)]
    for clip in spoiled(cut((scene, range(17)), *turning)):
        kept = verdicts(clip, scene.tracks[0].actor).identity[0]
        assert kept[:22].min() == 1
        assert kept[26:98].max() == 0
        assert kept[-2:].min() == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", MARKINGS)
@pytest.mark.parametrize("then", MARKINGS)
def test_a_marking_that_becomes_another(kind: str, first: str, then: str) -> None:
    scene = lone(replace(STILL, kind=kind), replace(STRIPED, marking=first))
    for clip in spoiled(cut((scene, range(17)), (changed(scene, marking=then), range(17, 20)))):
        kept = verdicts(clip, scene.tracks[0].actor).identity[0]
        assert kept.tolist() == [1.0] * 17 + [float(first == then)] * 3


def test_a_marking_that_is_none_of_ours() -> None:
    """A chess board, and half of it dark."""
    scene = lone(STILL, Look(0.0, 16.0))
    plain = cut((scene, range(24)))
    y, x = torch.meshgrid(torch.arange(96), torch.arange(160), indexing="ij")
    shape = (plain[0, 0] == plain[0, 0, 48, 80]).all(-1)
    for pattern in ((x // 6 + y // 6) % 2 == 0, x < 80):
        clip = plain.clone()
        clip[0, 16:, shape & pattern] = (clip[0, 0, 48, 80] * 0.65).round().to(torch.uint8)
        assert verdicts(clip, STILL).identity[0].tolist() == [1.0] * 16 + [0.0] * 8


def test_a_slow_drift_is_seen_when_it_has_gone_far() -> None:
    scene = lone(STILL, replace(STRIPED, tint=-0.8))
    frames = [(changed(scene, tint=-0.8 + 0.02 * n), range(n, n + 1)) for n in range(81)]
    kept = verdicts(cut(*frames), STILL).identity[0]
    assert kept[:16].min() == 1 and kept[40:].max() == 0


def test_what_was_not_there_in_the_first_second_is_nothing_to_be() -> None:
    scene = lone(STILL, STRIPED)
    empty = replace(scene, tracks=(replace(scene.tracks[0], box=shapes.Box(-900, 0, 160, 96), actor=TRAVELLER),))
    clip = cut((empty, range(18)), (scene, range(18, 40)))
    assert verdicts(clip, STILL).identity[0].tolist() == [0.0] * 40


def test_what_vanishes_is_not_what_it_was() -> None:
    scene = lone(STILL, STRIPED)
    clip = cut((scene, range(30)))
    clip[:, 20:] = clip[0, 0, 0, 0]
    assert verdicts(clip, STILL).identity[0].tolist() == [1.0] * 20 + [0.0] * 10


# Back as another ----------------------------------------------------------------------------------------------------


def returning(other: Scene, last: int = BACK + 15) -> Verdicts:
    """Judge a traveller in whose place that of another scene comes back."""
    scene, gone = lone(TRAVELLER, STRIPED), 52
    clip = cut((scene, range(gone)), (other, range(gone, last)))
    assert not observe(clip[:, gone - 1 : gone + 1]).present.any()
    return verdicts(clip, TRAVELLER)


def test_the_same_one_comes_back() -> None:
    verdict = returning(lone(TRAVELLER, STRIPED))
    assert verdict.returns[0, :60].isnan().all()
    assert verdict.returns[0, BACK:].tolist() == [1.0] * 15
    assert score(verdict).persistence == 1


@pytest.mark.parametrize(
    "look",
    [
        {"tint": 0.8},
        {"tint": -0.3},
        {"radius": 16.5},
        {"radius": 13.5},
        {"angle": 1.1},
        {"marking": "dots"},
        {"marking": "plain"},
    ],
    ids=str,
)
def test_another_of_the_same_name_comes_back(look: dict[str, object]) -> None:
    verdict = returning(changed(lone(TRAVELLER, STRIPED), **look))
    assert verdict.returns[0, BACK:].tolist() == [0.0] * 15
    assert verdict.identity[0, BACK:].tolist() == [0.0] * 15
    result = score(verdict)
    assert result.persistence == result.colour == result.kind == 1, "all that was promised is there"


def test_another_kind_comes_back() -> None:
    scene = lone(TRAVELLER, STRIPED)
    verdict = returning(changed(scene, actor=replace(TRAVELLER, kind="square")))
    assert verdict.returns[0, BACK:].tolist() == [0.0] * 15
    assert verdict.persistence[0, BACK:].tolist() == [0.0] * 15


def test_another_colour_comes_back() -> None:
    scene = lone(TRAVELLER, STRIPED)
    verdict = returning(changed(scene, actor=replace(TRAVELLER, colour="green")))
    assert verdict.returns[0, BACK:].tolist() == [0.0] * 15
    assert verdict.persistence[0, BACK:].tolist() == [0.0] * 15


def test_nobody_comes_back() -> None:
    verdict = returning(lone(TRAVELLER, STRIPED, away=900.0), last=240)
    assert verdict.persistence[0, :180].min() == 1, "it may stay away so long"
    assert verdict.persistence[0, 210:].max() == 0
    assert verdict.returns[0, :180].isnan().all()
    assert verdict.returns[0, 210:].tolist() == [0.0] * 30
    assert verdict.colour[0, 210:].max() == verdict.motion[0, 210:].max() == 0


def test_who_forgets_is_wrong() -> None:
    """Whatever else is as promised, looks that are drawn anew are rarely the old ones."""
    alone = [scene for scene in remembered(48, seed=4) if len(scene.tracks) == 1 and scene.tracks[0].away]
    films, promised = [], []
    for scene, other in zip(alone, alone[1:] + alone[:1], strict=True):
        seen = watch([scene], 113)
        present = seen.present[0].any(-1)
        gone = int((~present).int().argmax())
        if present[gone:].sum() < 30:
            continue  # back too late
        actor, look = scene.tracks[0].actor, other.tracks[0].look
        anew = changed(scene, **{name: getattr(look, name) for name in ("tint", "marking", "angle")})
        films.append(Seen.join([seen.first(gone), observe(cut((anew, range(gone, 113))))]))
        promised.append(shapes.Promise((actor,), scene.background))
    assert len(films) >= 8
    *tensors, sizes = zip(*films, strict=True)
    result = score(judge(Seen._make([*map(torch.cat, tensors), sizes[0]]), promised))
    assert result.returns < 0.3
    assert min(result.colour, result.kind, result.background, result.motion, result.persistence) >= LEAST[False]


def test_it_comes_back_in_the_middle_of_the_picture() -> None:
    """Then it had no leave to go."""
    scene = lone(TRAVELLER, STRIPED)
    verdict = verdicts(cut((scene, range(52)), (scene, range(90, 110))), TRAVELLER)
    assert verdict.persistence[0, :20].min() == verdict.persistence[0, 52:].min() == 1
    assert verdict.persistence[0, 45:52].max() == 0
    assert verdict.returns[0, 45:52].max() == 0
    assert verdict.returns[0, 52:].min() == 1, "the same one, after all"


def test_it_comes_back_where_it_had_gone() -> None:
    there = cut((lone(TRAVELLER, STRIPED), range(52)))
    verdict = verdicts(torch.cat([there, there.flip(1)], dim=1), TRAVELLER)
    assert verdict.persistence[0, :20].min() == verdict.persistence[0, -20:].min() == 1
    assert verdict.persistence[0, 45:59].max() == 0
    assert verdict.motion[0, -20:].max() == 0


def test_it_goes_on_as_on_the_torus() -> None:
    """On both sides at once: it has not left."""
    walker = replace(TRAVELLER, travels=False)
    scene = lone(walker, STRIPED)
    clip = cut((scene, range(110)))
    assert score(verdicts(clip, walker)).persistence == 1
    verdict = verdicts(clip, TRAVELLER)
    assert 4 <= (verdict.persistence == 0).sum() <= 20
    assert verdict.returns.isnan().all()


@pytest.mark.parametrize(
    ("motion", "speed"), [("left", "quickly"), ("up", "quickly"), ("right", "slowly"), ("still", "")]
)
def test_it_does_not_move_as_promised(motion: str, speed: str) -> None:
    clip = cut((lone(replace(TRAVELLER, motion=motion, speed=speed, travels=motion != "still"), STRIPED), range(40)))
    assert verdicts(clip, TRAVELLER).motion.nanmean() == 0


def test_tolerances_are_wider_than_what_is_seen_and_narrower_than_the_ranges() -> None:
    """Two drawn at random are told apart by hue alone in two of three scenes."""
    assert 0.1 < TINT_APART < 0.5
    assert 0.05 < SIZE_APART < math.log(1.1)
    assert math.radians(3) < ANGLE_APART < math.radians(20)
