"""Rows for products in float8, written in one pass over memory (Triton).

One program a token. Norms and residuals write such rows themselves (`norms.py`). Twins in `reference.py`, with shapes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from longsana.ops.reference import FLOAT8_MAX, Float8Rows

WARPS = 4
LARGEST = tl.constexpr(FLOAT8_MAX)


@triton.jit
def _scale_of(largest):
    """Return what a row is multiplied by, of the size of its largest number."""
    return tl.maximum(largest, 1e-12) / LARGEST


@triton.jit
def store_float8(value, to, scale_to, inside):
    """Write a row and its scale; value is 0 where it is not inside."""
    value = value.to(tl.float32)
    scale = _scale_of(tl.max(tl.abs(value), 0))
    tl.store(to, (value / scale).to(to.dtype.element_ty), inside)
    tl.store(scale_to, scale)


@triton.jit
def _quantise_kernel(x, y, scales, width: tl.constexpr, LANES: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    inside = lane < width
    row = token * width + lane
    store_float8(tl.load(x + row, inside, 0.0), y + row, scales + token, inside)


@triton.jit
def _neighbours_kernel(x, tail, y, scales, tokens, frames, start, length, width: tl.constexpr, LANES: tl.constexpr):
    """The tokens of one chunk, `length` frames from `start`."""
    number = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    inside = lane < width
    clip, cell = number // (length * tokens), number % tokens
    frame = start + number // tokens % length
    token = (clip * frames + frame) * tokens + cell
    row, step = token * width + lane, tokens * width
    # Rows that are not there have no lanes.
    kept = lane < tl.where(frame > 0, 0, width)
    previous = lane < tl.where(frame > 0, width, 0)
    following = lane < tl.where(frame + 1 < start + length, width, 0)
    before = tl.load(tail + (clip * tokens + cell) * width + lane, kept, 0.0).to(tl.float32)
    before += tl.load(x + row - step, previous, 0.0).to(tl.float32)
    here = tl.load(x + row, inside, 0.0).to(tl.float32)
    after = tl.load(x + row + step, following, 0.0).to(tl.float32)
    size = tl.maximum(tl.maximum(tl.abs(before), tl.abs(here)), tl.abs(after))
    scale = _scale_of(tl.max(size, 0))
    to = y + token * 3 * width + lane
    tl.store(to, (before / scale).to(y.dtype.element_ty), inside)
    tl.store(to + width, (here / scale).to(y.dtype.element_ty), inside)
    tl.store(to + 2 * width, (after / scale).to(y.dtype.element_ty), inside)
    tl.store(scales + token, scale)


def empty_rows(x: Tensor, widths: int = 1) -> Float8Rows:
    """Memory for rows of x (..., D), or of so many times its width."""
    *rest, width = x.shape
    rows = x.new_empty(*rest, widths * width, dtype=torch.float8_e4m3fn)
    return Float8Rows(rows, x.new_empty(*rest, 1, dtype=torch.float32))


def quantise_rows(x: Tensor) -> Float8Rows:
    """Fuse `reference.quantise_rows`: x (..., D) to rows like it."""
    x = x.contiguous()
    y, width = empty_rows(x), x.shape[-1]
    _quantise_kernel[(y.scale.numel(),)](x, *y, width, **row_launch(width))
    return y


def neighbour_rows(x: Tensor, tail: Tensor, *, lengths: Sequence[int]) -> Float8Rows:
    """Fuse `reference.neighbour_rows`: x (B, T, S, D), tail (B, S, D), to rows of (B, T, S, 3 D)."""
    x, tail = x.contiguous(), tail.contiguous()
    y = empty_rows(x, 3)
    batch, frames, tokens, width = x.shape
    for start, end in itertools.pairwise([0, *itertools.accumulate(lengths)]):
        _neighbours_kernel[(batch * (end - start) * tokens,)](
            x, tail, *y, tokens, frames, start, end - start, width, **row_launch(width)
        )
    return y


def row_launch(width: int) -> dict[str, int]:
    """Settings of a program that has a whole row."""
    return {"LANES": triton.next_power_of_2(width), "num_warps": WARPS}
