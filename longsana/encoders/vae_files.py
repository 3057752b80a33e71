"""Files of video VAEs: diffusers folders and Wan's original layout, read whole or refused; and new weights."""

from __future__ import annotations

import copy
import inspect
import json
import math
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderKLLTX2Video, AutoencoderKLWan
from safetensors.torch import load_file
from torch import Tensor, nn

from longsana.encoders.geometry import VAEGeometry
from longsana.models.checkpoint_files import write_pickle
from longsana.runtime.errors import InputError, did_you_mean
from longsana.runtime.hub import SEEDED, locate

Model: TypeAlias = Any  # one of diffusers' two; its type hints do not say that it is a module
Kind: TypeAlias = type[AutoencoderKLWan] | type[AutoencoderKLLTX2Video]
WAN, LTX2 = AutoencoderKLWan, AutoencoderKLLTX2Video
SEED = 0  # of `seeded:` weights
WIDTH = 96  # base_dim of the published VAE
ORIGINAL = (
    *("dim_mult", "num_res_blocks", "attn_scales", "temperal_downsample", "latents_mean", "latents_std"),
    *("decoder_base_dim", "is_residual"),
)
"""What a file in the original layout cannot say, beside its width."""


def load_model(
    source: str,
    shape: VAEGeometry,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    kind: Kind = WAN,
) -> Model:
    """The network that `source` names, frozen: a diffusers folder, Wan's original file, or seeded:FOLDER.

    Raises:
        InputError: nothing is there, it cannot be read, or its tensors are not exactly those of a VAE of this shape.
    """
    model, weights = _read_model(source, shape, kind)
    learned = {name for name, _ in model.named_parameters()}  # and not the statistics, which keep their precision
    on_device = {name: tensor.to(device, dtype if name in learned else None) for name, tensor in weights.items()}
    model.load_state_dict(on_device, strict=True, assign=True)
    model.eval().requires_grad_(False)
    return model


def convert_model(source: str, shape: VAEGeometry, out: Path, layout: str) -> None:
    """Write the VAE that `source` names in the other layout, every tensor as it is.

    layout: diffusers, a folder; or upstream, one file with the names of `Wan2.1_VAE.pth`.

    Raises:
        InputError: see `load_model`; or a shape that the original layout, which comes without a config, cannot say.
    """
    model, weights = _read_model(source, shape, WAN)
    if layout == "diffusers":
        model.load_state_dict(weights, strict=True, assign=True)
        model.save_pretrained(out)
        return
    published = inspect.signature(WAN.__init__).parameters
    if changed := [key for key in ORIGINAL if model.config[key] != published[key].default]:
        raise InputError(f"{source}: the layout upstream has no config, so {', '.join(changed)} must be as published")
    write_pickle(dict(to_original_layout(weights)), out)


def _read_model(source: str, shape: VAEGeometry, kind: Kind) -> tuple[Model, dict[str, Tensor]]:
    """A model without memory, and its weights as `source` has them, under its names."""
    what = "vae.vae_pretrained"
    name_in_file: Callable[[str], str] = str
    if source.startswith(SEEDED):
        model = _empty_model(_read_config(locate(source.removeprefix(SEEDED), what), kind), source, kind)
        weights = _seeded_weights(model)
    elif (path := locate(source, what, "vae")).is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        model = _empty_model(_read_config(folder, kind), source, kind)
        weights = _read_weights(_only_safetensors(folder))
    elif kind is WAN:
        weights = _read_weights(path)  # the original layout; it comes without a config file
        model = _empty_model({"base_dim": _width(weights)}, source, kind)
        name_in_file = _original_name
    else:
        raise InputError(f"{what}={source}: a file; an {kind.__name__} is a diffusers folder with its config.json")
    check_geometry(model, shape, source)
    return model, _renamed(weights, model, source, name_in_file)


def new_model(folder: str | Path, seed: int) -> Model:
    """A VAE to train, in the shape of `folder`'s config.json: float32, on the CPU, a function of the seed.

    It starts as one that knows nothing of time: only the newest tap of each temporal kernel is not zero, and the
    temporal strides pick and repeat frames. Random taps would have to be unlearned on clips, where steps are dear.
    Kernels have the variance 1 / fan-in of that tap, and the posterior starts narrow (standard deviation 0.05): with
    torch's smaller kernels and a posterior of 1 the decoder learns to ignore its latents and never recovers.

    Raises:
        InputError: there is no such config, or it makes no Wan VAE.
    """
    shape = _read_config(Path(folder), WAN)
    _empty_model(shape, str(folder), WAN)
    rng = torch.Generator().manual_seed(seed)
    model: Model = WAN(**shape)
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


def save_model(model: Model, folder: Path) -> None:
    """Write a diffusers folder with weights in float16."""
    nn.Module.to(copy.deepcopy(model), torch.float16).save_pretrained(folder)


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


class _FrameByFrame(nn.Conv3d):
    """A 1x1x1 convolution whose result for a frame does not depend on how many others come with it.

    diffusers applies this one to the whole clip, and kernels round differently for different sizes.
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(_FrameByFrame, self).forward(frame) for frame in x.split(1, dim=2)], dim=2)


def _empty_model(shape: dict[str, Any], source: str, kind: Kind) -> Model:
    try:
        with torch.device("meta"):
            model: Model = kind(**shape)
            if kind is WAN:
                model.post_quant_conv = _FrameByFrame(model.z_dim, model.z_dim, 1)
            return model
    except Exception as error:  # whatever a layer raises on sizes that make no network
        raise InputError(f"{source}: its config makes no {kind.__name__}: {_one_line(error)}") from error


def check_geometry(model: Model, shape: VAEGeometry, source: str) -> None:
    """Make sure that a model is a VAE of this shape that can be decoded as a stream.

    Raises:
        InputError: it is not; `source` is what the message calls it.
    """
    if isinstance(model, LTX2):
        _check_ltx2(model, shape, source)
        return
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


def _check_ltx2(model: Model, shape: VAEGeometry, source: str) -> None:
    found = model.config
    strides = [
        part for part, scaled in zip(found.downsample_type, found.spatio_temporal_scaling, strict=False) if scaled
    ]
    time = found.patch_size_t * 2 ** sum(part != "spatial" for part in strides)
    space = found.patch_size * 2 ** sum(part != "temporal" for part in strides)
    own = VAEGeometry(found.latent_channels, time, space, shape.smallest)
    if own != shape or (found.in_channels, found.out_channels) != (3, 3):
        raise InputError(f"{source}: not an LTX-2 VAE: its config gives {own}; needed is {shape}, and 3 -> 3 colours")
    noise = found.decoder_inject_noise
    if found.timestep_conditioning or (any(noise) if isinstance(noise, list | tuple) else noise):
        raise InputError(f"{source}: its decoder takes a timestep or noise; only plain ones can be used")
    if not found.encoder_causal:
        raise InputError(
            f"{source}: encoder_causal=False: a clip's latents would depend on the frames after it; must be true, as "
            "published"
        )


def _read_config(folder: Path, kind: Kind) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: no config.json in this folder; is it a diffusers VAE?")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {_one_line(error)}") from error
    if not isinstance(values, dict) or values.get("_class_name") != kind.__name__:
        raise InputError(f"{path}: not the config of an {kind.__name__}")
    shape = {key: value for key, value in values.items() if not key.startswith("_")}
    known = inspect.signature(kind.__init__).parameters
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
            weights[name] = 0.1 * draw + float(name.endswith(("gamma", "latents_std")))
    return weights


def _some(names: list[str], count: int = 8) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
