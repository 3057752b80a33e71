"""Latents, and videos decoded piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longsana.encoders.vae import DecodeCache, WanVAE


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stream(vae: WanVAE, latents: Tensor, lengths: Sequence[int]) -> tuple[Tensor, DecodeCache]:
    cache, frames = None, []
    for chunk in latents.split(list(lengths), dim=2):
        pixels, cache = vae.decode_stream(chunk, cache)
        frames.append(pixels)
    assert cache is not None
    return torch.cat(frames, dim=2), cache
