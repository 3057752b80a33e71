"""The decoder of the LTX-2 video VAE call by call: latents in as they are sampled, frames out, in constant memory.

A convolution over time remembers the last two frames of its input. If the decoder is causal that is all of the past. If
not, each convolution waits for one frame of the future, and its frames come one later: no window is decoded twice, and
the frames are still those of the whole clip, which `ahead` latents must follow. What has waited at a video's end comes
at once, in the one call whose memory is larger, whatever the video's length. The weights are those of diffusers'
`AutoencoderKLLTX2Video`, whose `decode` of a whole clip is the slow twin.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from einops import rearrange
from torch import Tensor

from longsana.encoders.convolution import (
    Layer,
    Memory,
    Rows,
    biases_come_late,
    clear_border,
    conv3d,
    linear,
    mirror_border,
)
from longsana.encoders.vae_files import Model
from longsana.ops import add_shortcut, copy_into, norm_silu_into


def ahead(model: Model) -> int:
    """Latents that must follow one until its frames are settled: how far the decoder looks into the future."""
    if model.config.decoder_causal:
        return 0
    decoder, frames, rate = model.decoder, 1, 1  # of conv_in
    frames += 2 * len(decoder.mid_block.resnets)
    for block in decoder.up_blocks:
        frames += 2 * (block.conv_in is not None)
        for upsampler in block.upsamplers or ():
            frames, rate = (frames + 1) * upsampler.stride[0], rate * upsampler.stride[0]
        frames += 2 * len(block.resnets)
    return math.ceil((frames + 1) / rate)


def encoder_reach(model: Model) -> int:
    """Latents before one that it depends on: how far the causal encoder looks into the past."""
    encoder, frames, rate = model.encoder, 2, 1  # of conv_in
    for block in encoder.down_blocks:
        frames += 4 * rate * len(block.resnets)
        for downsampler in block.downsamplers or ():
            stride = getattr(downsampler, "stride", None) or downsampler.conv.stride
            frames += 2 * rate
            rate *= stride[0]
    frames += 4 * rate * len(encoder.mid_block.resnets) + 2 * rate  # and of conv_out
    return math.ceil(frames / rate) + 1


def decode(
    model: Model,
    latents: Tensor,
    features: tuple[Tensor, ...] | None,
    *,
    seen: int = 0,
    last: bool = False,
    rows: Rows | None = None,
    consumed: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Frames of the next latents of a video, and what the decoder remembers of all so far.

    Args:
        model: without timesteps or noise; see `convolution.prepare`.
        latents: (B, C, T, h, w), not normalised, in the model's dtype; T >= 1.
        features: what the call before returned; None at the start of a video. Only read, unless `consumed`.
        seen: latents of the video in earlier calls.
        last: whether the video ends here. Else a decoder that looks into the future keeps back what later latents may
            change, and gives it with them; nothing follows a last call.
        rows: that this process decodes, and of which its features are; of a causal decoder alone.

    Returns:
        Frames (B, 3, F, 32 h, 32 w), not clamped; of a causal decoder F = 8 T, or 8 T - 7 at the start. Features: the
        last two input frames of each convolution, (B, C, 2, H, W), and, if it is not causal, the frames that wait
        beside it. Both in the model's dtype, channels-last.
    """
    decoder = model.decoder
    step = _Step(features, rows, seen=seen, ahead=int(not model.config.decoder_causal), last=last, consumed=consumed)
    assert rows is None or not step.ahead
    latents = latents if rows is None else rows.own(latents, 3)
    x = step.convolved(decoder.conv_in, latents.permute(0, 2, 3, 4, 1).contiguous())
    for resnet in decoder.mid_block.resnets:
        x = step.residual(resnet, x)
    for block in decoder.up_blocks:
        if block.conv_in is not None:
            x = step.residual(block.conv_in, x)
        for upsampler in block.upsamplers or ():
            x = step.upsampled(upsampler, x)
        for resnet in block.resnets:
            x = step.residual(resnet, x)
    x = step.activated(decoder.norm_out, decoder.conv_out, x)
    # A patch's columns come before its rows.
    frames = rearrange(
        x, "b t h w (c pt pw ph) -> b (t pt) (h ph) (w pw) c",
        pt=decoder.patch_size_t, ph=decoder.patch_size, pw=decoder.patch_size,
    )  # fmt: skip
    frames = frames if rows is None else rows.whole(frames, 2)
    return frames.permute(0, 4, 1, 2, 3), tuple(step.features)


