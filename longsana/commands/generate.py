"""A file of prompts in, a folder of videos out.

    python inference_video_scripts/inference_sana_video.py                      # the small default, on any machine
    accelerate launch --mixed_precision=bf16 inference_video_scripts/inference_sana_video.py \\
        --config=configs/sana_video_config/Sana_2000M_480px_adamW_fsdp_longsana.yaml --num_frames 961

Any setting of the config can be given as well: `--vae.weight_dtype float32`, or `vae.weight_dtype=float32`.
Exit status: 0 all videos are there, 1 some prompts failed (listed at the end) or the disk is full, 2 bad input,
128 + n stopped by signal n. The same command goes on where it ended.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm.contrib.logging import logging_redirect_tqdm

from longsana.config import InferenceConfig, load_config
from longsana.data.pictures import read_picture
from longsana.data.prompts import Prompt
from longsana.inference.beginnings import NONE, Beginning, prepare_beginning, prompt_of, prompts_after
from longsana.inference.flags import check_settings, parse_flags
from longsana.runtime.commandline import Parser, run_command, typed_path, whole
from longsana.runtime.distributed import World, keep_freed_memory, set_threads
from longsana.runtime.errors import InputError
from longsana.runtime.files import check_writable
from longsana.runtime.hub import locate
from longsana.runtime.teams import check_team
from longsana.sampling.checks import (
    check_config,
    check_division,
    check_picture_sampler,
    check_weights,
    seeded_sources,
    select_prompts,
)

log = logging.getLogger("longsana")

ALONE = World()
DEFAULT_CONFIG = "configs/sana_video_config/longsana/shapes/longsana.yaml"


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and every setting given on the command line as `section.key=value`."""
    parser = Parser(__doc__)
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="YAML file (default: %(default)s)")
    parser.add_argument("--work_dir", type=typed_path, help="output folder (default: output/inference/NAME_OF_CONFIG)")
    parser.add_argument("--dataset", help="folder in work_dir (default: the prompt file's name)")
    parser.add_argument("--add_label", default="", help="added to the name of that folder")
    parser.add_argument("--sample_nums", type=whole, help="prompts of the file, from its top (default: all)")
    parser.add_argument("--start_index", type=whole, default=0, help="first prompt, counted from 0")
    parser.add_argument("--end_index", type=whole, help="one past the last prompt")
    parser.add_argument("--image", type=typed_path, help="a picture that the videos of prompts without one begin with")
    parser.add_argument("--video", type=typed_path, help="a film or picture that the videos go on from")
    parser.add_argument("--new_frames_only", action="store_true", help="leave the film out of the mp4s")
    parser.add_argument("--from_state", type=typed_path, help="a saved state that the videos go on from")
    parser.add_argument(
        "--save_state",
        default=NONE,
        help="none; or beside each mp4 what it can be gone on from: latents (the network's state and the last latents) "
        "or full (the decoder's memory too, which is large) (default: %(default)s)",
    )
    parser.add_argument(
        "--gpus_per_video",
        type=whole,
        default=1,
        help="processes of a launch, each with a GPU, that make each video together (default: %(default)s)",
    )
    parser.add_argument("--save_every", type=whole, default=0, help="save a state after every so many chunks too")
    parser.add_threads()
    return parse_flags(parser, arguments)


def check_image(path: Path, config: InferenceConfig) -> None:
    """Refuse what `--image` names, which is no fault of any prompt's.

    Raises:
        InputError: the sampler takes no picture, or the file is none that is read.
    """
    try:
        check_picture_sampler(config)
        read_picture(path, config.sampling.height, config.sampling.width, config.sampling.image_fit)
    except InputError as error:
        raise InputError(f"--image: {error}") from error


@dataclass(frozen=True)
class Request:
    """A command line that has been checked."""

    config: InferenceConfig
    prompts: list[Prompt]
    folder: Path
    threads: int | None
    beginning: Beginning
    gpus_per_video: int


