"""Parts that the decoders share: channels-last convolutions over buffers, and their memory from call to call.

Activations are (B, T, H, W, C) in memory, what convolutions call channels-last: permuting costs nothing. What goes into
a convolution is a buffer with a border that the operation before it writes straight into.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longsana.encoders.vae_files import Model
from longsana.ops import copy_into
from longsana.ops.reference import accumulation_dtype
from longsana.runtime.peers import Peers

Layer: TypeAlias = Any  # one of diffusers' modules


def prepare(model: Model) -> None:
    """Lay the model's weights out for its decoder, once; in any other layout a GPU reorders them in every call.

    In the widest pictures a GPU takes two neighbouring pixels for one of twice the channels where an odd multiple of 32
    goes in, and what comes out fills no more than half of its last 64: cuDNN's convolutions for Hopper want multiples
    of 64. Of 96, as in Wan, it does 246 TFLOP/s, of 192 608 (one H100). Operations: a third more. The last convolution,
    to 3 channels, takes 1.75 ms for 2.45.
    """
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in model.parameters():
        if parameter.dim() in layouts:
            parameter.data = parameter.data.contiguous(memory_format=layouts[parameter.dim()])
    if model.device.type == "cuda" and model.dtype in (torch.bfloat16, torch.float16):
        for layer in model.decoder.modules():
            cubic = isinstance(layer, nn.Conv3d) and layer.kernel_size == (3, 3, 3)
            if cubic and layer.in_channels % 64 == 32 and 0 < layer.out_channels % 64 <= 32:
                pair(layer)
    for layer in model.decoder.modules():
        if getattr(layer, "mode", None) in ("upsample2d", "upsample3d"):
            enlarge(layer.resample[1])


def pair(layer: nn.Conv3d) -> None:
    """Let a 3x3x3 convolution run on pairs of pixels where the width is even."""
    layer.register_buffer("paired", _paired(layer.weight), persistent=False)


def enlarge(layer: nn.Conv2d) -> None:
    """Let a 3x3 convolution of a picture that is enlarged before, each pixel to 2x2, run on the picture as it is."""
    layer.register_buffer("enlarging", enlarging(layer.weight), persistent=False)


def enlarging(weight: Tensor) -> Tensor:
    """(I, O, 4, 4), which does to a picture what weight (O, I, 3, 3) does to the enlarged one, each pixel 2x2.

    An output sees 2x2 pixels, some of them through several taps, whose sum is one tap of a transposed convolution with
    stride 2: 16 products a pixel for 36, and the enlarged picture is never made.
    """
    wide = weight.detach().to(accumulation_dtype(weight.dtype)).transpose(0, 1)
    for side in (2, 3):
        first, middle, last = wide.unbind(side)
        wide = torch.stack([last, middle + last, first + middle, first], side)
    return wide.to(weight.dtype, memory_format=torch.channels_last)


class Rows(NamedTuple):
    """The rows of pictures that this process decodes, while its peers decode the others.

    height: latent rows of a whole picture.
    """

    peers: Peers
    height: int

    @classmethod
    def of(cls, peers: Peers, height: int) -> Rows | None:
        """Divide pictures of so many latent rows, two for each process at least; None where there are fewer."""
        return cls(peers, height) if 1 < peers.size <= height // 2 else None

    def own(self, x: Tensor, dim: int) -> Tensor:
        """This process's rows of whole pictures x, of any shape with rows along `dim`."""
        share, each = self.peers.share(self.height), x.shape[dim] // self.height
        return x.narrow(dim, each * share.start, each * len(share))

    def whole(self, x: Tensor, dim: int) -> Tensor:
        """Whole pictures of all processes' rows x, of any shape with rows along `dim`."""
        return self.peers.whole(x, dim, self.height)

    def beside(self, buffer: Tensor) -> None:
        """Fill the rows of the border of (B, T, H, W, C) that are other processes'; others stay as they are."""
        self.peers.exchange_rows(buffer, 2)

    def enlarged(self, layer: Layer, x: Tensor, *, bias: bool = True) -> Tensor:
        """Enlarge rows (N, H, W, C) to (N, 2 H, 2 W, C'), whose edges depend on the neighbours' too; see `enlarge`."""
        buffer = x.new_zeros(x.shape[0], x.shape[1] + 2, *x.shape[2:])
        buffer[:, 1:-1] = x
        self.peers.exchange_rows(buffer, 1)
        return enlarged(layer, buffer, beside=1, bias=bias)


