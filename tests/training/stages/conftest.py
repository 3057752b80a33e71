"""What stages decode with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from longsana.config import VAEConfig
from longsana.encoders.vae import WanVAE

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def vae(tmp_path_factory: pytest.TempPathFactory) -> WanVAE:
    """The shapes world's with a third of its channels, random: else overlap latents are half of a stretch's time."""
    folder = tmp_path_factory.mktemp("vae")
    config = json.loads((ROOT / "asset/shapes/vae/config.json").read_text()) | {"base_dim": 4}
    (folder / "config.json").write_text(json.dumps(config))
    return WanVAE.load(VAEConfig(vae_pretrained=f"seeded:{folder}"), "cpu", torch.float32)
