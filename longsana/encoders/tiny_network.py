"""Tiny encoders and decoders of video latents as they are defined, in plain PyTorch: the slow twin of `tiny_decoder`.

Every convolution sees one picture. Time is in three layers alone: a memory block also sees what went into it one frame
earlier, `Pool` folds frames into one, and `Grow` makes several of one. So nine frames of features are all that a stream
of any length needs of its past.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longsana.encoders.tiny_layouts import BLOCKS, TinyKind, latents_of, open_tiny, seed_of_tiny
from longsana.runtime.hub import locate

Memory: TypeAlias = tuple[Tensor, ...]
"""What went last into each memory block, (B, C, 1, H, W)."""


class Bound(nn.Module):
    """Keep latents within -3 and 3, softly: 3 tanh(x / 3)."""

    def forward(self, x: Tensor) -> Tensor:
        """x, of any shape, bound."""
        return 3 * torch.tanh(x / 3)


class MemoryBlock(nn.Module):
    """ReLU(f([x, past]) + x), where past is the block's input one frame earlier; before the first it is 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """Frames like x, (B, T, C, H, W). before: (B, 1, C, H, W), the input of the frame before them."""
        past = torch.cat([before, x[:, :-1]], dim=1)
        y = self.conv(torch.cat([x, past], dim=2).flatten(0, 1))
        return F.relu(y.unflatten(0, x.shape[:2]) + x)


class Pool(nn.Module):
    """Fold `frames` frames into one by a product over all of their channels."""

    def __init__(self, width: int, frames: int) -> None:
        super().__init__()
        self.frames = frames
        self.conv = nn.Conv2d(width * frames, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T / frames, C, H, W) of x (B, T, C, H, W)."""
        folded = x.unflatten(1, (-1, self.frames)).flatten(2, 3)
        y: Tensor = self.conv(folded.flatten(0, 1))
        return y.unflatten(0, folded.shape[:2])


class Grow(nn.Module):
    """Make `frames` frames of one by a product; the first of its channels are the earliest frame."""

    def __init__(self, width: int, frames: int) -> None:
        super().__init__()
        self.frames = frames
        self.conv = nn.Conv2d(width, width * frames, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T frames, C, H, W) of x (B, T, C, H, W)."""
        y: Tensor = self.conv(x.flatten(0, 1))
        return y.unflatten(1, (self.frames, -1)).flatten(0, 1).unflatten(0, (x.shape[0], -1))


class TinyNetwork(nn.Module):
    """An encoder, where the kind has one, and a decoder; names are those of its files.

    Both take time in order, with what they remember of it as a value. Pixels are in [0, 1].

    latents: the `latents_key` of the latents that it was trained on, where its file says it.
    last_weight, last_bias: of the decoder's last convolution for pictures in [-1, 1]; see `tiny_decoder.prepare`.
    """

    last_weight: Tensor
    last_bias: Tensor

    def __init__(self, kind: TinyKind) -> None:
        super().__init__()
        self.kind = kind
        self.latents: str | None = None
        self.encoder = _encoder(kind) if kind.encodes else None
        self.decoder = _decoder(kind)

    @property
    def device(self) -> torch.device:
        return self.decoder[1].weight.device  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder[1].weight.dtype  # type: ignore[return-value]

    def encode(self, frames: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """Latents (B, C, T, h, w) of a film's next frames (B, 3, F, H, W) in [0, 1], F = T times the time stride."""
        assert self.encoder is not None
        x = F.pixel_unshuffle(frames.transpose(1, 2), self.kind.patch)
        latents, memory = _run(self.encoder, x, memory)
        return latents.transpose(1, 2), memory

    def decode(self, latents: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """Frames (B, 3, F, H, W), not clamped to [0, 1], of the next latents (B, C, T, h, w), F = T times the stride.

        memory: None at the start of a video, of which the first frames, all but one of a latent's, are to be dropped.
        """
        frames, memory = _run(self.decoder, latents.transpose(1, 2), memory)
        return F.pixel_shuffle(frames, self.kind.patch).transpose(1, 2), memory


def _run(layers: nn.Sequential, x: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
    """Apply layers to frames (B, T, C, H, W); returns theirs, and what the memory blocks among them remember."""
    past, kept = iter(memory or ()), []
    for layer in layers:
        if isinstance(layer, MemoryBlock):
            before = torch.zeros_like(x[:, :1]) if memory is None else next(past).transpose(1, 2)
            kept.append(x[:, -1:].transpose(1, 2).clone())
            x = layer(x, before)
        elif isinstance(layer, Pool | Grow):
            x = layer(x)
        else:
            x = layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    return x, tuple(kept)


def _encoder(kind: TinyKind) -> nn.Sequential:
    width = kind.width
    layers: list[nn.Module] = [_conv(3 * kind.patch**2, width), nn.ReLU()]
    for frames in kind.pools:
        layers += [Pool(width, frames), nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)]
        layers += [MemoryBlock(width) for _ in range(BLOCKS)]
    return nn.Sequential(*layers, _conv(width, kind.channels))


def _decoder(kind: TinyKind) -> nn.Sequential:
    layers: list[nn.Module] = [Bound(), _conv(kind.channels, kind.widths[0]), nn.ReLU()]
    for frames, width, out in zip(kind.grows, kind.widths, kind.widths[1:], strict=False):
        layers += [MemoryBlock(width) for _ in range(BLOCKS)]
        layers += [nn.Upsample(scale_factor=2), Grow(width, frames), nn.Conv2d(width, out, 3, padding=1, bias=False)]
    return nn.Sequential(*layers, nn.ReLU(), _conv(kind.widths[-1], 3 * kind.patch**2))


def _conv(width: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(width, out, 3, padding=1)


def load_tiny(kind: TinyKind, source: str, device: torch.device | str, dtype: torch.dtype) -> TinyNetwork:
    """The network that `source` (vae.decoder_pretrained) names, frozen: a file, or seeded:N.

    Raises:
        InputError: nothing is there, it cannot be read, or its tensors are not exactly those of this kind.
    """
    with torch.device("meta"):
        network = TinyNetwork(kind)
    seed = seed_of_tiny(source)
    if seed is None:
        path = locate(source, "vae.decoder_pretrained")
        entries = open_tiny(kind, source, path)
        weights, latents = {name: entries[name].read() for name in network.state_dict()}, latents_of(path)
    else:
        weights, latents = _seeded(network, seed), None
    # A copy always: memory that maps the file would change, or crash us, with it.
    weights = {name: tensor.to(device, dtype, copy=True) for name, tensor in weights.items()}
    network.latents = latents
    network.load_state_dict(weights, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def _seeded(network: nn.Module, seed: int) -> dict[str, Tensor]:
    """Random weights, a function of the seed, that keep activations near 1 and pictures mostly inside [0, 1].

    A memory block adds to what goes in: its last convolution is small, so that nine of them do not pile up.
    """
    rng = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in network.state_dict().items():
        draw = torch.randn(parameter.shape, generator=rng, dtype=torch.float32, device="cpu")
        if name.endswith("bias"):
            weights[name] = 0.1 * draw + (0.5 if name == "decoder.22.bias" else 0)
            continue
        scale = (2 / parameter[0].numel()) ** 0.5
        if name.endswith("conv.4.weight"):
            scale /= 4
        if name == "decoder.22.weight":
            scale /= 16
        weights[name] = scale * draw
    return weights
