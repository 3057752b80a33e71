"""Clips of latents: from disk as they were written, and made from their number alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longsana.config import VAEConfig, load_config
from longsana.data.clips import (
    DIRECTIONS,
    DRAWN_AT_ONCE,
    SPEEDS,
    Batch,
    Clip,
    ClipFolder,
    ClipSource,
    Encoder,
    GeneratedClips,
    ShapeClips,
    mixed_scene,
    open_clips,
    turning_scene,
    write_clips,
)
from longsana.encoders.geometry import GEOMETRIES
from longsana.encoders.vae import WanVAE
from longsana.runtime.errors import InputError
from longsana.shapes.scenes import TURNS, Actor, Scene, draw_scene, is_held_out, parse_caption, render
from longsana.training.config import TrainingConfig

SHAPE = (16, 9, 12, 20)
SMALL_WORLD = Path(__file__).resolve().parents[2] / "configs/sana_video_config/longsana/shapes/base.yaml"


@pytest.fixture(autouse=True)
def own_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_clips_on_disk_are_those_that_were_written(tmp_path: Path) -> None:
    blobs = open_clips("generated:blobs", shape=SHAPE)
    some = GeneratedClips(blobs.__getitem__, 5, tuple(blobs.prompts()))
    write_clips(tmp_path / "clips", some, {"generator": "blobs"}, dtype="float32", shard_size=2)
    clips = open_clips(str(tmp_path / "clips"), shape=SHAPE)
    assert isinstance(clips, ClipFolder)
    assert len(clips) == 5
    assert clips.prompts() == [some[index].prompt for index in range(5)]
    for index in range(5):
        assert clips[index].prompt == some[index].prompt
        assert torch.equal(clips[index].latents, some[index].latents)
    with pytest.raises(InputError, match=r"the config asks for \(16, 9, 12, 22\)"):
        open_clips(str(tmp_path / "clips"), shape=(16, 9, 12, 22))


def test_writing_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    made: list[int] = []
    stop = 3

    def make(index: int) -> Clip:
        if index == stop:
            raise KeyboardInterrupt
        made.append(index)
        return Clip(torch.full((2, 1, 2, 2), float(index)), str(index))

    clips = GeneratedClips(make, 5, tuple("01234"))
    with pytest.raises(KeyboardInterrupt):
        write_clips(tmp_path / "a", clips, {}, shard_size=2)
    with pytest.raises(InputError, match="unfinished, 1 of 3 shards are there; write the clips again"):
        ClipFolder(tmp_path / "a")
    stop, made[:] = 9, []
    write_clips(tmp_path / "a", clips, {}, shard_size=2)
    assert made == [0, 2, 3, 4], "0 for the shape; shard 0 is kept"
    write_clips(tmp_path / "b", clips, {}, shard_size=2)
    assert all((tmp_path / "b" / path.name).read_bytes() == path.read_bytes() for path in (tmp_path / "a").iterdir())
    with pytest.raises(InputError, match="made with other settings: seed=1"):
        write_clips(tmp_path / "a", clips, {"seed": 1}, shard_size=2)


def test_a_blob_clip_is_a_function_of_seed_and_index() -> None:
    one, same, other = (open_clips("generated:blobs", shape=SHAPE, seed=seed) for seed in (0, 0, 1))
    torch.manual_seed(1)
    for index in (0, 7, len(one) - 1):
        assert torch.equal(one[index].latents, same[index].latents)
        assert one[index].prompt == same[index].prompt
        assert not torch.equal(one[index].latents, other[index].latents)
        assert not torch.equal(one[index].latents, one[(index + 1) % len(one)].latents)
    assert one[0].latents.shape == SHAPE
    assert one[0].latents.dtype == torch.float32
    for index in (-1, len(one)):
        with pytest.raises(IndexError):
            one[index]


def test_blobs_do_what_their_caption_says() -> None:
    """Brute force: of all moves by whole cells in eight frames, the one that fits best."""
    channels, frames, height, width = 4, 9, 24, 24
    clips = open_clips("generated:blobs", shape=(channels, frames, height, width))
    captions = set()
    for index in range(40):
        latents, caption = clips[index]
        captions.add(caption)
        words = caption.removeprefix("soft blobs drift ").split(" ", 1)
        angle, step = DIRECTIONS.index(words[1]) * math.pi / 4, SPEEDS[words[0]]
        fits = {
            (down, right): float((latents[:, 0].roll((down, right), (1, 2)) * latents[:, 8]).sum())
            for down in range(-11, 12)
            for right in range(-11, 12)
        }
        down, right = max(fits, key=fits.__getitem__)
        assert abs(down - 8 * step * math.sin(angle)) < 1, caption
        assert abs(right - 8 * step * math.cos(angle)) < 1, caption
    assert captions <= set(clips.prompts())
    assert len(captions) > 15
    assert len(set(clips.prompts())) == len(DIRECTIONS) * len(SPEEDS)


def test_blobs_are_smooth_and_about_as_large_as_latents() -> None:
    clips = open_clips("generated:blobs", shape=SHAPE)
    latents = torch.stack([clips[index].latents for index in range(64)])
    assert 0.3 < float(latents.std()) < 1.5
    assert abs(float(latents.mean())) < 0.1
    jump = (latents[:, :, 1:] - latents[:, :, :-1]).std() / latents.std()
    assert 0.02 < float(jump) < 0.6, "white noise has 1.41"


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("generated:blob", "did you mean 'blobs'"),
        ("generated:", "known: blobs"),
        ("no/such/folder", "no/such/folder: no manifest.json here; write the clips again"),
    ],
)
def test_what_is_not_there(path: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        open_clips(path, shape=SHAPE)


# Clips of the shapes world

PICTURES = (6, 3, 12, 20)  # latents of 9 frames of 96 x 160


class Pooling:
    """An encoder: averages over 8 x 8 pixels and over what a latent spans, and their negatives."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.geometry = GEOMETRIES["WanVAE"]
        self.batches: list[int] = []

    def encode(self, frames: Tensor) -> Tensor:
        self.batches.append(len(frames))
        first, rest = frames[:, :, :1], frames[:, :, 1:]
        values = torch.cat([F.avg_pool3d(first, (1, 8, 8)), F.avg_pool3d(rest, (4, 8, 8))], dim=2)
        return torch.cat([values, -values], dim=1)


