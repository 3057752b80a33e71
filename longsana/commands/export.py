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

from longsana.runtime.commandline import Parser, run_command, typed_path
from longsana.runtime.distributed import World
from longsana.runtime.errors import InputError
from longsana.training.export import GROUPS, export
from longsana.weights.network import LAYOUTS


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", type=typed_path, help="folder of a run, checkpoint_model_...")
    parser.add_argument("--out", type=typed_path, required=True, help="a folder for diffusers, else a file")
    parser.add_argument("--layout", choices=list(LAYOUTS), required=True)
    parser.add_argument("--weights", choices=list(GROUPS), help="the network (default: raw; trainer: all of them)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    return parser.parse_args(arguments)


def prepare(arguments: Sequence[str], world: World) -> argparse.Namespace:
    options = parse(arguments)
    if world.size > 1:
        raise InputError("several processes: an export is the work of one; start it without a launcher")
    return options


def run(options: argparse.Namespace) -> int:
    export(
        options.checkpoint,
        options.out,
        options.layout,
        weights=options.weights,
        dtype=getattr(torch, options.dtype),
        force=options.force,
    )
    return 0


def main(arguments: Sequence[str]) -> int:
    return run_command(
        lambda world: prepare(arguments, world),
        lambda options, world: run(options),
        after_stop="nothing was written; give the same command again",
    )
