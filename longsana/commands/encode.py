"""Clips of one's own with captions in, shards of latents out, which flow matching trains on.

    longsana encode FOLDER --out SHARDS --summary_only                  # a look first: lengths, sizes, motion, pictures
    torchrun --nproc_per_node=8 train_video_scripts/encode_clips.py FOLDER --out SHARDS \\
        --config_path configs/sana_video_config/Sana_2000M_480px_AdamW_fsdp.yaml

FOLDER comes first: mp4, webm and mov files in any folders of it, or a WebDataset's tars. Any setting of the config can
be given as well: `sampling.fps=16`. Stopped at any moment, the same command goes on.

Exit status: 0 the shards are whole; 1 they are whole without films that are broken, which are listed, or could not be
written; 2 bad input, or no clip; 128 + n stopped by signal n.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from tqdm.contrib.logging import logging_redirect_tqdm

from longsana.config import leaf_keys, load_config
from longsana.data.sources import BESIDE, NAMES, Source, find_sources
from longsana.data.survey import Facts, forget_found, survey, write_found, write_summary
from longsana.runtime.commandline import Parser, run_command, typed_path, whole
from longsana.runtime.distributed import World, keep_freed_memory, set_threads
from longsana.runtime.errors import InputError
from longsana.runtime.files import check_writable, hold_folder
from longsana.runtime.hub import locate
from longsana.sampling.checks import check_weights
from longsana.training.clips import (
    Sized,
    check_encoding,
    clip_frames,
    cut_and_sized,
    refuse_other_clips,
    refuse_other_cutting,
    shard_folders,
    with_whole_vae,
)
from longsana.training.config import TrainingConfig

log = logging.getLogger("longsana")

DEFAULT_CONFIG = "configs/sana_video_config/longsana/shapes/base.yaml"


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=typed_path, help="where the clips are, or a tar")
    parser.add_argument("--out", type=typed_path, required=True, help="folder of the results")
    parser.add_argument(
        "--captions",
        default=BESIDE,
        help=f"{BESIDE} (NAME.txt or NAME.json), {NAMES} (the files'), or a CSV or JSON Lines file "
        "(default: %(default)s)",
    )
    parser.add_argument("--config_path", default=DEFAULT_CONFIG, help="YAML that will train (default: %(default)s)")
    parser.add_argument("--summary_only", action="store_true", help="write the summary, and encode nothing")
    parser.add_argument("--shard_size", type=whole, default=16, help="clips a file (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="float16", help="(default: %(default)s)"
    )
    parser.add_threads()
    return parser.parse_command(arguments, {}, leaf_keys(TrainingConfig))


@dataclass(frozen=True)
class Request:
    """A command line that has been checked."""

    config: TrainingConfig
    options: argparse.Namespace


def prepare(arguments: Sequence[str]) -> Request:
    """Read the command line, and check it as far as that goes without reading a film or loading anything large."""
    options, settings = parse(arguments)
    if options.shard_size < 1:
        raise InputError(f"--shard_size {options.shard_size}: must be at least 1")
    # YAMLs of base models say no stage; clips are for this one.
    path = locate(options.config_path, "--config_path")
    config = load_config(path, ["trainer=flow_matching", *settings], TrainingConfig)
    check_encoding(config)
    config = with_whole_vae(config)
    if not options.summary_only:
        check_weights(config, sections=("vae",))
    return Request(config, options)


def run(request: Request, world: World) -> int:
    options = request.options
    sources = world.broadcast(world.on_main(lambda: find_sources(options.folder, options.captions)) or [])
    with ExitStack() as stack:
        world.on_main(lambda: check_writable(options.out, "--out"))  # films that are refused leave no folder behind
        world.on_main(lambda: stack.enter_context(hold_folder(options.out, "--out")))
        world.on_main(lambda: refuse_other_cutting(request.config, options.out))
        with logging_redirect_tqdm():  # lines go above the bars, not through them
            return _run(request, sources, world)


def _run(request: Request, sources: Sequence[Source], world: World) -> int:
    config, options, frames = request.config, request.options, clip_frames(request.config)
    threads = set_threads(options.threads, world)
    log.info("%d films, %d threads, %d processes, results to %s", len(sources), threads, world.size, options.out)
    found = survey(sources, config.sampling.fps, options.out, world, threads)
    clips = cut_and_sized(config, sources, found)
    broken = [facts.problem for facts in found if facts.problem is not None]
    world.on_main(lambda: _refuse_replacing(request, clips, found))
    world.on_main(lambda: write_found(found, options.out))
    world.on_main(lambda: print(write_summary(found, clips, frames, options.out)))
    for problem in broken:
        log.warning("skipped: %s", problem)
    world.on_main(lambda: _refuse_none(request, clips, found))
    if not options.summary_only:
        from longsana.training.encoding import encode_clips  # diffusers comes with it, which takes seconds

        keep_freed_memory()
        device = world.device()
        log.info("%d clips of %d frames on %s", len(clips), frames, device)
        folders = encode_clips(
            config,
            clips,
            options.out,
            dtype=options.dtype,
            shard_size=options.shard_size,
            readers=threads,
            world=world,
            device=device,
        )
        for (height, width), folder in folders.items():
            log.info(
                "train on them: data.data_path=%s sampling.height=%d sampling.width=%d sampling.fps=%s",
                *(folder, height, width, config.sampling.fps),
            )
    return 1 if broken else 0


def _refuse_replacing(request: Request, clips: Sequence[Sized], found: Sequence[Facts]) -> None:
    """Refuse (InputError) other clips than those whose shards are there, before what describes them is replaced."""
    out = request.options.out
    if not shard_folders(out):
        return
    try:
        _refuse_none(request, clips, found)
        refuse_other_clips(request.config, clips, out)
    except InputError:
        forget_found(out)
        raise


def _refuse_none(request: Request, clips: Sequence[Sized], found: Sequence[Facts]) -> None:
    """Refuse (InputError) films of which none is whole and long enough."""
    if clips:
        return
    fps, frames = request.config.sampling.fps, clip_frames(request.config)
    broken = [facts.problem for facts in found if facts.problem is not None]
    told = f"{request.options.folder}: no clip of {frames} frames ({frames / fps:.1f} s) in it"
    if broken:
        told += f"; {len(broken)} of {len(found)} films are broken, the first: {broken[0]}"
    if len(broken) < len(found):
        longest = max(facts.seconds for facts in found)
        told += f"; the longest {'other ' if broken else ''}film has {longest:.1f} s: lower "
        told += "rollout.num_training_frames, or give longer films"
    raise InputError(told)


def main(arguments: Sequence[str]) -> int:
    return run_command(lambda world: prepare(arguments), run)
