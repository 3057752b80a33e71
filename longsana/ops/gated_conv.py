"""The gate of the Mix-FFN in one pass (Triton): SiLU, depthwise 3x3, gate.

A program walks down a strip of a frame, a few columns and many channels wide. Row r is part of the outputs above it, of
its own and below it: three sums of each column are carried, and the upper one is complete when r has been added. A
column's neighbours are other registers of the same thread, so that a number is read, and its SiLU computed, once in a
strip. The wider it is, the fewer numbers are read by two. A thread holds two channels, which are loaded and converted
as a pair.
"""
# Tuples that grow while a loop is unrolled change their type.
# mypy: disable-error-code="assignment"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from longsana.ops.activation import silu, silu_gradient
from longsana.ops.dispatch import shares


class Strip(NamedTuple):
    """Columns of a strip at most, its channels, and its program's warps."""

    columns: int
    channels: int
    warps: int

    def across(self, width: int) -> tuple[int, int]:
        """Strips of a frame, and columns of each, as even as they can be: 52 columns are 4 strips of 13."""
        strips = triton.cdiv(width, self.columns)
        return strips, triton.cdiv(width, strips)


OUTPUTS, OF_SUMS, OF_INPUTS = Strip(13, 64, 1), Strip(4, 64, 1), Strip(4, 128, 2)
"""Strips for outputs, for the gradients of the sums, which hold more of each column, and for those of the inputs."""
PROGRAMS = 1056
"""Programs of one warp that keep a large GPU busy, eight times its multiprocessors."""


@triton.jit
def _load_row(source, lane, last, column, width, stride: tl.constexpr, COLUMNS: tl.constexpr):
    """A row's numbers before SiLU, COLUMNS + 2 vectors of the channels before `last`; zeros beyond the frame.

    source: pointers to the strip's first column, so that the others are constants away.
    """
    row = ()
    for i in tl.static_range(COLUMNS + 2):
        at = column + i - 1
        there = lane < tl.where((at >= 0) & (at < width), last, 0)
        row += (tl.load(source + (i - 1) * stride, there, 0.0),)
    return row


@triton.jit
def _load_inner(source, lane, column, width, stride: tl.constexpr, COLUMNS: tl.constexpr):
    """A row's COLUMNS vectors, without neighbours, in float32."""
    row = ()
    for i in tl.static_range(COLUMNS):
        there = lane < tl.where(column + i < width, stride, 0)
        row += (tl.load(source + i * stride, there, 0.0).to(tl.float32),)
    return row


@triton.jit
def _activate(row, COLUMNS: tl.constexpr):
    values = ()
    for i in tl.static_range(COLUMNS + 2):
        values += (silu(row[i].to(tl.float32), row[i].dtype != tl.bfloat16),)
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
def _repeated(vector, count: tl.constexpr):
    vectors = ()
    for _ in tl.static_range(count):
        vectors += (vector,)
    return vectors


@triton.jit
def _store_row(out, values, gates, lane, column, width, inner: tl.constexpr, COLUMNS: tl.constexpr):
    for i in tl.static_range(COLUMNS):
        done = values[i] * silu(gates[i], out.dtype.element_ty != tl.bfloat16)
        tl.store(out + i * inner, done.to(out.dtype.element_ty), lane < tl.where(column + i < width, inner, 0))


@triton.jit
def _gated_conv_kernel(
    x, taps, bias, out, height, width, inner: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr
):
    frame, column = tl.program_id(2).to(tl.int64), tl.program_id(1) * COLUMNS
    lane = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    channels = lane < inner
    stride: tl.constexpr = 2 * inner
    first = frame * height * width + column
    source, target = x + first * stride + lane, out + first * inner + lane
    v_taps = _load_taps(taps, lane, channels, stride)
    g_taps = _load_taps(taps, lane + inner, channels, stride)
    v_none = _repeated(tl.load(bias + lane, channels, 0.0).to(tl.float32), COLUMNS)
    g_none = _repeated(tl.load(bias + inner + lane, channels, 0.0).to(tl.float32), COLUMNS)
    v_above, v_here, g_above, g_here = v_none, v_none, g_none, g_none
    v_next = _load_row(source, lane, inner, column, width, stride, COLUMNS)
    g_next = _load_row(source + inner, lane, inner, column, width, stride, COLUMNS)
    for row in range(height):
        values, gates = _activate(v_next, COLUMNS), _activate(g_next, COLUMNS)
        # The next row is on its way while this one is added.
        source += tl.where(row + 1 < height, width, 0) * stride
        v_next = _load_row(source, lane, inner, column, width, stride, COLUMNS)
        g_next = _load_row(source + inner, lane, inner, column, width, stride, COLUMNS)
        v_above, g_above = _add(v_above, values, v_taps, 2, COLUMNS), _add(g_above, gates, g_taps, 2, COLUMNS)
        if row > 0:
            _store_row(target, v_above, g_above, lane, column, width, inner, COLUMNS)
            target += width * inner
        v_above, g_above = _add(v_here, values, v_taps, 1, COLUMNS), _add(g_here, gates, g_taps, 1, COLUMNS)
        v_here, g_here = _add(v_none, values, v_taps, 0, COLUMNS), _add(g_none, gates, g_taps, 0, COLUMNS)
    _store_row(target, v_above, g_above, lane, column, width, inner, COLUMNS)


