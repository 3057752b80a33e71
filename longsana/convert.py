"""Weights from one layout to another: a network, or a Wan 2.1 VAE.

    python -m longsana.convert SANA_Video_2B_480p_LongLive.pth transformer --to diffusers
    python -m longsana.convert transformer model.pth --to upstream
    python -m longsana.convert Wan2.1_VAE.pth vae --to diffusers

SRC is any file or folder that the inference command reads (also hf://OWNER/REPO/FILE), DST a folder for diffusers, else
a file. Every tensor keeps its dtype; nothing is computed with them. Beside the weights lies a model card.
Exit status: 0 it is there, 1 the disk is full or broken, 2 bad input.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    from longsana.runtime import stop

    stop.catch()  # before the imports below, which take seconds

import torch

from longsana.config import ARCHITECTURES, InferenceConfig, ModelConfig, load_config
from longsana.models.past import LEARNED
from longsana.runtime.commandline import Parser, run_command, typed_path
from longsana.runtime.distributed import World
from longsana.runtime.errors import InputError
from longsana.runtime.hub import locate
from longsana.weights.files import NETWORKS, PIPELINE_PART, open_checkpoint, weights_file
from longsana.weights.names import (
    BASE_CLASS,
    CAUSAL_CLASS,
    DECAY_LOGIT,
    chosen_past,
    diffusers_config,
    from_diffusers_config,
)
from longsana.weights.network import LAYOUTS, Layout, read_weights, save_checkpoint, written_config
from longsana.weights.run_folder import check_content, is_checkpoint
from longsana.weights.writing import check_target, write_weights

log = logging.getLogger("longsana")

VAE_CLASS = "AutoencoderKLWan"
VAE_LAYOUTS = ("upstream", "diffusers")
MODEL_CARD = """\
# {title}

{what}, {layout} layout: {count:,} parameters, {dtypes}.

