"""What a wheel holds is all that the small default needs."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import pytest
import setuptools
import torch

from longsana.config import InferenceConfig, load_config
from longsana.inference.sidecar import source_digests
from longsana.runtime import hub
from longsana.sampling.checks import check_weights, select_prompts
from longsana.sampling.engine import Engine

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/sana_video_config/longsana/shapes/longsana.yaml"


@pytest.mark.parametrize("settings", [[], ["vae.decoder=full"]])
def test_the_small_default_is_whole(settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere than in the repository, with either decoder."""
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    for name in runpy.run_path(str(ROOT / "setup.py"))["SHIPPED"]:
        target = tmp_path / "shipped" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(hub, "SHIPPED", tmp_path / "shipped")
    config = load_config(tmp_path / "shipped" / CONFIG, settings, InferenceConfig)
    check_weights(config)
    assert select_prompts(config, 0, None)
    assert source_digests(config, encodes=True).keys() >= {"model", "vae", "text_encoder"}
    _, decoder = Engine(config, "cpu").load()
    assert decoder.encode(torch.zeros(1, 3, 1, 32, 48)).shape == (1, 16, 1, 4, 6)