def shape_clips(count: int, *, seed: int = 0, encoder: Encoder | None = None) -> ShapeClips:
    return ShapeClips(PICTURES, seed, count, encoder or Pooling(), group=4)


def same(one: Batch | Clip, other: Batch | Clip) -> bool:
    return one[1] == other[1] and torch.equal(one.latents, other.latents)


def assert_batches_are_items(clips: ClipSource, indices: list[int]) -> None:
    batch = clips.batch(indices)
    assert batch.latents.dtype == torch.float32
    assert batch.prompts == [clips[index].prompt for index in indices]
    assert torch.equal(batch.latents, torch.stack([clips[index].latents for index in indices]))


def test_a_batch_is_its_items(tmp_path: Path) -> None:
    clips = shape_clips(6)
    write_clips(tmp_path / "clips", clips, {"generator": "shapes"}, dtype="float16", shard_size=4)
    folder = ClipFolder(tmp_path / "clips")
    for source in (clips, folder, open_clips("generated:blobs", shape=SHAPE)):
        assert_batches_are_items(source, [5, 0, 3, 3])
    # On disk they are what they were in memory, to the bit.
    assert same(folder.batch(range(6)), clips.batch(range(6)))


def test_a_shape_clip_is_the_encoded_scene() -> None:
    clips = shape_clips(6, seed=7)
    assert len(clips) == 6
    for index in range(6):
        scene = draw_scene(7, index)
        latents = Pooling().encode(render([scene], range(9)))[0]
        assert clips[index].prompt == scene.caption
        assert clips[index].latents.shape == PICTURES
        torch.testing.assert_close(clips[index].latents, latents, rtol=1e-3, atol=1e-3)
    assert clips.prompts() == [draw_scene(7, index).caption for index in range(6)]
    assert all(parse_caption(caption) for caption in clips.prompts())


def test_a_shape_clip_does_not_depend_on_how_many_there_are() -> None:
    few, many = Pooling(), Pooling()
    some, more = shape_clips(3, encoder=few), shape_clips(9, encoder=many)
    assert (few.batches, many.batches) == ([4], [4, 4, 4]), "kernels round differently for other batches"
    assert same(some.batch([0, 1, 2]), more.batch([0, 1, 2]))
    assert_batches_are_items(more, [8, 2])
    assert len(some.prompts()) == 3
    with pytest.raises(IndexError):
        some[3]
    assert not same(shape_clips(3, seed=1)[0], some[0])


def test_large_pictures_are_encoded_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    several = Pooling()
    many = ShapeClips(PICTURES, 0, 5, several)
    assert several.batches == [16]
    config: TrainingConfig = load_config(SMALL_WORLD, [], TrainingConfig)
    small = 3 * several.geometry.pixel_frames(config.rollout.num_training_frames) * 96 * 160 * 4
    assert 64 * small <= DRAWN_AT_ONCE, "other groups would make other latents of the small world's clips"
    clip = 4 * render([draw_scene(0, 0)], range(9)).numel()
    for most, batches in ((2 * clip, [2, 2, 2]), (clip - 1, [1] * 5)):
        monkeypatch.setattr("longsana.data.clips.DRAWN_AT_ONCE", most)
        few = Pooling()
        some = ShapeClips(PICTURES, 0, 5, few)
        assert few.batches == batches
        assert some.prompts() == many.prompts()
        torch.testing.assert_close(some.batch(range(5)).latents, many.batch(range(5)).latents, rtol=1e-3, atol=1e-3)


