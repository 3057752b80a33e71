"""The decoder of the Wan 2.1 VAE as a GPU likes it: channels last, few passes over memory.

Where a convolution looks back in time, its buffer's first two frames are the last two of the call before; the border is
zero. The weights are those of diffusers' `AutoencoderKLWan`, whose own loop is the slow twin.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from longsana.encoders.convolution import Layer, Memory, Rows, biases_come_late, clear_border, conv3d, enlarged, linear
from longsana.encoders.vae_files import Model
from longsana.ops import add_shortcut, copy_into, norm_silu_into

WHOLE = 5
"""Convolutions before the pictures are divided into rows: attention, before which they are, sees all of a frame."""


def decode(
    model: Model,
    latents: Tensor,
    features: tuple[Tensor, ...] | None,
    *,
    rows: Rows | None = None,
    consumed: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Frames of the next latents of a video, and what the decoder remembers of all so far.

    Args:
        model: see `convolution.prepare`.
        latents: (B, C, T, h, w), not normalised, in the model's dtype. The first latent of a video comes alone.
        features: what the call before returned; None at the start of a video. Only read, unless `consumed`.
        rows: that this process decodes, after the first `WHOLE` convolutions; its features of others are of these rows.

    Returns:
        Frames (B, 3, F, 8 h, 8 w), not clamped, with F = 1 for the first latent and 4 T for others. Features: the last
        two input frames of each causal convolution, (B, C, 2, H, W), in diffusers' order. Both in the model's dtype,
        channels-last.
    """
    assert features is not None or latents.shape[2] == 1, "the first latent comes alone"
    decoder, step = model.decoder, _Step(features, consumed=consumed)
    x = linear(model.post_quant_conv, latents.permute(0, 2, 3, 4, 1))
    x = conv3d(decoder.conv_in, step.padded(x, border=1))
    x = step.residual(decoder.mid_block.resnets[0], x)
    x = _attention(decoder.mid_block.attentions[0], x)
    x = step.residual(decoder.mid_block.resnets[1], x)
    if rows is not None:
        x, step.rows = rows.own(x, 2).contiguous(), rows
    bias = None
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x, bias = step.residual(resnet, x, bias), None
        for upsampler in block.upsamplers or ():
            x, bias = step.upsampled(upsampler, x)
    assert bias is None, "no residual block adds it"
    x = conv3d(decoder.conv_out, step.normalised(decoder.norm_out, x))
    x = x if rows is None else rows.whole(x, 2)
    return x.permute(0, 4, 1, 2, 3), tuple(step.features)


class _Step(Memory):
    def residual(self, block: Layer, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """bias: of the convolution that made x, if it is still to be added."""
        late = biases_come_late(x)
        h = conv3d(block.conv1, self.normalised(block.norm1, x, bias), bias=not late)
        h = self.normalised(block.norm2, h, block.conv1.bias if late else None)  # rebinding frees what went in
        h = conv3d(block.conv2, h, bias=not late)
        own = block.conv2.bias if late else None
        if isinstance(block.conv_shortcut, nn.Identity):
            return add_shortcut(h, x, own if bias is None else bias + block.conv2.bias)
        return add_shortcut(h, linear(block.conv_shortcut, x, bias), own)

    def upsampled(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Twice the height and width, and twice the frames where the layer says so; the first latent stays one.

        And the bias, if it is still to be added.
        """
        pictures = x
        if layer.mode == "upsample3d" and self.first:
            # diffusers leaves the convolution out for the first latent, and forgets what it would have seen.
            self.features.append(x.new_zeros(x.shape[0], 2, *x.shape[2:]).permute(0, 4, 1, 2, 3))
        elif layer.mode == "upsample3d":
            pairs = conv3d(layer.time_conv, self.padded(x, border=0))
            halves = pairs.unflatten(-1, (2, -1)).permute(0, 1, 4, 2, 3, 5).flatten(0, 1)  # (B T, 2, H, W, C)
            pictures = x.new_empty(halves.shape)
            copy_into(halves, pictures)
        conv, late = layer.resample[1], biases_come_late(x)
        larger = enlarged if self.rows is None else self.rows.enlarged
        y = larger(conv, pictures.flatten(0, 1), bias=not late)
        return y.unflatten(0, (x.shape[0], -1)), conv.bias if late else None

    def padded(self, x: Tensor, border: int) -> Tensor:
        """The input of a causal convolution, without its own padding: (B, 2 + T, H + 2 border, W + 2 border, C)."""
        buffer, frames = self._buffer(x, border)
        copy_into(x, frames[:, 2:])
        self.remember(frames[:, -2:])
        return buffer

    def normalised(self, norm: Layer, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Convolve SiLU(norm(x + bias)), with a border of 1."""
        buffer, frames = self._buffer(x, border=1)
        norm_silu_into(x, norm.gamma.flatten(), frames[:, 2:], bias)
        self.remember(frames[:, -2:])
        if self.rows is not None:
            self.rows.beside(buffer)
        return buffer

    def _buffer(self, x: Tensor, border: int) -> tuple[Tensor, Tensor]:
        """A buffer to fill, and the part of it inside the border, where the two frames from before are already."""
        batch, count, height, width, channels = x.shape
        buffer = x.new_empty(batch, 2 + count, height + 2 * border, width + 2 * border, channels)
        if border:
            clear_border(buffer)
        frames = buffer[:, :, border : border + height, border : border + width]
        if self.first:
            frames[:, :2].zero_()
        else:
            copy_into(self.recall(), frames[:, :2])
        return buffer, frames


def _attention(block: Layer, x: Tensor) -> Tensor:
    """Between the pixels of each frame, one head."""
    batch, count, height, width, channels = x.shape
    y = F.rms_norm(x, (channels,), block.norm.gamma.flatten(), eps=1e-24 / channels)  # diffusers': |x| >= 1e-12
    q, k, v = linear(block.to_qkv, y).view(batch * count, 1, height * width, 3 * channels).chunk(3, dim=-1)
    return x + linear(block.proj, F.scaled_dot_product_attention(q, k, v).reshape(x.shape))
