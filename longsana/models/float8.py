"""Large matrix products in float8 for inference: e4m3, a scale for every row of the input and of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from longsana.models.dit import Block, LongSanaDiT
from longsana.models.feed_forward import TemporalConv
from longsana.ops import Float8Rows, neighbour_rows, quantise_rows

MULTIPLE = 16
"""What the hardware's products want of widths."""
CAPABILITY = (8, 9)
PRODUCTS = (
    *("attn.qkv", "attn.out", "cross_attn.q", "cross_attn.out"),
    *("feed_forward.expand", "feed_forward.project", "feed_forward.temporal"),
)
"""Layers of each block: all products over video tokens."""


class Float8Linear(nn.Module):
    """A linear layer with both factors rounded to float8, summed in the fast mode of the hardware. Not for training."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        if in_features % MULTIPLE or out_features % MULTIPLE:
            raise ValueError(
                f"a product from {in_features} to {out_features} channels: for float8 both must be multiples of "
                f"{MULTIPLE}"
            )
        rows, scale = quantise_rows(weight.detach())
        self.weight: Tensor
        self.scale: Tensor
        self.register_buffer("weight", rows)
        self.register_buffer("scale", scale.t().contiguous())
        self.bias = bias
        self.out_dtype = weight.dtype

    def forward(self, x: Tensor | Float8Rows) -> Tensor:
        """(..., in) to (..., out), in the layer's dtype; a tensor's rows are quantised as they come."""
        rows, scale = x if isinstance(x, Float8Rows) else quantise_rows(x)
        out = torch._scaled_mm(
            rows.flatten(0, -2), self.weight.t(), scale_a=scale.view(-1, 1), scale_b=self.scale, bias=self.bias,
            out_dtype=self.out_dtype, use_fast_accum=True,
        )  # fmt: skip
        return out.unflatten(0, rows.shape[:-1])


class Float8TemporalConv(nn.Module):
    """The temporal convolution as one product with the three taps side by side."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.taps = Float8Linear(weight[..., 0].transpose(1, 2).flatten(1), None)

    def forward(self, x: Tensor, tail: Tensor, lengths: Sequence[int], ahead: Tensor | None = None) -> Tensor:
        """x: (B, T, S, D), as `TemporalConv` takes and returns it."""
        out: Tensor = self.taps(neighbour_rows(x, tail, lengths=lengths, ahead=ahead))
        return out


def in_float8(layer: nn.Module) -> nn.Module:
    """The layer's replacement, which takes the same inputs."""
    if isinstance(layer, TemporalConv):
        return Float8TemporalConv(layer.weight)
    assert isinstance(layer, nn.Linear)
    return Float8Linear(layer.weight, layer.bias)


def check_float8(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse (ValueError) a GPU or dtype that such products do not take."""
    if device.type == "cuda" and (torch.cuda.get_device_capability(device) < CAPABILITY or dtype != torch.bfloat16):
        raise ValueError("float8 needs a GPU of compute capability 8.9 or newer, and model.dtype=bfloat16")


def to_float8(model: LongSanaDiT) -> None:
    """Replace the large products of every block, in place; what comes before them writes rows for them.

    Raises:
        ValueError: a width is no multiple of 16; and see `check_float8`.
    """
    check_float8(model.patch_embed.weight.device, model.dtype)
    for block in model.blocks:
        for name in PRODUCTS:
            parent, _, leaf = name.rpartition(".")
            module = block.get_submodule(parent)
            setattr(module, leaf, in_float8(getattr(module, leaf)))
        cast(Block, block).float8 = True
