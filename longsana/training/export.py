"""A training checkpoint as the weights files that the world reads; one process, no process group."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from longsana.config import ModelConfig, load_config
from longsana.runtime.errors import InputError
from longsana.training.checkpoint import read_progress
from longsana.training.config import TrainingConfig
from longsana.weights.build import empty_model
from longsana.weights.files import NETWORKS, weights_file
from longsana.weights.names import OPTIONAL
from longsana.weights.network import Layout, load_weights, save_checkpoint
from longsana.weights.run_folder import SEPARATOR, check_content, is_checkpoint, open_tensors
from longsana.weights.writing import check_target, write_weights

log = logging.getLogger(__name__)

Weights = Literal["raw", "ema", "critic"]
GROUPS: dict[Weights, str] = {"raw": "generator", "ema": "generator_ema", "critic": "critic"}
CONFIG = "config.yaml"


def export(
    checkpoint: Path,
    out: Path,
    layout: Layout,
    *,
    weights: Weights | None = None,
    dtype: torch.dtype = torch.float32,
    force: bool = False,
) -> None:
    """Write one network of a checkpoint folder, or with the layout `trainer` all of them; whole or not at all.

    out: a folder for diffusers, else a file.
    weights: raw (None means that), ema or critic; not with trainer.
    force: replace what is at `out`.

    Raises:
        InputError: the checkpoint is not whole or lacks the network, or `out` exists or cannot be written.
    """
    folder = weights_file(checkpoint)  # a run's folder is an error that names its newest checkpoint
    if not is_checkpoint(folder):
        raise InputError(f"{checkpoint}: no checkpoint folder of training (checkpoint_model_..., with {CONFIG} in it)")
    if layout == "trainer" and weights is not None:
        raise InputError(f"--weights {weights}: --layout trainer holds all networks; leave it out")
    check_target(out, layout, "--out", force=force)
    log.info("%s: reading all of it, to compare its files with their digests", folder)
    check_content(folder)
    roles = network_configs(folder)
    group = GROUPS[weights or "raw"]
    others: dict[str, dict[str, Tensor]] = {}
    there = {name.partition(SEPARATOR)[0] for name in open_tensors(folder)}
    if group not in there:
        has = ", ".join(name for name, held in GROUPS.items() if held in there)
        raise InputError(f"--weights {weights}: {checkpoint} holds no such network; it has {has}")
    if layout == "trainer":
        for name in (name for name in NETWORKS[1:] if name in there):
            _check_same(roles["generator"], roles[name], name)
            others[name] = _read(folder, name, roles[name], dtype)
    state_dict = _read(folder, group, roles[group], dtype)
    step = int(read_progress(folder)["step"])
    write_weights(
        out,
        layout,
        lambda to: save_checkpoint(state_dict, to, layout, roles[group], others=others, step=step, consume=True),
    )
    log.info("%s: %s of step %d, %s, %s", out, ", ".join([group, *others]), step, layout, str(dtype)[6:])


def network_configs(folder: Path) -> dict[str, ModelConfig]:
    """Read the configs of the networks in a checkpoint folder, by their groups' names."""
    config = load_config(folder / CONFIG, schema=TrainingConfig)
    return {"generator": config.model, "generator_ema": config.model, "critic": config.fake_score}


def _read(folder: Path, group: str, config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    model = empty_model(config)
    load_weights(model, folder, key=group, dtype=dtype)
    return dict(model.state_dict())


def _check_same(config: ModelConfig, other: ModelConfig, name: str) -> None:
    """Refuse (InputError) networks that a trainer's file has no place for: all are of one shape, but scores, which have
    no past, may lack the factors of it."""
    own, others = ({key: value.shape for key, value in empty_model(it).state_dict().items()} for it in (config, other))
    if {key: shape for key, shape in own.items() if key in others or key not in OPTIONAL} != others:
        raise InputError(
            f"the {name} has another shape than the generator ({other.model}, {config.model}): "
            f"export it by itself, with --weights {name} and another layout"
        )
