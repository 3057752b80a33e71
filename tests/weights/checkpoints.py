"""A small network's weights, for the tests of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longsana.config import ModelConfig
from longsana.models.dit import LongSanaDiT
from longsana.weights.names import foreign
from longsana.weights.network import Layout, load_weights

TINY = ModelConfig(depth=2, hidden_size=48, num_heads=4, linear_head_dim=8, caption_channels=20, caption_length=7)
PATHS: dict[Layout, str] = {
    "upstream": "model.pth",
    "trainer": "model.pt",
    "diffusers": "folder",
    "safetensors": "model.safetensors",
}


def meta(config: ModelConfig = TINY) -> LongSanaDiT:
    with torch.device("meta"):
        return LongSanaDiT(config)


def weights(seed: int = 0, config: ModelConfig = TINY) -> dict[str, Tensor]:
    """Different random numbers in every tensor, so that no two can be mistaken for each other."""
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=rng) for name, tensor in meta(config).state_dict().items()}


def load(path: Path, **options: Any) -> dict[str, Tensor]:
    model = meta()
    load_weights(model, path, **options)
    return dict(model.state_dict())


def upstream(seed: int = 0) -> dict[str, Tensor]:
    """The dict inside the public checkpoint."""
    return {
        part.name: tensor.reshape(part.shape)
        for name, tensor in weights(seed).items()
        for part in foreign(name, tuple(tensor.shape), "upstream")
    }


def assert_same(loaded: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
