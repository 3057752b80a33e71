"""Block-causal linear attention in two passes (Triton): sums over the tokens of a chunk, then output token by token.

A rotation turns channels (2i, 2i + 1) together, so even and odd channels are loaded as two tiles and never woven again:
a product over channels is the sum of a product over the even ones and one over the odd.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from longsana.ops.reference import prefix_sums

TOKENS = 64
"""Tokens of a tile."""
PROGRAMS = 264
"""Programs that keep a large GPU busy, twice its multiprocessors."""


@triton.jit
def _rotated(source, cos, sin, token, there, token_stride, HALF: tl.constexpr, HALVES: tl.constexpr):
    """Even and odd channels (tokens, HALVES) of a head, as they are and rotated, float32."""
    pair = tl.arange(0, HALVES)
    inside = there[:, None] & (pair < HALF)[None, :]
    at = source + token[:, None] * token_stride + 2 * pair[None, :]
    even = tl.load(at, inside, 0.0).to(tl.float32)
    odd = tl.load(at + 1, inside, 0.0).to(tl.float32)
    angle = token[:, None] * HALF + pair[None, :]
    c, s = tl.load(cos + angle, inside, 0.0), tl.load(sin + angle, inside, 0.0)
    return even, odd, even * c - odd * s, even * s + odd * c


@triton.jit
def _sums_kernel(
    k, v, cos, sin, kv, k_sum, first, last, share, heads, k_strides_b, k_strides_n, v_strides_b, v_strides_n,
    HALF: tl.constexpr, HALVES: tl.constexpr, LANES: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """kv (B, shares, heads, d, d) and k_sum (B, shares, heads, d): of `share` tokens from first on."""
    part, head, clip = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    dim: tl.constexpr = 2 * HALF
    k += clip * k_strides_b + head * dim
    v += clip * v_strides_b + head * dim
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
        even, odd, r_even, r_odd = _rotated(k, cos, sin, token, there, k_strides_n, HALF, HALVES)
        value = tl.load(
            v + token[:, None] * v_strides_n + lane[None, :], there[:, None] & (lane < dim)[None, :], 0.0
        ).to(tl.float32)
        kv_even = tl.dot(tl.trans(r_even), value, kv_even, input_precision=PRECISION)
        kv_odd = tl.dot(tl.trans(r_odd), value, kv_odd, input_precision=PRECISION)
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
def _output_kernel(
    q, cos, sin, kv, k_sum, out, first, last, heads, q_strides_b, q_strides_n, out_strides_b, out_strides_n,
    eps: tl.constexpr, HALF: tl.constexpr, HALVES: tl.constexpr, LANES: tl.constexpr, TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out of the tokens first .. last, which see kv (B, heads, d, d) and k_sum (B, heads, d)."""
    head, clip = tl.program_id(1), tl.program_id(2).to(tl.int64)
    dim: tl.constexpr = 2 * HALF
    token = first + tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = token < last
    even, odd, r_even, r_odd = _rotated(
        q + clip * q_strides_b + head * dim, cos, sin, token, there, q_strides_n, HALF, HALVES
    )
    pair, lane = tl.arange(0, HALVES), tl.arange(0, LANES)
    row = clip * heads + head
    k_sum += row * dim + 2 * pair
    k_even, k_odd = tl.load(k_sum, pair < HALF, 0.0), tl.load(k_sum + 1, pair < HALF, 0.0)
    denominator = tl.sum(even * k_even[None, :], 1) + tl.sum(odd * k_odd[None, :], 1) + eps
    kv += row * dim * dim + 2 * pair[:, None] * dim + lane[None, :]
    inside = (pair < HALF)[:, None] & (lane < dim)[None, :]
    numerator = tl.dot(r_even, tl.load(kv, inside, 0.0), input_precision=PRECISION)
    numerator = tl.dot(r_odd, tl.load(kv + dim, inside, 0.0), numerator, input_precision=PRECISION)
    tl.store(
        out + clip * out_strides_b + token[:, None] * out_strides_n + head * dim + lane[None, :],
        (numerator / denominator[:, None]).to(out.dtype.element_ty),
        there[:, None] & (lane < dim)[None, :],
    )


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
    batch, count, heads, dim = q.shape
    assert all(part.stride(3) == 1 and part.stride(2) == dim for part in (q, k, v)), "heads lie side by side"
    cos, sin = cos.contiguous(), sin.contiguous()
    half = dim // 2
    tile = {
        "HALF": half,
        "HALVES": max(triton.next_power_of_2(half), 16),
        "LANES": max(triton.next_power_of_2(dim), 16),
        "TOKENS": TOKENS,
        # 10 bits of mantissa, more than bfloat16 has and as many as float16.
        "PRECISION": "ieee" if v.dtype == torch.float32 else "tf32",
    }
    spans = list(itertools.pairwise([0, *itertools.accumulate(lengths)]))

    own_kv, own_k = [], []
    for first, last in spans:
        parts = max(min(PROGRAMS // (batch * heads), triton.cdiv(last - first, TOKENS)), 1)
        share = triton.cdiv(triton.cdiv(last - first, parts), TOKENS) * TOKENS
        parts = triton.cdiv(last - first, share)
        sums = kv.new_empty(batch, parts, heads, dim, dim), k_sum.new_empty(batch, parts, heads, dim)
        _sums_kernel[(parts, heads, batch)](
            k, v, cos, sin, *sums, first, last, share, heads, k.stride(0), k.stride(1), v.stride(0), v.stride(1), **tile
        )
        own_kv.append(sums[0].sum(1))
        own_k.append(sums[1].sum(1))
    kv_seen, kv = prefix_sums(kv, torch.stack(own_kv, 1), window)
    k_seen, k_sum = prefix_sums(k_sum, torch.stack(own_k, 1), window)

    out = v.new_empty(batch, count, heads, dim)
    for chunk, (first, last) in enumerate(spans):
        _output_kernel[(triton.cdiv(last - first, TOKENS), heads, batch)](
            q, cos, sin, kv_seen[:, chunk].contiguous(), k_seen[:, chunk].contiguous(), out, first, last, heads,
            q.stride(0), q.stride(1), out.stride(0), out.stride(1), eps, **tile,
        )  # fmt: skip
    return out, kv, k_sum
