"""A training checkpoint as one safetensors file, in the public layout, as a trainer's file, or as a diffusers folder.

    python train_video_scripts/export.py output/run/checkpoint_model_000200 --out model.safetensors --layout safetensors
    python train_video_scripts/export.py output/run/checkpoint_model_000200 --out transformer --layout diffusers \\
        --weights ema --dtype bfloat16

The inference command reads all of them (--model_path), and the checkpoint's folder itself.
Exit status: 0 it is there, 1 the disk is full or broken, 2 bad input.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from longsana.commands.conversion import CONFIG, DTYPES, LORA, Conversion
from longsana.runtime.commandline import Parser, run_command, typed_path
from longsana.runtime.distributed import World
from longsana.runtime.errors import InputError
from longsana.weights.files import networks_in
from longsana.weights.network import LAYOUTS
from longsana.weights.what_is import what_is

KEYS = {"raw": "generator", "ema": "generator_ema", "critic": "critic"}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", type=typed_path, help="folder of a run, checkpoint_model_...")
    parser.add_argument("--out", type=typed_path, required=True, help="a folder for diffusers, else a file")
    parser.add_argument("--layout", choices=[*LAYOUTS, LORA], required=True)
    parser.add_argument("--weights", choices=list(KEYS), help="the network (default: raw; trainer: all of them)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    return parser.parse_args(arguments)


def prepare(arguments: Sequence[str], world: World) -> Conversion:
    options = parse(arguments)
    if world.size > 1:
        raise InputError("several processes: an export is the work of one; start it without a launcher")
    checkpoint, weights = options.checkpoint, options.weights
    if what_is(checkpoint, "name a checkpoint folder of training").kind != "checkpoint":
        raise InputError(f"{checkpoint}: no checkpoint folder of training (checkpoint_model_..., with {CONFIG} in it)")
    if options.layout == "trainer" and weights is not None:
        raise InputError(f"--weights {weights}: --layout trainer holds all networks; leave it out")
    there = networks_in(checkpoint)
    if KEYS[weights or "raw"] not in there:
        has = ", ".join(name for name, key in KEYS.items() if key in there)
        raise InputError(f"--weights {weights or 'raw'}: {checkpoint} holds no such network; it has {has}")
    conversion = Conversion(
        source=str(checkpoint),
        path=checkpoint,
        out=options.out,
        layout=options.layout,
        option="--out",
        key=KEYS[weights] if weights else None,
        dtype=getattr(torch, options.dtype),
        force=options.force,
    )
    conversion.check()
    return conversion


def run(conversion: Conversion, world: World) -> int:
    conversion.run()
    return 0


def main(arguments: Sequence[str]) -> int:
    return run_command(
        lambda world: prepare(arguments, world),
        run,
        after_stop="nothing was written; give the same command again",
    )