class Memory:
    """One call of a decoder: its convolutions take what they remember in turn, and leave what they will.

    rows: of the pictures at hand, where other processes have the others.
    consumed: nobody looks at `features` again; what is left lies where what was taken did.
    """

    def __init__(
        self, features: tuple[Tensor, ...] | None, rows: Rows | None = None, *, consumed: bool = False
    ) -> None:
        self.first, self.rows = features is None, rows
        self.features: list[Tensor] = []
        self._past = iter(features or ())
        self._consumed = consumed
        self._taken: Tensor | None = None

    def recall(self) -> Tensor:
        """(B, T, H, W, C), what the same convolution left in the call before."""
        past = next(self._past).permute(0, 2, 3, 4, 1)
        self._taken = past if self._consumed and past.is_contiguous() else None
        return past if past.stride(4) == 1 else past.contiguous()  # another layout may come from a checkpoint

    def remember(self, frames: Tensor) -> None:
        """Keep frames (B, 2, H, W, C) for the next call, as features (B, C, 2, H, W)."""
        # Copied: a view would keep the whole buffer alive.
        taken, self._taken = self._taken, None
        own = frames.new_empty(frames.shape) if taken is None or taken.shape != frames.shape else taken
        if own.numel():
            copy_into(frames, own)
        self.features.append(own.permute(0, 4, 1, 2, 3))


def clear_border(buffer: Tensor) -> None:
    """Zero the outermost pixels of (..., H, W, C)."""
    height, width = buffer.shape[-3:-1]
    buffer[..., :: height - 1, :, :].zero_()
    buffer[..., :: width - 1, :].zero_()


def mirror_border(buffer: Tensor) -> None:
    """Make the outermost pixels of (..., H, W, C) those on the other side of their neighbours (`reflect`)."""
    assert min(buffer.shape[-3:-1]) > 3, "a single row or column has no other side"
    for border, inside in ((0, 2), (-1, -3)):
        buffer[..., border, 1:-1, :] = buffer[..., inside, 1:-1, :]
    for border, inside in ((0, 2), (-1, -3)):
        buffer[..., border, :] = buffer[..., inside, :]


def biases_come_late(x: Tensor) -> bool:
    """Tell whether what reads a convolution's result adds its bias: see ops/decoder.py. oneDNN adds it at no cost.

    x: (B, T, H, W, C).
    """
    return x.is_cuda


def conv3d(layer: Layer, x: Tensor, *, bias: bool = True) -> Tensor:
    """Convolve x (B, T, H, W, C), with its padding, to (B, T', H', W', C'). bias: False leaves the layer's out."""
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


def enlarged(layer: Layer, x: Tensor, *, beside: int = 0, bias: bool = True) -> Tensor:
    """Enlarge pictures (N, H, W, C) to (N, 2 H, 2 W, C'); see `enlarge`.

    beside: rows at the top and as many at the bottom that are only looked at, of neighbours, or 0 beyond the border.
    """
    added = layer.bias if bias else None
    with _same_each_time():
        y = F.conv_transpose2d(x.permute(0, 3, 1, 2), layer.enlarging, added, stride=2, padding=(1 + 2 * beside, 1))
    return y.permute(0, 2, 3, 1)


@contextmanager
def _same_each_time() -> Iterator[None]:
    """cuDNN's transposed convolutions of float32 may add in any order, and frames would depend on the run."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


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


def linear(layer: Layer, x: Tensor, before: Tensor | None = None) -> Tensor:
    """A convolution whose kernel is one pixel, of x + before, which is (C,)."""
    weight, bias = layer.weight.flatten(1), layer.bias
    if before is not None:
        bias = F.linear(before, weight, bias)
    # Flat: with more dimensions the bias may become a pass of its own.
    return F.linear(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])
