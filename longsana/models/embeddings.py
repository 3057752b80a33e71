"""Embeddings, which the blocks are given: the latents as tokens, the time, and the text."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


class TextEmbedding(NamedTuple):
    """A batch of encoded captions.

    tokens: (B, L, C), hidden states of the text encoder.
    mask: (B, L), bool; True marks a token that the network may look at.
    """

    tokens: Tensor
    mask: Tensor


class TextMemory(NamedTuple):
    """Keys and values that a network's blocks have made of a `TextEmbedding`: see `LongSanaDiT.cache_caption`.

    layers: of each block, keys and values (B, heads, L, d).
    mask: (B, L), bool, of the tokens that may be looked at; or (B,), int32, how many of each caption's first ones may
        be; None if all.
    """

    layers: list[tuple[Tensor, Tensor]]
    mask: Tensor | None


Text = TextEmbedding | TextMemory


class PatchEmbedding(nn.Conv3d):
    """Patches of latents to tokens: a convolution whose kernel is its stride, as a product that writes whole tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, T, H, W), H and W multiples of the patch; returns (B, T, S, D)."""
        _, height, width = self.kernel_size
        patches = rearrange(x, "b c t (h ph) (w pw) -> b t (h w) (c ph pw)", ph=height, pw=width)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class TimeEmbedding(nn.Module):
    """Timestep to the conditioning vector and the six modulation vectors of every block."""

    FREQUENCIES = 256

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(self.FREQUENCIES, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t of any shape, in [0, 1000]: returns (..., D) and (..., 6, D)."""
        dtype = self.linear_1.weight.dtype
        embedding = self.linear_2(F.silu(self.linear_1(sinusoid(t, self.FREQUENCIES).to(dtype))))
        return embedding, self.modulation(F.silu(embedding)).unflatten(-1, (6, -1))


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """cos(t f_i) for all i, then sin(t f_i), with f_i = 10000^(-i / (dim / 2)): t (...) to (..., dim) in float32."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    # Published checkpoints were trained on whole timesteps: 959.96 is embedded as 959.
    angles = t.long().to(torch.float32)[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class CaptionEmbedding(nn.Module):
    """Hidden states of the text encoder to the width of the network."""

    null_tokens: Tensor

    def __init__(self, caption_channels: int, hidden_size: int, caption_length: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(caption_channels, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.RMSNorm(hidden_size, eps=1e-5)
        # The learned "no caption". A buffer: published checkpoints keep it outside the optimizer.
        self.register_buffer("null_tokens", torch.zeros(caption_length, caption_channels))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, C) to (B, L, D)."""
        tokens = tokens.to(self.linear_1.weight.dtype)
        return self.norm(self.linear_2(F.gelu(self.linear_1(tokens), approximate="tanh")))


class Captioned(Protocol):
    """A network that embeds captions."""

    @property
    def text_embed(self) -> CaptionEmbedding: ...


def null_embedding(model: Captioned, batch: int) -> TextEmbedding:
    """The "no caption" that the network's checkpoint was trained with, `batch` times; all of its tokens are seen.

    Raises:
        ValueError: the checkpoint has none (all zeros).
    """
    null = model.text_embed.null_tokens
    if not null.any():
        raise ValueError("the checkpoint has no null caption (its null_tokens are all zeros)")
    return TextEmbedding(
        null.expand(batch, *null.shape), torch.ones(batch, null.shape[0], dtype=torch.bool, device=null.device)
    )
