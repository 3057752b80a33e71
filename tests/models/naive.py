"""The published network a second time: written from its description alone, slow, in float64, sharing no code.

Names, shapes and layouts are the published checkpoint's, and so is the cache: for each chunk one entry, a list over
blocks of `[vk, k_sum, tconv]` made of that chunk's tokens only. `forward` runs one chunk; `accumulate` turns the
entries so far into what the next chunk reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]
Entry = list[list[Tensor]]
"""For each block: vk (B, heads, d value, d key), k_sum (B, heads, 1, d), tconv (B, D, 1, S)."""

LINEAR_EPS, QK_EPS, CAPTION_EPS, CROSS_EPS = 1e-8, 1e-5, 1e-5, 1e-6


def forward(
    weights: Weights,
    x: Tensor,
    t: Tensor,
    y: Tensor,
    mask: Tensor,
    *,
    head_dim: int,
    cross_heads: int,
    patch: tuple[int, int] = (2, 2),
    start: int = 0,
    cache: Entry | None = None,
) -> tuple[Tensor, Entry]:
    """One chunk whose first frame is `start`; x (B, C, T, H, W), t (B,) or (B, T), y (B, L, C), mask (B, L)."""
    x, y = x.double(), y.double()
    batch, channels, frames, height, width = x.shape
    h, w = height // patch[0], width // patch[1]
    depth = sum(name.endswith("attn.qkv.weight") for name in weights)

    x = F.conv3d(x, weights["x_embedder.proj.weight"], weights["x_embedder.proj.bias"], stride=(1, *patch))
    x = x.flatten(2).transpose(1, 2)  # B, N, D with n = (f h + row) w + column
    dim = x.shape[2]

    steps = (t if t.dim() == 2 else t[:, None].expand(batch, frames)).to(torch.int64).to(torch.float32)
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    angles = steps[:, :, None] * frequencies
    sinusoid = torch.cat([torch.cos(angles), torch.sin(angles)], dim=2).double()
    temb = linear(weights, "t_embedder.mlp.2", silu(linear(weights, "t_embedder.mlp.0", sinusoid)))
    t0 = linear(weights, "t_block.1", silu(temb)).reshape(batch, frames, 6, dim)

    y = linear(weights, "y_embedder.y_proj.fc2", gelu(linear(weights, "y_embedder.y_proj.fc1", y)))
    y = rms_norm(y, weights["attention_y_norm.weight"], CAPTION_EPS)

    def per_token(vector: Tensor) -> Tensor:
        return vector.repeat_interleave(h * w, dim=1)

    entry = []
    for i in range(depth):
        block = {name.removeprefix(f"blocks.{i}."): value for name, value in weights.items()}
        m = block["scale_shift_table"] + t0
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = [per_token(m[:, :, j]) for j in range(6)]
        past = cache[i] if cache is not None else [None, None, None]

        inner = layer_norm(x) * (1 + scale_msa) + shift_msa
        out, vk, k_sum = self_attention(block, inner, head_dim, (frames, h, w), start, past[0], past[1])
        x = x + gate_msa * out

        x = x + cross_attention(block, x, y, mask, cross_heads)

        inner = layer_norm(x) * (1 + scale_mlp) + shift_mlp
        out, tconv = feed_forward(block, inner, (frames, h, w), past[2])
        x = x + gate_mlp * out
        entry.append([vk, k_sum, tconv])

    shift, scale = [per_token(weights["final_layer.scale_shift_table"][j] + temb) for j in range(2)]
    x = linear(weights, "final_layer.linear", layer_norm(x) * (1 + scale) + shift)

    image = torch.zeros(batch, channels, frames, height, width, dtype=torch.float64)
    for n in range(frames * h * w):
        f, row, column = n // (h * w), n // w % h, n % w
        for p in range(patch[0]):
            for q in range(patch[1]):
                first = (p * patch[1] + q) * channels
                image[:, :, f, row * patch[0] + p, column * patch[1] + q] = x[:, n, first : first + channels]
    return image, entry


def accumulate(entries: Sequence[Entry], window: int = -1) -> Entry | None:
    """What the next chunk reads: the sums of the last `window` chunks (all: -1) and the last chunk's frame."""
    if not entries:
        return None
    seen = entries if window <= 0 else entries[max(0, len(entries) - window) :]
    return [
        [sum(entry[i][0] for entry in seen), sum(entry[i][1] for entry in seen), entries[-1][i][2]]
        for i in range(len(entries[-1]))
    ]


Weigh = Callable[[int, int], list[Tensor]]
"""How much chunk c sees of chunk i: of (c, i), for each block (heads,)."""


def weighted(entries: Sequence[Entry], weigh: Weigh) -> Entry | None:
    """What the next chunk reads: the sums of all chunks, each by its weight, and the last chunk's frame."""
    if not entries:
        return None
    weights = [weigh(len(entries), i) for i in range(len(entries))]
    return [
        [
            *(
                sum(weights[i][block][:, None, None] * entry[block][part] for i, entry in enumerate(entries))
                for part in range(2)
            ),
            entries[-1][block][2],
        ]
        for block in range(len(entries[-1]))
    ]


