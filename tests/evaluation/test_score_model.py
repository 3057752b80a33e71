"""A model on trial: means over videos and seeds, and prefixes of one long video."""

from __future__ import annotations

import math

import pytest
import torch

from longsana.chunks import ChunkPlan
from longsana.config import InferenceConfig, load_config
from longsana.encoders.loading import load_vae
from longsana.evaluation import score_model as trial
from longsana.evaluation.score_model import FIGURES, Trial, summarise, try_model, try_truth
from longsana.shapes.remembered import WORLDS, draw_remembered
from longsana.shapes.scenes import FPS, draw_scene, prompts, render

CPU = torch.device("cpu")
CONFIG = "configs/sana_video_config/longsana/shapes/longsana.yaml"


def films(scenes, frames, pieces=3):
    pictures = ((render(scenes, range(frames)) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)
    return pictures.chunk(pieces, dim=1)


def test_the_world_itself_scores_in_full():
    scenes = [draw_scene(5, index, held_out=True) for index in range(4)]
    frames = 3 * FPS + 1
    seam = trial.seam_of(ChunkPlan.split((frames - 1) // 4 + 1, 5), 4)
    scored = trial._score(films(scenes, frames), [scene.caption for scene in scenes], (2, 3), seam, CPU)
    report = summarise([scored], (2, 3))
    for seconds in ("2", "3"):
        for figure in FIGURES:
            # Nothing leaves this world, and so nothing comes back.
            expected = None if figure == "returns" else pytest.approx(1, abs=0.01)
            assert report["figures"][seconds][figure] == [expected, None], figure
        assert report["figures"][seconds]["seam index"][0] == pytest.approx(1, abs=0.2)
        assert report["figures"][seconds][trial.RIGHT][0] == 1
    assert report["videos"] == 4
    assert report["seeds"] == 1
    assert report["curves"]["persistence"] == report["curves"]["identity"] == pytest.approx([1, 1, 1])


def test_the_remembered_world_scores_in_full_and_does_not_drift():
    scenes = [draw_remembered(5, index, held_out=True) for index in range(6)]
    frames = 8 * FPS + 1
    scored = trial._score(
        films(scenes, frames), [scene.caption for scene in scenes], (8,), trial.seam_of(ChunkPlan.split(33, 5), 4), CPU
    )
    figures = summarise([scored], (8,))["figures"]["8"]
    for figure in FIGURES:
        assert figures[figure] == [pytest.approx(1, abs=0.01), None], figure
    # Half of the time there is little to see.
    assert figures["saturation drift"][0] < 0.01


def test_the_truth_is_of_the_world_that_is_asked_for(monkeypatch):
    """Through a VAE that was never trained."""
    config = load_config(CONFIG, ["vae.vae_pretrained=seeded:asset/shapes/vae", "vae.decoder=full"], InferenceConfig)
    shown = []
    for world, draw in WORLDS.items():
        monkeypatch.setitem(
            trial.WORLDS, world, lambda *place, own=draw, **kept: shown.append((own, place)) or own(*place, **kept)
        )
    for world in WORLDS:
        result = try_truth(config, Trial([""], lengths=(1,), batch=1, world=world), CPU)
        assert result["videos"] == 1
    assert shown == [(draw_scene, (0, trial.TRUTH)), (draw_remembered, (0, trial.TRUTH))]


def test_a_prefix_is_scored_as_a_shorter_video():
    scenes = [draw_scene(5, index, held_out=True) for index in range(2)]
    captions = [scene.caption for scene in scenes]
    long = trial._score(films(scenes, 3 * FPS + 1), captions, (2,), trial.seam_of(ChunkPlan.split(13, 4), 4), CPU)
    short = trial._score(
        films(scenes, 2 * FPS + 1, pieces=1), captions, (2,), trial.seam_of(ChunkPlan.split(9, 4), 4), CPU
    )
    for a, b in zip(long, short, strict=True):
        for name, value in a["figures"][2].items():
            assert value == pytest.approx(b["figures"][2][name], nan_ok=True), name


def test_what_breaks_its_promise_scores_less():
    scenes = [draw_scene(5, index, held_out=True) for index in range(2)]
    other = [draw_scene(6, index, held_out=True).caption for index in range(2)]
    scored = trial._score(films(scenes, 2 * FPS + 1), other, (2,), trial.seam_of(ChunkPlan.split(1, 1), 4), CPU)
    figures = summarise([scored], (2,))["figures"]["2"]
    assert figures["persistence"][0] == figures[trial.RIGHT][0] == 0


def test_a_video_with_one_wrong_frame_is_not_right_in_every_frame():
    scenes = [draw_scene(5, index, held_out=True) for index in range(2)]
    shown = torch.cat(films(scenes, 2 * FPS + 1), dim=1)
    shown[0, FPS] = shown[0, FPS, :1, :1]  # its ground alone
    captions = [scene.caption for scene in scenes]
    scored = trial._score([shown], captions, (2,), trial.seam_of(ChunkPlan.split(9, 4), 4), CPU)
    assert [video["figures"][2][trial.RIGHT] for video in scored] == [0, 1]
    assert scored[0]["figures"][2]["persistence"] == pytest.approx(1 - 1 / (2 * FPS + 1))


@pytest.mark.parametrize(("decoder", "bias"), [("full", "decoder.conv_out.bias"), ("tae_shapes", "decoder.1.bias")])
def test_a_truth_that_is_none_is_not_scored(decoder, bias):
    config = load_config(CONFIG, [f"vae.decoder={decoder}"], InferenceConfig).vae
    vae = load_vae(config, CPU, torch.float32)
    vae.model.get_parameter(bias)[0] = torch.nan
    with pytest.raises(FloatingPointError, match="latents 0 to 1: decoded frames are not finite"):
        next(trial._decoded(vae, torch.zeros(1, 16, 3, 2, 2), ChunkPlan((2, 1))))


def test_mean_and_spread_are_over_seeds():
    def video(value):
        figures = dict.fromkeys((*FIGURES, "seam index", "saturation drift"), value)
        return {"figures": {5: figures}, "curves": {"persistence": [value, math.nan]}}

    report = summarise([[video(0.0), video(1.0)], [video(1.0), video(math.nan)]], (5,))
    assert report["figures"]["5"]["colour"] == [0.75, 0.25]
    assert report["curves"]["persistence"] == [pytest.approx(2 / 3), None]


def test_a_network_is_sampled_and_scored():
    """A random one: what it shows is noise, and none of it is what was promised."""
    config = load_config(CONFIG, ["model.depth=1", "model.load_from=seeded:0"], InferenceConfig)
    report = try_model(config, Trial(prompts(0, 2, held_out=True), seeds=(0, 1), lengths=(1,), batch=1), CPU)
    assert report["videos"] == 2
    assert report["seeds"] == 2
    assert report["figures"]["1"]["persistence"] == [0, 0]
