"""Rows for products in float8, each written in one pass over memory by what makes it: norms, residuals (Triton).

One program a token, which holds the row in float32 from its numbers to its scale: nothing is rounded on the way. It has
few warps: one that has a row to itself waits for no other, and takes it in pieces of 256, of which 2240 numbers are not
quite nine, where they would be half of a power of two. Twins in `reference.py`, with shapes.
"""
# Tuples that grow while a loop is unrolled change their type.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from longsana.ops.norms import frame_strides
from longsana.ops.reference import FLOAT8_MAX, Float8Rows

PIECE = 256
"""Numbers of a row that a warp takes at a time: 16 bytes of bfloat16 a thread."""
HELD = 3584
"""Numbers of rows that a warp holds at most, 112 a thread: one row of 2240, a half of 6720 or of three rows."""
LARGEST = tl.constexpr(FLOAT8_MAX)


@triton.jit
def _load(source, lane, width, PIECES: tl.constexpr, STEP: tl.constexpr):
    """A row in float32, PIECES vectors of STEP numbers; zeros beyond its width."""
    row = ()
    for i in tl.static_range(PIECES):
        row += (tl.load(source + i * STEP + lane, lane < width - i * STEP, 0.0).to(tl.float32),)
    return row


@triton.jit
def _store(row, to, lane, width, PIECES: tl.constexpr, STEP: tl.constexpr):
    for i in tl.static_range(PIECES):
        tl.store(to + i * STEP + lane, row[i].to(to.dtype.element_ty), lane < width - i * STEP)


@triton.jit
def _sum_of(row, PIECES: tl.constexpr):
    total = row[0]
    for i in tl.static_range(1, PIECES):
        total += row[i]
    return tl.sum(total, 0)


@triton.jit
def _size_of(row, PIECES: tl.constexpr):
    """The largest number's, of each lane."""
    size = tl.abs(row[0])
    for i in tl.static_range(1, PIECES):
        size = tl.maximum(size, tl.abs(row[i]))
    return size


@triton.jit
def _scaled(row, scale, PIECES: tl.constexpr):
    factor = 1 / scale
    scaled = ()
    for i in tl.static_range(PIECES):
        scaled += (row[i] * factor,)
    return scaled


@triton.jit
def _store_float8(row, to, scale_to, lane, width, PIECES: tl.constexpr, STEP: tl.constexpr):
    scale = tl.maximum(tl.max(_size_of(row, PIECES), 0), 1e-12) / LARGEST
    tl.store(scale_to, scale)
    _store(_scaled(row, scale, PIECES), to, lane, width, PIECES, STEP)


@triton.jit
def _quantise_kernel(x, y, scales, width: tl.constexpr, PIECES: tl.constexpr, STEP: tl.constexpr):
    token, lane = tl.program_id(0).to(tl.int64), tl.arange(0, STEP)
    row = _load(x + token * width, lane, width, PIECES, STEP)
    _store_float8(row, y + token * width, scales + token, lane, width, PIECES, STEP)


