"""Operations on every token by itself, in one pass over memory each: norms, modulation, residuals (Triton).

One program a token; for gradients, one for a share of the tokens that have a modulation or weight in common, which sums
its gradients, and the sums of programs are added by PyTorch. Twins in `reference.py`, with shapes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from longsana.ops.dispatch import shares

WARPS = 4
PROGRAMS = 396
"""Programs of gradients that run at once on a large GPU: three on a multiprocessor, by their registers."""


@triton.jit
def _sums_of(a, b):
    """Sums of two rows, which wait for each other's threads once."""
    return tl.split(tl.sum(tl.join(a, b), 0))


@triton.jit
def _features_kernel(
    qkv, q_weight, k_weight, q, k, factors, width: tl.constexpr, eps: tl.constexpr, LANES: tl.constexpr
):
    """factors (tokens, 2): what rows are multiplied by."""
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    inside = lane < width
    for part in tl.static_range(2):
        x = tl.load(qkv + token * 3 * width + part * width + lane, inside, 0.0).to(tl.float32)
        weight = tl.load((k_weight if part else q_weight) + lane, inside, 0.0).to(tl.float32)
        factor = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
        tl.store(factors + token * 2 + part, factor)
        y = x * factor * weight
        out = (k if part else q) + token * width + lane
        tl.store(out, tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL).to(q.dtype.element_ty), inside)


