"""Plain PyTorch twin of every fused operation, written to be read and checked against the formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

Total: TypeAlias = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Sums tensors over processes."""
FLOAT8_MAX = torch.finfo(torch.float8_e4m3fn).max


class Float8Rows(NamedTuple):
    """A tensor (..., D) as products in float8 read it: its rows, and what each is multiplied by.

    rows: (..., D) in float8_e4m3fn, the largest of each row 448 in size. scale: (..., 1) in float32.
    """

    rows: Tensor
    scale: Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums, numerators and denominators are float32; float64 stays float64 for exact tests."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel pairs (2i, 2i + 1): x is (B, N, heads, d), cos and sin are (N, d / 2)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def prefix_sums(
    past: Tensor, own: Tensor, window: int, decay: Tensor | None = None, sink: int | None = None
) -> tuple[Tensor, Tensor]:
    """Sum what each chunk may see, and what to remember after the last one.

        S_c = sinks + f_c recent_(c-1) + own_c

    Args:
        past: (B, W, heads, ...): if there are sinks the sum of those so far; then the sum of the other chunks before,
            or one entry for each of the last `window` of them, the oldest first.
        own: (B, n, heads, ...), one entry for each chunk of this call.
        window: how many earlier chunks, sinks apart, a chunk sees besides itself; -1 for all.
        decay: (n, heads), the factors f that each chunk multiplies what came before it by, sinks apart; None is 1.
        sink: how many of this call's chunks, from the first, join the sinks; None is a past without them.

    Returns:
        (B, n, heads, ...), for each chunk the sum over itself and what it sees; and the next `past`, its own memory.
    """
    factors = None if decay is None else decay.view(*decay.shape, *[1] * (own.dim() - 3))
    if sink is None and window < 0 and own.shape[1] == 1:  # a step of inference, in one launch
        total = past + own if factors is None else torch.addcmul(own, past, factors)
        return total, total
    if sink is None and factors is None:
        history = torch.cat([past, own], dim=1)
        if window < 0:
            sums = history.cumsum(dim=1)[:, 1:]
            return sums, sums[:, -1:].clone()
        return history.unfold(1, window + 1, 1).sum(-1), history[:, -window:].clone()
    first, recent = (past[:, :0], past) if sink is None else (past[:, :1], past[:, 1:])
    kept, seen = recent.shape[1], []
    for c, new in enumerate(own.split(1, dim=1)):
        if factors is not None:
            recent = factors[c] * recent
        if c < (sink or 0):
            first = first + new
        elif window < 0:
            recent = recent + new
        else:
            recent = torch.cat([recent, new], dim=1)
        total = recent.sum(1, keepdim=True)
        seen.append(total if sink is None else first + total)
        recent = recent[:, -kept:]
    return torch.cat(seen, dim=1), torch.cat([first, recent], dim=1)


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
    """Block-causal linear attention with carried state (SANA-Video, arXiv 2509.24695, section on block attention).

        o_i = (R q_i)^T S_c / (q_i . z_c + eps)      S_c = sum_j w_jc (R k_j) v_j^T      z_c = sum_j w_jc k_j

    for a token i of chunk c; j runs over the carried past and all tokens of chunks up to and including c. As published,
    every weight w is 1. `window`, `decay` and `sink` change those of tokens of earlier chunks, as in `prefix_sums`.

    Args:
        q, k, v: (B, N, heads, d); q and k are non-negative (after ReLU), not yet rotated.
        cos, sin: (N, d / 2), the rotation R of each token.
        kv, k_sum: carried S as (B, W, heads, d, d), index [key, value], and z as (B, W, heads, d).
        lengths: tokens of each chunk; they add up to N.
        window, decay, sink: see `prefix_sums`; decay in the dtype of the sums.
        total: adds to the sums of each chunk's tokens those of its tokens that other processes have; without gradients.

    Returns:
        o as (B, N, heads, d) in v's dtype, and the next kv and k_sum.
    """
    dtype, out_dtype = accumulation_dtype(v.dtype), v.dtype
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    q_rotated, k_rotated = rotate(q, cos, sin), rotate(k, cos, sin)

    def sum_of(chunk: tuple[Tensor, Tensor]) -> Tensor:
        return torch.einsum("bnhk,bnhv->bhkv", *chunk)

    chunks = zip(k_rotated.split(list(lengths), 1), v.split(list(lengths), 1), strict=True)
    own_kv = torch.stack([sum_of(chunk) for chunk in chunks], 1)
    # The denominator uses unrotated q and k: it stays non-negative.
    own_k_sum = torch.stack([chunk.sum(1) for chunk in k.split(list(lengths), 1)], 1)
    if total is not None:
        own_kv, own_k_sum = total([own_kv, own_k_sum])
    kv_seen, kv = prefix_sums(kv, own_kv, window, decay, sink)
    k_seen, k_sum = prefix_sums(k_sum, own_k_sum, window, decay, sink)

    out = []
    for c, (q_c, r_c) in enumerate(zip(q.split(list(lengths), 1), q_rotated.split(list(lengths), 1), strict=True)):
        numerator = torch.einsum("bnhk,bhkv->bnhv", r_c, kv_seen[:, c])
        denominator = torch.einsum("bnhk,bhk->bnh", q_c, k_seen[:, c]) + eps
        out.append((numerator / denominator[..., None]).to(out_dtype))
    return torch.cat(out, 1), kv, k_sum


