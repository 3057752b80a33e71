"""The verifier passes what is right, also through a VAE, and fails each fault planted."""

from __future__ import annotations

import colorsys
from dataclasses import replace

import pytest
import torch

from longsana.shapes import scenes as shapes
from longsana.shapes.scenes import BACKGROUNDS, COLOURS, KINDS, MOTIONS, Actor, Promise, Scene, parse_caption
from longsana.shapes.sight import CORE, Seen, observe
from longsana.shapes.verifier import Verdicts, judge, score
from tests.shapes.films import pictures, scenes, through_vae, watch

PROPERTIES = Verdicts._fields


def promises(drawn):
    return [scene.promise for scene in drawn]


def with_actors(drawn, **changes):
    """Promises of these scenes whose actors are changed; values are functions of the actor as it was."""

    def changed(actor):
        return replace(actor, **{name: change(actor) for name, change in changes.items()})

    return [Promise(tuple(map(changed, scene.promise.actors)), scene.background) for scene in drawn]


def scene(*actors: Actor, background: str = "navy", index: int = 0) -> Scene:
    """A scene of these actors, side by side when there are two."""
    width = shapes.WIDTH / len(actors)
    tracks = tuple(
        shapes.Track(actor, shapes.Box(number * width, 0, width, shapes.HEIGHT), (0.3, 0.6, 0.2 + 0.1 * index, 0.5))
        for number, actor in enumerate(actors)
    )
    return Scene(tracks, background, "")


RED = Actor("small", "red", "square", "still", "")
CYAN = Actor("big", "cyan", "circle", "right", "slowly")


# What is right ------------------------------------------------------------------------------------------------------


def test_the_truth_keeps_its_promises(truth):
    drawn, seen = truth
    promised = [parse_caption(scene.caption) for scene in drawn]
    assert promised == promises(drawn)
    result = score(judge(seen, promised)).as_dict()
    assert min(result.values()) >= 0.99, result


def test_a_vae_does_not_break_promises():
    drawn = scenes(8, seed=6)
    result = score(judge(watch(drawn, vae=True), promises(drawn))).as_dict()
    assert min(result.values()) >= 0.97, result


@pytest.mark.slow
@pytest.mark.parametrize("vae", [False, True])
def test_many_keep_their_promises(vae):
    drawn = scenes(192, seed=8)
    result = score(judge(watch(drawn, vae=vae), promises(drawn))).as_dict()
    assert min(result.values()) >= (0.97 if vae else 0.99), result


def test_a_long_video_in_pieces():
    drawn = [shapes.draw_scene(9, 4), shapes.draw_scene(9, 5, held_out=True)]
    pieces = [observe(pictures(drawn, min(64, 321 - start), start)) for start in range(0, 321, 64)]
    seen = Seen.join(pieces)
    assert seen.core.shape == (2, 321, len(COLOURS))
    result = score(judge(seen, promises(drawn))).as_dict()
    assert min(result.values()) >= 0.99, result


def test_what_is_seen_is_where_and_what_it_is():
    """Also across the rim of the picture, in two pieces."""
    actor = Actor("big", "yellow", "triangle", "right", "quickly")
    drawn = scene(actor)
    seen = observe(pictures([drawn], 81))
    colour = list(COLOURS).index("yellow")
    path = torch.from_numpy(drawn.tracks[0](torch.arange(81).numpy())).float()
    assert path[:, 0].max() > 158 and path[:, 0].min() < 2, "it crosses the rim"
    error = seen.centre[0, :, colour] - path
    assert shapes.around(error[:, 0], shapes.WIDTH).abs().max() < 0.1
    assert error[:, 1].abs().max() < 0.1
    assert (seen.velocity[0, :, colour] - torch.tensor([shapes.SPEEDS["quickly"], 0])).abs().max() < 0.05
    assert (seen.radius[0, :, colour] - shapes.SIZES["big"]).abs().max() < 0.5
    assert (seen.kind[0, :, colour] == KINDS.index("triangle")).all()
    assert seen.present[0].sum(-1).tolist() == [1] * 81
    assert (seen.background == list(BACKGROUNDS).index("navy")).all()