def stream(
    weights: Weights,
    x: Tensor,
    t: Tensor,
    y: Tensor,
    mask: Tensor,
    *,
    lengths: Sequence[int],
    head_dim: int,
    cross_heads: int,
    window: int = -1,
    weigh: Weigh | None = None,
    start: int = 0,
) -> tuple[Tensor, list[Entry]]:
    """Chunk after chunk, every one of them written to the cache; t is (B, T). weigh: takes the place of a window."""
    outputs, entries, begin = [], [], 0
    for length in lengths:
        end = begin + length
        out, entry = forward(
            weights,
            x[:, :, begin:end],
            t[:, begin:end],
            y,
            mask,
            head_dim=head_dim,
            cross_heads=cross_heads,
            start=start + begin,
            cache=accumulate(entries, window) if weigh is None else weighted(entries, weigh),
        )
        outputs.append(out)
        entries.append(entry)
        begin = end
    return torch.cat(outputs, dim=2), entries


def self_attention(
    block: Weights,
    x: Tensor,
    head_dim: int,
    grid: tuple[int, int, int],
    start: int,
    past_vk: Tensor | None,
    past_k_sum: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, count, dim = x.shape
    qkv = x @ block["attn.qkv.weight"].T
    q, k, v = qkv[:, :, :dim], qkv[:, :, dim : 2 * dim], qkv[:, :, 2 * dim :]
    q = rms_norm(q, block["attn.q_norm.weight"], QK_EPS)
    k = rms_norm(k, block["attn.k_norm.weight"], QK_EPS)
    # B, heads, d, N
    q, k, v = [part.transpose(1, 2).reshape(batch, dim // head_dim, head_dim, count) for part in (q, k, v)]
    q, k = q.clamp(min=0), k.clamp(min=0)
    q_roped, k_roped = rope(q, grid, start), rope(k, grid, start)
    own_vk = v @ k_roped.transpose(2, 3)
    own_k_sum = k.sum(dim=3, keepdim=True).transpose(2, 3)
    vk = own_vk if past_vk is None else past_vk + own_vk
    k_sum = own_k_sum if past_k_sum is None else past_k_sum + own_k_sum
    z = 1 / (k_sum @ q + LINEAR_EPS)
    out = ((vk @ q_roped) * z).permute(0, 3, 1, 2).reshape(batch, count, dim)
    return linear(block, "attn.proj", out), own_vk, own_k_sum


def rope(x: Tensor, grid: tuple[int, int, int], start: int) -> Tensor:
    """(B, heads, d, N): channels 2i and 2i + 1 are the real and imaginary part of a number that is turned."""
    turned = torch.zeros_like(x)
    for n, phases in enumerate(rope_phases(x.shape[2], grid, start)):
        for i, phase in enumerate(phases):
            number = torch.complex(x[:, :, 2 * i, n], x[:, :, 2 * i + 1, n]) * phase
            turned[:, :, 2 * i, n], turned[:, :, 2 * i + 1, n] = number.real, number.imag
    return turned


@lru_cache
def rope_phases(head_dim: int, grid: tuple[int, int, int], start: int) -> list[list[complex]]:
    frames, h, w = grid
    space = 2 * (head_dim // 6)
    phases = []
    for f in range(start, start + frames):
        for row in range(h):
            for column in range(w):
                token = []
                for position, part in ((f, head_dim - 2 * space), (row, space), (column, space)):
                    for i in range(part // 2):
                        angle = position * 10000.0 ** (-2 * i / part)
                        token.append(complex(math.cos(angle), math.sin(angle)))
                phases.append(token)
    return phases


def cross_attention(block: Weights, x: Tensor, y: Tensor, mask: Tensor, heads: int) -> Tensor:
    dim = x.shape[2]
    size = dim // heads
    q = rms_norm(linear(block, "cross_attn.q_linear", x), block["cross_attn.q_norm.weight"], CROSS_EPS)
    kv = linear(block, "cross_attn.kv_linear", y)
    k, v = rms_norm(kv[:, :, :dim], block["cross_attn.k_norm.weight"], CROSS_EPS), kv[:, :, dim:]
    bias = (1 - mask.double()) * -10000
    out = torch.zeros_like(x)
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        scores = q[:, :, own] @ k[:, :, own].transpose(1, 2) / math.sqrt(size) + bias[:, None, :]
        out[:, :, own] = torch.exp(scores - torch.logsumexp(scores, dim=2, keepdim=True)) @ v[:, :, own]
    return linear(block, "cross_attn.proj", out)


def feed_forward(block: Weights, x: Tensor, grid: tuple[int, int, int], past: Tensor | None) -> tuple[Tensor, Tensor]:
    frames, h, w = grid
    batch, _, dim = x.shape
    image = x.reshape(batch * frames, h, w, dim).permute(0, 3, 1, 2)
    image = silu(F.conv2d(image, block["mlp.inverted_conv.conv.weight"], block["mlp.inverted_conv.conv.bias"]))
    depth, bias = block["mlp.depth_conv.conv.weight"], block["mlp.depth_conv.conv.bias"]
    image = F.conv2d(image, depth, bias, padding=1, groups=image.shape[1])
    half = image.shape[1] // 2
    image = image[:, :half] * silu(image[:, half:])
    p = F.conv2d(image, block["mlp.point_conv.conv.weight"])
    p = p.reshape(batch, frames, dim, h * w).transpose(1, 2)  # B, D, T, S

    joined = p if past is None else torch.cat([past, p], dim=2)
    mixed = F.conv2d(joined, block["mlp.t_conv.weight"], padding=(1, 0))[:, :, joined.shape[2] - frames :]
    return (p + mixed).permute(0, 2, 3, 1).reshape(x.shape), p[:, :, -1:].clone()


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * weight


def layer_norm(x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(dim=-1, keepdim=True) + 1e-6)