def prepare(arguments: Sequence[str], world: World = ALONE) -> Request:
    """Read the command line, and check it as far as that goes without loading anything large."""
    options, settings = parse(arguments)
    config_path = locate(options.config, "the config")
    config: InferenceConfig = load_config(config_path, settings)
    check_settings(settings, config)
    check_config(config)
    check_team(world, options.gpus_per_video)
    if options.gpus_per_video > 1:
        check_division(config)
    if Path(options.add_label).name != options.add_label:
        raise InputError(f"--add_label {options.add_label}: must be part of a folder's name, without slashes")
    if options.dataset is not None and (options.dataset[:1] in ("/", "~") or ".." in Path(options.dataset).parts):
        raise InputError(f"--dataset {options.dataset}: must be a folder below --work_dir")
    if options.image is not None:
        check_image(options.image, config)
    beginning, config = prepare_beginning(options, settings, config)
    if beginning.goes_on and options.image is not None:
        raise InputError("--image: a picture to begin with, and what the video goes on from; give one of them")
    if beginning.state is not None and not any(item.startswith("sampling.txt_file=") for item in settings):
        prompts = [prompt_of(beginning.state, config)]
    else:
        prompts = select_prompts(
            config,
            options.start_index,
            options.end_index,
            options.sample_nums,
            pictures=True,
            image=options.image,
            goes_on=beginning.goes_on,
        )
    if not any(prompt.pictures for prompt in prompts) and any(
        item.startswith("sampling.image_fit=") for item in settings
    ):
        log.info("--image_fit changes nothing here: no prompt begins with a picture")
    if options.image is not None and options.image not in {prompt.image for prompt in prompts}:
        log.info("--image changes nothing here: every prompt names a picture of its own")
    prompts = prompts_after(beginning, prompts, config)
    check_weights(config, encodes=beginning.encodes(prompts))
    work_dir = options.work_dir or Path("output/inference") / config_path.stem
    usual = (beginning.path or Path(config.sampling.txt_file)).stem
    folder = work_dir / ((options.dataset or usual) + options.add_label)
    check_writable(folder)
    return Request(config, prompts, folder, options.threads, beginning, options.gpus_per_video)


def run(request: Request, world: World) -> int:
    from longsana.inference.batch import run_batch  # brings diffusers and transformers, which take seconds

    config, device, threads = request.config, world.device(), set_threads(request.threads, world)
    keep_freed_memory()
    log.info(
        "%d prompts to %s on %s, %d threads, %d processes",
        len(request.prompts),
        request.folder,
        device,
        threads,
        world.size,
    )
    if device.type == "cpu" and os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        log.info("the dtype comes from the config, not from the launcher: auto is float32 on a CPU")
    if seeded := seeded_sources(config):
        log.warning("RANDOM WEIGHTS (%s): the videos show noise, not what the prompts say", ", ".join(seeded))

    with logging_redirect_tqdm():  # lines go above the bars, not through them
        outcome = run_batch(
            config,
            request.prompts,
            request.folder,
            world=world,
            device=device,
            beginning=request.beginning,
            gpus_per_video=request.gpus_per_video,
        )
    written, there, failed = outcome.written, outcome.skipped, len(outcome.failures)
    log.info("%d videos written, %d there before, %d failed", written, there, failed)
    for failure in outcome.failures if world.is_main else ():
        print(f"failed: line {failure.line}: {failure.reason} ({failure.text[:60]})", file=sys.stderr)
    if outcome.disk is not None and world.is_main:
        missing = len(request.prompts) - written - there - failed
        print(f"failed: {outcome.disk}; {missing} videos are not made", file=sys.stderr)
    return 0 if outcome.disk is None and not outcome.failures else 1


def main(arguments: Sequence[str]) -> int:
    return run_command(lambda world: prepare(arguments, world), run)
