"""Block-causal linear attention in two passes (Triton): sums over the tokens of a chunk, then output token by token.

A program takes a share of a chunk's tokens, tile by tile, of one head. Tokens are rotated as they are read. Sums are
float32. For inputs of 16 bits products are exact to 16 bits: a tensor core multiplies bfloat16, so a factor is split
into two of them, its first 8 bits and the next, and the product of both seconds is left out (TF32 has 10 bits, takes as
long, and wants its tiles transposed). For float32 they are three products of TF32, 21 bits.

Gradients, with o = n / m, n = (R q)^T S, m = q . z + eps and g that of o:
    of n: g / m      of R q: S (g / m)      of S: sum (R q) (g / m)^T, as S is a sum over keys
    of m: -(g . o) / m = -q . (R^T S (g / m)) / m, so that o is not computed again
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from longsana.ops import reference
from longsana.ops.activation import INTERPRETED
from longsana.ops.dispatch import shared_memory, shares
from longsana.ops.reference import Total, prefix_sums


class Tile(NamedTuple):
    """Tokens that a program takes at a time, its warps, and the stages of its loop over them."""

    tokens: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """Tiles of sums and outputs, and of gradients: of what sums and outputs read, and of the sums that outputs read.

    apart: the gradients of keys are computed without those of values, as a head's sums and their transpose are more
    than a program's shared memory.
    """

    sums: Tile
    output: Tile
    of_sums: Tile
    of_output: Tile
    of_state: Tile
    apart: bool


# Of 227 KB, for tensor cores that read a head's sums from shared memory: heads of 112 spill some hundred bytes, and are
# faster than smaller tiles or more warps that spill none (sm_90). The others hold the sums in registers, which so few
# tokens and so many warps leave room for; 64 tokens and 4 warps would spill up to 14 KB a thread (sm_80).
TILES = {
    227: Tiles(Tile(64, 4, 2), Tile(64, 4, 1), Tile(64, 4, 1), Tile(32, 4, 1), Tile(32, 4, 1), apart=False),
    163: Tiles(Tile(64, 8, 2), Tile(16, 4, 2), Tile(32, 8, 2), Tile(32, 8, 1), Tile(32, 8, 1), apart=False),
    99: Tiles(Tile(32, 8, 2), Tile(16, 8, 2), Tile(16, 8, 2), Tile(32, 8, 1), Tile(32, 8, 1), apart=True),
}
"""By `shared_memory`."""
PROGRAMS = 264
"""Programs that keep a large GPU busy, twice its multiprocessors."""
Span = tuple[int, int]
"""First token of a chunk, and the first after it."""


@triton.jit
def _dot(a, b, total):
    """total + a @ b, of bfloat16; the interpreter would multiply its bits as integers."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total)


@triton.jit
def _split(x, EXACT: tl.constexpr):
    """x as a sum of two, for `_product`."""
    if EXACT:
        high, low = x.to(tl.float32), x
    else:
        # The first is cut off, not rounded: a GPU rounds single numbers eight times slower than pairs.
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True) & 0xFFFF0000
        high = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        low = (x.to(tl.float32) - bits.to(tl.float32, bitcast=True)).to(tl.bfloat16)
    return high, low


@triton.jit
def _product(a, b, total, EXACT: tl.constexpr):
    """total + a @ b, with a b that is split. EXACT: to 21 bits; else to 16, or 8 of a bfloat16."""
    high, low = _split(a, EXACT)
    if EXACT:
        total = tl.dot(high, b[0], total, input_precision="tf32x3")
    else:
        total = _dot(high, b[0], total)
        total = _dot(high, b[1], total)
        if a.dtype != tl.bfloat16:
            total = _dot(low, b[0], total)
    return total


@triton.jit
def _transposed(split):
    return tl.trans(split[0]), tl.trans(split[1])


@triton.jit
def _tile(source, token, there, token_stride, lane, dim: tl.constexpr):
    """(tokens, LANES) of a head, zeros where there is nothing."""
    return tl.load(source + token[:, None] * token_stride + lane[None, :], there[:, None] & (lane < dim)[None, :], 0.0)


@triton.jit
def _angles(cos, sin, token, there, HALF: tl.constexpr, HALVES: tl.constexpr):
    """(tokens, HALVES) each."""
    pair = tl.arange(0, HALVES)
    at = token[:, None] * HALF + pair[None, :]
    inside = there[:, None] & (pair < HALF)[None, :]
    return tl.load(cos + at, inside, 0.0), tl.load(sin + at, inside, 0.0)


@triton.jit
def _rotated(x, c, s):
    """(tokens, LANES): channels (2i, 2i + 1) turned by an angle together; by its opposite for -s."""
    TOKENS: tl.constexpr = c.shape[0]
    HALVES: tl.constexpr = c.shape[1]
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (TOKENS, HALVES, 2)))
    return tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (TOKENS, 2 * HALVES))


