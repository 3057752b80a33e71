"""Training of the small VAE: what it writes is what inference reads, and it learns to draw."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longsana.config import VAEConfig
from longsana.encoders.vae import WanVAE
from longsana.encoders.vae_files import new_model, save_model
from longsana.runtime.stop import Stopped
from longsana.shapes import descent, material
from longsana.shapes import train_vae as training
from longsana.shapes.remembered import WORLDS, draw_remembered
from longsana.shapes.scenes import draw_scene, render
from longsana.shapes.snapshot import NAME
from longsana.shapes.train_vae import VAETrainingConfig, held_out_psnr, train_vae

SHAPE = Path(__file__).resolve().parents[2] / "asset/shapes/vae/config.json"
CPU = torch.device("cpu")
SIZE = (32, 32)


@pytest.fixture(scope="module", autouse=True)
def _small_pictures() -> object:
    """Where training takes full pictures, for statistics and the test, it gets small ones: seconds, not minutes."""
    with pytest.MonkeyPatch.context() as patch:
        for world, draw in tuple(WORLDS.items()):
            patch.setitem(WORLDS, world, functools.partial(draw, size=SIZE))
        patch.setattr(material, "render", functools.partial(render, size=SIZE))
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> VAETrainingConfig:
    """Two phases of two steps with a VAE of width 4."""
    folder = tmp_path_factory.mktemp("shape")
    (folder / "config.json").write_text(json.dumps(json.loads(SHAPE.read_text()) | {"base_dim": 4}))
    return VAETrainingConfig(
        shape=str(folder),
        steps=(2, 2),
        clips=(4, 4),
        frames=(1, 5),
        heights=(32, 32),
        widths=(32, 32),
        statistics_clips=2,
        test_clips=1,
        test_frames=17,
    )


class Trained:
    """A run of 60 steps, and its log."""

    def __init__(self, config: VAETrainingConfig, folder: Path) -> None:
        self.folder, self.messages = folder, []
        handler = logging.Handler()
        handler.emit = lambda record: self.messages.append(record.getMessage())
        training.log.addHandler(handler)
        level = training.log.level
        training.log.setLevel(logging.INFO)
        self.psnr = train_vae(replace(config, steps=(57, 3), clips=(6, 2), statistics_clips=16), folder, CPU)
        training.log.setLevel(level)
        training.log.removeHandler(handler)


@pytest.fixture(scope="module")
def trained(config: VAETrainingConfig, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(config, tmp_path_factory.mktemp("trained"))


def load(folder: Path) -> WanVAE:
    return WanVAE.load(VAEConfig(vae_pretrained=str(folder)), CPU, torch.float32)


def clips(seed: int, count: int, frames: int = 81) -> Tensor:
    return render([draw_scene(seed, index, size=SIZE) for index in range(count)], range(frames), size=SIZE)


def test_two_runs_write_the_same_bytes(config: VAETrainingConfig, tmp_path: Path) -> None:
    results = [train_vae(config, tmp_path / name, CPU) for name in ("one", "two")]
    assert results[0] == results[1]
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["config.json", "diffusion_pytorch_model.safetensors"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_what_is_written_is_a_vae_that_inference_reads(trained: Trained) -> None:
    vae = load(trained.folder)
    pictures = clips(9, 2, 9)
    latents = vae.encode(pictures)
    assert latents.shape == (2, 16, vae.geometry.latent_frames(9), *vae.geometry.latent_size(*SIZE))
    frames, _ = vae.decode_stream(latents)
    assert frames.shape == pictures.shape
    assert torch.isfinite(frames).all()


def test_training_brings_pictures_closer(trained: Trained, config: VAETrainingConfig, tmp_path: Path) -> None:
    save_model(new_model(config.shape, config.seed), tmp_path / "new")
    assert trained.psnr > held_out_psnr(tmp_path / "new", 1, config.test_frames, CPU) + 1
    first, last = load(tmp_path / "new"), load(trained.folder)
    pictures = clips(9, 8, 1)  # of no seed that it was trained on
    before, after = ((vae.decode_stream(vae.encode(pictures))[0] - pictures).abs().mean() for vae in (first, last))
    assert after < 0.85 * before


def test_the_log_says_how_far_it_is(trained: Trained) -> None:
    assert [message.split(",")[0] for message in trained.messages[:2]] == [
        "vae: step 50 of 60",
        "vae: step 60 of 60",
    ]
    assert f"{trained.psnr:.2f} dB" in trained.messages[-1]


def test_psnr_is_that_of_the_streamed_frames(trained: Trained) -> None:
    vae = load(trained.folder)
    errors = []
    for index in range(2):
        pictures = render([draw_scene(0, index, held_out=True, size=SIZE)], range(17), size=SIZE)
        errors.append((vae.decode_stream(vae.encode(pictures))[0] - pictures).square().mean().item())
    expected = 10 * math.log10(4 / (sum(errors) / 2))
    for batch in (1, 2, 8):
        assert held_out_psnr(trained.folder, 2, 17, CPU, batch=batch) == pytest.approx(expected, abs=0.02)


def test_latents_of_ordinary_clips_are_normalised(trained: Trained) -> None:
    latents = load(trained.folder).encode(clips(9, 16)).transpose(0, 1).flatten(1)
    assert latents.mean(dim=1).abs().max() < 0.35
    assert (latents.std(dim=1) - 1).abs().max() < 0.35


def test_steps_draw_their_own_clips(config: VAETrainingConfig) -> None:
    """Of a step alone, not of the ones before; and not those of the statistics or of the test."""
    one, again, other = (material.draw_clips(0, step, 4, 5, SIZE, CPU, "shapes") for step in (0, 0, 1))
    assert torch.equal(one, again)
    assert not any(torch.equal(a, b) for a in one for b in other)
    assert not torch.equal(material.draw_clips(1, 0, 4, 5, SIZE, CPU, "shapes"), one)
    pictures = material.draw_clips(0, 0, 10, 1, SIZE, CPU, "shapes")
    assert pictures.shape == (10, 3, 1, *SIZE)
    scene = render([draw_scene(1, 0, size=SIZE)], range(0, 80, 20), size=SIZE)
    assert torch.equal(pictures[:4, :, 0], scene[0].transpose(0, 1))


def test_a_pool_is_drawn_before_a_phase_and_each_step_takes_some_of_it(config: VAETrainingConfig) -> None:
    pooled = replace(config, pool=(8, 6))
    first, second = (training._Clips(pooled, phase, CPU) for phase in (0, 1))
    assert torch.equal(first(3), training._Clips(pooled, 0, CPU)(3)), "a step's clips are its own"
    assert not torch.equal(first(3), first(4))
    assert first(0).shape == (4, 3, 1, *SIZE) and second(0).shape == (4, 3, 5, *SIZE)
    taken = {clip.numpy().tobytes() for step in range(40) for clip in second(step)}
    assert len(taken) == 6
    clip = second(0)[0]
    assert any((clip - drawn).abs().max() < 1 / 255 + 1e-6 for drawn in material.clips_of(pooled, 1, 4 + 8, 6, CPU)), (
        "bytes, as every video has them"
    )


def test_a_run_with_a_pool_and_weights_is_the_same_twice(config: VAETrainingConfig, tmp_path: Path) -> None:
    own = replace(config, pool=(8, 6), object_weight=8.0, edge_weight=0.5)
    assert train_vae(own, tmp_path / "one", CPU) == train_vae(own, tmp_path / "two", CPU)
    assert train_vae(replace(own, edge_weight=0.0), tmp_path / "three", CPU) != held_out_psnr(
        tmp_path / "one", 1, 17, CPU
    )


def test_objects_are_where_shapes_are_and_two_pixels_around_them() -> None:
    scene = draw_scene(3, 1, size=(64, 64))
    pictures = render([scene], range(5), size=(64, 64))
    ground = pictures[0, :, 0, 0, 0] if pictures[0, :, 0, 0, 0].equal(pictures[0, :, 0, -1, -1]) else None
    assert ground is not None, "both corners of this scene are bare"
    differs = (pictures - ground[:, None, None, None]).abs().amax(1) > material.DIFFERS
    objects = material.objects(pictures)[:, 0] == 1
    assert objects[differs].all()
    assert objects.sum() > differs.sum()
    for frame, near in zip(differs[0], objects[0], strict=True):
        for y, x in near.nonzero().tolist():
            assert frame[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3].any()


def test_errors_on_shapes_and_of_edges_weigh_more(config: VAETrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder's pictures are given: the truth, but for one pixel."""
    pictures = -torch.ones(1, 3, 1, *SIZE)
    pictures[..., 4:12, 4:12] = 0.5
    network = new_model(config.shape, 0)

    def error(y: int, x: int, object_weight: float, edge_weight: float) -> float:
        decoded = pictures.clone()
        decoded[..., y, x] += 0.1
        monkeypatch.setattr(training, "decode_clip", lambda *arguments, **options: decoded)
        noise = torch.zeros(1, 16, 1, 4, 4)
        return training._losses(network, pictures, noise, object_weight, edge_weight)[0].item()

    assert error(8, 8, 1, 0) == pytest.approx(0.1 / SIZE[0] / SIZE[1])
    assert error(8, 8, 8, 0) == pytest.approx(8 * error(20, 20, 8, 0), rel=1e-4)
    # One pixel takes part in two differences to the right, and in two down.
    assert error(20, 20, 1, 0.5) == pytest.approx((1 + 0.5 / 2 * 4 * 32 / 31) * error(20, 20, 1, 0), rel=1e-4)


