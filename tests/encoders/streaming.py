"""Latents, and videos decoded piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from longsana.encoders.vae import DecodeCache, EncodeCache, VideoVAE


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stream(vae: VideoVAE, latents: Tensor, lengths: Sequence[int]) -> tuple[Tensor, DecodeCache]:
    cache, frames = None, []
    for chunk in latents.split(list(lengths), dim=2):
        pixels, cache = vae.decode_stream(chunk, cache)
        frames.append(pixels)
    assert cache is not None
    return torch.cat(frames, dim=2), cache


def encoded_in_pieces(vae: VideoVAE, film: Tensor, lengths: Sequence[int]) -> tuple[Tensor, EncodeCache]:
    """The latents of a film, so many at a time."""
    cache, latents = None, []
    counts = [vae.geometry.pixel_frames(length, first=not index) for index, length in enumerate(lengths)]
    for piece in film.split(counts, dim=2):
        encoded, cache = vae.encode_stream(piece, cache)
        latents.append(encoded)
    assert cache is not None
    return torch.cat(latents, dim=2), cache


def psnr(given: Tensor, expected: Tensor) -> float:
    """In dB, relative to the range of what is expected."""
    error = (given - expected).square().mean()
    return float(10 * torch.log10((expected.max() - expected.min()).square() / error))


def assert_nothing_is_transposed(vae: VideoVAE, latents: Tensor, cache: DecodeCache) -> None:
    """For a convolution on a GPU; and the fused norm runs."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        vae.decode_stream(latents, cache)
        torch.cuda.synchronize()
    kernels = [event.key for event in seen.key_averages()]
    assert any("_norm_silu" in kernel for kernel in kernels), kernels
    assert not [kernel for kernel in kernels if "nchwtonhwc" in kernel.lower() or "nhwctonchw" in kernel.lower()]


def assert_memory_is_taken_over(vae: VideoVAE, latents: Tensor) -> float:
    """Whoever gives a cache away has the same frames and the same next cache, to the bit.

    Returns the share of the cache's tensors that lie where the one before did; those of a copy lie elsewhere.
    """
    _, cache = vae.decode_stream(latents[:, :, :5], more=True)
    places = {feature.data_ptr() for feature in cache.features if feature.numel()}
    expected, other = vae.decode_stream(latents[:, :, 5:], cache, more=True)
    assert not places & {feature.data_ptr() for feature in other.features}
    given, after = vae.decode_stream(latents[:, :, 5:], cache, more=True, consumed=True)
    assert torch.equal(given, expected)
    for one, same in zip(after.features, other.features, strict=True):
        assert torch.equal(one, same)
    return len(places & {feature.data_ptr() for feature in after.features}) / len(places)
