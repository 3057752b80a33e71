"""The decoder of a tiny network as a GPU likes it: channels last, nothing joined, few passes over memory.

Activations are (B, T, H, W, C) in memory. A memory block's input lies in a buffer behind the frame that was before it,
so that its first convolution, of a frame and of the one before, is one product over two frames of the buffer.
Enlarging, `Grow` and the convolution after them have nothing but sums in them, and are one transposed convolution. What
a convolution makes goes through one pass more: bias, shortcut and ReLU, into the next one's buffer. The slow twin is
`TinyNetwork.decode`. There is no choice that depends on a value, so a call can be recorded as a CUDA graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from longsana.encoders.convolution import Layer, Memory, enlarged, enlarging
from longsana.encoders.tiny_layouts import BLOCKS
from longsana.encoders.tiny_network import Grow, MemoryBlock, TinyNetwork
from longsana.ops import copy_into, relu_into
from longsana.ops.reference import accumulation_dtype


def prepare(network: TinyNetwork) -> None:
    """Lay the decoder's weights out for `decode`, beside the network's own. Again after these have changed."""
    layers = list(network.decoder)
    for layer in layers:
        for weight in layer.parameters():
            if weight.dim() == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    for index, layer in enumerate(layers):
        if isinstance(layer, MemoryBlock):
            here, past = layer.conv[0].weight.detach().chunk(2, dim=1)  # type: ignore[operator]
            joint = torch.stack([past, here], dim=2).contiguous(memory_format=torch.channels_last_3d)
            layer.register_buffer("joint", joint, persistent=False)
        elif isinstance(layer, Grow):
            layer.register_buffer("enlarging", enlarging(_composed(layer, layers[index + 1])), persistent=False)
    last: Layer = layers[-1]
    # Pictures in [-1, 1] straight away: in 16 bits they are twice as fine as those in [0, 1].
    network.register_buffer("last_weight", 2 * last.weight.detach(), persistent=False)
    wide = last.bias.detach().to(accumulation_dtype(network.dtype))
    network.register_buffer("last_bias", 2 * wide - 1, persistent=False)


def decode(
    network: TinyNetwork, latents: Tensor, features: tuple[Tensor, ...] | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Frames of the next latents of a video, and what the decoder remembers of all so far.

    Args:
        network: see `prepare`.
        latents: (B, C, T, h, w), as the network takes them, in its dtype; T >= 1.
        features: what the call before returned; None at the start of a video. Only read.

    Returns:
        Frames (B, 3, F, H, W), float32 (float64 of a network in float64), in [-1, 1] but not clamped, channels-last:
        F is T times the time stride, at the start without all but one frame of the first latent. Features: the last
        input frame of each memory block, (B, C, 1, H, W), channels-last, in the network's dtype.
    """
    layers: list[Layer] = list(network.decoder)
    step, batch = _Step(features), latents.shape[0]
    x = layers[0](latents).permute(0, 2, 3, 4, 1).contiguous()
    x = _convolved(layers[1].weight, x)
    buffer = step.buffer(x, x.shape)
    relu_into(x, buffer[:, 1:], layers[1].bias)
    for level, frames in enumerate(network.kind.grows):
        place, last = 3 + (BLOCKS + 3) * level, level == len(network.kind.grows) - 1
        x = step.blocks(layers[place : place + BLOCKS], buffer)
        # Of each latent a picture whose channels are those of several frames.
        y = enlarged(layers[place + BLOCKS + 1], x.flatten(0, 1), bias=False)
        y = y.unflatten(0, (batch, -1)).unflatten(-1, (frames, -1)).permute(0, 1, 4, 2, 3, 5)
        shape = torch.Size((batch, y.shape[1] * frames, *y.shape[3:]))
        buffer = x.new_empty(shape) if last else step.buffer(x, shape)
        for own, room in zip(y, buffer if last else buffer[:, 1:], strict=True):
            (relu_into if last else copy_into)(own, room.unflatten(0, (-1, frames)))
    y = _convolved(network.last_weight, buffer)
    y = y.to(accumulation_dtype(y.dtype)) + network.last_bias
    patch = network.kind.patch
    pixels = rearrange(y, "b t h w (c p q) -> b c t (h p) (w q)", p=patch, q=patch)
    first = network.kind.stride - 1 if features is None else 0
    return pixels[:, :, first:], tuple(step.features)


class _Step(Memory):
    """One pass of `decode`."""

    def buffer(self, like: Tensor, shape: torch.Size) -> Tensor:
        """Make room for a memory block's input (B, T, H, W, C) behind the frame before it, which is there already."""
        batch, count, *size = shape
        buffer = like.new_empty(batch, 1 + count, *size)
        if self.first:
            buffer[:, :1].zero_()
        else:
            copy_into(self.recall(), buffer[:, :1])
        return buffer

    def blocks(self, blocks: list[Layer], buffer: Tensor) -> Tensor:
        """Memory blocks one after another, of a buffer with the first one's input; (B, T, H, W, C)."""
        for number, block in enumerate(blocks, 1):
            self.remember(buffer[:, -1:])
            x, layers = buffer[:, 1:], block.conv
            h = _joined(block.joint, buffer)
            relu_into(h, h, layers[0].bias)
            h = _convolved(layers[2].weight, h)
            relu_into(h, h, layers[2].bias)
            h = _convolved(layers[4].weight, h)
            after = h.new_empty(h.shape) if number == len(blocks) else self.buffer(h, h.shape)
            relu_into(h, after if number == len(blocks) else after[:, 1:], layers[4].bias, x)
            buffer = after
        return buffer


def _joined(weight: Tensor, buffer: Tensor) -> Tensor:
    """Convolve each frame and the one before it: (B, 1 + T, H, W, C) to (B, T, H, W, C)."""
    x, padding, ones = buffer.permute(0, 4, 1, 2, 3), (0, 1, 1), (1, 1, 1)
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.enabled:
        y = torch.mkldnn_convolution(x, weight, None, padding, ones, ones, 1)  # see convolution.conv3d
    else:
        y = F.conv3d(x, weight, padding=padding)
    return y.permute(0, 2, 3, 4, 1)


def _convolved(weight: Tensor, x: Tensor) -> Tensor:
    """Convolve each frame of (B, T, H, W, C) by a kernel of 3x3, without its bias."""
    y = F.conv2d(x.flatten(0, 1).permute(0, 3, 1, 2), weight, padding=1)
    return y.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


def _composed(grow: Grow, layer: Layer) -> Tensor:
    """The weight (frames O, I, 3, 3) of `grow` and then a convolution (O, C, 3, 3) of each of its frames."""
    dtype = layer.weight.dtype
    wide = layer.weight.detach().to(accumulation_dtype(dtype))
    products = grow.conv.weight.detach().to(wide.dtype)[..., 0, 0].unflatten(0, (grow.frames, -1))
    return torch.einsum("ocyx,fci->foiyx", wide, products).flatten(0, 1).to(dtype)
