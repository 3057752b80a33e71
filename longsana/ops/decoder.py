"""Operations between a decoder's convolutions, each as one pass over memory.

cuDNN adds a bias in a pass of its own, so what reads a convolution's result adds it here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from longsana.ops.activation import silu

ELEMENTS = 4096  # of a program's block: 32 for each thread of four warps


@triton.jit
def _own(pixels, channels: tl.constexpr, block_pixels: tl.constexpr, block_channels: tl.constexpr):
    """This program's pixels and channels, and which of their numbers there are."""
    pixel = tl.program_id(0) * block_pixels + tl.arange(0, block_pixels)
    channel = tl.arange(0, block_channels)
    return pixel, channel, (pixel < pixels)[:, None] & (channel < channels)[None, :]


@triton.jit
def _place(pixel, frames, height, width, stride_batch, stride_frame, stride_row, stride_pixel):
    """Locate pixel number `pixel` of (batch, frame, row, column). A buffer may have more than 2**31 elements."""
    row = pixel // width
    frame = row // height
    return (
        (frame // frames).to(tl.int64) * stride_batch
        + (frame % frames).to(tl.int64) * stride_frame
        + (row % height).to(tl.int64) * stride_row
        + (pixel % width).to(tl.int64) * stride_pixel
    )


@triton.jit(do_not_specialize=["pixels", "frames", "height", "width"])  # one binary for clips of any size
def _norm_silu(
    x,
    gamma,
    bias,
    out,
    pixels,
    frames,
    height,
    width,
    stride_batch,
    stride_frame,
    stride_row,
    stride_pixel,
    root,
    least,
    channels: tl.constexpr,
    block_pixels: tl.constexpr,
    block_channels: tl.constexpr,
):
    pixel, channel, inside = _own(pixels, channels, block_pixels, block_channels)

    source = pixel.to(tl.int64)[:, None] * channels + channel[None, :]
    target = _place(pixel, frames, height, width, stride_batch, stride_frame, stride_row, stride_pixel)
    target = target[:, None] + channel[None, :]

    values = tl.load(x + source, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        values += tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    length = tl.maximum(tl.sqrt(tl.sum(values * values, axis=1) + least), 1e-12)
    y = values * (1 / length)[:, None]
    if gamma is None:
        y *= root
    else:
        y *= tl.load(gamma + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :] * root
    tl.store(out + target, silu(y, x.dtype.element_ty != tl.bfloat16).to(out.dtype.element_ty), mask=inside)


def norm_silu_into(x: Tensor, gamma: Tensor | None, out: Tensor, bias: Tensor | None = None, eps: float = 0.0) -> None:
    """Fuse `reference.norm_silu_into`: x (B, T, H, W, C) to out, a view of this shape with any strides but of C."""
    batch, frames, height, width, channels = x.shape
    assert x.is_contiguous() and (gamma is None or gamma.is_contiguous()), "channels last, without gaps"
    assert out.shape == x.shape and out.stride(4) == 1, (out.shape, out.stride())
    pixels = batch * frames * height * width
    sizes = _block(channels)
    _norm_silu[(triton.cdiv(pixels, sizes["block_pixels"]),)](
        x,
        gamma,
        bias,
        out,
        pixels,
        frames,
        height,
        width,
        *out.stride()[:4],
        channels**0.5,
        channels * eps,
        channels=channels,
        **sizes,
    )


@triton.jit(do_not_specialize=["pixels"])
def _add_shortcut(
    x, shortcut, bias, pixels, channels: tl.constexpr, block_pixels: tl.constexpr, block_channels: tl.constexpr
):
    pixel, channel, inside = _own(pixels, channels, block_pixels, block_channels)
    at = pixel.to(tl.int64)[:, None] * channels + channel[None, :]
    total = tl.load(x + at, inside, 0.0).to(tl.float32) + tl.load(shortcut + at, inside, 0.0).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + channel, channel < channels, 0.0).to(tl.float32)[None, :]
    tl.store(x + at, total.to(x.dtype.element_ty), inside)


def add_shortcut(x: Tensor, shortcut: Tensor, bias: Tensor | None = None) -> Tensor:
    """Fuse `reference.add_shortcut`: x, shortcut (..., C), bias (C,); the sum is x's memory."""
    assert x.is_contiguous() and shortcut.is_contiguous() and x.shape == shortcut.shape, "channels last, without gaps"
    channels = x.shape[-1]
    pixels, sizes = x.numel() // channels, _block(channels)
    _add_shortcut[(triton.cdiv(pixels, sizes["block_pixels"]),)](x, shortcut, bias, pixels, channels, **sizes)
    return x


@triton.jit(do_not_specialize=["pixels", "frames", "height", "width"])
def _copy(
    x,
    out,
    pixels,
    frames,
    height,
    width,
    x_batch,
    x_frame,
    x_row,
    x_pixel,
    out_batch,
    out_frame,
    out_row,
    out_pixel,
    channels: tl.constexpr,
    block_pixels: tl.constexpr,
    block_channels: tl.constexpr,
):
    pixel, channel, inside = _own(pixels, channels, block_pixels, block_channels)
    source = _place(pixel, frames, height, width, x_batch, x_frame, x_row, x_pixel)
    target = _place(pixel, frames, height, width, out_batch, out_frame, out_row, out_pixel)
    values = tl.load(x + source[:, None] + channel[None, :], mask=inside)
    tl.store(out + target[:, None] + channel[None, :], values, mask=inside)


def copy_into(x: Tensor, out: Tensor) -> None:
    """Fuse `reference.copy_into`: x (B, T, H, W, C) to out, views with any strides but of C."""
    _over(_copy, (x, out), x, out)


@triton.jit(do_not_specialize=["pixels", "frames", "height", "width"])
def _relu(
    x,
    out,
    bias,
    shortcut,
    pixels,
    frames,
    height,
    width,
    x_batch,
    x_frame,
    x_row,
    x_pixel,
    out_batch,
    out_frame,
    out_row,
    out_pixel,
    add_batch,
    add_frame,
    add_row,
    add_pixel,
    channels: tl.constexpr,
    block_pixels: tl.constexpr,
    block_channels: tl.constexpr,
):
    pixel, channel, inside = _own(pixels, channels, block_pixels, block_channels)
    source = _place(pixel, frames, height, width, x_batch, x_frame, x_row, x_pixel)
    total = tl.load(x + source[:, None] + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    if shortcut is not None:
        added = _place(pixel, frames, height, width, add_batch, add_frame, add_row, add_pixel)
        total += tl.load(shortcut + added[:, None] + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    # Not the larger of it and 0, which may lose a NaN.
    total = tl.where(total < 0, 0.0, total)
    target = _place(pixel, frames, height, width, out_batch, out_frame, out_row, out_pixel)
    tl.store(out + target[:, None] + channel[None, :], total.to(out.dtype.element_ty), mask=inside)


def relu_into(x: Tensor, out: Tensor, bias: Tensor | None = None, shortcut: Tensor | None = None) -> None:
    """Fuse `reference.relu_into`: x, out, shortcut (A, B, H, W, C), views with any strides but of C; bias (C,)."""
    _over(_relu, (x, out, out if shortcut is None else shortcut), x, out, bias, shortcut)


def _over(kernel: Any, views: Sequence[Tensor], *given: Tensor | None) -> None:
    """Run a kernel over all pixels of views (A, B, H, W, C) of one shape, whose strides it takes one after another.

    given: its arguments before the number of pixels.
    """
    batch, frames, height, width, channels = views[0].shape
    assert all(view.shape == views[0].shape for view in views), [view.shape for view in views]
    assert all(view.stride(4) == 1 for view in views), "channels are neighbours"
    pixels = batch * frames * height * width
    sizes = _block(channels)
    strides = [stride for view in views for stride in view.stride()[:4]]
    grid = (triton.cdiv(pixels, sizes["block_pixels"]),)
    kernel[grid](*given, pixels, frames, height, width, *strides, channels=channels, **sizes)


def _block(channels: int) -> dict[str, int]:
    """Pixels and channels of a program: all channels of some pixels."""
    block_channels = triton.next_power_of_2(channels)
    return {"block_pixels": max(ELEMENTS // block_channels, 1), "block_channels": block_channels}