def test_shape_clips_are_opened_by_name_and_encoded_by_anyone() -> None:
    asked = []

    def pooling() -> Pooling:
        asked.append(Pooling())
        return asked[-1]

    clips = open_clips("generated:shapes", shape=PICTURES, seed=3, count=5, encoder=pooling)
    assert isinstance(clips, ShapeClips)
    assert len(asked) == 1
    assert len(clips) == 5
    assert same(clips[4], shape_clips(5, seed=3)[4])
    open_clips("generated:blobs", shape=SHAPE, encoder=pooling)
    assert len(asked) == 1, "blobs are not made of pictures"


def turns(actor: Actor) -> bool:
    return actor.motion in ("bounce", *TURNS)


def anything(actor: Actor) -> bool:
    return True


MIXED: list[Callable[[Actor], bool]] = [
    lambda actor: actor.motion == "bounce",
    lambda actor: actor.motion in TURNS,
    lambda actor: actor.motion in ("right", "left", "up", "down") and actor.speed == "quickly",
    lambda actor: actor.size == "small" and actor.kind in ("ring", "cross"),
    anything,
]


@pytest.mark.parametrize(
    ("name", "draw", "wanted"),
    [("turning_shapes", turning_scene, [anything, *[turns] * 3]), ("mixed_shapes", mixed_scene, MIXED)],
)
def test_most_scenes_have_what_is_hard_and_none_is_held_out(
    name: str, draw: Callable[..., Scene], wanted: list[Callable[[Actor], bool]]
) -> None:
    scenes, period = [draw(2, index, (96, 160)) for index in range(200)], len(wanted)
    for place, one in enumerate(wanted):
        some = scenes[place::period]
        assert all(any(one(track.actor) for track in scene.tracks) for scene in some)
        others = [scene for number, scene in enumerate(scenes) if number % period != place]
        assert one is anything or not all(any(one(track.actor) for track in scene.tracks) for scene in others)
    drawn = [draw_scene(2, index) for index in range(200)]
    free = wanted.index(anything)
    assert [scene.caption for scene in scenes[free::period]] == [scene.caption for scene in drawn[free::period]]
    assert len({scene.caption for scene in scenes}) > 190
    for scene in scenes:
        for track in scene.tracks:
            assert not is_held_out(track.actor.kind, track.actor.colour, track.actor.motion)
    clips = open_clips(f"generated:{name}", shape=PICTURES, seed=2, count=4, encoder=Pooling)
    assert clips.prompts() == [scene.caption for scene in scenes[:4]]


def test_turning_shapes_begin_near_one_place_and_anywhere() -> None:
    scenes = [turning_scene(2, index, (96, 160)) for index in range(1, 4000, 4)]
    for count in (1, 2):  # how far is not how many
        some = [track for scene in scenes if len(scene.tracks) == count for track in scene.tracks]
        draws = np.array([track.draws[0] for track in some if track.actor.motion in TURNS])
        assert np.mean(np.abs(draws - 0.5) > 0.2) > 0.05
    tracks = [track for scene in scenes for track in scene.tracks]
    orbits = [track for track in tracks if track.actor.motion in TURNS]
    phases = np.array([track.draws[2] for track in orbits])
    away = np.abs((phases - 0.625 + 0.5) % 1 - 0.5)
    assert np.mean(away < 0.05) > 0.3  # a tenth, if they began anywhere
    assert away.max() > 0.4
    nearest = orbits[away.argmin()]
    x, y = nearest(np.arange(1))[0]
    assert x < nearest.box.left + nearest.box.width / 2
    assert y < nearest.box.top + nearest.box.height / 2
    others = [track.draws for track in tracks if track.actor.motion == "still"]
    assert np.std([draws[0] for draws in others]) > 0.25  # everywhere


def test_the_vae_is_such_an_encoder() -> None:
    shapes = Path(__file__).resolve().parents[2] / "asset/shapes/vae"
    vae = WanVAE.load(VAEConfig(vae_pretrained=f"seeded:{shapes}"), "cpu", torch.float32)
    clips = ShapeClips((16, 2, 4, 4), 0, 2, vae, group=2)
    pictures = render([draw_scene(0, index, size=(32, 32)) for index in range(2)], range(5), size=(32, 32))
    torch.testing.assert_close(clips.batch([0, 1]).latents, vae.encode(pictures), rtol=1e-3, atol=1e-3)
