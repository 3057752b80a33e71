"""Block-causal linear attention in two passes (Triton): sums over the tokens of a chunk, then output token by token.

A rotation turns channels (2i, 2i + 1) together, so even and odd channels are loaded as two tiles and never woven again:
a product over channels is the sum of a product over the even ones and one over the odd. Everything is computed in
float32, with TF32 products for 16-bit inputs: 10 bits of mantissa, more than bfloat16 has and as many as float16. The
hardware would cut the other bits off, which makes all products smaller; so factors are rounded first.

Gradients, with o = n / m, n = (R q)^T S, m = q . z + eps and g that of o:
    of n: g / m      of m: -(g . o) / m      of R q: S (g / m)      of S: sum (R q) (g / m)^T, as S is a sum over keys
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from longsana.ops.reference import prefix_sums

TOKENS = 64
"""Tokens of a tile."""
PROGRAMS = 264
"""Programs that keep a large GPU busy, twice its multiprocessors."""
Span = tuple[int, int]
"""First token of a chunk, and the first after it."""


@triton.jit
def _product(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b, of float32 factors."""
    if PRECISION == "tf32":
        a = (a.to(tl.uint32, bitcast=True) + 0x1000).to(tl.float32, bitcast=True)
        b = (b.to(tl.uint32, bitcast=True) + 0x1000).to(tl.float32, bitcast=True)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _rotated(source, cos, sin, token, there, token_stride, HALF: tl.constexpr, HALVES: tl.constexpr):
    """Even and odd channels (tokens, HALVES) of a head, as they are and rotated, and the cosines and sines."""
    pair, lane = tl.arange(0, HALVES), tl.arange(0, 2 * HALVES)
    inside = there[:, None] & (pair < HALF)[None, :]
    # Loaded as they lie, then parted: every other number by itself would be a load of 16 bits.
    both = tl.load(
        source + token[:, None] * token_stride + lane[None, :], there[:, None] & (lane < 2 * HALF)[None, :], 0.0
    )
    even, odd = tl.split(tl.reshape(both.to(tl.float32), (both.shape[0], HALVES, 2)))
    angle = token[:, None] * HALF + pair[None, :]
    c, s = tl.load(cos + angle, inside, 0.0), tl.load(sin + angle, inside, 0.0)
    return even, odd, even * c - odd * s, even * s + odd * c, c, s


@triton.jit
def _state(kv, k_sum, HALF: tl.constexpr, HALVES: tl.constexpr, LANES: tl.constexpr):
    """A head's sums: even and odd rows (HALVES, LANES) of kv, even and odd channels (HALVES,) of k_sum."""
    pair, lane = tl.arange(0, HALVES), tl.arange(0, LANES)
    dim: tl.constexpr = 2 * HALF
    inside = (pair < HALF)[:, None] & (lane < dim)[None, :]
    kv += 2 * pair[:, None] * dim + lane[None, :]
    k_sum += 2 * pair
    return (
        tl.load(kv, inside, 0.0),
        tl.load(kv + dim, inside, 0.0),
        tl.load(k_sum, pair < HALF, 0.0),
        tl.load(k_sum + 1, pair < HALF, 0.0),
    )


@triton.jit
def _times_state(r_even, r_odd, kv_even, kv_odd, PRECISION: tl.constexpr):
    """(tokens, LANES), of rotated channels and a head's kv."""
    return _product(r_odd, kv_odd, _product(r_even, kv_even, None, PRECISION), PRECISION)


