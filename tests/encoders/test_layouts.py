"""Names and shapes that are told without the libraries that own the networks are those of these libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLLTX2Video, AutoencoderKLWan
from transformers import Gemma2Config, Gemma2Model

from longsana.encoders.layouts import (
    GEMMA_DEFAULTS,
    LTX2_DEFAULTS,
    WAN_DEFAULTS,
    gemma_tensors,
    ltx2_tensors,
    wan_tensors,
)

ROOT = Path(__file__).parents[2]


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


WAN: list[dict[str, Any]] = [
    {},
    json.loads((ROOT / "asset/shapes/vae/config.json").read_text()),
    {"base_dim": 4, "decoder_base_dim": 8},
    {"base_dim": 8, "num_res_blocks": 3, "dim_mult": [1, 2, 2], "temperal_downsample": [True, False], "z_dim": 5},
]
LTX2: list[dict[str, Any]] = [
    {},
    {
        "block_out_channels": [8, 8, 16, 16],
        "layers_per_block": [1, 1, 1, 1, 1],
        "decoder_block_out_channels": [8, 16, 32],
        "decoder_layers_per_block": [1, 2, 1, 1],
    },
    {"decoder_block_out_channels": [16, 64, 64], "upsample_factor": [1, 2, 2], "spatio_temporal_scaling": True},
    {
        "downsample_type": ["spatial", "conv", "spatial", "temporal"],
        "upsample_type": ["spatial", "temporal", "spatial"],
    },
]
GEMMA: list[dict[str, Any]] = [
    {"num_hidden_layers": 3},
    json.loads((ROOT / "asset/shapes/text_encoder/config.json").read_text()),
    {"num_hidden_layers": 1, "hidden_size": 96, "num_key_value_heads": 8, "head_dim": 16},
]


@pytest.mark.parametrize("config", WAN)
def test_wan(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = AutoencoderKLWan(**{key: value for key, value in config.items() if not key.startswith("_")})
    assert wan_tensors(config) == shapes(model)


@pytest.mark.parametrize("config", LTX2)
def test_ltx2(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = AutoencoderKLLTX2Video(**config)
    assert ltx2_tensors(config) == shapes(model)


@pytest.mark.parametrize("config", GEMMA)
def test_gemma(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = Gemma2Model(Gemma2Config(**config))
    assert gemma_tensors(config) == shapes(model)


def test_defaults_are_the_libraries_own() -> None:
    with torch.device("meta"):
        wan, ltx2 = AutoencoderKLWan().config, AutoencoderKLLTX2Video().config
    for defaults, own in ((WAN_DEFAULTS, wan), (LTX2_DEFAULTS, ltx2), (GEMMA_DEFAULTS, Gemma2Config().to_dict())):
        found = {key: list(own[key]) if isinstance(own[key], tuple) else own[key] for key in defaults}
        assert found == dict(defaults)


def test_layers_of_other_kinds_are_not_guessed() -> None:
    assert wan_tensors({"is_residual": True}) is wan_tensors({"attn_scales": [1.0]}) is None
    assert ltx2_tensors({"timestep_conditioning": True}) is ltx2_tensors({"decoder_inject_noise": True}) is None