def test_fused_norms_compute_what_the_norms_and_activations_do(config: VAETrainingConfig) -> None:
    # float64: in float32 a gradient that is a sum of many may be off by more than 1e-4 of itself.
    rng, network = torch.Generator().manual_seed(0), new_model(config.shape, 0).double()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name.endswith("gamma"):
                weight.copy_(torch.rand(weight.shape, generator=rng) + 0.5)
    pictures, noise = clips(9, 1, 5), torch.randn(1, 16, 2, 4, 4, generator=rng)
    names = network.state_dict().keys()
    results = []
    for fused in (False, True):
        if fused:
            training.fuse_norms(network)
        with torch.compiler.set_stance("force_eager"):
            losses = training._losses(network, pictures, noise, 8, 0.5)
            results.append([*losses, *torch.autograd.grad(sum(losses), list(network.parameters()))])
    assert network.state_dict().keys() == names
    for plain, own in zip(*results, strict=True):
        assert (plain - own).norm() <= 1e-4 * plain.norm() + 1e-7


def test_it_trains_on_the_world_that_is_asked_for(config: VAETrainingConfig, tmp_path: Path) -> None:
    clips = material.draw_clips(0, 3, 2, 5, SIZE, CPU, "remembered_shapes")
    scenes = [draw_remembered(1, 3 * 1024 + number, size=SIZE) for number in range(2)]
    assert torch.equal(clips, render(scenes, range(5), size=SIZE))
    # What is measured, too: the test's clips are that world's.
    psnr = train_vae(replace(config, world="remembered_shapes"), tmp_path, CPU)
    assert psnr == held_out_psnr(tmp_path, 1, 17, CPU, world="remembered_shapes")
    assert psnr != held_out_psnr(tmp_path, 1, 17, CPU)


