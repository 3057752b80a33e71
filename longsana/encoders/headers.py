"""Files of VAEs and text encoders, opened without reading them: what headers and config.json tell of the weights.

Neither diffusers nor transformers is needed, whose imports take seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from longsana.config import VAEConfig
from longsana.encoders.geometry import VAEGeometry, geometry
from longsana.encoders.layouts import (
    LTX2_CLASS,
    LTX2_DEFAULTS,
    STRIDES,
    WAN_CLASS,
    WAN_DEFAULTS,
    WAN_WIDTH,
    Shape,
    gemma_tensors,
    ltx2_tensors,
    wan_original_name,
    wan_tensors,
)
from longsana.runtime.errors import InputError
from longsana.runtime.foreign import read_json, refuse_stand_in
from longsana.runtime.hub import SEEDED
from longsana.weights.files import Entry, open_weights
from longsana.weights.fit import kind, misfit
from longsana.weights.what_is import DIFFUSERS_WEIGHTS, SUFFIXES, TRANSFORMERS_WEIGHTS, Weights, what_is

CLASSES = {"WanVAE": WAN_CLASS, "LTX2VAE_diffusers": LTX2_CLASS}
"""What diffusers calls the network of each vae.vae_type."""
DEFAULTS = {WAN_CLASS: WAN_DEFAULTS, LTX2_CLASS: LTX2_DEFAULTS}
TOKENIZERS = ("tokenizer.json", "tokenizer.model")


class VAEFiles(NamedTuple):
    """The files of a VAE.

    config: of its network, as its class takes it. entries: its tensors by the file's names; None for random ones, and
    where headers do not tell them. original: whether these names are those of `Wan2.1_VAE.pth`.
    """

    config: dict[str, Any]
    entries: dict[str, Entry] | None
    original: bool

    def name(self, name: str) -> str:
        """Translate diffusers' name of a tensor to the file's."""
        return wan_original_name(name) if self.original else name


def open_vae(source: str, path: Path, class_name: str, *, headers_only: bool = False) -> VAEFiles:
    """Tell what `source` (vae.vae_pretrained) at `path` is: a diffusers folder, or Wan's original file.

    Raises:
        InputError: there is no config, another class's, or no weights to be chosen; or a file is damaged.
    """
    if source.startswith(SEEDED):
        return VAEFiles(_vae_config(path, class_name), None, original=False)
    if path.is_dir():
        folder = vae_folder(path)
        config = _vae_config(folder, class_name)
        found = what_is(folder, f"one must have the usual name, {DIFFUSERS_WEIGHTS}")
        return VAEFiles(config, _open(found, headers_only), original=False)
    if class_name != WAN_CLASS:
        raise InputError(
            f"vae.vae_pretrained={source}: a file; an {class_name} is a diffusers folder with its config.json"
        )
    entries = _open(what_is(path), headers_only)
    first = (entries or {}).get("encoder.conv1.bias")  # all but the width is as published
    width = first.shape[0] if first is not None and len(first.shape) == 1 and first.shape[0] else WAN_WIDTH
    return VAEFiles({"base_dim": width}, entries, original=True)


def vae_folder(path: Path) -> Path:
    """The folder of a VAE itself, of its own or of a whole pipeline's folder."""
    return path / "vae" if (path / "vae").is_dir() else path


def check_vae(config: VAEConfig, path: Path) -> None:
    """Refuse a VAE whose headers tell that it is none of the kind, or not whole. path: where vae_pretrained lies.

    Raises:
        InputError: what is wrong.
    """
    source, class_name = config.vae_pretrained, CLASSES[config.vae_type]
    files = open_vae(source, path, class_name, headers_only=True)
    check_vae_config({**DEFAULTS[class_name], **files.config}, geometry(config), source)
    if files.entries is None:
        return
    tensors: Callable[[Mapping[str, Any]], dict[str, Shape] | None]
    tensors = wan_tensors if class_name == WAN_CLASS else ltx2_tensors
    try:
        needed = tensors(files.config)
    except Exception as error:  # whatever sizes that make no network raise
        raise InputError(f"{source}: its config makes no {class_name}: {type(error).__name__}: {error}") from error
    if needed is not None:
        refuse_misfit(files.entries, {files.name(name): shape for name, shape in needed.items()}, source, "this VAE")


def refuse_misfit(entries: Mapping[str, Entry], needed: Mapping[str, Shape], source: str, whose: str) -> None:
    """Refuse tensors that are not exactly those of a network; all that is wrong is told.

    whose: what the network is called.

    Raises:
        InputError: they are not.
    """
    found = {name: entry.kind for name, entry in entries.items()}
    if told := misfit(found, {name: kind(shape) for name, shape in needed.items()}):
        raise InputError(f"{source}: not the weights of {whose}: {told}")