@triton.jit
def _modulate_kernel(
    x, h, shift, scale, total, y, scales, tokens, frames, clip_stride, frame_stride,
    width: tl.constexpr, eps: tl.constexpr, PIECES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """total: x + h, if there is an h."""
    token, lane = tl.program_id(0).to(tl.int64), tl.arange(0, STEP)
    frame = token // tokens
    modulation = frame // frames * clip_stride + frame % frames * frame_stride
    row = _load(x + token * width, lane, width, PIECES, STEP)
    if h is not None:
        more = _load(h + token * width, lane, width, PIECES, STEP)
        summed = ()
        for i in tl.static_range(PIECES):
            summed += (row[i] + more[i],)
        row = summed
        _store(row, total + token * width, lane, width, PIECES, STEP)
    mean = _sum_of(row, PIECES) / width
    centred = ()
    squares = ()
    for i in tl.static_range(PIECES):
        centred += (tl.where(lane < width - i * STEP, row[i] - mean, 0.0),)
        squares += (centred[i] * centred[i],)
    factor = tl.rsqrt(_sum_of(squares, PIECES) / width + eps)
    by = _load(scale + modulation, lane, width, PIECES, STEP)
    to = _load(shift + modulation, lane, width, PIECES, STEP)
    modulated = ()
    for i in tl.static_range(PIECES):
        modulated += (centred[i] * factor * (1 + by[i]) + to[i],)
    _store_float8(modulated, y + token * width, scales + token, lane, width, PIECES, STEP)


@triton.jit
def _residual_kernel(
    x, gate, h, total, y, scales, tokens, frames, clip_stride, frame_stride,
    width: tl.constexpr, PIECES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    token, lane = tl.program_id(0).to(tl.int64), tl.arange(0, STEP)
    frame = token // tokens
    row = _load(x + token * width, lane, width, PIECES, STEP)
    more = _load(h + token * width, lane, width, PIECES, STEP)
    by = _load(gate + frame // frames * clip_stride + frame % frames * frame_stride, lane, width, PIECES, STEP)
    summed = ()
    for i in tl.static_range(PIECES):
        summed += (row[i] + by[i] * more[i],)
    _store(summed, total + token * width, lane, width, PIECES, STEP)
    _store_float8(summed, y + token * width, scales + token, lane, width, PIECES, STEP)


@triton.jit
def _neighbours_kernel(
    x, tail, ahead, y, scales, tokens, frames, start, length,
    width: tl.constexpr, PIECES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The tokens of one chunk, `length` frames from `start`; ahead: the frame after them, where there is one."""
    number, lane = tl.program_id(0).to(tl.int64), tl.arange(0, STEP)
    clip, cell = number // (length * tokens), number % tokens
    frame = start + number // tokens % length
    token = (clip * frames + frame) * tokens + cell
    source, step = x + token * width, tokens * width
    # A row that is not there has no width.
    last = tl.where(frame + 1 < start + length, width, 0)
    before = _load(source - step, lane, tl.where(frame > 0, width, 0), PIECES, STEP)
    kept = _load(tail + (clip * tokens + cell) * width, lane, tl.where(frame > 0, 0, width), PIECES, STEP)
    here = _load(source, lane, width, PIECES, STEP)
    after = _load(source + step, lane, last, PIECES, STEP)
    if ahead is not None:
        beyond = _load(ahead + (clip * tokens + cell) * width, lane, width - last, PIECES, STEP)
        right = ()
        for i in tl.static_range(PIECES):
            right += (after[i] + beyond[i],)
        after = right
    left = ()
    for i in tl.static_range(PIECES):
        left += (before[i] + kept[i],)
    size = tl.maximum(tl.maximum(_size_of(left, PIECES), _size_of(here, PIECES)), _size_of(after, PIECES))
    scale = tl.maximum(tl.max(size, 0), 1e-12) / LARGEST
    tl.store(scales + token, scale)
    target = y + token * 3 * width
    _store(_scaled(left, scale, PIECES), target, lane, width, PIECES, STEP)
    _store(_scaled(here, scale, PIECES), target + width, lane, width, PIECES, STEP)
    _store(_scaled(after, scale, PIECES), target + 2 * width, lane, width, PIECES, STEP)


def quantise_rows(x: Tensor) -> Float8Rows:
    """Fuse `reference.quantise_rows`: x (..., D) to rows like it."""
    x = x.contiguous()
    y, width = _empty_rows(x), x.shape[-1]
    _quantise_kernel[(y.scale.numel(),)](x, *y, width, **_launch(width))
    return y


def norm_modulate_rows(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Float8Rows:
    """Fuse `reference.norm_modulate_rows`: x (B, T, S, D) to rows like it; shift and scale (B, 1 or T, 1, D)."""
    return _modulate(x.contiguous(), None, shift, scale, None, eps)


def add_norm_modulate_rows(x: Tensor, h: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Float8Rows]:
    """Fuse `reference.add_norm_modulate_rows`: x, h (B, T, S, D) to x + h and rows; shift, scale (B, 1 or T, 1, D)."""
    x, h = x.contiguous(), h.contiguous()
    total = torch.empty_like(x)
    return total, _modulate(x, h, shift, scale, total, eps)


def gated_residual_rows(x: Tensor, gate: Tensor, h: Tensor) -> tuple[Tensor, Float8Rows]:
    """Fuse `reference.gated_residual_rows`: x, h (B, T, S, D), gate (B, 1 or T, 1, D), to a sum like x and its rows."""
    x, h = x.contiguous(), h.contiguous()
    total, y = torch.empty_like(x), _empty_rows(x)
    batch, frames, tokens, width = x.shape
    _residual_kernel[(batch * frames * tokens,)](
        x, gate, h, total, *y, tokens, frames, *frame_strides(gate, x), width, **_launch(width)
    )
    return total, y


def neighbour_rows(x: Tensor, tail: Tensor, *, lengths: Sequence[int], ahead: Tensor | None = None) -> Float8Rows:
    """Fuse `reference.neighbour_rows`: x (B, T, S, D), tail, ahead (B, S, D), to rows of (B, T, S, 3 D)."""
    x, tail = x.contiguous(), tail.contiguous()
    ahead = None if ahead is None else ahead.contiguous()
    y = _empty_rows(x, 3)
    batch, frames, tokens, width = x.shape
    for start, end in itertools.pairwise([0, *itertools.accumulate(lengths)]):
        _neighbours_kernel[(batch * (end - start) * tokens,)](
            x, tail, ahead if end == frames else None, *y, tokens, frames, start, end - start, width,
            **_launch(width, 3),
        )  # fmt: skip
    return y


def _modulate(
    x: Tensor, h: Tensor | None, shift: Tensor, scale: Tensor, total: Tensor | None, eps: float
) -> Float8Rows:
    """Return the rows; fill total where there is an h."""
    y = _empty_rows(x)
    batch, frames, tokens, width = x.shape
    strides = frame_strides(shift, x)
    assert strides == frame_strides(scale, x)
    _modulate_kernel[(batch * frames * tokens,)](
        x, h, shift, scale, total, *y, tokens, frames, *strides, width, eps, **_launch(width)
    )
    return y


def _empty_rows(x: Tensor, count: int = 1) -> Float8Rows:
    """Memory for rows of x (..., D), or of so many times its width."""
    *rest, width = x.shape
    rows = x.new_empty(*rest, count * width, dtype=torch.float8_e4m3fn)
    return Float8Rows(rows, x.new_empty(*rest, 1, dtype=torch.float32))


def _launch(width: int, rows: int = 1) -> dict[str, int]:
    """Settings of a program that holds so many rows."""
    warps = min(triton.next_power_of_2(triton.cdiv(rows * width, HELD)), 32)
    return {"PIECES": triton.cdiv(width, PIECE * warps), "STEP": PIECE * warps, "num_warps": warps}
