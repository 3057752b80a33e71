"""What happens to every token on its own, in one pass over memory each: norms, modulation, residuals (Triton).

One program a token. Twins in `reference.py`, with shapes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longsana.ops.reference import FLOAT8_MAX

WARPS = 8


@triton.jit
def _normalised(x, inside, width, eps):
    """LayerNorm of a row without weights; lanes beyond the width are garbage."""
    mean = tl.sum(x, 0) / width
    centred = tl.where(inside, x - mean, 0.0)
    return centred * tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)


@triton.jit
def _features_kernel(qkv, q_weight, k_weight, q, k, width: tl.constexpr, eps: tl.constexpr, LANES: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    inside = lane < width
    for part in tl.static_range(2):
        x = tl.load(qkv + token * 3 * width + part * width + lane, inside, 0.0).to(tl.float32)
        weight = tl.load((k_weight if part else q_weight) + lane, inside, 0.0).to(tl.float32)
        y = x * tl.rsqrt(tl.sum(x * x, 0) / width + eps) * weight
        out = (k if part else q) + token * width + lane
        tl.store(out, tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL).to(q.dtype.element_ty), inside)


@triton.jit
def _modulate_kernel(
    x, h, shift, scale, total, y, tokens, frames, clip_stride, frame_stride,
    width: tl.constexpr, eps: tl.constexpr, ADD: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    inside = lane < width
    frame = token // tokens
    modulation = frame // frames * clip_stride + frame % frames * frame_stride + lane
    row = token * width + lane
    value = tl.load(x + row, inside, 0.0).to(tl.float32)
    if ADD:
        value += tl.load(h + row, inside, 0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row, rounded, inside)
        value = rounded.to(tl.float32)
    normalised = _normalised(value, inside, width, eps)
    by = tl.load(scale + modulation, inside, 0.0).to(tl.float32)
    to = tl.load(shift + modulation, inside, 0.0).to(tl.float32)
    tl.store(y + row, (normalised * (1 + by) + to).to(y.dtype.element_ty), inside)


@triton.jit
def _residual_kernel(
    x, gate, h, y, tokens, frames, clip_stride, frame_stride, width: tl.constexpr, LANES: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    inside = lane < width
    frame = token // tokens
    by = tl.load(gate + frame // frames * clip_stride + frame % frames * frame_stride + lane, inside, 0.0)
    row = token * width + lane
    value = tl.load(x + row, inside, 0.0).to(tl.float32)
    value += by.to(tl.float32) * tl.load(h + row, inside, 0.0).to(tl.float32)
    tl.store(y + row, value.to(y.dtype.element_ty), inside)


@triton.jit
def _quantise_kernel(x, y, scales, width: tl.constexpr, largest: tl.constexpr, LANES: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    inside = lane < width
    value = tl.load(x + token * width + lane, inside, 0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value), 0), 1e-12) / largest
    tl.store(y + token * width + lane, (value / scale).to(y.dtype.element_ty), inside)
    tl.store(scales + token, scale)


def qk_features(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    qkv = qkv.contiguous()
    width = qkv.shape[-1] // 3
    q, k = (qkv.new_empty(*qkv.shape[:-1], width) for _ in range(2))
    _features_kernel[(qkv.numel() // (3 * width),)](
        qkv, q_weight, k_weight, q, k, width, eps, triton.next_power_of_2(width), num_warps=WARPS
    )
    return q, k


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    _modulate(x, x, shift, scale, x, y, eps, add=False)
    return y


def add_norm_modulate(x: Tensor, h: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, h = x.contiguous(), h.contiguous()
    total, y = torch.empty_like(x), torch.empty_like(x)
    _modulate(x, h, shift, scale, total, y, eps, add=True)
    return total, y


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    count, width = x.shape
    y, scale = torch.empty_like(x, dtype=torch.float8_e4m3fn), x.new_empty(count, 1, dtype=torch.float32)
    _quantise_kernel[(count,)](x, y, scale, width, FLOAT8_MAX, triton.next_power_of_2(width), num_warps=WARPS)
    return y, scale


def _modulate(
    x: Tensor, h: Tensor, shift: Tensor, scale: Tensor, total: Tensor, y: Tensor, eps: float, *, add: bool
) -> None:
    batch, frames, tokens, width = x.shape
    strides = _frame_strides(shift, x)
    assert strides == _frame_strides(scale, x)
    _modulate_kernel[(batch * frames * tokens,)](
        x, h, shift, scale, total, y, tokens, frames, *strides, width, eps, add, triton.next_power_of_2(width),
        num_warps=WARPS,
    )  # fmt: skip


def gated_residual(x: Tensor, gate: Tensor, h: Tensor) -> Tensor:
    x, h = x.contiguous(), h.contiguous()
    y = torch.empty_like(x)
    batch, frames, tokens, width = x.shape
    _residual_kernel[(batch * frames * tokens,)](
        x, gate, h, y, tokens, frames, *_frame_strides(gate, x), width, triton.next_power_of_2(width), num_warps=WARPS
    )
    return y


def _frame_strides(modulation: Tensor, x: Tensor) -> tuple[int, int]:
    """From clip to clip and from frame to frame, of a modulation (B, 1 or T, 1, D)."""
    assert modulation.stride(-1) == 1 and modulation.shape[2] == 1, modulation.shape
    clip, frame, *_ = modulation.expand(*x.shape[:2], 1, -1).stride()
    return clip, frame
