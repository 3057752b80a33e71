"""The decoder of the Wan 2.1 VAE as a GPU likes it: channels last, few passes over memory.

Activations are (B, T, H, W, C) in memory, what convolutions call channels-last: permuting costs nothing. What goes into
a convolution is a buffer with a border of zeros that the operation before it writes straight into; where it looks back
in time, the buffer's first two frames are the last two of the call before.

In the widest pictures a GPU takes two neighbouring pixels for one of twice the channels, since cuDNN's convolutions for
Hopper want multiples of 64: of the published 96 it does 246 TFLOP/s, of 192 608 (one H100). Operations: a third more.

The weights are those of diffusers' `AutoencoderKLWan`, whose own loop is the slow twin.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longsana.encoders.vae_files import Model
from longsana.ops import add_shortcut, norm_silu_into, spread_into

Layer: TypeAlias = Any  # one of diffusers' modules


def prepare(model: Model) -> None:
    """Lay the model's weights out for `decode`, once; in any other layout a GPU reorders them in every call."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in model.parameters():
        if parameter.dim() in layouts:
            parameter.data = parameter.data.contiguous(memory_format=layouts[parameter.dim()])
    if model.device.type == "cuda" and model.dtype in (torch.bfloat16, torch.float16):
        for layer in model.decoder.modules():
            cubic = isinstance(layer, nn.Conv3d) and layer.kernel_size == (3, 3, 3)
            if cubic and layer.in_channels % 64 == layer.out_channels % 64 == 32:
                pair(layer)


def pair(layer: nn.Conv3d) -> None:
    """Let a 3x3x3 convolution run on pairs of pixels where the width is even."""
    layer.register_buffer("paired", _paired(layer.weight), persistent=False)


