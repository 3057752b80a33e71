"""All stages on another VAE by config alone: 8 frames and 32 x 32 pixels a latent, patches of one latent."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.encoders.test_ltx2 import SMALL
from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
train = load_script(ROOT / "train_video_scripts" / "train_longsana.py")
pairs = load_script(ROOT / "train_video_scripts" / "generate_ode_pairs.py")


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("vae")
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLLTX2Video"} | SMALL))
    networks = [
        f"{role}.{size}"
        for role in ("model", "real_score", "fake_score")
        for size in ("in_channels=128", "patch_size=[1,1,1]")
    ]
    return [
        "vae.vae_type=LTX2VAE_diffusers", f"vae.vae_pretrained=seeded:{folder}", *networks,
        "sampling.height=64", "sampling.width=96", "sampling.num_frames=33", "train.max_iters=3",
        "validation.vis_interval=3",
    ]  # fmt: skip


def run(path: Path, logdir: Path) -> list[dict[str, float]]:
    assert train.main(["--config_path", str(path), "--logdir", str(logdir), "--disable-wandb", "--threads", "1"]) == 0
    lines = [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(value) for line in lines for name, value in line.items() if "loss" in name)
    return lines


@pytest.mark.parametrize("trainer", [pytest.param("self_forcing", marks=pytest.mark.slow), "longsana"])
def test_distillation(trainer: str, small_training: Callable[..., Path], overrides: list[str], tmp_path: Path) -> None:
    lines = run(small_training(trainer, *overrides), tmp_path)
    assert sum("generator_loss" in line for line in lines) >= 1
    assert any(tmp_path.rglob("*.mp4")), "validation shows a video"


def test_trajectories_and_what_is_learned_of_them(
    small_training: Callable[..., Path], overrides: list[str], tmp_path: Path
) -> None:
    student = [item for item in overrides if "score" not in item]
    path = small_training("ode", *student, f"data.data_path={tmp_path / 'pairs'}")
    ours = OmegaConf.load(path)
    shapes = ROOT / "configs/sana_video_config/longsana/shapes"
    teacher = {
        "base": str(shapes / "longsana.yaml"),
        "model": {**ours.model, "load_from": "seeded:2"},
        "vae": ours.vae,
        "sampling": {name: ours.sampling[name] for name in ("height", "width", "num_frames")},
        "pairs": {"num_steps": 4, "shard_size": 2},
    }
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(shapes / "ode_pairs.yaml"), teacher), tmp_path / "pairs.yaml")
    teach = ["--config_path", str(tmp_path / "pairs.yaml"), "--out", str(tmp_path / "pairs"), "--end_index", "2"]
    assert pairs.main([*teach, "--threads", "1"]) == 0
    run(path, tmp_path / "ode")
