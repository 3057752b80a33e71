"""Video VAEs: pixels to latents, and latents back to pixels chunk by chunk in constant memory.

The networks are diffusers'. Their causal convolutions remember the last two frames of their input; `decode_stream`
hands that memory in and out as a value, so a video of any length is decoded as it is sampled. It runs the network's own
weights by `wan_decoder` or `ltx2_decoder`; diffusers' own decoding is the slow twin (`decode`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longsana.config import VAEConfig
from longsana.encoders import convolution, ltx2_decoder, wan_decoder
from longsana.encoders.convolution import Rows
from longsana.encoders.geometry import GEOMETRIES, VAEGeometry, geometry
from longsana.encoders.vae_files import LTX2, WAN, Kind, Model, check_geometry, load_model
from longsana.runtime.arguments import Whole, settled
from longsana.runtime.defaults import plain_defaults
from longsana.runtime.errors import InputError
from longsana.runtime.peers import Peers

if TYPE_CHECKING:
    from typing import Self

ALONE = 2
"""A video's first latents that are decoded one by one: its first pictures, a still one and some that move, come
sooner."""


class DecodeCache(NamedTuple):
    """The decoder's memory: the last two input frames of each convolution over time, (B, C, 2, H, W) each, and
    what waits for the future, if it looks there.

    One size for a video of any length. A value: it may be decoded from any number of times.
    """

    features: tuple[Tensor, ...]
    latents: int  # latent frames decoded so far
    ended: bool = False  # its decoder looked for a future and was told that there is none
    rows: int = 0  # latent rows of whole pictures, where features are of a process's own; see `VideoVAE.divide`

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it keeps alive."""
        return sum(feature.untyped_storage().nbytes() for feature in self.features)


class EncodeCache(NamedTuple):
    """The encoder's memory of a film, of one size whatever its length. A value, as `DecodeCache` is.

    features: of Wan the last input frames of each convolution over time, (B, C, 1 or 2, H, W) each; of LTX-2 the last
        pixel frames, (B, 3, F, H, W), which are encoded again in front of the next.
    latents: encoded so far.
    """

    features: tuple[Tensor, ...]
    latents: int


