"""The Wan decoder's norm and activation as one pass over memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 4096  # of a program's block: 32 for each thread of four warps


@triton.jit(do_not_specialize=["pixels", "frames", "height", "width"])  # one binary for clips of any size
def _norm_silu(
    x: tl.tensor,
    gamma: tl.tensor,
    out: tl.tensor,
    pixels: tl.tensor,
    frames: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    stride_batch: tl.tensor,
    stride_frame: tl.tensor,
    stride_row: tl.tensor,
    stride_pixel: tl.tensor,
    root: tl.tensor,
    channels: tl.constexpr,
    block_pixels: tl.constexpr,
    block_channels: tl.constexpr,
) -> None:
    pixel = tl.program_id(0) * block_pixels + tl.arange(0, block_pixels)
    channel = tl.arange(0, block_channels)
    inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]

    # A buffer of several videos has more than 2**31 elements.
    source = pixel.to(tl.int64)[:, None] * channels + channel[None, :]
    row = pixel // width
    frame = row // height
    target = (
        (frame // frames).to(tl.int64) * stride_batch
        + (frame % frames).to(tl.int64) * stride_frame
        + (row % height).to(tl.int64) * stride_row
        + (pixel % width).to(tl.int64) * stride_pixel
    )[:, None] + channel[None, :]

    values = tl.load(x + source, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(gamma + channel, mask=channel < channels, other=0.0).to(tl.float32) * root
    length = tl.maximum(tl.sqrt(tl.sum(values * values, axis=1)), 1e-12)
    y = values / length[:, None] * gain[None, :]
    tl.store(out + target, (y * tl.sigmoid(y)).to(out.dtype.element_ty), mask=inside)


def norm_silu_into(x: Tensor, gamma: Tensor, out: Tensor) -> None:
    batch, frames, height, width, channels = x.shape
    assert x.is_contiguous() and gamma.is_contiguous(), "channels last, without gaps"
    assert out.shape == x.shape and out.stride(4) == 1, (out.shape, out.stride())
    pixels = batch * frames * height * width
    block_channels = triton.next_power_of_2(channels)
    block_pixels = max(ELEMENTS // block_channels, 1)
    _norm_silu[(triton.cdiv(pixels, block_pixels),)](
        x,
        gamma,
        out,
        pixels,
        frames,
        height,
        width,
        *out.stride()[:4],
        channels**0.5,
        channels=channels,
        block_pixels=block_pixels,
        block_channels=block_channels,
    )
