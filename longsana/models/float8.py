"""Large matrix products in float8 for inference: e4m3, a scale for every row of the input and of the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longsana.models.dit import LongSanaDiT
from longsana.ops import quantise_rows

MULTIPLE = 16
"""What the hardware's products want of widths."""
CAPABILITY = (8, 9)
PRODUCTS = (
    *("attn.qkv", "attn.out", "cross_attn.q", "cross_attn.out"),
    *("feed_forward.expand", "feed_forward.project"),
)
"""Layers of each block: all products over video tokens but the temporal convolution, five sixths of the work."""


class Float8Linear(nn.Module):
    """`linear` with both factors rounded to float8, summed in the fast mode of the hardware. Not for training."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        if linear.in_features % MULTIPLE or linear.out_features % MULTIPLE:
            raise ValueError(f"{linear}: for float8 both widths must be multiples of {MULTIPLE}")
        weight, scale = quantise_rows(linear.weight.detach())
        self.weight: Tensor
        self.scale: Tensor
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.t().contiguous())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in x's dtype; rows are quantised as they come."""
        rows, scale = quantise_rows(x.flatten(0, -2))
        out = torch._scaled_mm(
            rows, self.weight.t(), scale_a=scale, scale_b=self.scale, bias=self.bias, out_dtype=x.dtype,
            use_fast_accum=True,
        )  # fmt: skip
        return out.unflatten(0, x.shape[:-1])


def check_float8(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse (ValueError) a GPU or dtype that such products do not take."""
    if device.type == "cuda" and (torch.cuda.get_device_capability(device) < CAPABILITY or dtype != torch.bfloat16):
        raise ValueError("float8 needs a GPU of compute capability 8.9 or newer, and model.dtype=bfloat16")


def to_float8(model: LongSanaDiT) -> None:
    """Replace the large products of every block, in place.

    Raises:
        ValueError: a width is no multiple of 16; and see `check_float8`.
    """
    check_float8(model.patch_embed.weight.device, model.dtype)
    for block in model.blocks:
        for name in PRODUCTS:
            parent, _, leaf = name.rpartition(".")
            module = block.get_submodule(parent)
            setattr(module, leaf, Float8Linear(getattr(module, leaf)))
