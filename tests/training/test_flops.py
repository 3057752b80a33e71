from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from longsana.chunks import ChunkPlan
from longsana.config import ModelConfig
from longsana.models.embeddings import TextEmbedding
from longsana.training.flops import forward_flops
from tests.weights.checkpoints import meta


def counted(config: ModelConfig, frames: int, height: int, width: int, chunks: int) -> int:
    """What torch counts while the network runs; attention as products, which the counter sees on every device."""
    text = TextEmbedding(
        torch.zeros(1, config.caption_length, config.caption_channels, device="meta"),
        torch.ones(1, config.caption_length, dtype=torch.bool, device="meta"),
    )
    x = torch.zeros(1, config.in_channels, frames, height, width, device="meta")
    plan = ChunkPlan.split(frames, frames // chunks)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        meta(config)(x, torch.zeros(1, device="meta"), text, plan=plan)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("changes", [{}, {"patch_size": (1, 1, 1), "mlp_ratio": 2.5, "linear_head_dim": 14}])
def test_every_product_is_counted(small_config: Any, changes: dict[str, Any], chunks: int) -> None:
    config = small_config(**changes)
    assert forward_flops(config, 7, 4, 6) == counted(config, 7, 4, 6, chunks)


def test_the_2b_network_at_480p() -> None:
    """Measured on a GPU: the matrix products of linear layers and of the temporal convolution are 56.4 TFLOP."""
    flops = forward_flops(ModelConfig(), 10, 60, 104)
    assert flops == counted(ModelConfig(), 10, 60, 104, 1)
    assert 56.4e12 < flops < 1.03 * 56.4e12


def test_a_shorter_caption_is_less_to_look_at(small_config: Any) -> None:
    config = small_config()
    assert forward_flops(config, 7, 4, 6, caption_length=3) == counted(small_config(caption_length=3), 7, 4, 6, 1)
