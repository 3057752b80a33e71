"""A folder of videos in, figures out: do they keep what their captions promise, and do they hold over time?

    python inference_video_scripts/evaluate.py output/inference/longsana/shapes_prompts

Writes evaluation.json, evaluation.md and evaluation.png. Videos whose prompt is not of the shapes world, or that have
no sidecar, get the general figures alone. A video that is broken, or whose sidecar is, is skipped and listed.

Exit status: 0 all videos are evaluated; 1 the results are of the others, as some were skipped, or they could not be
written; 2 bad input, or no video that can be evaluated; 128 + n stopped by signal n.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from longsana.evaluation.report import examine, load_matplotlib, write_report
from longsana.evaluation.videos import describe, find_videos
from longsana.runtime.commandline import Parser, run_command, typed_path
from longsana.runtime.errors import InputError
from longsana.runtime.files import check_writable, hold_folder

log = logging.getLogger("longsana")


@dataclass(frozen=True)
class Request:
    """A command line that has been checked."""

    videos: list[Path]
    out: Path
    device: torch.device


def prepare(arguments: Sequence[str]) -> Request:
    """Read the command line, and check it as far as that goes without loading anything large."""
    parser = Parser(__doc__)
    parser.add_argument("folder", type=typed_path, help="where the mp4s and their sidecars are")
    parser.add_argument("--out", type=typed_path, help="folder of the results (default: the folder of the videos)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    options = parser.parse_args(arguments)
    device = _device(options.device)
    videos = find_videos(options.folder)
    out = options.out or options.folder
    check_writable(out, "--out")
    load_matplotlib()  # which may fail, before videos are read for hours
    return Request(videos, out, device)


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise InputError(f"--device {name}: there is no such device; give cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda") or (
        device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    ):
        raise InputError(f"--device {name}: not on this machine, which has {torch.cuda.device_count()} GPUs")
    return device


def run(request: Request) -> int:
    log.info("%d videos on %s, results to %s", len(request.videos), request.device, request.out)
    examined, skipped = [], {}
    with hold_folder(request.out, "--out"):
        for path in tqdm(request.videos, unit="video", disable=None):
            try:
                examined.append(examine(describe(path), request.device))
            except InputError as error:
                skipped[path.name] = str(error)
        if not examined:
            others = f" (and {len(skipped) - 1} more videos cannot be evaluated)" if len(skipped) > 1 else ""
            raise InputError(f"{next(iter(skipped.values()))}{others}")
        print(write_report(examined, skipped, request.out))
    for reason in skipped.values():
        log.warning("skipped: %s", reason)
    return 1 if skipped else 0


def main(arguments: Sequence[str]) -> int:
    return run_command(lambda world: prepare(arguments), lambda request, world: run(request))