def test_what_has_no_promise_is_not_scored(truth):
    drawn, seen = truth
    verdicts = judge(seen, [None, *promises(drawn)[1:]])
    for name in PROPERTIES:
        values = getattr(verdicts, name)
        # Nothing leaves this world, and so nothing comes back.
        assert values[0].isnan().all() and (values[1:].isnan().any() == (name == "returns")), name
    nothing = score(judge(seen, [None] * len(drawn)))
    assert all(value != value for value in nothing.as_dict().values())


def test_a_prefix_scores_as_the_shorter_video(truth):
    drawn, seen = truth
    short = observe(pictures(drawn[:2], 40))
    expected = score(judge(short, promises(drawn[:2]))).as_dict()
    part = Seen._make([*(values[:2] for values in seen[:-1]), seen.size])
    assert score(judge(part.first(40), promises(drawn[:2]))).as_dict() == pytest.approx(expected, nan_ok=True)


# What is wrong: the promise is another ------------------------------------------------------------------------------


def test_wrong_kind(truth):
    drawn, seen = truth
    other = with_actors(drawn, kind=lambda a: KINDS[KINDS.index(a.kind) - 1])
    result = score(judge(seen, other))
    assert (result.kind, result.persistence) == (0, 0)
    assert result.colour == 1


def test_wrong_background(truth):
    drawn, seen = truth
    names = list(BACKGROUNDS)
    other = [Promise(s.promise.actors, names[names.index(s.background) - 1]) for s in drawn]
    assert score(judge(seen, other)).background == 0


def test_wrong_speed(truth):
    drawn, seen = truth
    moving = [scene for scene in drawn if all(a.motion != "still" for a in scene.promise.actors)]
    kept = torch.tensor([scene in moving for scene in drawn])
    part = Seen._make([*(values[kept] for values in seen[:-1]), seen.size])
    other = {"slowly": "quickly", "quickly": "slowly"}
    assert score(judge(part, with_actors(moving, speed=lambda a: other[a.speed]))).motion == 0


@pytest.mark.parametrize("motion", MOTIONS)
def test_wrong_motion(truth, motion):
    """Whatever it does, it does not do anything else: directions, senses of turning, bounces, rest."""
    drawn, seen = truth
    speed = "" if motion == "still" else "slowly"
    other = with_actors(drawn, motion=lambda a: motion, speed=lambda a: speed and (a.speed or speed))
    wrong = torch.tensor([all(a.motion != motion for a in s.promise.actors) for s in drawn])
    values = judge(seen, other).motion[wrong]
    assert len(values) > 20
    assert values.mean() < 0.01


def test_frozen(truth):
    drawn, seen = truth
    frozen = Seen._make([*(v[:, 40:41].repeat(1, 81, *[1] * (v.ndim - 2)) for v in seen[:-1]), seen.size])
    verdicts = judge(frozen, promises(drawn))
    still = torch.tensor([[a.motion == "still" for a in s.promise.actors].count(True) for s in drawn])
    share = still / torch.tensor([len(s.tracks) for s in drawn])
    torch.testing.assert_close(verdicts.motion, share[:, None].expand(-1, 81).float())
    assert score(verdicts).persistence == 1


def test_a_jump_is_not_the_promised_motion():
    drawn = [scene(CYAN)]
    seen = Seen.join([observe(pictures(drawn, 40)), observe(pictures(drawn, 41, start=60))])
    motion = judge(seen, promises(drawn)).motion[0]
    assert motion[30:50].sum() == 0
    assert motion[:20].min() == motion[60:].min() == 1


# What is wrong: the pictures ----------------------------------------------------------------------------------------


def turned(clip: torch.Tensor) -> torch.Tensor:
    """The clip with all hues turned by a tenth of the circle; few enough colours to do it by colour."""
    flat = clip.reshape(-1, 3)
    colours, index = flat.unique(dim=0, return_inverse=True)
    rows = []
    for red, green, blue in (colours / 255).tolist():
        hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
        rows.append(colorsys.hsv_to_rgb((hue + 0.1) % 1, saturation, value))
    return (torch.tensor(rows) * 255).round().to(torch.uint8)[index].reshape(clip.shape)