class VideoVAE(ABC):
    """Encoder and decoder with frozen weights; no call leaves anything behind on the object.

    Kinds of VAE differ in their network alone, which is diffusers'. See `loading.load_vae`.

    bring: has the weights on the device; called before each use of them. encoding: has those of the encoder there,
    inside. See `runtime.offload`.
    """

    name: ClassVar[str]  # of VAEConfig.vae_type
    kind: ClassVar[Kind]
    tiny: ClassVar[bool] = False  # whether another, smaller network decodes than the VAE's own
    undivided: ClassVar[int] = 0  # convolutions whose memory is of all rows on every process; see `divide`

    def __init__(self, model: Model, shape: VAEGeometry, latents_per_call: int) -> None:
        assert latents_per_call > 0
        self._prepare(model)
        self.model = model
        self.geometry = shape
        self.latents_per_call = latents_per_call
        self.peers: Peers | None = None
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.bring: Callable[[], None] = _are_there
        self.encoding: Callable[[], AbstractContextManager[None]] = nullcontext
        self._mean, self._std = (
            part.to(self.device, torch.float32).view(1, -1, 1, 1, 1) for part in self._statistics(model)
        )

    def divide(self, peers: Peers) -> None:
        """Decode with other processes, which make the same calls: each some rows of all pictures, and all get all.

        A tiny decoder, which takes less time than the division, and one that looks ahead decode all on each process.
        """
        self.peers = peers

    def _rows(self, count: int) -> Rows | None:
        """The rows of pictures of so many latent rows that this process decodes; None: all."""
        return None if self.peers is None or self.ahead or self.tiny else Rows.of(self.peers, count)

    def whole(self, cache: DecodeCache) -> DecodeCache:
        """The memory that one process alone would have, on every process."""
        if not cache.rows:
            return cache
        assert self.peers is not None
        rows = Rows(self.peers, cache.rows)
        kept, divided = cache.features[: self.undivided], cache.features[self.undivided :]
        return cache._replace(features=(*kept, *(rows.whole(part, 3) for part in divided)), rows=0)

    def own(self, cache: DecodeCache) -> DecodeCache:
        """This process's part of the memory that one process alone would have."""
        rows = self._rows(cache.features[0].shape[3])
        if rows is None or cache.rows:
            return cache
        kept, divided = cache.features[: self.undivided], cache.features[self.undivided :]
        return cache._replace(features=(*kept, *(rows.own(part, 3) for part in divided)), rows=rows.height)

    @classmethod
    @plain_defaults()
    def load(cls, config: VAEConfig, device: torch.device | str, dtype: torch.dtype) -> Self:
        """Read the weights named by `config.vae_pretrained` and put them on `device` as `dtype`.

        Raises:
            InputError: a setting is wrong, nothing is there, it cannot be read, or its tensors are not exactly those of
                this kind of VAE.
        """
        config = settled(config, "vae")
        Whole(1).settle("vae.latents_per_call", config.latents_per_call)
        shape = geometry(config)
        return cls(
            load_model(config.vae_pretrained, shape, device, dtype, kind=cls.kind), shape, config.latents_per_call
        )

    @classmethod
    def around(cls, model: Model, latents_per_call: int) -> Self:
        """Wrap diffusers' model where it is. Its weights may get another layout.

        Raises:
            InputError: it is not of this kind.
        """
        shape = GEOMETRIES[cls.name]
        check_geometry(model, shape, "vae")
        return cls(model, shape, latents_per_call)

    @staticmethod
    def _prepare(model: Model) -> None:
        """Lay the model's weights out for its decoder."""
        convolution.prepare(model)

    @staticmethod
    @abstractmethod
    def _statistics(model: Model) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (C,) of the network's latents; ours have 0 and 1."""

    @abstractmethod
    def _posterior_mean(self, frames: Tensor) -> Tensor:
        """(B, C, T, h, w), not normalised, of frames in the network's dtype."""

    @abstractmethod
    def _encode_next(self, frames: Tensor, cache: EncodeCache | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Posterior mean (B, C, T, h, w), not normalised, of a film's next frames, and what is remembered of them."""

    @abstractmethod
    def _decode_group(
        self, latents: Tensor, features: tuple[Tensor, ...] | None, seen: int, *, last: bool, consumed: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Frames, not clamped, of the next latents, and what is remembered. None: the start, one latent alone.

        seen: latents before them; last: whether the video ends with them; consumed: see `decode_stream`.
        """

    @property
    @abstractmethod
    def widest(self) -> tuple[int, int]:
        """Channels of the decoder's last and largest activations, and of how many pixels' side each of them is."""

    @staticmethod
    def ahead_of(model: Model) -> int:
        """Latents that must follow one until its frames are settled; 0 where the decoder is causal."""
        return 0

    @property
    def ahead(self) -> int:
        """Latents that this decoder looks ahead; see `ahead_of`."""
        return self.ahead_of(self.model)

    @property
    def looks_on(self) -> bool:
        """True if a film is encoded by whole latents' frames, of which the last ones are repeated at its end; else its
        first latent is its first frame alone. See `encode_stream`."""
        return False

    def identity(self) -> tuple[str, Mapping[str, Tensor]]:
        """The name and the tensors, of any shape, that decide what this decoder's memory means."""
        return self.name, self.model.state_dict()

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Normalised latents (posterior mean - mean) / std, (B, C, T, h, w) float32, of (B, 3, F, H, W) in [-1, 1].

        Raises:
            InputError: the VAE cannot cut this number of frames or this size evenly.
        """
        self.geometry.latent_frames(frames.shape[2])
        self.geometry.latent_size(*frames.shape[3:])
        self.bring()
        with self.encoding():
            return self._normalise(self._posterior_mean(frames.to(self.device, self.dtype)))

    @torch.no_grad()
    def encode_stream(self, frames: Tensor, cache: EncodeCache | None = None) -> tuple[Tensor, EncodeCache]:
        """Normalised latents (B, C, T, h, w), float32, of a film's next frames (B, 3, F, H, W) in [-1, 1].

        F is `geometry.pixel_frames(T, first=cache is None)`; of an encoder that `looks_on` T times the time stride, or
        less at the film's end. Cut anywhere, the latents are those of `encode` within rounding.

        Raises:
            InputError: the VAE cannot cut this number of frames or this size evenly.
        """
        opening = 0 if cache is None else 1
        self.geometry.latent_frames(frames.shape[2] + opening)
        self.geometry.latent_size(*frames.shape[3:])
        self.bring()
        with self.encoding():
            raw, features = self._encode_next(frames.to(self.device, self.dtype), cache)
        return self._normalise(raw), EncodeCache(features, raw.shape[2] + (0 if cache is None else cache.latents))

    def encode_pictures(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Normalised latents (B, C, 1, h, w), float32, of pictures (H, W, 3), uint8, of one size.

        Each is encoded by itself, as a video of one frame, so that none depends on those beside it.

        Raises:
            InputError: the VAE cannot cut this size evenly.
        """
        pixels = (torch.from_numpy(np.array(picture)).to(self.device, torch.float32) for picture in pictures)
        frames = (own.permute(2, 0, 1)[None, :, None] / 127.5 - 1 for own in pixels)
        return torch.cat([self.encode_stream(frame)[0] for frame in frames])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Frames (B, 3, F, H, W) float32 in [-1, 1] of a whole video's latents (B, C, T, h, w).

        The slow twin of `decode_stream`: diffusers' own decoding, whose memory grows with the length.
        """
        self.bring()
        frames: Tensor = self.model.decode(self._denormalise(latents)).sample
        return frames.float().clamp_(-1, 1)

    @torch.no_grad()
    def decode_stream(
        self, latents: Tensor, cache: DecodeCache | None = None, *, more: bool = False, consumed: bool = False
    ) -> tuple[Tensor, DecodeCache]:
        """Frames of the next latents (B, C, T, h, w) of a video, T >= 1, and the cache to decode the ones after.

        more: whether latents follow. Only a decoder that looks `ahead` asks: it keeps back the frames that they may
        change, and gives them in one call where the video ends, as its cache then does.
        consumed: whether nobody will look at `cache` again: the next one may take its memory. Where it is large, a
        decoder then holds it once and not twice.

        Returns float32 frames in [-1, 1], (B, 3, F, H, W), and NaN where the network's are not finite. A causal decoder
        gives all of these latents', F = `geometry.pixel_frames(T, first=cache is None)`.
        Cut anywhere, the frames are those of `decode` within rounding (about 3e-5 in float32). Cuts between groups of
        g = `latents_per_call` change no bit of them: latent 0 is decoded alone, then 1 .. g, g+1 .. 2g, and so on.

        Raises:
            ValueError: the cache is of a video that has ended.
        """
        start = 0 if cache is None else cache.latents
        stop = start + latents.shape[2]
        features: tuple[Tensor, ...] | None = None if cache is None else cache.features
        if cache is not None and cache.ended:
            raise ValueError(f"the video of this cache has ended after {start} latents: decode those with more=True")
        self.bring()
        frames: list[Tensor] = []
        for group in _groups(start, latents.shape[2], self.latents_per_call, ALONE):
            raw = self._denormalise(latents[:, :, group.start - start : group.stop - start])
            last = not more and group.stop == stop
            decoded, features = self._decode_group(raw, features, group.start, last=last, consumed=consumed)
            consumed = True  # what lies between groups is nobody's
            frames.append(_clamped(decoded))
        assert features is not None, "no latents to decode"
        divided = 0 if self._rows(latents.shape[3]) is None else latents.shape[3]
        return torch.cat(frames, dim=2), DecodeCache(features, stop, self.ahead > 0 and not more, divided)

    def grouped(self, latents: Tensor, start: int) -> list[Tensor]:
        """Cut a video's latents (B, C, T, h, w), from latent `start` on, where `decode_stream` does.

        Decoded one after another, these give its frames to the bit.
        """
        groups = _groups(start, latents.shape[2], self.latents_per_call, ALONE)
        return [latents[:, :, group.start - start : group.stop - start] for group in groups]

    @torch.no_grad()
    def decode_end(self, cache: DecodeCache) -> tuple[Tensor, DecodeCache]:
        """The frames (B, 3, F, H, W) that wait for latents that will not come, as from `decode_stream`, and the cache.

        Raises:
            ValueError: the decoder does not look ahead, so that nothing waits, or the video has ended already.
        """
        if not self.ahead or cache.ended:
            raise ValueError("nothing waits in this cache")
        self.bring()
        batch, _, _, height, width = cache.features[0].shape  # what the first convolution remembers: latents
        none = torch.empty(batch, self.geometry.channels, 0, height, width, device=self.device, dtype=self.dtype)
        decoded, features = self._decode_group(none, cache.features, cache.latents, last=True)
        return _clamped(decoded), DecodeCache(features, cache.latents, ended=True)

    def overlap_latent(self, latents: Tensor, cache: DecodeCache | None = None) -> tuple[Tensor, DecodeCache]:
        """The last pixel frame of latents (B, C, T, h, w), encoded as a picture of its own, and the next cache.

        (B, C, 1, h, w), float32: it leads a stretch from the middle of a video when that is taken for a clip, whose
        first latent is one picture. cache: of all latents before these; None decodes them as if there were none, which
        is off by what the decoder would remember of them, some 20 latents far.
        """
        frames, after = self.decode_stream(latents, cache, more=True)
        if self.ahead:
            frames, _ = self.decode_end(after)
        return self.encode(frames[:, :, -1:]), after

    @staticmethod
    def to_uint8(frames: Tensor) -> Tensor:
        """Pictures (B, F, H, W, 3) uint8 of frames (B, 3, F, H, W) in [-1, 1]."""
        # Truncated, not rounded: what the published videos were written with.
        return (127.5 * frames).add_(127.5).clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()

    def _normalise(self, raw: Tensor) -> Tensor:
        return (raw.float() - self._mean) / self._std

    def _denormalise(self, latents: Tensor) -> Tensor:
        return (latents.to(self.device, torch.float32) * self._std + self._mean).to(self.dtype)


def _are_there() -> None:
    """Bring nothing: the weights stay where they are used."""


class WanVAE(VideoVAE):
    """The Wan 2.1 VAE."""

    name, kind, undivided = "WanVAE", WAN, wan_decoder.WHOLE

    @staticmethod
    def _statistics(model: Model) -> tuple[Tensor, Tensor]:
        statistics = (model.config.latents_mean, model.config.latents_std)
        mean, std = (torch.tensor(values, dtype=torch.float32, device="cpu") for values in statistics)
        return mean, std

    @property
    def widest(self) -> tuple[int, int]:
        return self.model.config.base_dim, 1

    def _posterior_mean(self, frames: Tensor) -> Tensor:
        return encode_clip(self.model, frames, latents_per_call=self.latents_per_call).chunk(2, dim=1)[0]

    def _encode_next(self, frames: Tensor, cache: EncodeCache | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        features, start = (None, 0) if cache is None else cache
        both, features = encode_next(self.model, frames, features, seen=start, latents_per_call=self.latents_per_call)
        return both.chunk(2, dim=1)[0], features

    def _decode_group(
        self, latents: Tensor, features: tuple[Tensor, ...] | None, seen: int, *, last: bool, consumed: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        rows = self._rows(latents.shape[3])
        return wan_decoder.decode(self.model, latents, features, rows=rows, consumed=consumed)


class LTX2VAE(VideoVAE):
    """The LTX-2 VAE. Its statistics are tensors of its weights, and its decoder may look into the future."""

    name, kind = "LTX2VAE_diffusers", LTX2

    @staticmethod
    def _statistics(model: Model) -> tuple[Tensor, Tensor]:
        return model.latents_mean, model.latents_std.float() / model.config.scaling_factor

    def _posterior_mean(self, frames: Tensor) -> Tensor:
        mean: Tensor = self.model.encode(frames).latent_dist.mean
        return mean

    def _encode_next(self, frames: Tensor, cache: EncodeCache | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        # The encoder is causal with a finite reach: latents whose whole reach is given are those of the whole film. A
        # film may be taken up at any latent's last frame, which then passes for an opening one.
        assert self.model.config.encoder_causal
        stride = self.geometry.time_stride
        before = frames[:, :, :0] if cache is None else cache.features[0]
        whole = torch.cat([before, frames], dim=2)
        new = (frames.shape[2] + (0 if cache else stride - 1)) // stride
        kept = stride * ltx2_decoder.encoder_reach(self.model) + 1
        return self._posterior_mean(whole)[:, :, -new:], (whole[:, :, -kept:].clone(),)

    @property
    def widest(self) -> tuple[int, int]:
        return self.model.decoder.conv_out.in_channels, self.model.config.patch_size

    @staticmethod
    def ahead_of(model: Model) -> int:
        return ltx2_decoder.ahead(model)

    def _decode_group(
        self, latents: Tensor, features: tuple[Tensor, ...] | None, seen: int, *, last: bool, consumed: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        rows = self._rows(latents.shape[3])
        return ltx2_decoder.decode(self.model, latents, features, seen=seen, last=last, rows=rows, consumed=consumed)


VAES: dict[str, type[WanVAE | LTX2VAE]] = {kind.name: kind for kind in (WanVAE, LTX2VAE)}


def kind_of(model: Model) -> type[WanVAE | LTX2VAE]:
    """The class for a diffusers model.

    Raises:
        InputError: there is none.
    """
    for kind in VAES.values():
        if isinstance(model, kind.kind):
            return kind
    known = " or ".join(kind.kind.__name__ for kind in VAES.values())
    raise InputError(f"vae: a {type(model).__name__}; needed is an {known}")


def _clamped(decoded: Tensor) -> Tensor:
    """Frames in [-1, 1], float32, of what a decoder gives, which is overwritten."""
    # An infinite number would become plain white, and nobody would see what went wrong.
    return decoded.nan_to_num_(nan=math.nan, posinf=math.nan, neginf=math.nan).clamp_(-1, 1).float()


def encode_clip(model: Model, frames: Tensor, *, latents_per_call: int) -> Tensor:
    """Posterior mean and log-variance (B, 2C, T, h, w), not normalised, of frames (B, 3, 4 T - 3, H, W) in [-1, 1].

    The first frame is encoded alone, the others in calls of 4 * latents_per_call; with 1 it is diffusers' loop. Unlike
    it this can be differentiated through.
    """
    return encode_next(model, frames, None, seen=0, latents_per_call=latents_per_call)[0]


def encode_next(
    model: Model, frames: Tensor, features: tuple[Tensor, ...] | None, *, seen: int, latents_per_call: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Encode a clip's next frames (B, 3, F, H, W) as `encode_clip` does; returns their latents' (B, 2C, T, h, w), and
    what the encoder remembers.

    features: what the call before returned; None at the start. seen: latents before these; F is 4 T, or 4 T - 3 at the
    start.
    """
    # diffusers replaces the entries of this list and never writes into their tensors: the caller's stay.
    entries: list[Any] = [None] * len(list(model.encoder.modules())) if features is None else list(features)
    first = max(4 * seen - 3, 0)
    groups = _groups(seen, (frames.shape[2] + first + 3) // 4 - seen, latents_per_call)
    encoded = [
        model.encoder(
            frames[:, :, max(4 * group.start - 3, 0) - first : 4 * group.stop - 3 - first],
            feat_cache=entries,
            feat_idx=[0],
        )
        for group in groups
    ]
    remembered = tuple(entry for entry in entries if entry is not None)
    return model.quant_conv(torch.cat(encoded, dim=2)), remembered


def decode_clip(model: Model, latents: Tensor, *, latents_per_call: int) -> Tensor:
    """Frames (B, 3, 4 T - 3, H, W), not clamped, of latents (B, C, T, h, w) that are not normalised."""
    features: tuple[Tensor, ...] | None = None
    frames = []
    for group in _groups(0, latents.shape[2], latents_per_call):
        decoded, features = _decode_group(model, latents[:, :, group], features)
        frames.append(decoded)
    return torch.cat(frames, dim=2)


def _decode_group(
    model: Model, latents: Tensor, features: tuple[Tensor, ...] | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    # diffusers replaces the entries of this list and never writes into their tensors: the caller's stay.
    entries: list[Any] = [None] * len(list(model.decoder.modules())) if features is None else list(features)
    x = model.post_quant_conv(latents)
    frames = model.decoder(x, feat_cache=entries, feat_idx=[0], first_chunk=features is None)
    if features is None:
        entries = _settle(entries)
    return frames, tuple(entries)


def _groups(start: int, count: int, size: int, alone: int = 1) -> Iterator[slice]:
    """Slices of the absolute latents start .. start + count that are taken together: 0, then `size` at a time.

    alone: the latents before this one are taken one by one; the group that they are cut from keeps its end.
    """
    stop = start + count
    while start < stop:
        end = start + 1 if start < alone else start + size - (start - 1) % size
        yield slice(start, min(end, stop))
        start = end


def _settle(entries: list[Any]) -> list[Tensor]:
    """The decoder's memory of the first latent as tensors of two frames, the shape that it keeps from then on.

    diffusers stores one frame there, or the mark "Rep" for "no frames yet", and treats the missing ones as zeros.
    """
    used = [entry for entry in entries if entry is not None]
    settled: list[Tensor] = []
    for entry in used:
        if isinstance(entry, str):
            # The upsampler's convolution sees what the convolution before it returns, of that one's own input shape.
            settled.append(torch.zeros_like(settled[-1]))
        else:
            settled.append(F.pad(entry, (0, 0, 0, 0, 2 - entry.shape[2], 0)))
    return settled
