"""The gate of the Mix-FFN in one pass (Triton): SiLU, depthwise 3x3, gate.

A program walks down a strip of a frame, a few channels and columns wide. Row r is part of the outputs above it, of its
own and below it: three sums are carried, and the upper one is complete when r has been added. A number is read three
times, for the outputs beside it, from the nearest cache after the first.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

COLUMNS, CHANNELS = 8, 64
"""Of a strip: 126 registers a thread on sm_90, and 52 columns fill seven of them."""


@triton.jit
def _silu(x):
    return x / (1 + tl.exp(-x))


@triton.jit
def _add_row(above, here, below, source, taps, lane, channels, column, width, stride: tl.constexpr):
    """Add a row to the sums of three outputs. source: (columns, channels) of the row; taps: (3, 3, channels)."""
    for dx in tl.static_range(3):
        beside = column + dx - 1
        there = ((beside >= 0) & (beside < width))[:, None] & channels[None, :]
        value = _silu(tl.load(source + beside[:, None] * stride + lane[None, :], there, 0.0).to(tl.float32))
        above += value * tl.load(taps + (6 + dx) * stride + lane, channels, 0.0).to(tl.float32)[None, :]
        here += value * tl.load(taps + (3 + dx) * stride + lane, channels, 0.0).to(tl.float32)[None, :]
        below += value * tl.load(taps + dx * stride + lane, channels, 0.0).to(tl.float32)[None, :]
    return above, here, below


@triton.jit
def _gated_conv_kernel(
    x, taps, bias, out, height, width, inner: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr
):
    frame = tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    value_lane = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    gate_lane = value_lane + inner
    channels = value_lane < inner
    inside = (column < width)[:, None] & channels[None, :]
    stride: tl.constexpr = 2 * inner
    x += frame * height * width * stride
    out += frame * height * width * inner + column[:, None] * inner + value_lane[None, :]
    value_bias = tl.load(bias + value_lane, channels, 0.0).to(tl.float32)[None, :]
    gate_bias = tl.load(bias + gate_lane, channels, 0.0).to(tl.float32)[None, :]
    zero = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    v_above, v_here, v_below = zero, zero, zero
    g_above, g_here, g_below = zero, zero, zero
    for row in range(height):
        source = x + row * width * stride
        v_above, v_here, v_below = _add_row(
            v_above, v_here, v_below, source, taps, value_lane, channels, column, width, stride
        )
        g_above, g_here, g_below = _add_row(
            g_above, g_here, g_below, source, taps, gate_lane, channels, column, width, stride
        )
        if row > 0:
            done = (v_above + value_bias) * _silu(g_above + gate_bias)
            tl.store(out + (row - 1) * width * inner, done.to(out.dtype.element_ty), inside)
        v_above, v_here, v_below = v_here, v_below, zero
        g_above, g_here, g_below = g_here, g_below, zero
    done = (v_above + value_bias) * _silu(g_above + gate_bias)
    tl.store(out + (height - 1) * width * inner, done.to(out.dtype.element_ty), inside)


def gated_conv(x: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int]) -> Tensor:
    x, taps = x.contiguous(), weight.flatten(1).t().contiguous()
    inner = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], inner)
    frames = x.numel() // (x.shape[-2] * x.shape[-1])
    _gated_conv_kernel[(triton.cdiv(inner, CHANNELS), triton.cdiv(size[1], COLUMNS), frames)](
        x, taps, bias, out, *size, inner, COLUMNS, CHANNELS, num_warps=4
    )
    return out