@triton.jit
def _modulate_kernel(
    x, h, shift, scale, total, y, moments, tokens, frames, clip_stride, frame_stride,
    width: tl.constexpr, eps: tl.constexpr, ADD: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """moments (tokens, 2): means of rows, and what they are multiplied by."""
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
    mean = tl.sum(value, 0) / width
    centred = tl.where(inside, value - mean, 0.0)
    factor = tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    tl.store(moments + token * 2, mean)
    tl.store(moments + token * 2 + 1, factor)
    by = tl.load(scale + modulation, inside, 0.0).to(tl.float32)
    to = tl.load(shift + modulation, inside, 0.0).to(tl.float32)
    tl.store(y + row, (centred * factor * (1 + by) + to).to(y.dtype.element_ty), inside)


@triton.jit
def _sum(h, more, row, inside):
    """h + more, where there is more."""
    value = tl.load(h + row, inside, 0.0).to(tl.float32)
    if more is not None:
        value += tl.load(more + row, inside, 0.0).to(tl.float32)
    return value


@triton.jit
def _residual_kernel(
    x, gate, h, more, y, tokens, frames, clip_stride, frame_stride, width: tl.constexpr, LANES: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    inside = lane < width
    frame = token // tokens
    by = tl.load(gate + frame // frames * clip_stride + frame % frames * frame_stride + lane, inside, 0.0)
    row = token * width + lane
    value = tl.load(x + row, inside, 0.0).to(tl.float32)
    value += by.to(tl.float32) * _sum(h, more, row, inside)
    tl.store(y + row, value.to(y.dtype.element_ty), inside)


@triton.jit
def _features_gradients_kernel(
    qkv, q_weight, k_weight, factors, of_q, of_k, of_v, of_qkv, of_weights, count, share,
    width: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """of_weights (shares, 2, width): those of the tokens of a share."""
    program = tl.program_id(0)
    first = program.to(tl.int64) * share
    lane = tl.arange(0, LANES)
    inside = lane < width
    for part in tl.static_range(2):
        weight = tl.load((k_weight if part else q_weight) + lane, inside, 0.0).to(tl.float32)
        total = tl.zeros((LANES,), tl.float32)
        for token in range(tl.minimum(share, count - program * share)):
            row = (first + token) * width + lane
            x = tl.load(qkv + 3 * row - 2 * lane + part * width, inside, 0.0).to(tl.float32)
            factor = tl.load(factors + (first + token) * 2 + part)
            normalised = x * factor
            of_y = tl.load((of_k if part else of_q) + row, inside, 0.0).to(tl.float32)
            of_y = tl.where(normalised * weight > 0, of_y, 0.0)
            total += of_y * normalised
            of_x = of_y * weight
            of_x = factor * (of_x - normalised * (tl.sum(of_x * normalised, 0) / width))
            tl.store(of_qkv + 3 * row - 2 * lane + part * width, of_x.to(of_qkv.dtype.element_ty), inside)
            if part:
                tl.store(of_qkv + 3 * row - 2 * lane + 2 * width, tl.load(of_v + row, inside), inside)
        tl.store(of_weights + (program * 2 + part) * width + lane, total, inside)


@triton.jit
def _modulate_gradients_kernel(
    x, scale, moments, of_total, of_y, of_x, of_shift, of_scale, tokens, frames, clip_stride, frame_stride, share,
    width: tl.constexpr, ADD: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """of_shift, of_scale (B T, shares, width): those of the tokens of a share of a frame."""
    frame, part = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, LANES)
    inside = lane < width
    by = tl.load(scale + frame // frames * clip_stride + frame % frames * frame_stride + lane, inside, 0.0)
    by = 1 + by.to(tl.float32)
    shift_total, scale_total = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    for token in range(part * share, tl.minimum(part * share + share, tokens)):
        number = frame.to(tl.int64) * tokens + token
        row = number * width + lane
        mean, factor = tl.load(moments + number * 2), tl.load(moments + number * 2 + 1)
        normalised = (tl.load(x + row, inside, 0.0).to(tl.float32) - mean) * factor
        given = tl.load(of_y + row, inside, 0.0).to(tl.float32)
        shift_total += given
        scale_total += given * normalised
        given *= by
        total, along = _sums_of(given, given * normalised)
        given = factor * (given - (total + normalised * along) / width)
        if ADD:
            given += tl.load(of_total + row, inside, 0.0).to(tl.float32)
        tl.store(of_x + row, given.to(of_x.dtype.element_ty), inside)
    at = (frame * tl.num_programs(1) + part) * width + lane
    tl.store(of_shift + at, shift_total, inside)
    tl.store(of_scale + at, scale_total, inside)


@triton.jit
def _residual_gradients_kernel(
    gate, h, more, of_y, of_h, of_gate, tokens, frames, clip_stride, frame_stride, share,
    width: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """of_gate (B T, shares, width): those of the tokens of a share of a frame."""
    frame, part = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, LANES)
    inside = lane < width
    by = tl.load(gate + frame // frames * clip_stride + frame % frames * frame_stride + lane, inside, 0.0)
    by = by.to(tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    end = tl.minimum(part * share + share, tokens)
    row = (frame.to(tl.int64) * tokens + part * share) * width + lane
    given, terms = tl.load(of_y + row, inside, 0.0), _sum(h, more, row, inside)
    for token in range(part * share, end):
        # The next row is on its way while this one is written; lanes before 0 are none.
        following = lane < tl.where(token + 1 < end, width, 0)
        next_given, next_terms = tl.load(of_y + row + width, following, 0.0), _sum(h, more, row + width, following)
        value = given.to(tl.float32)
        total += value * terms
        tl.store(of_h + row, (value * by).to(of_h.dtype.element_ty), inside)
        given, terms = next_given, next_terms
        row += width
    tl.store(of_gate + (frame * tl.num_programs(1) + part) * width + lane, total, inside)


def qk_features(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Fuse `reference.qk_features`: qkv (B, N, 3 D) to q, k, v (B, N, D), v a view; weights (D,)."""
    q, k, v = _Features.apply(qkv, q_weight, k_weight, eps)
    return q, k, v


class _Features(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float) -> tuple[Tensor, ...]:
        qkv = qkv.contiguous()
        width = qkv.shape[-1] // 3
        count = qkv.numel() // (3 * width)
        q, k = (qkv.new_empty(*qkv.shape[:-1], width) for _ in range(2))
        factors = qkv.new_empty(count, 2, dtype=torch.float32)
        _features_kernel[(count,)](qkv, q_weight, k_weight, q, k, factors, width, eps, **_row(width))
        ctx.save_for_backward(qkv, q_weight, k_weight, factors)
        return q, k, qkv[..., 2 * width :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_q: Tensor, of_k: Tensor, of_v: Tensor) -> tuple[Tensor | None, ...]:
        qkv, q_weight, k_weight, factors = ctx.saved_tensors
        width = qkv.shape[-1] // 3
        count = qkv.numel() // (3 * width)
        parts, share = shares(count, 1, programs=PROGRAMS)
        of_qkv = torch.empty_like(qkv)
        of_weights = qkv.new_empty(parts, 2, width, dtype=torch.float32)
        _features_gradients_kernel[(parts,)](
            qkv, q_weight, k_weight, factors, of_q.contiguous(), of_k.contiguous(), of_v.contiguous(), of_qkv,
            of_weights, count, share, width, **_row(width),
        )  # fmt: skip
        of_q_weight, of_k_weight = of_weights.sum(0).to(q_weight.dtype)
        return of_qkv, of_q_weight, of_k_weight, None


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Fuse `reference.norm_modulate`: x (B, T, S, D) to y like it; shift and scale (B, 1 or T, 1, D)."""
    y: Tensor = _NormModulate.apply(x, shift, scale, eps)
    return y


class _NormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        ctx.save_for_backward(x, scale, _modulate(x, x, shift, scale, x, y, eps, add=False))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, moments = ctx.saved_tensors
        return (*_modulate_gradients(x, scale, moments, None, of_y), None)


def add_norm_modulate(x: Tensor, h: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Fuse `reference.add_norm_modulate`: x, h (B, T, S, D) to x + h and y like it; shift, scale (B, 1 or T, 1, D)."""
    total, y = _AddNormModulate.apply(x, h, shift, scale, eps)
    return total, y


class _AddNormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x, h = x.contiguous(), h.contiguous()
        total, y = torch.empty_like(x), torch.empty_like(x)
        ctx.save_for_backward(total, scale, _modulate(x, h, shift, scale, total, y, eps, add=True))
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: Tensor, of_y: Tensor) -> tuple[Tensor | None, ...]:
        total, scale, moments = ctx.saved_tensors
        of_x, of_shift, of_scale = _modulate_gradients(total, scale, moments, of_total, of_y)
        return of_x, of_x, of_shift, of_scale, None


def gated_residual(x: Tensor, gate: Tensor, h: Tensor, more: Tensor | None = None) -> Tensor:
    """Fuse `reference.gated_residual`: x, h, more (B, T, S, D), gate (B, 1 or T, 1, D), to a new tensor like x."""
    y: Tensor = _GatedResidual.apply(x, gate, h, more)
    return y


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, h: Tensor, more: Tensor | None) -> Tensor:
        x, h = x.contiguous(), h.contiguous()
        more = None if more is None else more.contiguous()
        ctx.save_for_backward(gate, h, more)
        y = torch.empty_like(x)
        batch, frames, tokens, width = x.shape
        _residual_kernel[(batch * frames * tokens,)](
            x, gate, h, more, y, tokens, frames, *frame_strides(gate, x), width, **_row(width)
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, ...]:
        gate, h, more = ctx.saved_tensors
        batch, frames, tokens, width = h.shape
        parts, share = shares(tokens, batch * frames, programs=PROGRAMS)
        of_h, of_gate = torch.empty_like(h), h.new_empty(batch, frames, parts, width, dtype=torch.float32)
        _residual_gradients_kernel[(batch * frames, parts)](
            gate, h, more, of_y.contiguous(), of_h, of_gate, tokens, frames, *frame_strides(gate, h), share, width,
            **_row(width),
        )  # fmt: skip
        return of_y, _of_modulation(of_gate, gate), of_h, None if more is None else of_h


def _modulate(
    x: Tensor, h: Tensor, shift: Tensor, scale: Tensor, total: Tensor, y: Tensor, eps: float, *, add: bool
) -> Tensor:
    """Fill total and y; the moments of total's tokens."""
    batch, frames, tokens, width = x.shape
    strides = frame_strides(shift, x)
    assert strides == frame_strides(scale, x)
    moments = x.new_empty(batch * frames * tokens, 2, dtype=torch.float32)
    _modulate_kernel[(batch * frames * tokens,)](
        x, h, shift, scale, total, y, moments, tokens, frames, *strides, width, eps, add, **_row(width)
    )
    return moments


def _modulate_gradients(
    x: Tensor, scale: Tensor, moments: Tensor, of_total: Tensor | None, of_y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, shift and scale."""
    batch, frames, tokens, width = x.shape
    parts, share = shares(tokens, batch * frames, programs=PROGRAMS)
    of_y = of_y.contiguous()
    of_x = torch.empty_like(x)
    of_shift, of_scale = (x.new_empty(batch, frames, parts, width, dtype=torch.float32) for _ in range(2))
    _modulate_gradients_kernel[(batch * frames, parts)](
        x, scale, moments, of_y if of_total is None else of_total.contiguous(), of_y, of_x, of_shift, of_scale, tokens,
        frames, *frame_strides(scale, x), share, width, of_total is not None, **_row(width),
    )  # fmt: skip
    return of_x, _of_modulation(of_shift, scale), _of_modulation(of_scale, scale)


def _of_modulation(sums: Tensor, modulation: Tensor) -> Tensor:
    """The gradient of modulation (B, 1 or T, 1, D), from sums (B, T, shares, D) over its tokens."""
    return sums.sum(2, keepdim=True).sum_to_size(modulation.shape).to(modulation.dtype)


def _row(width: int) -> dict[str, int]:
    return {"LANES": triton.next_power_of_2(width), "num_warps": WARPS}


def frame_strides(modulation: Tensor, x: Tensor) -> tuple[int, int]:
    """Return the strides from clip to clip and from frame to frame of a modulation (B, 1 or T, 1, D)."""
    assert modulation.stride(-1) == 1 and modulation.shape[2] == 1, modulation.shape
    clip, frame, *_ = modulation.expand(*x.shape[:2], 1, -1).stride()
    return clip, frame
