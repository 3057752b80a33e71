"""Another VAE by config alone: 8 frames and 32 x 32 pixels a latent, patches of one latent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from longsana.config import InferenceConfig, load_config
from longsana.data.prompts import Prompt
from longsana.runtime.errors import InputError
from longsana.sampling.captions import caption_encoder
from longsana.sampling.checks import check_config
from longsana.sampling.engine import Engine
from tests.encoders.test_ltx2 import SMALL
from tests.sampling.pieces import by_chunk
from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
TEXT = "a red ball rolls"
CONFIG = "configs/sana_video_config/Sana_2000M_720px_longsana.yaml"


def small_settings(folder: Path, **vae: Any) -> list[str]:
    """Small random networks: 41 frames in chunks of 2 latents. `folder`: for the VAE's shape."""
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLLTX2Video"} | SMALL | vae))
    return [
        "model.load_from=seeded:1", "model.depth=2", "model.hidden_size=56", "model.num_heads=4",
        "model.linear_head_dim=28", "model.caption_channels=64", "model.caption_length=48",
        f"vae.vae_pretrained=seeded:{folder}", "text_encoder.text_encoder_name=seeded:asset/shapes/text_encoder",
        "text_encoder.chi_prompt=none", "sampling.height=64", "sampling.width=96", "sampling.num_frames=41",
        "sampling.chunk_frames=2",
    ]  # fmt: skip


def small_720p(folder: Path, **vae: Any) -> InferenceConfig:
    """The 720p config with `small_settings`."""
    return load_config(CONFIG, small_settings(folder, **vae), InferenceConfig)


@pytest.mark.parametrize("causal", [True, False])
def test_a_video_chunk_by_chunk(causal: bool, tmp_path: Path) -> None:
    config = small_720p(tmp_path, decoder_causal=causal)
    check_config(config)
    engine = Engine(config, "cpu")
    prompt = Prompt(1, TEXT, (TEXT,), 0, 64, 96)
    with caption_encoder(engine.config, engine.device) as encode:
        caption = encode(prompt)
    network, decoder = engine.load()
    pieces = by_chunk(engine.sample(network, decoder, [prompt], [caption]))
    # One that looks 8 latents ahead gives all of this short video at its end.
    assert [piece.pixels.shape[1] for piece in pieces] == ([9, 16, 16] if causal else [0, 0, 41])
    latents = torch.cat([piece.latents for piece in pieces], dim=2)
    assert latents.shape == (1, 128, 6, 2, 3)
    whole = decoder.to_uint8(decoder.decode(latents))
    pixels = torch.cat([piece.pixels for piece in pieces], dim=1)
    assert (pixels.int() - whole.int()).abs().max() <= 1
    assert pixels.float().std() > 10


def test_the_benchmark_of_a_decoder_that_looks_ahead(tmp_path: Path) -> None:
    """Longer than the two chunks that it makes cold, which give no frame."""
    script, out = load_script(ROOT / "inference_video_scripts" / "benchmark.py"), tmp_path / "report.json"
    settings = small_settings(tmp_path, decoder_causal=False)
    assert (
        script.main(
            ["--config", CONFIG, "--threads", "1", "--kernels", "--out", str(out), *settings, "sampling.num_frames=105"]
        )
        == 0
    )
    report = json.loads(out.read_text())
    assert report["video"]["frames"] == 105
    assert report["passes"]["decode a frame"] > 0


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("sampling.num_frames=81", None),
        ("sampling.num_frames=85", "must be 8n\\+1 for this VAE; nearest are 81 and 89"),
        ("sampling.height=720", "nearest are 704 and 736"),
        ("sampling.height=32", "height=32: must be a multiple of 32 and at least 64; the nearest is 64"),
        ("model.in_channels=16", "the latents of LTX2VAE_diffusers have 128"),
    ],
)
def test_sizes_are_this_vaes(override: str, says: str | None) -> None:
    config = load_config(CONFIG, [override], InferenceConfig)
    if says is None:
        check_config(config)
        return
    with pytest.raises(InputError, match=says):
        check_config(config)