@triton.jit
def _fractions(
    q, cos, sin, kv, k_sum, token, there, token_stride, eps: tl.constexpr, HALF: tl.constexpr, HALVES: tl.constexpr,
    LANES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Numerators (tokens, LANES) and denominators (tokens,) of a head; its sums and the rotation, as read."""
    even, odd, r_even, r_odd, c, s = _rotated(q, cos, sin, token, there, token_stride, HALF, HALVES)
    kv_even, kv_odd, k_even, k_odd = _state(kv, k_sum, HALF, HALVES, LANES)
    denominator = tl.sum(even * k_even[None, :], 1) + tl.sum(odd * k_odd[None, :], 1) + eps
    numerator = _times_state(r_even, r_odd, kv_even, kv_odd, PRECISION)
    return numerator, denominator, kv_even, kv_odd, k_even, k_odd, c, s


@triton.jit
def _store_unrotated(
    target, even, odd, c, s, more_even, more_odd, token, there, token_stride, HALF: tl.constexpr, HALVES: tl.constexpr
):
    """The gradient of a head's channels, from that of the rotated ones and what comes to them unrotated."""
    lane = tl.arange(0, 2 * HALVES)
    both = tl.reshape(
        tl.join(even * c + odd * s + more_even, odd * c - even * s + more_odd), (even.shape[0], 2 * HALVES)
    )
    at = target + token[:, None] * token_stride + lane[None, :]
    tl.store(at, both.to(target.dtype.element_ty), there[:, None] & (lane < 2 * HALF)[None, :])


@triton.jit
def _sums_kernel(
    k, v, weight, cos, sin, kv, k_sum, first, last, share, heads, k_clip, k_token, v_clip, v_token, weight_clip,
    WEIGHTED: tl.constexpr, HALF: tl.constexpr, HALVES: tl.constexpr, LANES: tl.constexpr, TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """kv (B, shares, heads, d, d) and k_sum (B, shares, heads, d), of `share` tokens each.

    WEIGHTED: the tokens of k_sum, but not of kv, have weights (B, N, heads).
    """
    part, head, clip = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    dim: tl.constexpr = 2 * HALF
    k += clip * k_clip + head * dim
    v += clip * v_clip + head * dim
    pair, lane = tl.arange(0, HALVES), tl.arange(0, LANES)
    kv_even = tl.zeros((HALVES, LANES), tl.float32)
    kv_odd = tl.zeros((HALVES, LANES), tl.float32)
    k_even = tl.zeros((HALVES,), tl.float32)
    k_odd = tl.zeros((HALVES,), tl.float32)
    begin = first + part * share
    end = tl.minimum(begin + share, last)
    for start in range(begin, end, TOKENS):
        token = start + tl.arange(0, TOKENS)
        there = token < end
        even, odd, r_even, r_odd, _, _ = _rotated(k, cos, sin, token, there, k_token, HALF, HALVES)
        value = tl.load(v + token[:, None] * v_token + lane[None, :], there[:, None] & (lane < dim)[None, :], 0.0)
        value = value.to(tl.float32)
        kv_even = _product(tl.trans(r_even), value, kv_even, PRECISION)
        kv_odd = _product(tl.trans(r_odd), value, kv_odd, PRECISION)
        if WEIGHTED:
            w = tl.load(weight + clip * weight_clip + token * heads + head, there, 0.0)[:, None]
            even *= w
            odd *= w
        k_even += tl.sum(even, 0)
        k_odd += tl.sum(odd, 0)
    row = (clip * tl.num_programs(0) + part) * heads + head
    kv += row * dim * dim + 2 * pair[:, None] * dim + lane[None, :]
    inside = (pair < HALF)[:, None] & (lane < dim)[None, :]
    tl.store(kv, kv_even, inside)
    tl.store(kv + dim, kv_odd, inside)
    tl.store(k_sum + row * dim + 2 * pair, k_even, pair < HALF)
    tl.store(k_sum + row * dim + 2 * pair + 1, k_odd, pair < HALF)


@triton.jit
def _sums_gradients_kernel(
    k, v, cos, sin, kv, k_sum, k_grad, v_grad, first, last, heads, k_clip, k_token, v_clip, v_token, clip_stride,
    HALF: tl.constexpr, HALVES: tl.constexpr, LANES: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """kv (B, heads, d, d) and k_sum (B, heads, d) are the gradients of the sums."""
    head, clip = tl.program_id(1), tl.program_id(2).to(tl.int64)
    dim: tl.constexpr = 2 * HALF
    lane = tl.arange(0, LANES)
    token = first + tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = token < last
    wide = there[:, None] & (lane < dim)[None, :]
    _, _, r_even, r_odd, c, s = _rotated(k + clip * k_clip + head * dim, cos, sin, token, there, k_token, HALF, HALVES)
    value = tl.load(v + clip * v_clip + head * dim + token[:, None] * v_token + lane[None, :], wide, 0.0)
    value = value.to(tl.float32)
    row = clip * heads + head
    kv_even, kv_odd, k_even, k_odd = _state(kv + row * dim * dim, k_sum + row * dim, HALF, HALVES, LANES)
    even = _product(value, tl.trans(kv_even), None, PRECISION)
    odd = _product(value, tl.trans(kv_odd), None, PRECISION)
    own = clip * clip_stride + head * dim
    _store_unrotated(
        k_grad + own, even, odd, c, s, k_even[None, :], k_odd[None, :], token, there, heads * dim, HALF, HALVES
    )
    grad = _times_state(r_even, r_odd, kv_even, kv_odd, PRECISION)
    at = v_grad + own + token[:, None] * heads * dim + lane[None, :]
    tl.store(at, grad.to(v_grad.dtype.element_ty), wide)


@triton.jit
def _output_kernel(
    q, cos, sin, kv, k_sum, out, first, last, heads, q_clip, q_token, out_clip, eps: tl.constexpr,
    HALF: tl.constexpr, HALVES: tl.constexpr, LANES: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out of the tokens first .. last, which see kv (B, heads, d, d) and k_sum (B, heads, d)."""
    head, clip = tl.program_id(1), tl.program_id(2).to(tl.int64)
    dim: tl.constexpr = 2 * HALF
    lane = tl.arange(0, LANES)
    token = first + tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = token < last
    row = clip * heads + head
    numerator, denominator, _, _, _, _, _, _ = _fractions(
        q + clip * q_clip + head * dim, cos, sin, kv + row * dim * dim, k_sum + row * dim, token, there, q_token, eps,
        HALF, HALVES, LANES, PRECISION,
    )  # fmt: skip
    tl.store(
        out + clip * out_clip + token[:, None] * heads * dim + head * dim + lane[None, :],
        (numerator / denominator[:, None]).to(out.dtype.element_ty),
        there[:, None] & (lane < dim)[None, :],
    )


@triton.jit
def _output_gradients_kernel(
    q, grad, cos, sin, kv, k_sum, q_grad, n_grad, m_grad, first, last, heads, q_clip, q_token, clip_stride,
    eps: tl.constexpr, HALF: tl.constexpr, HALVES: tl.constexpr, LANES: tl.constexpr, TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """q_grad, and the gradients of numerators (B, N, heads, d) and denominators (B, N, heads)."""
    head, clip = tl.program_id(1), tl.program_id(2).to(tl.int64)
    dim: tl.constexpr = 2 * HALF
    lane = tl.arange(0, LANES)
    token = first + tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = token < last
    wide = there[:, None] & (lane < dim)[None, :]
    row = clip * heads + head
    numerator, denominator, kv_even, kv_odd, k_even, k_odd, c, s = _fractions(
        q + clip * q_clip + head * dim, cos, sin, kv + row * dim * dim, k_sum + row * dim, token, there, q_token, eps,
        HALF, HALVES, LANES, PRECISION,
    )  # fmt: skip
    own = clip * clip_stride + head * dim
    at = own + token[:, None] * heads * dim + lane[None, :]
    of_n = tl.load(grad + at, wide, 0.0).to(tl.float32) / denominator[:, None]
    of_m = -tl.sum(of_n * numerator, 1) / denominator
    tl.store(n_grad + at, of_n, wide)
    tl.store(m_grad + own // dim + token * heads, of_m, there)
    _store_unrotated(
        q_grad + own,
        _product(of_n, tl.trans(kv_even), None, PRECISION),
        _product(of_n, tl.trans(kv_odd), None, PRECISION),
        c, s, of_m[:, None] * k_even[None, :], of_m[:, None] * k_odd[None, :], token, there, heads * dim, HALF, HALVES,
    )  # fmt: skip


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv: Tensor,
    k_sum: Tensor,
    *,
    lengths: Sequence[int],
    window: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    spans = list(itertools.pairwise([0, *itertools.accumulate(lengths)]))
    cos, sin = cos.contiguous(), sin.contiguous()
    own_kv, own_k = _Sums.apply(k, v, cos, sin, spans)
    kv_seen, kv = prefix_sums(kv, own_kv, window)
    k_seen, k_sum = prefix_sums(k_sum, own_k, window)
    return _Output.apply(q, cos, sin, kv_seen, k_seen, spans, eps, v.dtype), kv, k_sum


class _Sums(torch.autograd.Function):
    """(B, n, heads, d, d) and (B, n, heads, d) of the tokens of n chunks; k and v are (B, N, heads, d)."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, spans: list[Span]) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(k, v, cos, sin)
        ctx.spans = spans
        return _sums(k, v, None, cos, sin, spans)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, kv: Tensor, k_sum: Tensor) -> tuple[Tensor | None, ...]:
        k, v, cos, sin = ctx.saved_tensors
        batch, _, heads, _ = k.shape
        k_grad, v_grad = (part.new_empty(part.shape) for part in (k, v))
        for chunk, (first, last) in enumerate(ctx.spans):
            _sums_gradients_kernel[(triton.cdiv(last - first, TOKENS), heads, batch)](
                k, v, cos, sin, kv[:, chunk].contiguous(), k_sum[:, chunk].contiguous(), k_grad, v_grad, first, last,
                heads, *_strides(k), *_strides(v), k_grad.stride(0), **_tile(k),
            )  # fmt: skip
        return k_grad, v_grad, None, None, None


class _Output(torch.autograd.Function):
    """(B, N, heads, d); kv and k_sum are what each of n chunks sees, as `_Sums` returns them."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        cos: Tensor,
        sin: Tensor,
        kv: Tensor,
        k_sum: Tensor,
        spans: list[Span],
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(q, cos, sin, kv, k_sum)
        ctx.spans, ctx.eps = spans, eps
        batch, _, heads, _ = q.shape
        out = q.new_empty(q.shape, dtype=dtype)
        for chunk, (first, last) in enumerate(spans):
            _output_kernel[(triton.cdiv(last - first, TOKENS), heads, batch)](
                q, cos, sin, kv[:, chunk].contiguous(), k_sum[:, chunk].contiguous(), out, first, last, heads,
                *_strides(q), out.stride(0), eps, **_tile(q),
            )  # fmt: skip
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, cos, sin, kv, k_sum = ctx.saved_tensors
        batch, count, heads, _ = q.shape
        grad = grad.contiguous()
        q_grad, n_grad = q.new_empty(q.shape), q.new_empty(q.shape, dtype=torch.float32)
        m_grad = q.new_empty(batch, count, heads, dtype=torch.float32)
        for chunk, (first, last) in enumerate(ctx.spans):
            _output_gradients_kernel[(triton.cdiv(last - first, TOKENS), heads, batch)](
                q, grad, cos, sin, kv[:, chunk].contiguous(), k_sum[:, chunk].contiguous(), q_grad, n_grad, m_grad,
                first, last, heads, *_strides(q), grad.stride(0), ctx.eps, **_tile(q),
            )  # fmt: skip
        kv_grad, k_grad = _sums(q, n_grad, m_grad, cos, sin, ctx.spans)
        return q_grad, None, None, kv_grad, k_grad, None, None, None


def _sums(
    k: Tensor, v: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, spans: list[Span]
) -> tuple[Tensor, Tensor]:
    batch, _, heads, dim = k.shape
    own = []
    for first, last in spans:
        parts = max(min(PROGRAMS // (batch * heads), triton.cdiv(last - first, TOKENS)), 1)
        share = triton.cdiv(triton.cdiv(last - first, parts), TOKENS) * TOKENS
        parts = triton.cdiv(last - first, share)
        kv = k.new_empty(batch, parts, heads, dim, dim, dtype=torch.float32)
        k_sum = k.new_empty(batch, parts, heads, dim, dtype=torch.float32)
        _sums_kernel[(parts, heads, batch)](
            k, v, k if weight is None else weight, cos, sin, kv, k_sum, first, last, share, heads, *_strides(k),
            *_strides(v), 0 if weight is None else weight.stride(0), weight is not None, **_tile(k),
        )  # fmt: skip
        own.append((kv.sum(1), k_sum.sum(1)))
    kvs, k_sums = zip(*own, strict=True)
    return torch.stack(kvs, 1), torch.stack(k_sums, 1)


def _strides(part: Tensor) -> tuple[int, int]:
    """From clip to clip and token to token of (B, N, heads, d), whose heads lie side by side."""
    assert part.stride(3) == 1 and part.stride(2) == part.shape[3], part.stride()
    clip, token, *_ = part.stride()
    assert part.shape[1] * token < 2**31, "offsets within a clip have 32 bits"
    return clip, token


def _tile(part: Tensor) -> dict[str, Any]:
    dim = part.shape[-1]
    lanes = max(triton.next_power_of_2(dim), 16)  # the least that a product takes
    return {
        "HALF": dim // 2,
        "HALVES": max(triton.next_power_of_2(dim // 2), 16),
        "LANES": lanes,
        "TOKENS": TOKENS,
        "num_warps": 8 if lanes > 64 else 4,  # a head's kv is held in registers
        "PRECISION": "ieee" if part.dtype == torch.float32 else "tf32",
    }