class _Step(Memory):
    """One pass of `decode`. seen: frames that the layer at hand was given in earlier calls; ahead: 1 if not causal."""

    def __init__(
        self,
        features: tuple[Tensor, ...] | None,
        rows: Rows | None,
        *,
        seen: int,
        ahead: int,
        last: bool,
        consumed: bool,
    ) -> None:
        super().__init__(features, rows, consumed=consumed)
        self.seen, self.ahead, self.last = seen, ahead, last

    def convolved(self, layer: Layer, x: Tensor) -> Tensor:
        """A 3x3x3 convolution."""
        return self._convolved(layer.conv, x, partial(copy_into, x))

    def activated(
        self, norm: Layer, layer: Layer, x: Tensor, before: Tensor | None = None, *, bias: bool = True
    ) -> Tensor:
        """The convolution of SiLU(norm(x + before)). bias: whether its own is added."""
        return self._convolved(layer.conv, x, lambda out: norm_silu_into(x, None, out, before, norm.eps), bias=bias)

    def residual(self, block: Layer, x: Tensor) -> Tensor:
        late = biases_come_late(x)
        h = self.activated(block.norm1, block.conv1, x, bias=not late)
        h = self.activated(block.norm2, block.conv2, h, block.conv1.conv.bias if late else None, bias=not late)
        x = self._beside(h, x)
        if block.conv_shortcut is not None:
            x = linear(block.conv_shortcut, block.norm3(x))
        return add_shortcut(h, x, block.conv2.conv.bias if late else None) if h.numel() else h

    def upsampled(self, layer: Layer, x: Tensor) -> Tensor:
        """More frames, rows and columns from channels; the video's first frame stays one."""
        frames = layer.stride[0]
        h = self.convolved(layer.conv, x)
        x = self._beside(h, x)
        h = _spread(h, layer.stride)
        if layer.residual:
            x = _spread(x, layer.stride)
            h.unflatten(-1, (-1, x.shape[-1])).add_(x[..., None, :])
        if not self.seen:
            return h[:, frames - 1 :].contiguous()
        self.seen = self.seen * frames - (frames - 1)
        return h

    def _convolved(self, layer: Layer, x: Tensor, write: Callable[[Tensor], None], *, bias: bool = True) -> Tensor:
        """write: puts what is convolved, of x's shape, into a view."""
        batch, count, height, width, channels = x.shape
        past = x[:, :0] if self.first else self.recall()
        # Beyond the ends of a video are copies of its first and last frame.
        before = past.shape[1] or (2 - self.ahead) * bool(count)
        after = self.ahead * self.last
        buffer = x.new_empty(batch, before + count + after, height + 2, width + 2, channels)
        frames = buffer[:, :, 1:-1, 1:-1]
        if count:
            write(frames[:, before : before + count])
        if past.shape[1]:
            copy_into(past, frames[:, :before])
        else:
            frames[:, :before] = frames[:, before : before + 1]
        self.remember(frames[:, : before + count][:, -2:])
        if after:
            frames[:, -1] = frames[:, -2]
        self.seen = max(self.seen - self.ahead, 0)
        if buffer.shape[1] < 3:
            return x.new_empty(batch, 0, height, width, layer.out_channels)
        (mirror_border if layer.padding_mode == "reflect" else clear_border)(buffer)
        if self.rows is not None:
            self.rows.beside(buffer)
        return conv3d(layer, buffer, bias=bias)

    def _beside(self, h: Tensor, x: Tensor) -> Tensor:
        """Take the frames of x that h has been computed of; the others wait."""
        if not self.ahead:
            return x
        waiting = x if self.first else torch.cat([self.recall(), x], dim=1)
        self.remember(waiting[:, h.shape[1] :])
        return waiting[:, : h.shape[1]].contiguous()


def _spread(x: Tensor, stride: tuple[int, int, int]) -> Tensor:
    frames, rows, columns = stride
    return rearrange(
        x, "b t h w (c pt ph pw) -> b (t pt) (h ph) (w pw) c", pt=frames, ph=rows, pw=columns
    )  # fmt: skip
