"""Weights from one layout to another: a network, or a Wan 2.1 VAE. `longsana convert` is the same command.

    python -m longsana.convert SANA_Video_2B_480p_LongLive.pth transformer --to diffusers
    python -m longsana.convert transformer model.pth --to upstream
    python -m longsana.convert Wan2.1_VAE.pth vae --to diffusers
    python -m longsana.convert RUN/checkpoint_model_000200 lora.safetensors --to lora
    python -m longsana.convert longsana.safetensors own.safetensors --to safetensors --fuse lora.safetensors

SRC is any file or folder that the inference command reads (also hf://OWNER/REPO/FILE), DST a folder for diffusers, else
a file. Every tensor keeps its dtype without --dtype; nothing is computed with them but the sum that --fuse asks
for, once for each weight. Beside the weights lies a model card.
Exit status: 0 it is there, 1 the disk is full or broken, 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

if __name__ == "__main__":
    from longsana.runtime.process import begin

    begin()  # before the imports below, which take seconds

import torch

from longsana.commands.conversion import DTYPES, LORA, Conversion
from longsana.runtime.commandline import Parser, run_command, typed_path
from longsana.runtime.distributed import World
from longsana.runtime.errors import InputError
from longsana.runtime.hub import locate
from longsana.weights.files import NETWORKS
from longsana.weights.network import LAYOUTS
from longsana.weights.what_is import PIPELINE_PART


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("source", metavar="SRC", help="a checkpoint, a folder of one, or hf://OWNER/REPO/FILE")
    parser.add_argument("target", metavar="DST", type=typed_path, help="a folder for diffusers, else a file")
    parser.add_argument("--to", choices=[*LAYOUTS, LORA], required=True)
    parser.add_argument("--config", help="YAML of the network, if it is not the published one at 480p")
    parser.add_argument(
        "--key",
        choices=NETWORKS,
        help="the network of a training checkpoint (default: generator; of a run's, to trainer: all of them)",
    )
    parser.add_argument(
        "--causal", action="store_true", help="to diffusers: a LongSANA network, which samples chunk by chunk"
    )
    parser.add_argument(
        "--fuse",
        metavar="LORA",
        action="append",
        help="add a LoRA to the weights: its file, or a checkpoint folder of its training",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="what tensors become, of a network or a LoRA (default: each keeps its own)"
    )
    parser.add_argument("--force", action="store_true", help="replace what is there")
    return parser.parse_args(arguments)


def prepare(arguments: Sequence[str], world: World) -> Conversion:
    options = parse(arguments)
    if world.size > 1:
        raise InputError("several processes: a conversion is the work of one; start it without a launcher")
    if len(options.fuse or ()) > 1:
        raise InputError("--fuse: given twice; add one LoRA at a time, the second to what the first has made")
    conversion = Conversion(
        source=options.source,
        path=locate(options.source, "SRC", PIPELINE_PART),
        out=options.target,
        layout=options.to,
        option="DST",
        key=options.key,
        config=options.config,
        causal=options.causal,
        force=options.force,
        card=True,
        fuse=options.fuse[0] if options.fuse else None,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