def test_a_stop_saves_and_the_same_call_goes_on(
    config: VAETrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit; and not from what another config has left."""
    train_vae(config, tmp_path / "whole", CPU)
    losses, calls = training._losses, itertools.count(1)

    def asked(*arguments: Any) -> Any:
        if next(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return losses(*arguments)

    monkeypatch.setattr(training, "_losses", asked)
    broken = tmp_path / "broken"
    with pytest.raises(Stopped):
        train_vae(config, broken, CPU)
    assert [path.name for path in broken.iterdir()] == [NAME]
    shutil.copytree(broken, tmp_path / "other")
    train_vae(config, broken, CPU)
    assert next(calls) == 5, "three steps and one"
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert {path.name: path.read_bytes() for path in broken.iterdir()} == whole
    train_vae(replace(config, seed=1), tmp_path / "other", CPU)
    assert next(calls) == 10


class _Standin:
    """A recording that calls the function again, as replaying it does on a GPU."""

    replayed = 0

    def __init__(self, function: Any, inputs: Any, *, warm_up: Any, warm_ups: int) -> None:
        self.function, self.warm = function, [warm_up(*inputs) for _ in range(warm_ups)]

    def replay(self, inputs: Any) -> Any:
        _Standin.replayed += 1
        return self.function(*inputs)


def test_recorded_steps_are_the_steps_themselves(
    config: VAETrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train_vae(config, tmp_path / "plain", CPU)
    monkeypatch.setattr(descent, "Recording", _Standin)
    monkeypatch.setattr(descent, "replays", lambda config, device: True)
    assert train_vae(config, tmp_path / "recorded", CPU) == plain
    assert _Standin.replayed == sum(config.steps)
