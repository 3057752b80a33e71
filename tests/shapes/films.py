"""Scenes, their pictures, and what a VAE would make of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longsana.shapes import scenes as shapes
from longsana.shapes.scenes import Scene
from longsana.shapes.sight import Seen, observe


def pictures(scenes: Sequence[Scene], frames: int = 81, start: int = 0) -> Tensor:
    """uint8 (B, F, H, W, 3)."""
    rendered = shapes.render(scenes, range(start, start + frames))
    return ((rendered + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()


def through_vae(clean: Tensor, sigma: float = 0.8, psnr: float = 34.0) -> Tensor:
    """Blurred by a Gaussian of five taps, and noisy."""
    taps = torch.exp(-(torch.arange(-2, 3) ** 2) / (2 * sigma**2))
    values = clean.float()
    for side in (2, 3):
        values = sum(tap * values.roll(shift, side) for tap, shift in zip(taps / taps.sum(), range(-2, 3), strict=True))
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(7, *clean.shape[2:], generator=rng) * 255 / 10 ** (psnr / 20)
    index = torch.arange(clean.shape[0] * clean.shape[1]).reshape(clean.shape[:2]) % 7
    return (values + noise[index]).round().clamp(0, 255).to(torch.uint8)


def scenes(count: int, seed: int = 5) -> list[Scene]:
    """As many held-out ones as ordinary ones."""
    return [shapes.draw_scene(seed, index // 2, held_out=index % 2 == 1) for index in range(count)]


def watch(scenes: Sequence[Scene], frames: int = 81, *, vae: bool = False) -> Seen:
    """What is seen in the clips of these scenes."""
    seen = []
    for index in range(0, len(scenes), 8):
        clips = pictures(scenes[index : index + 8], frames)
        seen.append(observe(through_vae(clips) if vae else clips))
    *tensors, sizes = zip(*seen, strict=True)
    return Seen._make([*(torch.cat(values) for values in tensors), sizes[0]])
