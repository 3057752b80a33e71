"""Tiny decoders in training: they show validation's videos, and nothing is learned from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from longsana.config import VAEConfig, render_config
from longsana.encoders.tiny_vae import TinyVAE
from longsana.encoders.vae import WanVAE
from longsana.runtime.distributed import World
from longsana.runtime.errors import InputError
from longsana.training.build import StageBuilder
from longsana.training.checks import check_same_run, check_sources, check_training
from longsana.training.config import TrainingConfig
from longsana.training.stages.stage import MicroBatches
from longsana.training.validation import Validation
from longsana.weights.build import build_model

Load = Callable[..., TrainingConfig]
TINY = ("vae.decoder=taew2_1", "vae.decoder_pretrained=seeded:3")


def builder(config: TrainingConfig, folder: Path) -> StageBuilder:
    return StageBuilder(
        config, micro_batches=MicroBatches(0, 1, 1), world=World(), device=torch.device("cpu"), folder=folder
    )


def test_losses_have_the_vae_itself_and_videos_the_tiny_decoder(training_config: Load, tmp_path: Path) -> None:
    made = builder(training_config("longsana", *TINY), tmp_path)
    assert isinstance(made.vae, WanVAE) and isinstance(made.decoder, TinyVAE)
    plain = builder(training_config("longsana"), tmp_path)
    assert plain.decoder is plain.vae


def test_validation_without_the_vae(training_config: Load, tmp_path: Path) -> None:
    config = training_config("ode", *TINY, "validation.val_samples=1", "validation.vis_video_lengths=[2]")
    config = replace(config, vae=replace(config.vae, vae_pretrained=str(tmp_path / "none.pth")))
    check_training(config)
    check_sources(config)
    model = build_model(config.model, device="cpu", dtype=torch.float32)
    report = Validation(config, tmp_path, "cpu", World()).run(1, model, builder(config, tmp_path).decoder)
    assert report is not None and len(report.videos) == 1 and report.broken == 0
    assert 0 < report.metrics["probe_contrast_len_2"] < 0.5
    with pytest.raises(InputError, match=r"none\.pth"):
        check_sources(replace(training_config("longsana", *TINY), vae=config.vae))


def test_training_does_not_encode_with_a_tiny_encoder(training_config: Load) -> None:
    with pytest.raises(InputError, match=r"vae\.encoder=tiny: training encodes with the VAE itself"):
        check_training(training_config("longsana", *TINY, "vae.encoder=tiny"))


def test_a_run_goes_on_with_another_decoder(training_config: Load, tmp_path: Path) -> None:
    """Also one from before there was another."""
    config = training_config("ode")
    saved = yaml.safe_load(render_config(config))
    for setting in ("decoder", "decoder_pretrained", "encoder"):
        assert saved["vae"].pop(setting) == getattr(VAEConfig(), setting)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    assert check_same_run(config, tmp_path / "config.yaml") == []
    assert check_same_run(training_config("ode", *TINY), tmp_path / "config.yaml") == []
