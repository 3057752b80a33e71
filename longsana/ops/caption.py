"""Softmax attention of video tokens over a caption (Triton), whose length lies on the GPU.

A caption is short: a program keeps its tokens of video in registers and goes over the caption once. The length is read
when the kernel runs, so that a CUDA graph serves captions of any length.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from longsana.ops.activation import INTERPRETED
from longsana.ops.dispatch import shared_memory


class Tile(NamedTuple):
    """Tokens of video that a program takes, tokens of the caption at a time, warps, and stages of the loop over them.

    For numbers of 16 bits; those of 32 take half of both.
    """

    tokens: int
    keys: int
    warps: int
    stages: int


TILES = {227: Tile(128, 64, 8, 2), 163: Tile(128, 64, 8, 2), 99: Tile(64, 32, 4, 2)}
"""By `shared_memory`."""


@triton.jit
def _dot(a, b, EXACT: tl.constexpr):
    """a @ b in float32; the interpreter would multiply the bits of bfloat16 as integers."""
    if INTERPRETED:
        product = tl.dot(a.to(tl.float32), b.to(tl.float32))
    elif EXACT:
        product = tl.dot(a, b, input_precision="tf32x3")
    else:
        product = tl.dot(a, b)
    return product


@triton.jit(do_not_specialize=["tokens", "length"])
def _attend(
    q,
    k,
    v,
    out,
    lengths,
    tokens,
    length,
    q_clip,
    q_token,
    q_head,
    k_clip,
    k_head,
    k_token,
    v_clip,
    v_head,
    v_token,
    scale,
    dim: tl.constexpr,
    block_tokens: tl.constexpr,
    block_keys: tl.constexpr,
    block_dim: tl.constexpr,
):
    head, clip = tl.program_id(1), tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)
    lane = tl.arange(0, block_dim)
    there = (token < tokens)[:, None] & (lane < dim)[None, :]
    q += clip * q_clip + head * q_head
    query = tl.load(q + token[:, None].to(tl.int64) * q_token + lane[None, :], there, 0.0)
    if lengths is not None:
        length = tl.load(lengths + clip)
    k += clip * k_clip + head * k_head
    v += clip * v_clip + head * v_head

    most = tl.full((block_tokens,), float("-inf"), tl.float32)
    total = tl.zeros((block_tokens,), tl.float32)
    mean = tl.zeros((block_tokens, block_dim), tl.float32)
    for first in range(0, length, block_keys):
        key = first + tl.arange(0, block_keys)
        inside = (key < length)[:, None] & (lane < dim)[None, :]
        keys = tl.load(k + key[:, None] * k_token + lane[None, :], inside, 0.0)
        scores = _dot(query, tl.trans(keys), q.dtype.element_ty == tl.float32) * scale
        scores = tl.where((key < length)[None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, axis=1))
        weights, shrink = tl.exp2(scores - higher[:, None]), tl.exp2(most - higher)
        values = tl.load(v + key[:, None] * v_token + lane[None, :], inside, 0.0)
        total = total * shrink + tl.sum(weights, axis=1)
        mean = mean * shrink[:, None] + _dot(weights.to(v.dtype.element_ty), values, q.dtype.element_ty == tl.float32)
        most = higher
    place = (clip * tokens + token[:, None]) * tl.num_programs(1) + head
    tl.store(out + place * dim + lane[None, :], (mean / total[:, None]).to(out.dtype.element_ty), there)


def caption_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Fuse `reference.caption_attention`: q (B, N, H, d), k and v (B, H, L, d), with any strides but of d."""
    batch, tokens, heads, dim = q.shape
    assert q.stride(3) == k.stride(3) == v.stride(3) == 1, "a head's numbers are neighbours"
    tile, lanes = TILES[shared_memory()], max(16, triton.next_power_of_2(dim))
    less = max(1, q.element_size() // 2)
    rows, keys = tile.tokens // less, tile.keys // less
    out = q.new_empty(q.shape)
    _attend[(triton.cdiv(tokens, rows), heads, batch)](
        q,
        k,
        v,
        out,
        lengths,
        tokens,
        k.shape[2],
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        math.log2(math.e) / math.sqrt(dim),
        dim=dim,
        block_tokens=rows,
        block_keys=keys,
        block_dim=lanes,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out