def qk_features(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Non-negative queries and keys: RMSNorm over the full width, before the split into heads, then ReLU.

    Args:
        qkv: (..., 3 D), the fused product. q_weight, k_weight: (D,).

    Returns:
        q and k, (..., D); and v as it lies in the product, so that the gradient of all three is made in one place.
    """
    q, k, v = qkv.chunk(3, dim=-1)
    q, k = F.rms_norm(q, q_weight.shape, q_weight, eps), F.rms_norm(k, k_weight.shape, k_weight, eps)
    return q.relu(), k.relu(), v


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm without weights, then the modulation of a frame. x: (B, T, S, D); shift, scale: (B, 1 or T, 1, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def add_norm_modulate(x: Tensor, h: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + h, and `norm_modulate` of it. x, h: (B, T, S, D)."""
    x = x + h
    return x, norm_modulate(x, shift, scale, eps)


def gated_residual(x: Tensor, gate: Tensor, h: Tensor, more: Tensor | None = None) -> Tensor:
    """x + gate (h + more). x, h, more: (B, T, S, D), more may be none; gate: (B, 1 or T, 1, D)."""
    return x + gate * (h if more is None else h + more)


def gated_conv(x: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int]) -> Tensor:
    """The gate of the Mix-FFN: SiLU, a depthwise 3x3 convolution within each frame, then value times SiLU(gate).

    Args:
        x: (..., S, 2 I), S = size[0] * size[1] tokens of a frame. weight: (2 I, 1, 3, 3). bias: (2 I,).

    Returns:
        (..., S, I).
    """
    hidden = F.silu(x).reshape(-1, *size, x.shape[-1]).permute(0, 3, 1, 2)
    hidden = F.conv2d(hidden, weight, bias, padding=1, groups=weight.shape[0]).permute(0, 2, 3, 1)
    value, gate = hidden.chunk(2, dim=-1)
    return (value * F.silu(gate)).reshape(*x.shape[:-1], -1)


