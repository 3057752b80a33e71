"""The base model's trajectories from noise to video, which the ODE stage learns from: prompts in, a folder out.

    python train_video_scripts/generate_ode_pairs.py                            # the small default, on any machine
    torchrun --nproc_per_node=8 train_video_scripts/generate_ode_pairs.py \\
        --config_path configs/sana_video_config/longsana/480ms/ode_pairs.yaml --txt_file FILE --out output/LongSANA

Any setting of the config can be given as well: `--pairs.causal true`, or `pairs.causal=true`. Stopped at any moment,
the same command goes on. Exit status: 0 the folder is whole, 1 the disk is full or broken, 2 bad input.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm.contrib.logging import logging_redirect_tqdm

from longsana.config import leaf_keys, load_config
from longsana.data.prompts import Prompt
from longsana.runtime.commandline import Parser, run_command, whole
from longsana.runtime.distributed import World, keep_freed_memory, set_threads
from longsana.runtime.files import check_writable, expanded
from longsana.runtime.hub import locate
from longsana.sampling.checks import check_weights, seeded_sources, select_prompts
from longsana.training.config import OdePairsConfig
from longsana.training.pairs import USED, check_pairs, check_settings, distinct_prompts, teacher_config

log = logging.getLogger("longsana")

DEFAULT_CONFIG = "configs/sana_video_config/longsana/shapes/ode_pairs.yaml"
SETTING_FLAGS = {"txt_file": "sampling.txt_file", "out": "pairs.out"}


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(__doc__)
    parser.add_argument("--config_path", default=DEFAULT_CONFIG, help="YAML file (default: %(default)s)")
    parser.add_argument("--start_index", type=whole, default=0, help="first prompt, counted from 0")
    parser.add_argument("--end_index", type=whole, help="one past the last prompt")
    parser.add_threads()
    return parser.parse_command(arguments, SETTING_FLAGS, leaf_keys(OdePairsConfig))


@dataclass(frozen=True)
class Request:
    """A command line that has been checked."""

    config: OdePairsConfig
    prompts: list[Prompt]
    threads: int | None


def prepare(arguments: Sequence[str]) -> Request:
    """Read the command line, and check it as far as that goes without loading anything large."""
    options, settings = parse(arguments)
    config = load_config(locate(options.config_path, "the config"), settings, OdePairsConfig)
    check_settings([setting.partition("=")[0] for setting in settings], config)
    check_pairs(config)
    prompts = select_prompts(teacher_config(config), options.start_index, options.end_index)
    distinct = distinct_prompts(config, prompts)
    check_weights(teacher_config(config), sections=USED)
    check_writable(expanded(config.pairs.out), "--out")
    return Request(config, distinct, options.threads)


def run(request: Request, world: World) -> int:
    from longsana.training.ode_pairs import generate_pairs  # brings diffusers and transformers, which take seconds

    device, threads = world.device(), set_threads(request.threads, world)
    keep_freed_memory()
    log.info(
        "%d trajectories to %s on %s, %d threads, %d processes",
        len(request.prompts),
        request.config.pairs.out,
        device,
        threads,
        world.size,
    )
    if seeded := [source for source in seeded_sources(teacher_config(request.config)) if not source.startswith("vae")]:
        log.warning("RANDOM WEIGHTS (%s): the trajectories lead to noise", ", ".join(seeded))
    with logging_redirect_tqdm():  # lines go above the bars, not through them
        generate_pairs(request.config, request.prompts, world=world, device=device)
    return 0


def main(arguments: Sequence[str]) -> int:
    return run_command(lambda world: prepare(arguments), run)
