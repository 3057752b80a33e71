"""The Wan 2.1 video VAE: pixels to latents, and latents back to pixels chunk by chunk in constant memory.

The network is diffusers' `AutoencoderKLWan`. Its causal convolutions remember the last two frames of their input;
`decode_stream` hands that memory in and out as a value, so a video of any length is decoded as it is sampled.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file
from torch import Tensor, nn

from longsana.config import VAEConfig
from longsana.encoders.geometry import VAEGeometry, geometry
from longsana.runtime.errors import InputError, did_you_mean
from longsana.runtime.hub import SEEDED, locate

Model: TypeAlias = Any  # an AutoencoderKLWan; diffusers' type hints do not say that it is a module
SEED = 0  # of `seeded:` weights
WIDTH = 96  # base_dim of the published VAE


class DecodeCache(NamedTuple):
    """What the decoder remembers: the last two input frames of each causal convolution, (B, C, 2, H, W) each.

    One size for a video of any length. A value: it may be decoded from any number of times.
    """

    features: tuple[Tensor, ...]
    latents: int  # latent frames decoded so far

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it keeps alive."""
        return sum(feature.untyped_storage().nbytes() for feature in self.features)


class WanVAE:
    """Encoder and decoder with frozen weights; no call leaves anything behind on the object."""

    def __init__(self, model: Model, shape: VAEGeometry, latents_per_call: int) -> None:
        self.model = model
        self.geometry = shape
        self.latents_per_call = latents_per_call
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self._mean = _per_channel(model.config.latents_mean, model.device)
        self._std = _per_channel(model.config.latents_std, model.device)

    @classmethod
    def load(cls, config: VAEConfig, device: torch.device | str, dtype: torch.dtype) -> WanVAE:
        """Read the weights named by `config.vae_pretrained` and put them on `device` as `dtype`.

        Raises:
            InputError: nothing is there, it cannot be read, or its tensors are not exactly those of a Wan 2.1 VAE.
        """
        assert config.latents_per_call > 0
        source, what = config.vae_pretrained, "vae.vae_pretrained"
        name_in_file: Callable[[str], str] = str
        if source.startswith(SEEDED):
            model = _empty_model(_read_config(locate(source.removeprefix(SEEDED), what)), source)
            weights = _seeded_weights(model)
        elif (path := locate(source, what)).is_dir():
            model = _empty_model(_read_config(path), source)
            weights = _read_weights(_only_safetensors(path))
        else:
            weights = _read_weights(path)  # the original layout; it comes without a config file
            model = _empty_model({"base_dim": _width(weights)}, source)
            name_in_file = _original_name
        shape = geometry(config)
        _check_geometry(model, shape, source)
        weights = _renamed(weights, model, source, name_in_file)
        on_device = {name: tensor.to(device, dtype) for name, tensor in weights.items()}
        model.load_state_dict(on_device, strict=True, assign=True)
        model.eval().requires_grad_(False)
        if model.device.type == "cpu":
            # Twice as fast on two cores (18 against 38 ms a frame of 160 x 96, base_dim 12, five latents a call).
            _to_channels_last(model)
        return cls(model, shape, config.latents_per_call)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Normalised latents (posterior mean - mean) / std, (B, C, T, h, w) float32, of (B, 3, F, H, W) in [-1, 1].

        Raises:
            InputError: the VAE cannot cut this number of frames or this size evenly.
        """
        self.geometry.latent_frames(frames.shape[2])
        self.geometry.latent_size(*frames.shape[3:])
        moments = encode_clip(self.model, frames.to(self.device, self.dtype), latents_per_call=self.latents_per_call)
        return (moments.chunk(2, dim=1)[0].float() - self._mean) / self._std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Frames (B, 3, F, H, W) float32 in [-1, 1] of a whole video's latents (B, C, T, h, w).

        The slow twin of `decode_stream`: diffusers' own loop, whose memory grows with the length.
        """
        return self.model.decode(self._denormalise(latents)).sample.float()

    @torch.no_grad()
    def decode_stream(self, latents: Tensor, cache: DecodeCache | None = None) -> tuple[Tensor, DecodeCache]:
        """Frames of the next latents (B, C, T, h, w) of a video, T >= 1, and the cache to decode the ones after.

        Returns float32 frames in [-1, 1], (B, 3, `geometry.pixel_frames(T, first=cache is None)`, H, W).
        Cut anywhere, with `latents_per_call=1` the frames are those of `decode` to the bit. With more they differ from
        it by rounding (about 1e-5 in float32), and are equal to the bit for cuts between groups: latent 0 is decoded
        alone, then 1 .. g, g+1 .. 2g, and so on.
        """
        start = 0 if cache is None else cache.latents
        features: tuple[Tensor, ...] | None = None if cache is None else cache.features
        frames: list[Tensor] = []
        for group in _groups(start, latents.shape[2], self.latents_per_call):
            decoded, features = self._decode_group(latents[:, :, group.start - start : group.stop - start], features)
            frames.append(decoded)
        assert features is not None, "no latents to decode"
        return torch.cat(frames, dim=2), DecodeCache(features, start + latents.shape[2])

    def lead_latent(self, latents: Tensor, cache: DecodeCache | None = None) -> tuple[Tensor, DecodeCache]:
        """The last pixel frame of latents (B, C, T, h, w), encoded as a picture of its own, and the next cache.

        (B, C, 1, h, w), float32: it leads a stretch from the middle of a video when that is taken for a clip, whose
        first latent is one picture. cache: of all latents before these; None decodes them as if there were none, which
        is off by what the decoder would remember of them, some 20 latents far.
        """
        frames, cache = self.decode_stream(latents, cache)
        return self.encode(frames[:, :, -1:]), cache

    @staticmethod
    def to_uint8(frames: Tensor) -> Tensor:
        """Pictures (B, F, H, W, 3) uint8 of frames (B, 3, F, H, W) in [-1, 1]."""
        # Truncated, not rounded: what the published videos were written with.
        return (127.5 * frames + 127.5).clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()

    def _denormalise(self, latents: Tensor) -> Tensor:
        return (latents.to(self.device, torch.float32) * self._std + self._mean).to(self.dtype)

    def _decode_group(self, latents: Tensor, features: tuple[Tensor, ...] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        frames, features = _decode_group(self.model, self._denormalise(latents), features)
        return frames.clamp(-1, 1).float(), features


def new_model(folder: str | Path, seed: int) -> Model:
    """A VAE to train, in the shape of `folder`'s config.json: float32, on the CPU, a function of the seed.

    It starts as one that knows nothing of time: only the newest tap of each temporal kernel is not zero, and the
    temporal strides pick and repeat frames. Random taps would have to be unlearned on clips, where steps are dear.
    Kernels have the variance 1 / fan-in of that tap, and the posterior starts narrow (standard deviation 0.05): with
    torch's smaller kernels and a posterior of 1 the decoder learns to ignore its latents and never recovers.

    Raises:
        InputError: there is no such config, or it makes no Wan VAE.
    """
    shape = _read_config(Path(folder))
    _empty_model(shape, str(folder))
    rng = torch.Generator().manual_seed(seed)
    model: Model = AutoencoderKLWan(**shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 4 or name.endswith("gamma"):  # gains of norms, which stay 1
                continue
            newest = parameter[:, :, -1] if parameter.dim() == 5 else parameter
            drawn = torch.randn(newest.shape, generator=rng) / newest[0].numel() ** 0.5
            parameter.zero_()
            if name.endswith("time_conv.weight"):
                drawn = torch.eye(newest.shape[1]).repeat(newest.shape[0] // newest.shape[1], 1)[..., None, None]
            newest.copy_(drawn)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
        model.quant_conv.bias[model.config.z_dim :] = -6
    return model


def encode_clip(model: Model, frames: Tensor, *, latents_per_call: int) -> Tensor:
    """Posterior mean and log-variance (B, 2C, T, h, w), not normalised, of frames (B, 3, 4 T - 3, H, W) in [-1, 1].

    The first frame is encoded alone, the others in calls of 4 * latents_per_call; with 1 it is diffusers' loop. Unlike
    it this can be differentiated through.
    """
    entries: list[Any] = [None] * len(list(model.encoder.modules()))
    groups = _groups(0, 1 + (frames.shape[2] - 1) // 4, latents_per_call)
    encoded = [
        model.encoder(frames[:, :, max(4 * group.start - 3, 0) : 4 * group.stop - 3], feat_cache=entries, feat_idx=[0])
        for group in groups
    ]
    return model.quant_conv(torch.cat(encoded, dim=2))


def decode_clip(model: Model, latents: Tensor, *, latents_per_call: int) -> Tensor:
    """Frames (B, 3, 4 T - 3, H, W), not clamped, of latents (B, C, T, h, w) that are not normalised."""
    features: tuple[Tensor, ...] | None = None
    frames = []
    for group in _groups(0, latents.shape[2], latents_per_call):
        decoded, features = _decode_group(model, latents[:, :, group], features)
        frames.append(decoded)
    return torch.cat(frames, dim=2)


def save_model(model: Model, folder: Path) -> None:
    """Write a diffusers folder with weights in float16."""
    nn.Module.to(copy.deepcopy(model), torch.float16).save_pretrained(folder)


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


def to_original_layout(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the key names of `Wan2.1_VAE.pth`, from diffusers' names (two residual blocks a level)."""
    return {_original_name(name): tensor for name, tensor in weights.items()}


_RENAMES = [  # diffusers -> original, applied in order
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"\.conv_in\.", ".conv1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.down_blocks\.", ".downsamples."),
]
_RENAMES_OF_RESIDUAL_BLOCKS = [
    (r"\.norm1\.", ".residual.0."),
    (r"\.conv1\.", ".residual.2."),
    (r"\.norm2\.", ".residual.3."),
    (r"\.conv2\.", ".residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
]


def _original_name(name: str) -> str:
    # The decoder numbers its three residual blocks and the upsampler after them in one list.
    name = re.sub(
        r"\.up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers\.0)\.",
        lambda found: f".upsamples.{4 * int(found[1]) + int(found[2] or 3)}.",
        name,
    )
    for pattern, replacement in _RENAMES_OF_RESIDUAL_BLOCKS + _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _groups(start: int, count: int, size: int) -> Iterator[slice]:
    """Slices of the absolute latents start .. start + count that are decoded together."""
    stop = start + count
    while start < stop:
        end = 1 if start == 0 else start + size - (start - 1) % size
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


class _FrameByFrame(nn.Conv3d):
    """A 1x1x1 convolution whose result for a frame does not depend on how many others come with it.

    diffusers applies this one to the whole clip, and kernels round differently for different sizes.
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(_FrameByFrame, self).forward(frame) for frame in x.split(1, dim=2)], dim=2)


def _per_channel(values: list[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1, 1)


def _to_channels_last(model: nn.Module) -> None:
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in model.parameters():
        if parameter.dim() in layouts:
            parameter.data = parameter.data.contiguous(memory_format=layouts[parameter.dim()])


def _empty_model(shape: dict[str, Any], source: str) -> Model:
    try:
        with torch.device("meta"):
            model: Model = AutoencoderKLWan(**shape)
            model.post_quant_conv = _FrameByFrame(model.z_dim, model.z_dim, 1)
            return model
    except Exception as error:  # whatever a layer raises on sizes that make no network
        raise InputError(f"{source}: its config makes no Wan VAE: {_one_line(error)}") from error


def _check_geometry(model: Model, shape: VAEGeometry, source: str) -> None:
    found = model.config
    strides = VAEGeometry(found.z_dim, 2 ** sum(found.temperal_downsample), 2 ** (len(found.dim_mult) - 1))
    if strides != shape or found.patch_size is not None or (found.in_channels, found.out_channels) != (3, 3):
        raise InputError(
            f"{source}: not a Wan 2.1 VAE: its config gives {strides}, patch_size={found.patch_size}, "
            f"{found.in_channels} -> {found.out_channels} colours; needed are {shape}, no patches, 3 -> 3"
        )
    for name in ("latents_mean", "latents_std"):
        if len(found[name]) != shape.channels or not all(map(math.isfinite, found[name])):
            raise InputError(f"{source}: {name} must be {shape.channels} finite numbers")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: no config.json in this folder; is it a diffusers VAE?")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {_one_line(error)}") from error
    if not isinstance(values, dict) or values.get("_class_name") != AutoencoderKLWan.__name__:
        raise InputError(f"{path}: not the config of an {AutoencoderKLWan.__name__}")
    shape = {key: value for key, value in values.items() if not key.startswith("_")}
    known = inspect.signature(AutoencoderKLWan.__init__).parameters
    for key in shape:
        if key not in known:
            raise InputError(f"{path}: unknown key {key}{did_you_mean(key, known)}")
    return shape


def _only_safetensors(folder: Path) -> Path:
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        raise InputError(f"{folder}: expected one .safetensors file, found {len(found)}")
    return found[0]


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            loaded: Any = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{path}: cannot be read as weights: {_one_line(error)}") from error
    if not isinstance(loaded, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()
    ):
        raise InputError(f"{path}: expected a mapping of names to tensors")
    return loaded


def _width(weights: dict[str, Tensor]) -> int:
    """base_dim of weights in the original layout; all else about it is fixed. As published where it is not there."""
    first = weights.get("encoder.conv1.bias")
    return WIDTH if first is None or first.numel() == 0 else first.numel()


def _renamed(
    weights: dict[str, Tensor], model: nn.Module, source: str, name_in_file: Callable[[str], str]
) -> dict[str, Tensor]:
    """`weights` under the model's names, if they are all of its weights; `name_in_file` turns its names into theirs."""
    needed = {name_in_file(name): (name, tensor.shape) for name, tensor in model.state_dict().items()}
    complaints = {
        "missing": [name for name in needed if name not in weights],
        "unknown": [name for name in weights if name not in needed],
        "misshapen": [
            f"{name} {tuple(weights[name].shape)} for {tuple(shape)}"
            for name, (_, shape) in needed.items()
            if name in weights and weights[name].shape != shape
        ],
    }
    if any(complaints.values()):
        listed = "; ".join(f"{len(names)} {kind}: {_some(names)}" for kind, names in complaints.items() if names)
        raise InputError(f"{source}: not the weights of this VAE: {listed}")
    return {needed[name][0]: tensor for name, tensor in weights.items()}


def _seeded_weights(model: nn.Module) -> dict[str, Tensor]:
    """Random weights from a fixed seed that keep activations near 1 and pictures inside [-1, 1]."""
    generator = torch.Generator().manual_seed(SEED)
    weights = {}
    for name, parameter in model.state_dict().items():
        draw = torch.randn(parameter.shape, generator=generator)
        if name.endswith("weight"):
            weights[name] = draw / parameter[0].numel() ** 0.5
        else:
            weights[name] = 0.1 * draw + float(name.endswith("gamma"))
    return weights


def _some(names: list[str], count: int = 8) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