def decode(model: Model, latents: Tensor, features: tuple[Tensor, ...] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Frames of the next latents of a video, and what the decoder remembers of all so far.

    Args:
        model: see `prepare`.
        latents: (B, C, T, h, w), not normalised, in the model's dtype. The first latent of a video comes alone.
        features: what the call before returned; None at the start of a video. Only read.

    Returns:
        Frames (B, 3, F, 8 h, 8 w), not clamped, with F = 1 for the first latent and 4 T for others. Features: the last
        two input frames of each causal convolution, (B, C, 2, H, W), in diffusers' order. Both in the model's dtype,
        channels-last.
    """
    assert features is not None or latents.shape[2] == 1, "the first latent comes alone"
    decoder, step = model.decoder, _Step(features)
    x = _linear(model.post_quant_conv, latents.permute(0, 2, 3, 4, 1))
    x = _conv3d(decoder.conv_in, step.padded(x, border=1))
    x = step.residual(decoder.mid_block.resnets[0], x)
    x = _attention(decoder.mid_block.attentions[0], x)
    x = step.residual(decoder.mid_block.resnets[1], x)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = step.residual(resnet, x)
        for upsampler in block.upsamplers or ():
            x = step.upsampled(upsampler, x)
    x = _conv3d(decoder.conv_out, step.normalised(decoder.norm_out, x))
    return x.permute(0, 4, 1, 2, 3), tuple(step.features)


class _Step:
    """One call: its causal convolutions take what they remember in turn, and leave what they will."""

    def __init__(self, features: tuple[Tensor, ...] | None) -> None:
        self.first = features is None
        self.features: list[Tensor] = []
        self._past = iter(features or ())

    def residual(self, block: Layer, x: Tensor) -> Tensor:
        late = _biases_come_late(x)
        h = _conv3d(block.conv1, self.normalised(block.norm1, x), bias=not late)
        h = self.normalised(block.norm2, h, block.conv1.bias if late else None)  # rebinding frees what went in
        h = _conv3d(block.conv2, h, bias=not late)
        shortcut = x if isinstance(block.conv_shortcut, nn.Identity) else _linear(block.conv_shortcut, x)
        return add_shortcut(h, shortcut, block.conv2.bias if late else None)

    def upsampled(self, layer: Layer, x: Tensor) -> Tensor:
        """Twice the height and width, and twice the frames where the layer says so; the first latent stays one."""
        copies = x[:, :, None]
        if layer.mode == "upsample3d" and self.first:
            # diffusers leaves the convolution out for the first latent, and forgets what it would have seen.
            self.features.append(x.new_zeros(x.shape[0], 2, *x.shape[2:]).permute(0, 4, 1, 2, 3))
        elif layer.mode == "upsample3d":
            pairs = _conv3d(layer.time_conv, self.padded(x, border=0))
            copies = pairs.unflatten(-1, (2, -1)).permute(0, 1, 4, 2, 3, 5)
        return _enlarged(layer.resample[1], copies)

    def padded(self, x: Tensor, border: int) -> Tensor:
        """What a causal convolution reads, without its own padding: (B, 2 + T, H + 2 border, W + 2 border, C)."""
        buffer, frames = self._buffer(x, border)
        spread_into(x, frames[:, 2:])
        self._remember(frames[:, -2:])
        return buffer

    def normalised(self, norm: Layer, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The same of SiLU(norm(x + bias)), with a border of 1."""
        buffer, frames = self._buffer(x, border=1)
        norm_silu_into(x, norm.gamma.flatten(), frames[:, 2:], bias)
        self._remember(frames[:, -2:])
        return buffer

    def _buffer(self, x: Tensor, border: int) -> tuple[Tensor, Tensor]:
        """A buffer to fill, and the part of it inside the border, where the two frames from before are already."""
        batch, count, height, width, channels = x.shape
        buffer = x.new_empty(batch, 2 + count, height + 2 * border, width + 2 * border, channels)
        if border:
            _clear_border(buffer)
        frames = buffer[:, :, border : border + height, border : border + width]
        if self.first:
            frames[:, :2].zero_()
        else:
            past = next(self._past).permute(0, 2, 3, 4, 1)
            # Memory of another layout may come from a checkpoint.
            spread_into(past if past.stride(4) == 1 else past.contiguous(), frames[:, :2])
        return buffer, frames

    def _remember(self, frames: Tensor) -> None:
        # Copied: a view would keep the whole buffer alive.
        own = frames.new_empty(frames.shape)
        spread_into(frames, own)
        self.features.append(own.permute(0, 4, 1, 2, 3))


def _attention(block: Layer, x: Tensor) -> Tensor:
    """Between the pixels of each frame, one head."""
    batch, count, height, width, channels = x.shape
    y = F.rms_norm(x, (channels,), block.norm.gamma.flatten(), eps=1e-24 / channels)  # diffusers': |x| >= 1e-12
    q, k, v = _linear(block.to_qkv, y).view(batch * count, 1, height * width, 3 * channels).chunk(3, dim=-1)
    return x + _linear(block.proj, F.scaled_dot_product_attention(q, k, v).reshape(x.shape))


def _enlarged(layer: Layer, x: Tensor) -> Tensor:
    """A 3x3 convolution over x (B, T, k, H, W, C) at twice its height and width: (B, T k, 2 H, 2 W, C')."""
    batch, count, copies, height, width, channels = x.shape
    buffer = x.new_empty(batch, count, copies, 2 * height + 2, 2 * width + 2, channels)
    _clear_border(buffer)
    spread_into(x.flatten(0, 1), buffer.flatten(0, 1)[:, :, 1:-1, 1:-1])
    y = F.conv2d(buffer.flatten(0, 2).permute(0, 3, 1, 2), layer.weight, layer.bias)
    return y.permute(0, 2, 3, 1).unflatten(0, (batch, count * copies))


def _clear_border(buffer: Tensor) -> None:
    """Zero the outermost pixels of (..., H, W, C)."""
    height, width = buffer.shape[-3:-1]
    buffer[..., :: height - 1, :, :].zero_()
    buffer[..., :: width - 1, :].zero_()


def _biases_come_late(x: Tensor) -> bool:
    """Whether what reads a convolution's result adds its bias: see ops/decoder.py. oneDNN adds it at no cost."""
    return x.is_cuda


def _conv3d(layer: Layer, x: Tensor, *, bias: bool = True) -> Tensor:
    added = layer.bias if bias else None
    if getattr(layer, "paired", None) is not None and x.shape[3] % 2 == 0:
        pairs = x.unflatten(3, (-1, 2)).flatten(4)
        y = F.conv3d(pairs.permute(0, 4, 1, 2, 3), layer.paired, None if added is None else added.repeat(2))
        return y.permute(0, 2, 3, 4, 1).unflatten(4, (2, -1)).flatten(3, 4)
    x = x.permute(0, 4, 1, 2, 3)
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.enabled:
        # conv3d takes oneDNN for a single video only where C T H is above 20480, and elsewhere up to 20 times as long.
        y = torch.mkldnn_convolution(x, layer.weight, added, (0, 0, 0), (1, 1, 1), (1, 1, 1), 1)
    else:
        y = F.conv3d(x, layer.weight, added)
    return y.permute(0, 2, 3, 4, 1)


def _paired(weight: Tensor) -> Tensor:
    """(2 O, 2 I, kt, kh, 2), which does to pairs of neighbouring pixels what weight (O, I, kt, kh, 3) does to pixels.

    A pair of outputs sees two pairs, four pixels, of which each output takes three.
    """
    out, channels, *kernel, _ = weight.shape
    paired = weight.new_zeros(2, out, 2, channels, *kernel, 2)
    for pixel in range(2):
        for tap in range(3):
            pair, side = divmod(pixel + tap, 2)
            paired[pixel, :, side, ..., pair] = weight[..., tap]
    return paired.flatten(2, 3).flatten(0, 1).contiguous(memory_format=torch.channels_last_3d)


def _linear(layer: Layer, x: Tensor) -> Tensor:
    """A convolution whose kernel is one pixel."""
    # Flat: with more dimensions the bias may become a pass of its own.
    return F.linear(x.flatten(0, -2), layer.weight.flatten(1), layer.bias).unflatten(0, x.shape[:-1])