def check_vae_config(found: Mapping[str, Any], shape: VAEGeometry, source: str) -> None:
    """Make sure that a config is a VAE's of this shape that can be decoded as a stream.

    found: all values of the class, those that config.json leaves out too.

    Raises:
        InputError: it is not; `source` is what the message calls it.
    """
    try:
        (_check_wan if "z_dim" in found else _check_ltx2)(found, shape, source)
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise InputError(
            f"{source}: its config makes no video VAE: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


def _check_wan(found: Mapping[str, Any], shape: VAEGeometry, source: str) -> None:
    strides = VAEGeometry(found["z_dim"], 2 ** sum(found["temperal_downsample"]), 2 ** (len(found["dim_mult"]) - 1))
    colours = found["in_channels"], found["out_channels"]
    if strides != shape or found["patch_size"] is not None or colours != (3, 3):
        raise InputError(
            f"{source}: not a Wan 2.1 VAE: its config gives {strides}, patch_size={found['patch_size']}, "
            f"{colours[0]} -> {colours[1]} colours; needed are {shape}, no patches, 3 -> 3"
        )
    for name in ("latents_mean", "latents_std"):
        values = found.get(name)  # the class has the published ones
        if values is not None and (len(values) != shape.channels or not all(map(math.isfinite, values))):
            raise InputError(f"{source}: {name} must be {shape.channels} finite numbers")
        if name == "latents_std" and values is not None and min(values) <= 0:
            raise InputError(f"{source}: {name} must be above 0")


def _check_ltx2(found: Mapping[str, Any], shape: VAEGeometry, source: str) -> None:
    scaled = found["spatio_temporal_scaling"]
    kinds = found["downsample_type"]
    each = [scaled] * len(kinds) if isinstance(scaled, bool) else scaled
    factors = [STRIDES[kind] for kind, wanted in zip(kinds, each, strict=False) if wanted]
    own = VAEGeometry(
        found["latent_channels"],
        found["patch_size_t"] * math.prod(time for time, _ in factors),
        found["patch_size"] * math.prod(space for _, space in factors),
        shape.smallest,
    )
    if own != shape or (found["in_channels"], found["out_channels"]) != (3, 3):
        raise InputError(f"{source}: not an LTX-2 VAE: its config gives {own}; needed is {shape}, and 3 -> 3 colours")
    noise = found["decoder_inject_noise"]
    if found["timestep_conditioning"] or (any(noise) if isinstance(noise, list | tuple) else noise):
        raise InputError(f"{source}: its decoder takes a timestep or noise; only plain ones can be used")
    if not found["encoder_causal"]:
        raise InputError(
            f"{source}: encoder_causal=False: a clip's latents would depend on the frames after it; must be true, as "
            "published"
        )


def _vae_config(folder: Path, class_name: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: no config.json in this folder; is it a diffusers VAE?")
    values = read_json(path)
    if not isinstance(values, dict) or values.get("_class_name") != class_name:
        raise InputError(f"{path}: not the config of an {class_name}")
    return {key: value for key, value in values.items() if not key.startswith("_")}


def check_text_encoder(folder: Path, caption_channels: int, *, seeded: bool) -> None:
    """Refuse a text encoder whose headers tell that it is no Gemma 2 of this width, or not whole.

    seeded: the weights are random, and only config and tokenizer are in the folder.

    Raises:
        InputError: what is wrong.
    """
    config = check_text_folder(folder, caption_channels)
    if not seeded:
        open_text_weights(folder, config, headers_only=True)


def check_text_folder(folder: Path, caption_channels: int) -> dict[str, Any]:
    """Read the config.json of a text encoder's folder.

    Raises:
        InputError: it is none of a Gemma 2 of this width, or there is no tokenizer.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: no config.json; expected a transformers folder with a Gemma 2 text encoder")
    config = read_json(path)
    if not isinstance(config, dict) or config.get("model_type") != "gemma2":
        kind = config.get("model_type") if isinstance(config, dict) else None
        raise InputError(f"{folder}: model_type is '{kind}'; the text encoder must be a gemma2")
    width = _gemma(config, folder)["norm.weight"][0]
    if width != caption_channels:
        raise InputError(
            f"{folder}: this text encoder is {width} wide, but model.caption_channels is {caption_channels}; the two "
            "must agree"
        )
    # Without these, transformers makes up an empty tokenizer.
    there = [folder / name for name in TOKENIZERS if (folder / name).is_file()]
    if not there:
        raise InputError(f"{folder}: no tokenizer.json; expected a transformers folder with its tokenizer")
    for file in there:
        with file.open("rb") as stream:
            refuse_stand_in(file, stream.read(24))
        if file.suffix == ".json":
            found = read_json(file)
            if not isinstance(found, dict) or not isinstance(found.get("model"), dict):
                raise InputError(f"{file}: not a tokenizer (no 'model' in it); get this file again")
    return config


def open_text_weights(
    folder: Path, config: Mapping[str, Any], *, headers_only: bool = False
) -> dict[str, Entry] | None:
    """The tensors of a Gemma 2 by Gemma2Model's names; None where headers do not tell them.

    Raises:
        InputError: the folder has no weights, or several and none with the usual name; a file is damaged; or its
            tensors are not exactly those of the config.
    """
    if config.get("quantization_config") is not None:
        raise InputError(f"{folder}: quantised weights (quantization_config) cannot be used here; get the plain ones")
    if not any(file.suffix in SUFFIXES for file in folder.iterdir()):
        raise InputError(f"{folder}: no *.safetensors weights; for random ones use text_encoder_name=seeded:{folder}")
    entries = _open(what_is(folder, f"one must have the usual name, {TRANSFORMERS_WEIGHTS}"), headers_only)
    if entries is None:
        return None
    # A Gemma2ForCausalLM brings its head along.
    found = {name.removeprefix("model."): entry for name, entry in entries.items() if not name.startswith("lm_head.")}
    refuse_misfit(found, _gemma(config, folder), str(folder), "its config.json")
    return found


def _gemma(config: Mapping[str, Any], folder: Path) -> dict[str, Shape]:
    try:
        return gemma_tensors(config)
    except ValueError as error:
        raise InputError(f"{folder / 'config.json'}: its sizes make no network: {error}") from error


def _open(found: Weights, headers_only: bool) -> dict[str, Entry] | None:
    return None if headers_only and not found.headers_tell else open_weights(found.file)