def quantise_rows(x: Tensor) -> Float8Rows:
    """Round x: (..., D) to float8, each row by a scale of its own."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / FLOAT8_MAX
    return Float8Rows((x.float() / scale).to(torch.float8_e4m3fn), scale)


def norm_modulate_rows(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Float8Rows:
    """Return `norm_modulate` as rows of (B, T, S, D)."""
    return quantise_rows(norm_modulate(x, shift, scale, eps))


def add_norm_modulate_rows(x: Tensor, h: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Float8Rows]:
    """Return `add_norm_modulate`, (B, T, S, D) both, the second as rows."""
    x, y = add_norm_modulate(x, h, shift, scale, eps)
    return x, quantise_rows(y)


def gated_residual_rows(x: Tensor, gate: Tensor, h: Tensor) -> tuple[Tensor, Float8Rows]:
    """Return `gated_residual`, (B, T, S, D), and once more as rows."""
    x = gated_residual(x, gate, h)
    return x, quantise_rows(x)


def neighbour_rows(x: Tensor, tail: Tensor, *, lengths: Sequence[int], ahead: Tensor | None = None) -> Float8Rows:
    """Rows whose product with the taps side by side, (D, 3 D), is `temporal_conv`: three frames and one scale.

    Args:
        x, tail, lengths, ahead: see `temporal_conv`.

    Returns:
        Rows of (B, T, S, 3 D): of each token what it sees in the frame before, in its own, and in the next.
    """
    before = torch.cat([tail[:, None], x[:, :-1]], dim=1)
    after = torch.cat([F.pad(chunk[:, 1:], (0, 0, 0, 0, 0, 1)) for chunk in x.split(list(lengths), dim=1)], dim=1)
    if ahead is not None:
        after = torch.cat([after[:, :-1], ahead[:, None]], dim=1)
    return quantise_rows(torch.cat([before, x, after], dim=-1))


def temporal_conv(
    x: Tensor, tail: Tensor, weight: Tensor, *, lengths: Sequence[int], ahead: Tensor | None = None
) -> Tensor:
    """Convolution over three frames whose right neighbour never lies in another chunk (the causal Mix-FFN).

    The left neighbour of a chunk's first frame is the frame before it (`tail` for the first chunk), the right
    neighbour of its last frame is zero. With one chunk and a zero tail this is an ordinary same-padded convolution.

    Args:
        x: (B, T, S, D). tail: (B, S, D). weight: (D, D, 3, 1), as published. lengths: frames of each chunk.
        ahead: (B, S, D), the next frame of the last chunk, of which these are not all; None: there is none.

    Returns:
        (B, T, S, D).
    """
    out = []
    left = tail[:, None]
    chunks = x.split(list(lengths), dim=1)
    for number, chunk in enumerate(chunks, 1):
        right = torch.zeros_like(left) if ahead is None or number < len(chunks) else ahead[:, None]
        padded = torch.cat([left, chunk, right], dim=1)
        if torch.compiler.is_compiling() and torch.is_grad_enabled():
            # Products: the gradient of F.conv2d for one clip has other strides than Inductor expects (torch 2.11).
            before, here, after = (
                padded[:, i : i + chunk.shape[1]].flatten(1, 2) @ tap.expand(len(x), -1, -1)
                for i, tap in enumerate(weight[..., 0].permute(2, 1, 0))
            )
            out.append((before + here + after).view(chunk.shape))
        else:
            # Token-major memory is what a convolution calls channels-last: permuting costs nothing.
            out.append(F.conv2d(padded.permute(0, 3, 1, 2), weight).permute(0, 2, 3, 1))
        left = chunk[:, -1:]
    return torch.cat(out, dim=1)


def norm_silu_into(x: Tensor, gamma: Tensor | None, out: Tensor, bias: Tensor | None = None, eps: float = 0.0) -> None:
    """SiLU of an RMSNorm over channels, written into a view: a decoder's step before each convolution.

        out = silu(y)      y = gamma * (x + bias) / max(sqrt(mean((x + bias)^2) + eps), 1e-12 / sqrt(C))

    Args:
        x: (B, T, H, W, C), without gaps.
        gamma: (C,); None is 1. bias: (C,), of the convolution that made x, if it is still to be added.
        out: (B, T, H, W, C), any view, such as the interior of a padded buffer; only its elements are written.
    """
    assert _without_gaps(x)
    wide = x.to(accumulation_dtype(x.dtype))
    if bias is not None:
        wide = wide + bias
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    if eps:
        length = (length.square() + eps * x.shape[-1]).sqrt()
    gain = x.shape[-1] ** 0.5 if gamma is None else gamma.to(wide.dtype) * x.shape[-1] ** 0.5
    out.copy_(F.silu(wide / length.clamp_min(1e-12) * gain))


def add_shortcut(x: Tensor, shortcut: Tensor, bias: Tensor | None = None) -> Tensor:
    """x + shortcut + bias, in x's memory: a residual block's end in a decoder.

    Args:
        x, shortcut: (B, T, H, W, C), without gaps. bias: (C,), of the convolution that made x, if it is still to be
            added.
    """
    assert _without_gaps(x) and _without_gaps(shortcut)
    if bias is not None:
        shortcut = shortcut.to(accumulation_dtype(x.dtype)) + bias
    return x.add_(shortcut)


def copy_into(x: Tensor, out: Tensor) -> None:
    """Write pictures into a view.

    Args:
        x: (A, B, H, W, C), any view whose channels are neighbours in memory.
        out: like x, likewise; only its elements are written.
    """
    out.copy_(x)


def relu_into(x: Tensor, out: Tensor, bias: Tensor | None = None, shortcut: Tensor | None = None) -> None:
    """ReLU(x + bias + shortcut), written into a view: a tiny decoder's step after each convolution.

    Args:
        x: (A, B, H, W, C), any view whose channels are neighbours in memory; a convolution's result without its bias.
        out: like x, likewise, and may be x itself; only its elements are written.
        bias: (C,), of that convolution.
        shortcut: like x, likewise; what a residual block adds.
    """
    wide = x.to(accumulation_dtype(x.dtype))
    for term in (bias, shortcut):
        if term is not None:
            wide = wide + term
    out.copy_(F.relu(wide))


def caption_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Attend with softmax over a caption: (B, N, H, d).

        out_n = sum_l softmax_l(q_n . k_l / sqrt(d)) v_l

    Args:
        q: (B, N, H, d). k, v: (B, H, L, d).
        lengths: (B,), int32: how many of each caption's first tokens are looked at, at least one; None: all.
    """
    mask = None
    if lengths is not None:
        mask = (torch.arange(k.shape[2], dtype=torch.int32, device=k.device) < lengths[:, None])[:, None, None]
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask).transpose(1, 2)


def _without_gaps(x: Tensor) -> bool:
    """Tell whether x's elements fill its memory, in any order: a GPU's convolutions write channels last, others not."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.numel() == 0 or last + 1 == x.numel()
