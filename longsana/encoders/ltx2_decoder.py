"""The decoder of the LTX-2 video VAE call by call: latents in as they are sampled, frames out, in constant memory.

Its temporal convolutions look back only (`decoder_causal`), so what they remember, the last two frames of their input,
is all of the past. The weights and layers are those of diffusers' `AutoencoderKLLTX2Video`, whose `decode` of a whole
clip is the slow twin.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from longsana.encoders.vae_files import Model

Layer: TypeAlias = Any  # one of diffusers' modules


def decode(model: Model, latents: Tensor, features: tuple[Tensor, ...] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Frames of the next latents of a video, and what the decoder remembers of all so far.

    Args:
        model: causal, without timesteps or noise.
        latents: (B, C, T, h, w), not normalised, in the model's dtype; T >= 1.
        features: what the call before returned; None at the start of a video. Only read.

    Returns:
        Frames (B, 3, F, 32 h, 32 w), not clamped, with F = 8 T, or 8 T - 7 at the start. Features: the last two input
        frames of each convolution, (B, C, 2, H, W). Both in the model's dtype.
    """
    decoder, step = model.decoder, _Step(features)
    x = step.convolved(decoder.conv_in, latents)
    for resnet in decoder.mid_block.resnets:
        x = step.residual(resnet, x)
    for block in decoder.up_blocks:
        if block.conv_in is not None:
            x = step.residual(block.conv_in, x)
        for upsampler in block.upsamplers or ():
            x = step.upsampled(upsampler, x)
        for resnet in block.resnets:
            x = step.residual(resnet, x)
    x = step.convolved(decoder.conv_out, F.silu(decoder.norm_out(x), inplace=True))
    # A patch's columns come before its rows.
    frames = rearrange(
        x, "b (c pt pw ph) t h w -> b c (t pt) (h ph) (w pw)",
        pt=decoder.patch_size_t, ph=decoder.patch_size, pw=decoder.patch_size,
    )  # fmt: skip
    return frames, tuple(step.features)


class _Step:
    """One call: its convolutions take what they remember in turn, and leave what they will."""

    def __init__(self, features: tuple[Tensor, ...] | None) -> None:
        self.first = features is None
        self.features: list[Tensor] = []
        self._past = iter(features or ())

    def convolved(self, layer: Layer, x: Tensor) -> Tensor:
        """A 3x3x3 convolution; before a video's first frame it sees that frame twice more."""
        past = x[:, :, :1].expand(-1, -1, 2, -1, -1) if self.first else next(self._past)
        x = torch.cat([past, x], dim=2)
        self.features.append(x[:, :, -2:].clone())  # a slice would keep all of x alive
        y: Tensor = layer.conv(x)
        return y

    def residual(self, block: Layer, x: Tensor) -> Tensor:
        h = self.convolved(block.conv1, F.silu(block.norm1(x), inplace=True))
        h = self.convolved(block.conv2, F.silu(block.norm2(h), inplace=True))
        if block.conv_shortcut is not None:
            x = block.conv_shortcut(block.norm3(x.movedim(1, -1)).movedim(-1, 1))
        return h.add_(x)

    def upsampled(self, layer: Layer, x: Tensor) -> Tensor:
        """More frames, rows and columns from channels; the video's first frame stays one."""
        h = self._spread(self.convolved(layer.conv, x), layer.stride)
        if layer.residual:
            x = self._spread(x, layer.stride)
            h = h.unflatten(1, (-1, x.shape[1])).add_(x[:, None]).flatten(1, 2)
        return h

    def _spread(self, x: Tensor, stride: tuple[int, int, int]) -> Tensor:
        frames, rows, columns = stride
        x = rearrange(
            x, "b (c pt ph pw) t h w -> b c (t pt) (h ph) (w pw)", pt=frames, ph=rows, pw=columns
        )  # fmt: skip
        return x[:, :, frames - 1 :] if self.first else x