@pytest.mark.parametrize("colour", list(COLOURS))
@pytest.mark.parametrize("background", ["black", "gray", "brown"])
def test_colours_that_are_off_by_a_tenth(colour, background):
    drawn = [scene(replace(RED, colour=colour), background=background)]
    clip = pictures(drawn, 2)
    faults = {"brighter": (clip.short() + 25).clamp(0, 255).to(torch.uint8)}
    faults["darker"] = (clip.short() - 26).clamp(0, 255).to(torch.uint8)
    if colour != "white":  # has no hue to turn
        faults["turned"] = turned(clip)
    for name, fault in faults.items():
        for spoiled in (fault, through_vae(fault)):
            assert score(judge(observe(spoiled), promises(drawn))).colour == 0, name
    assert score(judge(observe(through_vae(clip)), promises(drawn))).colour == 1


def test_backgrounds_that_are_off_by_a_tenth():
    drawn = [scene(RED, background=name) for name in BACKGROUNDS]
    clip = pictures(drawn, 1)
    for shift in (25, -26):
        verdicts = judge(observe((clip.short() + shift).clamp(0, 255).to(torch.uint8)), promises(drawn))
        assert verdicts.background.sum() == 0


def test_a_vanished_object():
    drawn, alone = [scene(RED, CYAN)], [scene(CYAN)]
    both = pictures(drawn, 40)
    gone = both.clone()
    gone[:, 25:, :, :80] = torch.tensor(BACKGROUNDS["navy"], dtype=torch.uint8)
    verdicts = judge(observe(through_vae(gone)), promises(drawn))
    assert verdicts.persistence[0].tolist() == [1.0] * 25 + [0.0] * 15
    assert verdicts.colour[0].tolist() == verdicts.kind[0].tolist() == [1.0] * 25 + [0.5] * 15
    assert judge(observe(both), promises(alone)).persistence.sum() == 0, "one more than promised"


@pytest.mark.parametrize("colour", ["green", "cyan", "red"])
def test_an_object_that_appears(colour):
    """Of a new colour, or of one that is there: then there are two where one was promised."""
    drawn = [scene(RED, CYAN)]
    clip = pictures(drawn, 20)
    clip[:, 12:, 2:14, 2:14] = torch.tensor(COLOURS[colour], dtype=torch.uint8)
    verdicts = judge(observe(through_vae(clip)), promises(drawn))
    assert verdicts.persistence[0].tolist() == [1.0] * 12 + [0.0] * 8


def test_shapes_that_are_none():
    """An upturned triangle, a diamond, a half circle, a ring with a piece missing."""
    y, x = torch.meshgrid(torch.arange(96) - 48.2, torch.arange(160) - 80.3, indexing="ij")
    covered = torch.stack(
        [
            shapes.coverage("triangle", x, -y, 16.0),
            (18.5 - x.abs() - y.abs()).clamp(0, 1),
            shapes.coverage("circle", x, y, 15.0) * (y < 0),
            shapes.coverage("ring", x, y, 16.0) * (x < 8),
        ]
    )
    clip = torch.lerp(
        torch.tensor(BACKGROUNDS["navy"]).float(), torch.tensor(COLOURS["yellow"]).float(), covered[..., None]
    )
    for spoiled in (clip.to(torch.uint8)[:, None], through_vae(clip.to(torch.uint8)[:, None])):
        seen = observe(spoiled)
        assert seen.present.sum(-1).flatten().tolist() == [1] * 4
        assert (seen.kind == -1).all()


def test_soft_edges_are_no_objects():
    """Between white and black all is gray, and near purple."""
    drawn = [
        scene(Actor("small", colour, "ring", "still", ""), background=ground)
        for colour in COLOURS
        for ground in BACKGROUNDS
    ]
    seen = observe(through_vae(pictures(drawn, 1), sigma=1.6, psnr=28))
    assert (seen.present.sum(-1) == 1).all()
    assert seen.core[seen.present].min() > 2 * CORE
    assert score(judge(seen, promises(drawn))).persistence == 1


def test_noise_is_nothing():
    rng = torch.Generator().manual_seed(0)
    seen = observe(torch.randint(0, 256, (1, 4, 96, 160, 3), generator=rng, dtype=torch.uint8))
    assert not seen.present.any()
    assert (seen.background == -1).all()
