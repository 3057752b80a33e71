"""The gate of the Mix-FFN in one pass (Triton): SiLU, depthwise 3x3, gate.

A program walks down a strip of a frame, a few columns and many channels wide. Row r is part of the outputs above it, of
its own and below it: three sums of each column are carried, and the upper one is complete when r has been added. A
column's neighbours are other registers of the same thread, so that a number is read, and its SiLU computed, once in a
strip: SiLU is two of the slow operations of a GPU, and three of it a number took half of the time.
"""
# Tuples that grow while a loop is unrolled change their type.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

COLUMNS, CHANNELS = 4, 256
"""Of a strip. 52 columns are 13 strips."""


@triton.jit
def _silu(x):
    return x / (1 + tl.exp(-x))


@triton.jit
def _load_row(source, lane, last, column, width, stride: tl.constexpr, COLUMNS: tl.constexpr):
    """A row's numbers before SiLU, COLUMNS + 2 vectors of the channels before `last`; zeros beyond the frame."""
    row = ()
    for i in tl.static_range(COLUMNS + 2):
        at = column + i - 1
        there = lane < tl.where((at >= 0) & (at < width), last, 0)
        row += (tl.load(source + at * stride + lane, there, 0.0),)
    return row


@triton.jit
def _activate(row, COLUMNS: tl.constexpr):
    values = ()
    for i in tl.static_range(COLUMNS + 2):
        values += (_silu(row[i].to(tl.float32)),)
    return values


@triton.jit
def _load_taps(taps, lane, channels, stride: tl.constexpr):
    """(3, 3, channels): nine vectors."""
    own = ()
    for i in tl.static_range(9):
        own += (tl.load(taps + i * stride + lane, channels, 0.0).to(tl.float32),)
    return own


@triton.jit
def _add(sums, values, taps, dy: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums of a row's outputs, with row dy of their neighbours added."""
    total = ()
    for i in tl.static_range(COLUMNS):
        total += (
            sums[i] + values[i] * taps[3 * dy] + values[i + 1] * taps[3 * dy + 1] + values[i + 2] * taps[3 * dy + 2],
        )
    return total


@triton.jit
def _start(bias, COLUMNS: tl.constexpr):
    sums = ()
    for _ in tl.static_range(COLUMNS):
        sums += (bias,)
    return sums


@triton.jit
def _store_row(out, values, gates, lane, column, width, inner: tl.constexpr, COLUMNS: tl.constexpr):
    for i in tl.static_range(COLUMNS):
        done = (values[i] * _silu(gates[i])).to(out.dtype.element_ty)
        tl.store(out + i * inner + lane, done, lane < tl.where(column + i < width, inner, 0))


@triton.jit
def _gated_conv_kernel(
    x, taps, bias, out, height, width, inner: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr
):
    frame, column = tl.program_id(2).to(tl.int64), tl.program_id(1) * COLUMNS
    lane = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    channels = lane < inner
    stride: tl.constexpr = 2 * inner
    x += frame * height * width * stride
    out += (frame * height * width + column) * inner
    v_taps = _load_taps(taps, lane, channels, stride)
    g_taps = _load_taps(taps, lane + inner, channels, stride)
    v_none = _start(tl.load(bias + lane, channels, 0.0).to(tl.float32), COLUMNS)
    g_none = _start(tl.load(bias + inner + lane, channels, 0.0).to(tl.float32), COLUMNS)
    v_above, v_here, g_above, g_here = v_none, v_none, g_none, g_none
    v_next = _load_row(x, lane, inner, column, width, stride, COLUMNS)
    g_next = _load_row(x, lane + inner, stride, column, width, stride, COLUMNS)
    for row in range(height):
        values, gates = _activate(v_next, COLUMNS), _activate(g_next, COLUMNS)
        # The next row is on its way while this one is added.
        ahead = x + tl.minimum(row + 1, height - 1) * width * stride
        v_next = _load_row(ahead, lane, inner, column, width, stride, COLUMNS)
        g_next = _load_row(ahead, lane + inner, stride, column, width, stride, COLUMNS)
        v_above, g_above = _add(v_above, values, v_taps, 2, COLUMNS), _add(g_above, gates, g_taps, 2, COLUMNS)
        if row > 0:
            _store_row(out + (row - 1) * width * inner, v_above, g_above, lane, column, width, inner, COLUMNS)
        v_above, g_above = _add(v_here, values, v_taps, 1, COLUMNS), _add(g_here, gates, g_taps, 1, COLUMNS)
        v_here, g_here = _add(v_none, values, v_taps, 0, COLUMNS), _add(g_none, gates, g_taps, 0, COLUMNS)
    _store_row(out + (height - 1) * width * inner, v_above, g_above, lane, column, width, inner, COLUMNS)


def gated_conv(x: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int]) -> Tensor:
    x, taps = x.contiguous(), weight.flatten(1).t().contiguous()
    inner = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], inner)
    frames = x.numel() // (x.shape[-2] * x.shape[-1])
    _gated_conv_kernel[(triton.cdiv(inner, CHANNELS), triton.cdiv(size[1], COLUMNS), frames)](
        x, taps, bias, out, *size, inner, COLUMNS, CHANNELS, num_warps=4
    )
    return out