@triton.jit
def _convolved(bias, above, here, below, taps, COLUMNS: tl.constexpr):
    sums = _add(_repeated(bias, COLUMNS), above, taps, 0, COLUMNS)
    return _add(_add(sums, here, taps, 1, COLUMNS), below, taps, 2, COLUMNS)


@triton.jit
def _of_taps(total, of_sums, above, here, below, COLUMNS: tl.constexpr):
    """The gradients of nine taps and, last, of the bias: `total` with a row of outputs added."""
    rows = (above, here, below)
    more = ()
    for tap in tl.static_range(9):
        own = total[tap]
        for i in tl.static_range(COLUMNS):
            own += of_sums[i] * rows[tap // 3][i + tap % 3]
        more += (own,)
    own = total[9]
    for i in tl.static_range(COLUMNS):
        own += of_sums[i]
    more += (own,)
    return more


@triton.jit
def _store_of_taps(target, total, lane, last, stride: tl.constexpr):
    for i in tl.static_range(10):
        tl.store(target + i * stride + lane, total[i], lane < last)


@triton.jit
def _sums_gradients_kernel(
    x, taps, bias, grad, of_sums, of_taps, height, width, strips, count, share,
    inner: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """of_sums, the gradients of the convolution's outputs, like x; of_taps (shares, 10, 2 inner), those of a share's
    strips of taps and bias."""
    part = tl.program_id(1)
    lane = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    channels = lane < inner
    stride: tl.constexpr = 2 * inner
    EXACT: tl.constexpr = x.dtype.element_ty != tl.bfloat16
    v_taps = _load_taps(taps, lane, channels, stride)
    g_taps = _load_taps(taps, lane + inner, channels, stride)
    v_bias = tl.load(bias + lane, channels, 0.0).to(tl.float32)
    g_bias = tl.load(bias + inner + lane, channels, 0.0).to(tl.float32)
    zero = tl.zeros((CHANNELS,), tl.float32)
    v_total, g_total, nothing = _repeated(zero, 10), _repeated(zero, 10), _repeated(zero, COLUMNS + 2)
    for strip in range(part * share, tl.minimum(part * share + share, count)):
        first, column = (strip // strips).to(tl.int64) * height * width, strip % strips * COLUMNS
        at = first + column
        source, given, target = x + at * stride + lane, grad + at * inner + lane, of_sums + at * stride + lane
        v_above, g_above = nothing, nothing
        v_here = _activate(_load_row(source, lane, inner, column, width, stride, COLUMNS), COLUMNS)
        g_here = _activate(_load_row(source + inner, lane, inner, column, width, stride, COLUMNS), COLUMNS)
        last = tl.where(height > 1, inner, 0)  # lanes before 0 are none
        source += width * stride
        v_next = _load_row(source, lane, last, column, width, stride, COLUMNS)
        g_next = _load_row(source + inner, lane, last, column, width, stride, COLUMNS)
        for row in range(height):
            of_out = _load_inner(given, lane, column, width, inner, COLUMNS)
            v_below, g_below = _activate(v_next, COLUMNS), _activate(g_next, COLUMNS)
            last = tl.where(row + 2 < height, inner, 0)
            source += width * stride
            v_next = _load_row(source, lane, last, column, width, stride, COLUMNS)
            g_next = _load_row(source + inner, lane, last, column, width, stride, COLUMNS)
            values = _convolved(v_bias, v_above, v_here, v_below, v_taps, COLUMNS)
            gates = _convolved(g_bias, g_above, g_here, g_below, g_taps, COLUMNS)
            of_values, of_gates = (), ()
            for i in tl.static_range(COLUMNS):
                inside = lane < tl.where(column + i < width, inner, 0)
                of_value = of_out[i] * silu(gates[i], EXACT)
                of_gate = of_out[i] * values[i] * silu_gradient(gates[i], EXACT)
                tl.store(target + i * stride, of_value.to(of_sums.dtype.element_ty), inside)
                tl.store(target + i * stride + inner, of_gate.to(of_sums.dtype.element_ty), inside)
                of_values += (of_value,)
                of_gates += (of_gate,)
            v_total = _of_taps(v_total, of_values, v_above, v_here, v_below, COLUMNS)
            g_total = _of_taps(g_total, of_gates, g_above, g_here, g_below, COLUMNS)
            given += width * inner
            target += width * stride
            v_above, v_here, g_above, g_here = v_here, v_below, g_here, g_below
    of_taps += part * 10 * stride
    _store_of_taps(of_taps, v_total, lane, inner, stride)
    _store_of_taps(of_taps + inner, g_total, lane, inner, stride)


@triton.jit
def _input_gradients_kernel(
    x, taps, of_sums, of_x, height, width, stride: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr
):
    """The convolution's transpose, with its taps the other way round, of of_sums; times the gradient of SiLU."""
    frame, column = tl.program_id(2).to(tl.int64), tl.program_id(1) * COLUMNS
    lane = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    at = (frame * height * width + column) * stride + lane
    EXACT: tl.constexpr = x.dtype.element_ty != tl.bfloat16
    own = _load_taps(taps, lane, lane < stride, stride)
    turned = (own[8], own[7], own[6], own[5], own[4], own[3], own[2], own[1], own[0])
    zero = tl.zeros((CHANNELS,), tl.float32)
    above = _repeated(zero, COLUMNS + 2)
    source, given, target = of_sums + at, x + at, of_x + at
    here = _to_float(_load_row(source, lane, stride, column, width, stride, COLUMNS), COLUMNS)
    source += width * stride
    following = _load_row(source, lane, tl.where(height > 1, stride, 0), column, width, stride, COLUMNS)
    for row in range(height):
        inputs = _load_inner(given, lane, column, width, stride, COLUMNS)
        below = _to_float(following, COLUMNS)
        source += width * stride
        following = _load_row(source, lane, tl.where(row + 2 < height, stride, 0), column, width, stride, COLUMNS)
        sums = _convolved(zero, above, here, below, turned, COLUMNS)
        for i in tl.static_range(COLUMNS):
            of_input = sums[i] * silu_gradient(inputs[i], EXACT)
            inside = lane < tl.where(column + i < width, stride, 0)
            tl.store(target + i * stride, of_input.to(of_x.dtype.element_ty), inside)
        above, here = here, below
        given += width * stride
        target += width * stride


@triton.jit
def _to_float(row, COLUMNS: tl.constexpr):
    values = ()
    for i in tl.static_range(COLUMNS + 2):
        values += (row[i].to(tl.float32),)
    return values


def gated_conv(x: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int]) -> Tensor:
    """Fuse `reference.gated_conv`: x (..., S, 2 I), S = size[0] * size[1], to (..., S, I), in x's dtype."""
    assert x.shape[-2] == size[0] * size[1], (x.shape, size)
    out: Tensor = _GatedConv.apply(x, weight, bias, size)
    return out


def gated_conv_as_it_is(x: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int]) -> Tensor:
    """Fuse `reference.gated_conv`, x (..., S, 2 I) to (..., S, I), for compiled code, which does not look into it."""
    out: Tensor = _opaque(x, weight, bias, *size)
    return out


class _GatedConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int]) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight, bias)
        ctx.size = size
        return _outputs(x, weight, bias, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        return *_gradients(x, weight, bias, grad.contiguous(), ctx.size), None


def _outputs(x: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int]) -> Tensor:
    inner = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], inner)
    frames = x.numel() // (x.shape[-2] * x.shape[-1])
    _, channels, warps = OUTPUTS
    strips, columns = OUTPUTS.across(size[1])
    _gated_conv_kernel[(triton.cdiv(inner, channels), strips, frames)](
        x, _taps(weight), bias, out, *size, inner, columns, channels, num_warps=warps
    )
    return out


