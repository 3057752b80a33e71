"""The network that a config names, with its weights."""

from __future__ import annotations

import dataclasses
import logging
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from longsana.config import Architecture, Dtype, ModelConfig
from longsana.models.dit import LongSanaDiT
from longsana.runtime.arguments import Number, Whole, settled
from longsana.runtime.defaults import plain_defaults
from longsana.runtime.errors import InputError
from longsana.runtime.gpu import has_bfloat16
from longsana.runtime.hub import SEEDED, locate
from longsana.weights.names import BASE_CLASS, CAUSAL_CLASS, chosen_past, written_past
from longsana.weights.network import load_weights
from longsana.weights.what_is import PIPELINE_PART, what_is

log = logging.getLogger(__name__)


def resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """The dtype that a setting asks for on this device; see `Dtype`. A GPU without bfloat16 takes float32 for it."""
    on_gpu = device.type == "cuda"
    if dtype == "auto":
        dtype = "bfloat16" if on_gpu else "float32"
    if dtype == "bfloat16" and on_gpu and not has_bfloat16():
        return torch.float32
    resolved: torch.dtype = getattr(torch, dtype)
    return resolved


@plain_defaults()
def build_model(config: ModelConfig, *, device: torch.device | str, dtype: torch.dtype) -> LongSanaDiT:
    """The network on `device` in `dtype`, in eval mode, with the weights that `config.load_from` names.

    Raises:
        InputError: the config makes no network, or its weights are missing or do not fit.
    """
    model = empty_model(config).to(dtype).eval()
    if config.load_from.startswith(SEEDED):
        seed = seed_of(config.load_from)
        model.to_empty(device=device)
        model.init_weights(seed)
        log.info("%s: random weights from seed %d", config.model, seed)
    else:
        path = locate(config.load_from, "the checkpoint (model.load_from)", part=PIPELINE_PART)
        load_weights(model, path, key=config.checkpoint_key, device=device, dtype=dtype)
        log.info("%s: weights from %s", config.model, path)
        _compare_past(path, config)
    unfilled = [name for name, tensor in chain(model.named_parameters(), model.named_buffers()) if tensor.is_meta]
    assert not unfilled, f"neither a checkpoint nor a seed fills {unfilled}"
    return model


def _compare_past(path: Path, config: ModelConfig) -> None:
    """Say so if weights were written for another past than the config's, which is taken."""
    written = what_is(path).config
    if written.get("_class_name") not in (BASE_CLASS, CAUSAL_CLASS):
        return
    there, here = chosen_past(ModelConfig(**written_past(written))), chosen_past(config)
    if there != here:
        log.warning("%s was written with %s; the settings here are %s", path, _told(there), _told(here))


def _told(past: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in past.items()) or "those of the whole past"


def empty_model(config: ModelConfig) -> LongSanaDiT:
    """The network on the meta device: its names and shapes, without memory.

    Raises:
        InputError: the config makes no network.
    """
    config = settled(config, "model")
    sizes = {field.name: getattr(config.architecture(), field.name) for field in dataclasses.fields(Architecture)}
    for name in ("in_channels", "linear_head_dim", "caption_channels", "caption_length"):
        sizes[name] = getattr(config, name)
    for name, size in sizes.items():
        for number in size if isinstance(size, tuple) else (size,):
            Whole(1, 10**6).settle(f"model.{name}", number)
    Number(above=0, most=1000).settle("model.mlp_ratio", config.mlp_ratio)
    try:
        with torch.device("meta"):
            return LongSanaDiT(config)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"model: {error}") from error


def seed_of(load_from: str) -> int:
    """The seed of random weights.

    Raises:
        InputError: it is no whole number.
    """
    digits = load_from.removeprefix(SEEDED)
    if not digits.isdecimal() or int(digits) >= 2**63:
        raise InputError(f"model.load_from={load_from}: the seed must be a whole number below 2^63, as in seeded:0")
    return int(digits)
