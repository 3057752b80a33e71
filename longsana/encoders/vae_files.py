"""Files of video VAEs: diffusers folders and Wan's original layout, read whole or refused; and new weights."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderKLLTX2Video, AutoencoderKLWan
from torch import Tensor, nn

from longsana.encoders.geometry import VAEGeometry
from longsana.encoders.headers import check_vae_config, open_vae, refuse_misfit
from longsana.encoders.layouts import wan_original_name
from longsana.runtime.errors import InputError, did_you_mean
from longsana.runtime.hub import SEEDED, locate
from longsana.weights.files import write_pickle

Model: TypeAlias = Any  # one of diffusers' two; its type hints do not say that it is a module
Kind: TypeAlias = type[AutoencoderKLWan] | type[AutoencoderKLLTX2Video]
WAN, LTX2 = AutoencoderKLWan, AutoencoderKLLTX2Video
SEED = 0  # of `seeded:` weights
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
    # A copy always: memory that maps the file would change, or crash us, with it.
    on_device = {
        name: tensor.to(device, dtype if name in learned else None, copy=True) for name, tensor in weights.items()
    }
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
    files = open_vae(source, locate(source.removeprefix(SEEDED), "vae.vae_pretrained", "vae"), kind.__name__)
    model = _empty_model(_known_keys(files.config, source, kind), source, kind)
    check_geometry(model, shape, source)
    if (entries := files.entries) is None:
        return model, _seeded_weights(model)
    needed = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    refuse_misfit(entries, {files.name(name): size for name, size in needed.items()}, source, "this VAE")
    return model, {name: entries[files.name(name)].read() for name in needed}


def new_model(folder: str | Path, seed: int) -> Model:
    """A VAE to train, in the shape of `folder`'s config.json: float32, on the CPU, a function of the seed.

    It starts as one that knows nothing of time: only the newest tap of each temporal kernel is not zero, and the
    temporal strides pick and repeat frames. Random taps would have to be unlearned on clips, where steps are dear.
    Kernels have the variance 1 / fan-in of that tap, and the posterior starts narrow (standard deviation 0.05): with
    torch's smaller kernels and a posterior of 1 the decoder learns to ignore its latents and never recovers.

    Raises:
        InputError: there is no such config, or it makes no Wan VAE.
    """
    files = open_vae(SEEDED, Path(folder), WAN.__name__)
    shape = _known_keys(files.config, str(folder), WAN)
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
    """Rename tensors to the key names of `Wan2.1_VAE.pth`, from diffusers' names (two residual blocks a level).

    Each keeps its shape, dtype and memory.
    """
    return {wan_original_name(name): tensor for name, tensor in weights.items()}


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
    check_vae_config(model.config, shape, source)


def _known_keys(config: dict[str, Any], source: str, kind: Kind) -> dict[str, Any]:
    """The config, all of whose keys the class takes."""
    known = inspect.signature(kind.__init__).parameters
    for key in config:
        if key not in known:
            raise InputError(f"{source}: config.json: unknown key {key}{did_you_mean(key, known)}")
    return config


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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
