"""A folder of videos in the names that VBench and VBench-Long read, with the prompts as they read them.

    longsana export-vbench output/inference/vbench --out output/for_vbench --full_info VBench_full_info.json
    longsana export-vbench output/inference/long --out output/for_vbench_long --layout custom
    longsana export-vbench output/inference/own --out output/for_another --layout custom --names '{line:04d}.mp4'

Prompts are those of the videos' sidecars. Videos are linked where the disk can, else copied. OUT/videos is what these
programs are given; docs/usage.md has their commands.

Exit status: 0 it is there; 1 it is there, and videos that VBench asks for are missing, which are listed, or it could
not be written; 2 bad input.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from longsana.evaluation.vbench import NAMES, VIDEOS, Named, check_names, missing, named, write
from longsana.evaluation.videos import find_videos
from longsana.runtime.commandline import Parser, run_command, typed_path, whole
from longsana.runtime.errors import InputError
from longsana.runtime.files import check_writable

log = logging.getLogger("longsana")


@dataclass(frozen=True)
class Request:
    """A command line that has been checked."""

    videos: list[Named]
    missing: list[str]
    out: Path


def prepare(arguments: Sequence[str]) -> Request:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=typed_path, help="where the mp4s and their sidecars are")
    parser.add_argument("--out", type=typed_path, required=True, help="folder of the results, which is new")
    parser.add_argument("--layout", choices=tuple(NAMES), default="standard", help="PROMPT-0.mp4, or own names")
    parser.add_argument("--names", help="own names: text with {prompt}, {number}, {line}, {path} (default: {path}.mp4)")
    parser.add_argument("--prompts", type=typed_path, help="text file: prompts in the place of the lines videos are of")
    parser.add_argument("--full_info", type=typed_path, help="VBench_full_info.json, to say what is missing of it")
    parser.add_argument("--samples", type=whole, default=5, help="videos of a prompt that are asked for (default: 5)")
    options = parser.parse_args(arguments)
    if options.full_info and options.layout == "custom":
        raise InputError("--full_info: has no meaning with --layout custom, whose prompts are one's own; leave it out")
    if options.names and options.layout != "custom":
        raise InputError(
            "--names: has no meaning with --layout standard, whose names are VBench's; use --layout custom"
        )
    names = options.names or NAMES[options.layout]
    check_names(names)
    videos = named(find_videos(options.folder), options.folder, names, options.prompts)
    absent = missing(videos, options.full_info, options.samples) if options.full_info else []
    if options.out.exists():
        raise InputError(f"{options.out}: is there already; choose another --out")
    check_writable(options.out.absolute().parent, "--out")
    return Request(videos, absent, options.out)


def run(request: Request) -> int:
    write(request.videos, request.out)
    log.info("%d videos in %s", len(request.videos), request.out / VIDEOS)
    for name in request.missing:
        log.warning("missing: %s", name)
    return 1 if request.missing else 0


def main(arguments: Sequence[str]) -> int:
    return run_command(
        lambda world: prepare(arguments),
        lambda request, world: run(request),
        after_stop="nothing was written; give the same command again",
    )