@triton.jit
def _state(kv, k_sum, row, lane, dim: tl.constexpr, EXACT: tl.constexpr):
    """A head's sums: kv (LANES, LANES), split, and k_sum (LANES,)."""
    inside = (lane < dim)[:, None] & (lane < dim)[None, :]
    sums = tl.load(kv + row * dim * dim + lane[:, None] * dim + lane[None, :], inside, 0.0)
    return _split(sums, EXACT), tl.load(k_sum + row * dim + lane, lane < dim, 0.0)


@triton.jit
def _share(first, last, share):
    """The program's tokens: the first, and the one after the last."""
    begin = first + tl.program_id(0) * share
    return begin, tl.minimum(begin + share, last)


@triton.jit
def _sums_kernel(
    k, v, weight, cos, sin, kv, k_sum, first, last, share, heads, k_clip, k_token, v_clip, v_token, weight_clip,
    WEIGHTED: tl.constexpr, HALF: tl.constexpr, LANES: tl.constexpr, TOKENS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """kv (B, shares, heads, d, d) and k_sum (B, shares, heads, d), of `share` tokens each.

    WEIGHTED: the tokens of k_sum, but not of kv, have weights (B, N, heads).
    """
    part, head, clip = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    dim: tl.constexpr = 2 * HALF
    k += clip * k_clip + head * dim
    v += clip * v_clip + head * dim
    lane = tl.arange(0, LANES)
    total = tl.zeros((LANES, LANES), tl.float32)  # of kv, transposed: v is multiplied as it lies
    k_total = tl.zeros((LANES,), tl.float32)
    begin, end = _share(first, last, share)
    for start in range(begin, end, TOKENS):
        token = start + tl.arange(0, TOKENS)
        there = token < end
        key, value = _tile(k, token, there, k_token, lane, dim), _tile(v, token, there, v_token, lane, dim)
        c, s = _angles(cos, sin, token, there, HALF, LANES // 2)
        total = _product(tl.trans(value), _split(_rotated(key, c, s), EXACT), total, EXACT)
        key = key.to(tl.float32)
        if WEIGHTED:
            key *= tl.load(weight + clip * weight_clip + token * heads + head, there, 0.0)[:, None]
        k_total += tl.sum(key, 0)
    row = (clip * tl.num_programs(0) + part) * heads + head
    inside = (lane < dim)[:, None] & (lane < dim)[None, :]
    tl.store(kv + row * dim * dim + lane[None, :] * dim + lane[:, None], total, inside)
    tl.store(k_sum + row * dim + lane, k_total, lane < dim)


@triton.jit
def _sums_gradients_kernel(
    k, v, cos, sin, kv, k_sum, k_grad, v_grad, first, last, share, heads, k_clip, k_token, v_clip, v_token, clip_stride,
    KEYS: tl.constexpr, VALUES: tl.constexpr,
    HALF: tl.constexpr, LANES: tl.constexpr, TOKENS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """kv (B, heads, d, d) and k_sum (B, heads, d) are the gradients of the sums. KEYS, VALUES: whose are wanted."""
    head, clip = tl.program_id(1), tl.program_id(2).to(tl.int64)
    dim: tl.constexpr = 2 * HALF
    lane = tl.arange(0, LANES)
    row, own = clip * heads + head, clip * clip_stride + head * dim
    sums, k_total = _state(kv, k_sum, row, lane, dim, EXACT)
    begin, end = _share(first, last, share)
    for start in range(begin, end, TOKENS):
        token = start + tl.arange(0, TOKENS)
        there = token < end
        if VALUES:
            key = _tile(k + clip * k_clip + head * dim, token, there, k_token, lane, dim)
        if KEYS:
            value = _tile(v + clip * v_clip + head * dim, token, there, v_token, lane, dim)
        c, s = _angles(cos, sin, token, there, HALF, LANES // 2)
        zeros = tl.zeros((TOKENS, LANES), tl.float32)
        if KEYS:
            of_key = _rotated(_product(value, _transposed(sums), zeros, EXACT), c, -s) + k_total[None, :]
        if VALUES:
            of_value = _product(_rotated(key, c, s), sums, zeros, EXACT)
        at = own + token[:, None] * heads * dim + lane[None, :]
        inside = there[:, None] & (lane < dim)[None, :]
        if KEYS:
            tl.store(k_grad + at, of_key.to(k_grad.dtype.element_ty), inside)
        if VALUES:
            tl.store(v_grad + at, of_value.to(v_grad.dtype.element_ty), inside)


@triton.jit
def _output_kernel(
    q, cos, sin, kv, k_sum, out, first, last, share, heads, q_clip, q_token, out_clip, eps: tl.constexpr,
    HALF: tl.constexpr, LANES: tl.constexpr, TOKENS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """out of the tokens first .. last, which see kv (B, heads, d, d) and k_sum (B, heads, d)."""
    head, clip = tl.program_id(1), tl.program_id(2).to(tl.int64)
    dim: tl.constexpr = 2 * HALF
    lane = tl.arange(0, LANES)
    row = clip * heads + head
    sums, k_total = _state(kv, k_sum, row, lane, dim, EXACT)
    begin, end = _share(first, last, share)
    for start in range(begin, end, TOKENS):
        token = start + tl.arange(0, TOKENS)
        there = token < end
        query = _tile(q + clip * q_clip + head * dim, token, there, q_token, lane, dim)
        c, s = _angles(cos, sin, token, there, HALF, LANES // 2)
        numerator = _product(_rotated(query, c, s), sums, tl.zeros((TOKENS, LANES), tl.float32), EXACT)
        denominator = tl.sum(query.to(tl.float32) * k_total[None, :], 1) + eps
        tl.store(
            out + clip * out_clip + token[:, None] * heads * dim + head * dim + lane[None, :],
            (numerator * (1 / denominator)[:, None]).to(out.dtype.element_ty),
            there[:, None] & (lane < dim)[None, :],
        )


@triton.jit
def _output_gradients_kernel(
    q, grad, cos, sin, kv, k_sum, q_grad, n_grad, m_grad, first, last, share, heads, q_clip, q_token, clip_stride,
    eps: tl.constexpr, HALF: tl.constexpr, LANES: tl.constexpr, TOKENS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """q_grad, and the gradients of numerators (B, N, heads, d) and denominators (B, N, heads)."""
    head, clip = tl.program_id(1), tl.program_id(2).to(tl.int64)
    dim: tl.constexpr = 2 * HALF
    lane = tl.arange(0, LANES)
    row, own = clip * heads + head, clip * clip_stride + head * dim
    sums, k_total = _state(kv, k_sum, row, lane, dim, EXACT)
    begin, end = _share(first, last, share)
    for start in range(begin, end, TOKENS):
        token = start + tl.arange(0, TOKENS)
        there = token < end
        query = _tile(q + clip * q_clip + head * dim, token, there, q_token, lane, dim)
        c, s = _angles(cos, sin, token, there, HALF, LANES // 2)
        inverse = 1 / (tl.sum(query.to(tl.float32) * k_total[None, :], 1) + eps)
        of_n = _tile(grad + own, token, there, heads * dim, lane, dim).to(tl.float32) * inverse[:, None]
        back = _product(of_n, _transposed(sums), tl.zeros((TOKENS, LANES), tl.float32), EXACT)
        back = _rotated(back, c, -s)
        of_m = -tl.sum(query.to(tl.float32) * back, 1) * inverse
        of_query = back + of_m[:, None] * k_total[None, :]
        at = own + token[:, None] * heads * dim + lane[None, :]
        inside = there[:, None] & (lane < dim)[None, :]
        tl.store(n_grad + at, of_n, inside)
        tl.store(m_grad + own // dim + token * heads, of_m, there)
        tl.store(q_grad + at, of_query.to(q_grad.dtype.element_ty), inside)


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
    decay: Tensor | None = None,
    sink: int | None = None,
    total: Total | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Block-causal linear attention with carried state, as `reference.linear_attention` says.

    Args:
        q, k, v: (B, N, heads, d) in float32, bfloat16 or float16; the heads of a token lie side by side in memory.
        cos, sin: (N, d / 2), float32.
        kv, k_sum: (B, W, heads, d, d) and (B, W, heads, d), float32.
        decay: (n, heads), float32.

    Returns:
        o as (B, N, heads, d) in v's dtype, and the next kv and k_sum in float32. All that is differentiable there is
        here, the first time alone.
    """
    if q.dtype == torch.float32 and q.shape[-1] > 64 and (torch.is_grad_enabled() or shared_memory() < 163):
        # A head's sums in all their bits are 128 KB, and gradients want them transposed, too.
        return reference.linear_attention(
            q, k, v, cos, sin, kv, k_sum, lengths=lengths, window=window, eps=eps, decay=decay, sink=sink, total=total
        )
    spans = list(itertools.pairwise([0, *itertools.accumulate(lengths)]))
    cos, sin = cos.contiguous(), sin.contiguous()
    own_kv, own_k = _Sums.apply(k, v, cos, sin, spans)
    if total is not None:
        own_kv, own_k = total([own_kv, own_k])
    kv_seen, kv = prefix_sums(kv, own_kv, window, decay, sink)
    k_seen, k_sum = prefix_sums(k_sum, own_k, window, decay, sink)
    return _Output.apply(q, cos, sin, kv_seen, k_seen, spans, eps, v.dtype), kv, k_sum


class _Sums(torch.autograd.Function):
    """(B, n, heads, d, d) and (B, n, heads, d) of the tokens of n chunks; k and v are (B, N, heads, d)."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, spans: list[Span]) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(k, v, cos, sin)
        ctx.spans = spans
        return _sums(k, v, None, cos, sin, spans, _tiles().sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, kv: Tensor, k_sum: Tensor) -> tuple[Tensor | None, ...]:
        k, v, cos, sin = ctx.saved_tensors
        batch, _, heads, _ = k.shape
        k_grad, v_grad = (part.new_empty(part.shape) for part in (k, v))
        tile = _tiles().of_sums
        for chunk, (first, last) in enumerate(ctx.spans):
            parts, share = _parts(last - first, batch * heads, tile)
            own_kv, own_k = kv[:, chunk].contiguous(), k_sum[:, chunk].contiguous()
            for keys, values in ((True, False), (False, True)) if _tiles().apart else ((True, True),):
                _sums_gradients_kernel[(parts, heads, batch)](
                    k, v, cos, sin, own_kv, own_k, k_grad, v_grad, first, last, share, heads, *_strides(k),
                    *_strides(v), k_grad.stride(0), keys, values, **_sizes(k, tile),
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
        tile = _tiles().output
        for chunk, (first, last) in enumerate(spans):
            parts, share = _parts(last - first, batch * heads, tile)
            _output_kernel[(parts, heads, batch)](
                q, cos, sin, kv[:, chunk].contiguous(), k_sum[:, chunk].contiguous(), out, first, last, share, heads,
                *_strides(q), out.stride(0), eps, **_sizes(q, tile),
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
        tile = _tiles().of_output
        for chunk, (first, last) in enumerate(ctx.spans):
            parts, share = _parts(last - first, batch * heads, tile)
            _output_gradients_kernel[(parts, heads, batch)](
                q, grad, cos, sin, kv[:, chunk].contiguous(), k_sum[:, chunk].contiguous(), q_grad, n_grad, m_grad,
                first, last, share, heads, *_strides(q), grad.stride(0), ctx.eps, **_sizes(q, tile),
            )  # fmt: skip
        kv_grad, k_grad = _sums(q, n_grad, m_grad, cos, sin, ctx.spans, _tiles().of_state)
        return q_grad, None, None, kv_grad, k_grad, None, None, None


def _sums(
    k: Tensor, v: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, spans: list[Span], tile: Tile
) -> tuple[Tensor, Tensor]:
    batch, _, heads, dim = k.shape
    own = []
    for first, last in spans:
        parts, share = _parts(last - first, batch * heads, tile)
        kv = k.new_empty(batch, parts, heads, dim, dim, dtype=torch.float32)
        k_sum = k.new_empty(batch, parts, heads, dim, dtype=torch.float32)
        _sums_kernel[(parts, heads, batch)](
            k, v, k if weight is None else weight, cos, sin, kv, k_sum, first, last, share, heads, *_strides(k),
            *_strides(v), 0 if weight is None else weight.stride(0), weight is not None, **_sizes(k, tile),
        )  # fmt: skip
        own.append((kv.sum(1, keepdim=True), k_sum.sum(1, keepdim=True)))
    if len(own) == 1:
        return own[0]
    kvs, k_sums = zip(*own, strict=True)
    return torch.cat(kvs, 1), torch.cat(k_sums, 1)


def _strides(part: Tensor) -> tuple[int, int]:
    """Return the strides from clip to clip and token to token of (B, N, heads, d), whose heads lie side by side."""
    assert part.stride(3) == 1 and part.stride(2) == part.shape[3], part.stride()
    clip, token, *_ = part.stride()
    assert part.shape[1] * token < 2**31, "offsets within a clip have 32 bits"
    return clip, token


def _tiles() -> Tiles:
    return TILES[shared_memory()]


def _parts(tokens: int, others: int, tile: Tile) -> tuple[int, int]:
    return shares(tokens, others, programs=PROGRAMS, step=tile.tokens)


def _sizes(part: Tensor, tile: Tile) -> dict[str, Any]:
    dim = part.shape[-1]
    lanes = max(triton.next_power_of_2(dim), 16)  # the least that a product takes
    return {
        "HALF": dim // 2,
        "LANES": lanes,
        "TOKENS": tile.tokens,
        "EXACT": part.dtype == torch.float32,
        "num_warps": tile.warps if lanes > 64 else 4,
        "num_stages": tile.stages,
    }