Converted from `{source}` by `python -m longsana.convert`: every tensor that this layout has a place for, as it was.
Licence and use are those of the source.
"""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.prog = "python -m longsana.convert"
    parser.add_argument("source", metavar="SRC", help="a checkpoint, a folder of one, or hf://OWNER/REPO/FILE")
    parser.add_argument("target", metavar="DST", type=typed_path, help="a folder for diffusers, else a file")
    parser.add_argument("--to", choices=list(LAYOUTS), required=True)
    parser.add_argument("--config", help="YAML of the network, if it is not the published one at 480p")
    parser.add_argument("--key", choices=NETWORKS, default=NETWORKS[0], help="of a training checkpoint: the network")
    parser.add_argument(
        "--causal", action="store_true", help="to diffusers: a LongSANA network, which samples chunk by chunk"
    )
    parser.add_argument("--force", action="store_true", help="replace what is there")
    return parser.parse_args(arguments)


def prepare(arguments: Sequence[str], world: World) -> argparse.Namespace:
    options = parse(arguments)
    if world.size > 1:
        raise InputError("several processes: a conversion is the work of one; start it without a launcher")
    options.path = locate(options.source, "SRC", PIPELINE_PART)
    options.vae = is_vae(options.path, options.key)
    if options.vae and options.to not in VAE_LAYOUTS:
        raise InputError(f"--to {options.to}: this is a VAE, for which there are {' and '.join(VAE_LAYOUTS)}")
    check_target(options.target, options.to, "DST", force=options.force, card=True)
    options.target = options.target.absolute()
    file = weights_file(options.path).resolve()
    if options.target.resolve() in (options.path.resolve(), file, file.parent):
        raise InputError(f"DST {options.target}: is SRC, or where it lies")
    if options.to == "trainer":
        log.warning(
            "a trainer's file with one network, the %s; export.py keeps those of a run, and its step", options.key
        )
    return options


def is_vae(path: Path, key: str) -> bool:
    """Whether these are a Wan VAE's weights, by a diffusers folder's config or by names in a file.

    Raises:
        InputError: they are of a VAE that has one layout alone.
    """
    kind = written_config(path / "config.json").get("_class_name") if path.is_dir() else None
    if kind is None:
        entries = open_checkpoint(weights_file(path), key, digests=False)
        return any(name.startswith("encoder.") for name in entries)
    if str(kind).startswith("Autoencoder") and kind != VAE_CLASS:
        raise InputError(f"SRC {path}: an {kind}, which has no other layout; {VAE_CLASS} has")
    return bool(kind == VAE_CLASS)


def network_config(options: argparse.Namespace, written: dict[str, Any]) -> ModelConfig:
    """Describe the network in SRC: by --config, else its own config (`written`: its diffusers one), else as the
    published one; in any case with learned factors of its past if they are there."""
    config = _network_config(options, written)
    learned = DECAY_LOGIT in open_checkpoint(weights_file(options.path), options.key)
    return replace(config, state_decay=LEARNED) if learned else config


def _network_config(options: argparse.Namespace, written: dict[str, Any]) -> ModelConfig:
    if options.config is not None:
        config: InferenceConfig = load_config(locate(options.config, "--config"))
        return config.model
    if is_checkpoint(options.path):
        from longsana.training.export import network_configs  # torch.distributed comes with it

        return network_configs(options.path)[options.key]
    if written.get("_class_name") in (BASE_CLASS, CAUSAL_CLASS):
        return from_diffusers_config(diffusers_config(ModelConfig()) | written)
    return ModelConfig()


def run(options: argparse.Namespace) -> int:
    path, target, layout = options.path, options.target, options.to
    if options.vae:
        _convert_vae(path, target, layout, options.source)
    else:
        if is_checkpoint(path):
            log.info("%s: reading all of it, to compare its files with their digests", path)
            check_content(path)
        written = written_config(weights_file(path))
        config = network_config(options, written)
        try:
            state_dict = read_weights(path, config, key=options.key)
        except InputError as error:
            own = options.config or written.get("_class_name") in (BASE_CLASS, CAUSAL_CLASS)
            remedy = "" if own else "; a network of another size needs its YAML: --config"
            raise InputError(f"{error}{remedy}") from error
        dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in state_dict.values()}
        count = sum(tensor.numel() for tensor in state_dict.values())
        card = _card(target, layout, options.source, _named(config, options.key), count, dtypes)
        causal = options.causal or written.get("_class_name") == CAUSAL_CLASS
        write_weights(
            target,
            layout,
            lambda to: save_checkpoint(state_dict, to, layout, config, causal=causal, consume=True),
            card,
        )
    log.info("%s: %s, from %s", target, layout, options.source)
    return 0


def _convert_vae(path: Path, target: Path, layout: Layout, source: str) -> None:
    from longsana.config import VAEConfig
    from longsana.encoders.geometry import geometry
    from longsana.encoders.vae_files import convert_model  # brings diffusers, which takes seconds

    entries = open_checkpoint(weights_file(path), NETWORKS[0]).values()
    count = sum(torch.Size(entry.shape).numel() for entry in entries)
    card = _card(target, layout, source, "Wan 2.1 VAE", count, {entry.dtype for entry in entries})
    shape = geometry(VAEConfig())
    write_weights(target, layout, lambda to: convert_model(str(path), shape, to, layout), card)


def _named(config: ModelConfig, key: str) -> str:
    """A network by its size, as `model` may be the name of a larger one whose sizes a YAML changed."""
    size = config.architecture()
    name = config.model if ARCHITECTURES[config.model] == size else "LongSANA"
    past = "".join(f", {setting} {value}" for setting, value in chosen_past(config).items())
    return f"Network {name} ({key}), {size.depth} blocks of width {size.hidden_size}, patch {size.patch_size}{past}"


def _card(target: Path, layout: Layout, source: str, what: str, count: int, dtypes: set[str]) -> str:
    return MODEL_CARD.format(
        title=target.name, what=what, layout=layout, count=count, dtypes=", ".join(sorted(dtypes)), source=source
    )


def main(arguments: Sequence[str]) -> int:
    return run_command(
        lambda world: prepare(arguments, world),
        lambda options, world: run(options),
        after_stop="nothing was written; give the same command again",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
