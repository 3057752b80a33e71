"""A VAE whose decoder is a tiny network: a stream of latents to pixels at a small part of the cost.

What is encoded is encoded by the VAE itself, which is loaded then; or by the tiny network's own encoder, if asked for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from longsana.config import VAEConfig
from longsana.encoders import tiny_decoder
from longsana.encoders.geometry import GEOMETRIES, geometry
from longsana.encoders.tiny_graphs import ReplayedDecoder
from longsana.encoders.tiny_layouts import FULL, TINY, check_own_latents, source_of
from longsana.encoders.tiny_network import TinyNetwork, load_tiny
from longsana.encoders.vae import VAES, EncodeCache, VideoVAE
from longsana.encoders.vae_files import WAN, Model
from longsana.runtime.arguments import Whole, settled
from longsana.runtime.defaults import plain_defaults
from longsana.runtime.errors import InputError

if TYPE_CHECKING:
    from typing import Self

Decode: TypeAlias = Callable[[Tensor, tuple[Tensor, ...] | None], tuple[Tensor, tuple[Tensor, ...]]]


class TinyVAE(VideoVAE):
    """A tiny decoder of a VAE's latents, and an encoder of pixels to them.

    `DecodeCache.features` are nine frames, what went last into each memory block, (B, C, 1, H, W).

    encoder: gives the VAE that encodes, at the first call that asks for it; None: the tiny network's own does, or
        nothing where it has none.
    """

    name, tiny = "tiny", True

    def __init__(
        self, network: TinyNetwork, latents_per_call: int, encoder: Callable[[], VideoVAE] | None = None
    ) -> None:
        super().__init__(network, GEOMETRIES[network.kind.vae_type], latents_per_call)
        self._encoder = encoder
        self._decode: Decode = partial(tiny_decoder.decode, network)

    def replay(self) -> None:
        """Replay calls of the decoder as CUDA graphs from now on; it is on a GPU, and its weights stay as they are."""
        self._decode = ReplayedDecoder(self.model)

    @classmethod
    @plain_defaults()
    def load(cls, config: VAEConfig, device: torch.device | str, dtype: torch.dtype) -> Self:
        """Read the weights that `source_of` names and put them on `device` as `dtype`.

        Raises:
            InputError: a setting is wrong, nothing is there, it cannot be read, or its tensors are not exactly those of
                the kind that `config.decoder` says.
        """
        config = settled(config, "vae")
        Whole(1).settle("vae.latents_per_call", config.latents_per_call)
        assert config.decoder != FULL
        source = source_of(config)
        whole = replace(config, decoder=FULL, decoder_pretrained=None, encoder=FULL)
        encoder = partial(VAES[config.vae_type].load, whole, device, dtype)
        network = load_tiny(TINY[config.decoder], source, device, dtype)
        check_own_latents(config, network.latents)
        assert GEOMETRIES[network.kind.vae_type] == geometry(config)
        return cls(network, config.latents_per_call, encoder if config.encoder == FULL else None)

    @classmethod
    def around(cls, model: Model, latents_per_call: int, encoder: Callable[[], VideoVAE] | None = None) -> Self:
        """Wrap a tiny network where it is. Its decoder's weights get another layout.

        encoder: see the class.

        Raises:
            InputError: it is none.
        """
        if not isinstance(model, TinyNetwork):
            raise InputError(f"decoder: a {type(model).__name__}; must be a {TinyNetwork.__name__}")
        return cls(model, latents_per_call, encoder)

    @staticmethod
    def _prepare(model: Model) -> None:
        tiny_decoder.prepare(model)

    @staticmethod
    def _statistics(model: Model) -> tuple[Tensor, Tensor]:
        kind = model.kind
        if not kind.raw:
            zeros = torch.zeros(kind.channels, dtype=torch.float32, device="cpu")
            return zeros, zeros + 1
        published = inspect.signature(WAN.__init__).parameters
        mean, std = (
            torch.tensor(published[name].default, dtype=torch.float32, device="cpu")
            for name in ("latents_mean", "latents_std")
        )
        return mean, std

    @property
    def widest(self) -> tuple[int, int]:
        return self.model.kind.widths[-1], self.model.kind.patch

    @staticmethod
    def ahead_of(model: Model) -> int:
        return 0

    @property
    def looks_on(self) -> bool:
        return self._encoder is None and self.model.encoder is not None

    def identity(self) -> tuple[str, Mapping[str, Tensor]]:
        """The kind, and the tensors of any shape of the decoder: encoders leave nothing in its memory."""
        return self.model.kind.name, self.model.decoder.state_dict()

    @cached_property
    def _whole(self) -> VideoVAE:
        assert self._encoder is not None
        return self._encoder()

    def encode(self, frames: Tensor) -> Tensor:
        """Normalised latents (B, C, T, h, w) of (B, 3, F, H, W); see `VideoVAE.encode`."""
        return super().encode(frames) if self.looks_on else self._whole.encode(frames)

    @torch.no_grad()
    def encode_stream(self, frames: Tensor, cache: EncodeCache | None = None) -> tuple[Tensor, EncodeCache]:
        """Normalised latents (B, C, T, h, w) of a film's next frames (B, 3, F, H, W); see `VideoVAE.encode_stream`.

        Raises:
            ValueError: the tiny encoder has encoded the film's end.
        """
        if not self.looks_on:
            return self._whole.encode_stream(frames, cache)
        if cache is not None and not cache.features:
            raise ValueError(f"the film of this cache has ended after {cache.latents} latents")
        self.geometry.latent_size(*frames.shape[3:])
        raw, features = self._encode_next(frames.to(self.device, self.dtype), cache)
        return self._normalise(raw), EncodeCache(features, raw.shape[2] + (0 if cache is None else cache.latents))

    def _posterior_mean(self, frames: Tensor) -> Tensor:
        return self._encode_next(frames, None)[0]

    def _encode_next(self, frames: Tensor, cache: EncodeCache | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        stride = self.geometry.time_stride
        missing = -frames.shape[2] % stride
        if missing:  # copies of the last frame, behind it
            frames = torch.cat([frames, frames[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
        memory, latents = None if cache is None else cache.features, []
        for piece in ((frames + 1) / 2).split(stride * self.latents_per_call, dim=2):
            encoded, memory = self.model.encode(piece, memory)
            latents.append(encoded)
        assert memory is not None
        return torch.cat(latents, dim=2), () if missing else memory  # nothing goes on after a film's end

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Frames (B, 3, F, H, W) float32 in [-1, 1] of a whole video's latents (B, C, T, h, w).

        The slow twin of `decode_stream`: the network as it is defined.
        """
        frames: Tensor = self.model.decode(self._denormalise(latents))[0]
        shown = frames[:, :, self.geometry.time_stride - 1 :].float()
        return (2 * shown - 1).clamp_(-1, 1)

    def _decode_group(
        self, latents: Tensor, features: tuple[Tensor, ...] | None, seen: int, *, last: bool, consumed: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self._decode(latents, features)
