"""Train a stage of LongSANA; the same command goes on where it was stopped.

    torchrun --nproc_per_node=8 train_video_scripts/train_longsana.py \\
        --config_path configs/sana_video_config/longsana/480ms/self_forcing.yaml --logdir output/self_forcing

Any setting of the config can be given as well: `train.max_iters=20`, or `--train.max_iters 20`.
Exit status: 0 trained to the end, 1 failed, 2 bad input, 128 + n stopped by signal n after saving.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from longsana.config import leaf_keys, load_config, render_config
from longsana.runtime.commandline import Parser, run_command, typed_path
from longsana.runtime.distributed import World, keep_freed_memory, set_threads
from longsana.runtime.hub import locate
from longsana.training.checks import check_data, check_sources, check_training, micro_batches_of
from longsana.training.config import TrainingConfig
from longsana.training.published import TRAINING

FLAGS = {"max_iters": "train.max_iters"}
"""Flags that are short for a setting."""


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and every setting given on the command line as `section.key=value`."""
    parser = Parser(__doc__)
    parser.add_argument("--config_path", required=True, help="YAML file of a stage")
    parser.add_argument(
        "--logdir", type=typed_path, help="the run's folder (default: output/NAME_OF_FOLDER/NAME_OF_CONFIG)"
    )
    parser.add_argument("--no_save", action="store_true", help="write no checkpoints")
    parser.add_argument("--no_visualize", action="store_true", help="sample no validation videos")
    parser.add_argument("--no-auto-resume", action="store_true", help="start anew; what is in logdir is moved aside")
    parser.add_argument("--allow-config-change", action="store_true", help="go on although the config differs")
    parser.add_argument("--dry_run", action="store_true", help="print config, sizes and a memory estimate, and stop")
    parser.add_argument("--disable-wandb", action="store_true", help="log to metrics.jsonl alone")
    parser.add_argument("--wandb_name", help="the run's name in wandb (default: the config's folder)")
    parser.add_argument("--wandb-save-dir", type=typed_path, default=Path("wandb"), help="(default: %(default)s)")
    parser.add_threads()
    return parser.parse_command(arguments, FLAGS, [*leaf_keys(TrainingConfig), *TRAINING.rules, *TRAINING.references])


@dataclass(frozen=True)
class Request:
    """A command line that has been checked."""

    config: TrainingConfig
    options: argparse.Namespace
    path: Path


def prepare(arguments: Sequence[str], world: World) -> Request:
    """Read the command line, and check it as far as that goes without loading anything large."""
    options, settings = parse(arguments)
    path = locate(options.config_path, "--config_path")
    config: TrainingConfig = load_config(path, settings, TrainingConfig)
    check_training(config)
    micro_batches_of(config, world)
    if not options.dry_run:
        check_sources(config, visualize=not options.no_visualize)
        check_data(config)
    return Request(config, options, path)


def run(request: Request, world: World) -> int:
    config, options, path = request.config, request.options, request.path
    if options.dry_run:
        if world.is_main:
            print(render_config(config))
            from longsana.training.estimate import estimate  # diffusers comes with it, which takes seconds

            print(estimate(config, world.size, local_size=world.local_size).table())
        return 0

    from longsana.training.loop import TrainingFailed
    from longsana.training.run import RunOptions, train  # brings diffusers and transformers, which take seconds

    set_threads(options.threads, world)
    keep_freed_memory()
    choices = RunOptions(
        logdir=options.logdir or Path("output") / path.parent.name / path.stem,
        name=options.wandb_name or path.parent.name,
        save=not options.no_save,
        visualize=not options.no_visualize,
        wandb=not options.disable_wandb,
        wandb_dir=options.wandb_save_dir,
        auto_resume=not options.no_auto_resume,
        allow_config_change=options.allow_config_change,
    )
    try:
        with logging_redirect_tqdm():  # lines go above the bar, not through it
            return train(config, choices, world)
    except TrainingFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except (torch.OutOfMemoryError, MemoryError) as error:
        detail = (str(error).splitlines() or ["on the host"])[0]
        print(
            f"failed (process {world.rank}): out of memory ({detail}); lower "
            "train.batch_size, sampling.height and width or rollout.num_training_frames, set "
            "train.gradient_checkpointing=true and train.text_encoder=free, or use more processes",
            file=sys.stderr,
        )
        return 1


def main(arguments: Sequence[str]) -> int:
    # Training connects by itself, when it knows its device.
    return run_command(lambda world: prepare(arguments, world), run, connect=lambda world: None)
