"""Measure what a video costs on this machine: one prompt to one mp4, part by part.

    python inference_video_scripts/benchmark.py --num_frames 961                # the small default
    python inference_video_scripts/benchmark.py --config=configs/... --model_path=... --num_frames 961 --out full.json

    python inference_video_scripts/benchmark.py ... --backend triton --kernels --profile --peer diffusers
    python inference_video_scripts/benchmark.py ... --decoder taew2_1 --decoder_path seeded:0

Two chunks are made first (cold), then the whole video (warm). Config, settings and flags are those of
inference_sana_video.py. The report goes to --out as JSON, a table of it is printed. The wall time is from the prompt to
the finished mp4, without start-up; `other` is what none of the parts accounts for.
Exit status: 0 done, 1 the disk is full or broken, 2 bad input.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from longsana.commands.generate import DEFAULT_CONFIG
from longsana.config import InferenceConfig, load_config
from longsana.data.prompts import Prompt
from longsana.encoders.tiny_layouts import FULL
from longsana.evaluation.report import table
from longsana.inference.flags import check_settings, parse_flags
from longsana.models.float8 import check_float8
from longsana.ops.dispatch import VARIABLE, obstacle
from longsana.runtime.commandline import Parser, run_command, typed_path, whole
from longsana.runtime.distributed import World, keep_freed_memory, set_threads
from longsana.runtime.errors import InputError
from longsana.runtime.files import atomic_write_text, check_writable
from longsana.runtime.hub import locate
from longsana.runtime.teams import Team
from longsana.sampling.checks import check_config, check_division, check_weights, select_prompts

log = logging.getLogger("longsana")

LONGEST = 25
"""Kernels of a profile that the table shows; the JSON has all."""
Backend = Literal["reference", "triton", "compile"]


@dataclass(frozen=True)
class Request:
    """A command line that has been checked."""

    config: InferenceConfig
    prompt: Prompt
    out: Path
    threads: int | None
    backend: Backend | None
    extras: tuple[str, ...]


def prepare(arguments: Sequence[str], world: World) -> Request:
    """Read the command line, and check it as far as that goes without loading anything large."""
    parser = Parser(__doc__)
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="YAML file (default: %(default)s)")
    parser.add_argument("--out", type=typed_path, default=Path("output/benchmark.json"), help="(default: %(default)s)")
    parser.add_threads()
    parser.add_argument(
        "--backend", choices=get_args(Backend), help="the network's operations: plain, fused, or under torch.compile"
    )
    parser.add_argument("--kernels", action="store_true", help="also each operation against its reference and floor")
    parser.add_argument("--profile", action="store_true", help="also each kernel of one forward and of one decode")
    parser.add_argument("--peer", choices=["diffusers"], help="also the same network and decoder of this library")
    parser.add_argument("--float8", action="store_true", help="also what model.float8 would change: errors and speed")
    parser.add_argument(
        "--gpus_per_video",
        type=whole,
        default=1,
        help="processes of the launch, all of which make the video together (default: %(default)s)",
    )
    options, settings = parse_flags(parser, arguments)
    if options.gpus_per_video != world.size:
        raise InputError(
            f"--gpus_per_video {options.gpus_per_video}: must be the number of processes of the launch, which all make "
            f"the one video that is measured, and that is {world.size}"
        )
    config: InferenceConfig = load_config(locate(options.config, "the config"), settings)
    check_settings(settings, config)
    if config.sampling.bs != 1:
        raise InputError(f"--bs {config.sampling.bs}: one video is measured, so it must be 1")
    check_config(config)
    held = config.sampling.memory is not None or config.sampling.offload != "none"
    if held and (options.float8 or options.peer or options.backend == "compile"):
        raise InputError(
            "sampling.memory, sampling.offload: --float8, --peer and --backend compile have several networks on the "
            "GPU; measure them without"
        )
    if options.out.is_dir():
        raise InputError(f"--out {options.out}: is a folder; give the name of a file")
    check_writable(options.out.parent, "--out")
    if options.backend == "triton" and (missing := obstacle()):
        raise InputError(f"--backend triton: {missing}")
    if options.float8 and (config.model.float8 or options.backend == "compile"):
        raise InputError(
            "--float8: compares the network as it is with float8; not with model.float8 or --backend compile"
        )
    if options.peer and config.vae.decoder != FULL:
        raise InputError(
            f"--peer diffusers: compares the VAE's own decoder, and vae.decoder is {config.vae.decoder}; leave it out, "
            "or give --decoder full"
        )
    if world.size > 1:
        check_division(config)
        if options.kernels or options.profile or options.peer or options.float8 or options.backend == "compile":
            raise InputError(
                "--kernels, --profile, --peer, --float8 and --backend compile measure one process; leave them out, or "
                "--gpus_per_video"
            )
    extras = {
        "operations": options.kernels,
        "profile": options.profile,
        "peers": options.peer,
        "float8": options.float8,
    }
    if options.float8:
        try:
            check_float8(world.device(), torch.bfloat16)
        except ValueError as error:
            raise InputError(f"--float8: {error}") from error
    prompt = select_prompts(config, 0, 1, pictures=True)[0]
    check_weights(config, encodes=bool(prompt.pictures))
    return Request(
        config,
        prompt,
        options.out,
        options.threads,
        options.backend,
        tuple(name for name, wanted in extras.items() if wanted),
    )


def run(request: Request, world: World) -> int:
    if request.backend:
        # Read by the first operation.
        os.environ[VARIABLE] = "triton" if request.backend == "triton" else "reference"
    from longsana.inference.benchmark import (  # brings diffusers and transformers, which take seconds
        accompany,
        benchmark,
    )

    device = world.device()
    set_threads(request.threads, world)
    keep_freed_memory()
    team = Team.of(world, world.size, device)
    if not team.leads:
        with team.watched():
            accompany(request.config, request.prompt, device, team)
        return 0
    with tempfile.TemporaryDirectory() as folder, team.watched():
        report = benchmark(
            request.config,
            request.prompt,
            device,
            Path(folder),
            compiled=request.backend == "compile",
            extras=request.extras,
            team=team,
        )
    atomic_write_text(request.out, json.dumps(report, indent=2) + "\n")
    print(render(report))
    log.info("the report is %s", request.out)
    return 0


def render(report: dict[str, Any]) -> str:
    """The report as a table of two columns."""
    wall = report["seconds"]["wall"]
    lines = {
        **{f"{part}, s": f"{seconds:.2f} ({seconds / wall:.0%})" for part, seconds in report["seconds"].items()},
        **{f"first picture, {name}, s": f"{value:.2f}" for name, value in report["first picture"].items()},
        **{f"start-up: {name}, s": f"{value:.2f}" for name, value in report["start-up"].items()},
        **{f"FPS {name}": f"{value:.1f}" for name, value in report["FPS"].items()},
        **{f"FPS of the encoder alone, {name}": f"{value:.1f}" for name, value in report["encoder alone, FPS"].items()},
        **{f"a chunk, {name}, s": f"{report['chunk'][name]:.3f}" for name in ("p50", "p95")},
        **{f"{name}, MB": f"{value / 1e6:.0f}" for name, value in report["memory"].items()},
        **{f"{name}, ms": f"{value:.2f}" for name, value in report["passes"].items()},
    }
    for name, row in report.get("operations", {}).get("operations", {}).items():
        taken = ", ".join(f"{backend} {ms:.3f}" for backend, ms in row["ms"].items())
        lines[f"{name}, ms"] = f"{taken} ({row['share of the floor']:.0%} of the floor's speed)"
        if learning := row.get("ms with gradients"):
            lines[f"{name}, with gradients, ms"] = ", ".join(f"{backend} {ms:.3f}" for backend, ms in learning.items())
    for what, figures in report.get("peers", {}).items():
        lines |= {f"{what}: {name}": f"{value:.2f}" for name, value in figures.items()}
    if float8 := report.get("float8"):
        lines |= {f"float8: {name}": f"{value:.4g}" for name, value in float8.items()}
    for what, kernels in report.get("profile", {}).items():
        spent: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
        for kernel, row in kernels.items():
            ms, calls = spent[name := short_name(kernel)]
            spent[name] = (ms + row["ms"], calls + row["calls"])
        total = sum(ms for ms, _ in spent.values())
        for name, (ms, calls) in sorted(spent.items(), key=lambda item: -item[1][0])[:LONGEST]:
            lines[f"{what}, ms: {name}"] = f"{ms:.2f} in {calls} ({ms / total:.0%})"
    video = report["video"]
    decoder = "" if video["decoder"] == FULL else f", {video['decoder']}"
    title = f"{video['frames']} frames of {video['width']}x{video['height']}{decoder}"
    return table([{title: name, report["machine"]["device"]: value} for name, value in lines.items()])


def short_name(kernel: str) -> str:
    """A kernel's name without its template's arguments, but for what PyTorch's elementwise kernels compute."""
    name = kernel.replace("(anonymous namespace)::", "").removeprefix("void ")
    head, *arguments = re.split("[<(]", name, maxsplit=1)
    computed = re.search(r"\w*(?:Functor|_functor|_kernel_cuda)\w*", arguments[0]) if arguments else None
    short = (head.rsplit("::", 1)[-1] if arguments else head).strip()
    if computed:
        return f"{short} {computed[0]}"
    # cutlass' kernels are told apart by what they are given.
    return f"{short} {arguments[0][:60]}" if re.fullmatch(r"Kernel\d?|(device_)?kernel", short) else short


def main(arguments: Sequence[str]) -> int:
    return run_command(lambda world: prepare(arguments, world), run)
