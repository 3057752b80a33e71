"""A folder of videos in, figures out: do they keep what their captions promise, and do they hold over time?

    python inference_video_scripts/evaluate.py output/inference/longsana/shapes_prompts

Videos in folders of the folder count too. Writes evaluation.json, evaluation.md, evaluation.png, evaluation_frames.png
and a page, evaluation.html; with --wandb all is shown there too. Videos whose prompt is not of the shapes world, or
that have no sidecar, get the general figures alone. A video that is broken, or whose sidecar is, or whose name is not
UTF-8, is skipped and listed.

Exit status: 0 all videos are evaluated; 1 the results are of the others, as some were skipped or have no other one to
be compared with, or they could not be written; 2 bad input, or no video that can be evaluated; 128 + n stopped by
signal n.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from longsana.evaluation.flow import FlowMeter
from longsana.evaluation.report import NUMBERS, SHEET, examine, load_matplotlib, show, summarize, write_report
from longsana.evaluation.videos import describe, find_videos, pair
from longsana.runtime import strips
from longsana.runtime.commandline import Parser, run_command, typed_path
from longsana.runtime.errors import InputError
from longsana.runtime.files import check_writable, hold_folder
from longsana.runtime.foreign import printable, refuse_name
from longsana.runtime.logging import Wandb, WandbRun
from longsana.training.config import WandbConfig

log = logging.getLogger("longsana")


@dataclass(frozen=True)
class Request:
    """A command line that has been checked."""

    folder: Path
    videos: list[Path]
    out: Path
    device: torch.device
    pairs: dict[Path, Path]
    alone: list[Path]
    flow: bool
    wandb: WandbRun | None


def prepare(arguments: Sequence[str]) -> Request:
    """Read the command line, and check it as far as that goes without loading anything large."""
    parser = Parser(__doc__)
    parser.add_argument("folder", type=typed_path, help="where the mp4s and their sidecars are")
    parser.add_argument("--out", type=typed_path, help="folder of the results (default: the folder of the videos)")
    parser.add_argument("--against", type=typed_path, help="folder of videos of the same names, for PSNR and SSIM")
    parser.add_argument("--flow", action="store_true", help="measure optical flow too; needs the extra flow")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    parser.add_argument("--wandb", action="store_true", help="show figures, pictures and videos on wandb too")
    parser.add_argument("--wandb_name", help="the run's name in wandb (default: the folder's name)")
    parser.add_argument("--wandb_project", default=WandbConfig.project, help="(default: %(default)s)")
    parser.add_argument("--wandb_entity", help="user or team (default: wandb's own)")
    parser.add_argument("--wandb-save-dir", type=typed_path, default=Path("wandb"), help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    device = _device(options.device)
    videos = find_videos(options.folder)
    out = options.out or options.folder
    pairs, alone = pair(videos, options.folder, options.against) if options.against else ({}, [])
    check_writable(out, "--out")
    load_matplotlib()  # which may fail, before videos are read for hours
    if options.flow:
        FlowMeter()
    return Request(options.folder, videos, out, device, pairs, alone, options.flow, _wandb(options))


def _wandb(options: argparse.Namespace) -> WandbRun | None:
    if not options.wandb:
        return None
    against = str(options.against) if options.against else None
    return WandbRun(
        project=options.wandb_project,
        entity=options.wandb_entity,
        name=options.wandb_name or options.folder.resolve().name,
        folder=options.wandb_save_dir,
        config={"folder": str(options.folder), "against": against, "flow": options.flow},
        without="leave out --wandb",
    )


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
    examined = []
    skipped = {
        printable(path): f"{printable(path)}: no video of this name to compare it with" for path in request.alone
    }
    shown = strips.evenly(len(request.videos), SHEET)
    # wandb early: one that is wanted and not there is found before videos are read for hours.
    with hold_folder(request.out, "--out"), Wandb(request.wandb, request.out / NUMBERS) as wandb:
        for place, path in enumerate(tqdm(request.videos, unit="video", disable=None)):
            name = path.relative_to(request.folder).as_posix()
            try:
                refuse_name(name, path)
                other = request.pairs.get(path)
                found = examine(describe(path), request.device, name=name, against=other, flow=request.flow)
                examined.append(found if place in shown else found | {"strip": []})
            except InputError as error:
                skipped[printable(name)] = printable(str(error))
        if not examined:
            others = f" (and {len(skipped) - 1} more videos cannot be evaluated)" if len(skipped) > 1 else ""
            raise InputError(f"{next(iter(skipped.values()))}{others}")
        summary = summarize(examined)
        print(write_report(examined, summary, skipped, request.out))
        show(examined, summary, request.out, wandb)
    for reason in skipped.values():
        log.warning("skipped: %s", reason)
    return 1 if skipped else 0


def main(arguments: Sequence[str]) -> int:
    return run_command(
        lambda world: prepare(arguments),
        lambda request, world: run(request),
        after_stop="nothing was written; give the same command again",
    )