def _gradients(
    x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    (height, width), wide = size, x.shape[-1]
    taps, of_sums, of_x = _taps(weight), x.new_empty(x.shape), x.new_empty(x.shape)
    _, channels, warps = OF_SUMS
    strips, columns = OF_SUMS.across(width)
    blocks = triton.cdiv(wide // 2, channels)
    frames = x.numel() // (height * width * wide)
    count = frames * strips
    # A few strips a program: their gradients of the taps are one sum, and sums of programs do not race.
    parts, share = shares(count, blocks, programs=PROGRAMS)
    of_taps = x.new_empty(parts, 10, wide, dtype=torch.float32)
    _sums_gradients_kernel[(blocks, parts)](
        x, taps, bias, grad, of_sums, of_taps, height, width, strips, count, share, wide // 2,
        columns, channels, num_warps=warps,
    )  # fmt: skip
    _, channels, warps = OF_INPUTS
    strips, columns = OF_INPUTS.across(width)
    _input_gradients_kernel[(triton.cdiv(wide, channels), strips, frames)](
        x, taps, of_sums, of_x, height, width, wide, columns, channels, num_warps=warps
    )
    total = of_taps.sum(0)
    return of_x, total[:9].t().reshape(weight.shape).to(weight.dtype), total[9].to(bias.dtype)


@torch.library.custom_op("longsana::gated_conv", mutates_args=())
def _opaque(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    return _outputs(x.contiguous(), weight, bias, (height, width))


@_opaque.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@torch.library.custom_op("longsana::gated_conv_gradients", mutates_args=())
def _opaque_gradients(
    x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    of_x, of_weight, of_bias = _gradients(x.contiguous(), weight, bias, grad.contiguous(), (height, width))
    return of_x, of_weight.contiguous(), of_bias


@_opaque_gradients.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.height, ctx.width = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_opaque_gradients(*ctx.saved_tensors, grad, ctx.height, ctx.width), None, None


_opaque.register_autograd(_differentiate, setup_context=_keep)


def _taps(weight: Tensor) -> Tensor:
    """(9, channels) of (channels, 1, 3, 3)."""
    return weight.flatten(1).t().contiguous()
