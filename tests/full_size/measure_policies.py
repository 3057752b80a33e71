"""What the state should keep, untrained: the shipped LongSANA weights of the shapes world under each policy.

    python tests/full_size/measure_policies.py --out output/policies

Videos of held-out prompts, 300 seconds each, of which the first 60 are scored apart. A policy's figures are written to
OUT when it is done, and a table of all so far: stopped at any moment, the same command goes on, and where all figures
are there (asset/policies has them) it makes table and plot alone. With --processes 4 as many share a GPU, each with
policies of its own. With --minutes it begins no policy that would take longer than is left. Frames a second on two
cores are for `--speed`, which needs no GPU. On a laptop: `--prompts 2 --seconds 5`.

Exit status: 0 all policies are there, 2 bad input, 3 the time was up before.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # it also runs from a checkout not installed

if __name__ == "__main__":
    from longsana.runtime.process import begin

    begin()  # before the imports below, which take seconds

import torch

from longsana.config import InferenceConfig, load_config
from longsana.evaluation.report import plot, table
from longsana.evaluation.score_model import DRIFT, FIGURES, Trial, measure_speed, try_model
from longsana.runtime.commandline import Parser, run_command
from longsana.runtime.distributed import World
from longsana.runtime.errors import InputError
from longsana.runtime.files import atomic_write_text
from longsana.shapes.scenes import prompts
from tests.full_size.tables import check_options, chosen, measure_each, scores_of

log = logging.getLogger("longsana")

CONFIG = Path(__file__).resolve().parents[2] / "configs/sana_video_config/longsana/shapes/longsana.yaml"
CHUNK = 10
"""Latent frames of a chunk, for which the decays below are told."""
STEPS = 4


@dataclass(frozen=True)
class Policy:
    """A way to keep the past, by settings of the config."""

    name: str
    settings: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        return f"policy_{self.name.replace(',', '').replace(' ', '_')}.json"


def decay(*chunk: float) -> str:
    """The setting with which so much of the past is left after a chunk; of the first and the last head."""
    frame = [share ** (1 / CHUNK) for share in chunk]
    return f"model.state_decay={frame[0] if len(frame) == 1 else frame}"


def window(chunks: int) -> str:
    return f"model.num_cached_blocks={chunks}"


OWN_LAST = "scheduler.absorb=last_step"
SINK = "model.num_sink_blocks=1"
POLICIES = (
    Policy("everything"),
    Policy("decay 0.5 a chunk", (decay(0.5),)),
    Policy("window 2", (window(2),)),
    Policy("by head, 0.3 to 0.9 a chunk", (decay(0.3, 0.9),)),
    Policy("sink 1, decay 0.5 a chunk", (SINK, decay(0.5))),
    Policy("decay 0.7 a chunk", (decay(0.7),)),
    Policy("decay 0.3 a chunk", (decay(0.3),)),
    Policy("sink 1, window 2", (SINK, window(2))),
    Policy("everything, no absorbing pass", (OWN_LAST,)),
    Policy("window 2, no absorbing pass", (window(2), OWN_LAST)),
    Policy("decay 0.85 a chunk", (decay(0.85),)),
    Policy("window 1", (window(1),)),
    Policy("window 4", (window(4),)),
)
"""Those that decide most first."""
PLOTTED = ("everything", "everything, no absorbing pass", "decay 0.85 a chunk", "window 2", "decay 0.5 a chunk")
"""Lines of the plot that can be told apart."""


def sampler(policy: Policy) -> InferenceConfig:
    """The shipped model; on a GPU its passes are recorded, which changes no bit."""
    settings = [
        f"sampling.chunk_frames={CHUNK}",
        "sampling.cuda_graphs=true",
        "model.state_decay=1",
        "vae.decoder=full",
    ]
    config: InferenceConfig = load_config(CONFIG, [*settings, *policy.settings])
    return config


def share_out(options: argparse.Namespace) -> int:
    """Give the policies in turn to processes of this command: one leaves most of a GPU idle."""
    common = ["--out", str(options.out), "--prompts", str(options.prompts), "--batch", str(options.batch)]
    common += ["--seconds", *map(str, options.seconds)]
    common += [] if options.minutes is None else ["--minutes", str(options.minutes)]
    common += ["--no_table"]  # which all would write at once
    shares = [options.policies[first :: options.processes] for first in range(options.processes)]
    running = [
        subprocess.Popen([sys.executable, __file__, *common, "--only", *(policy.name for policy in share)])
        for share in shares
        if share
    ]
    try:
        statuses = [process.wait() for process in running]
    finally:
        for process in running:
            process.terminate()
    write_table(options.out)
    return max(statuses, key=abs)


def measure(options: argparse.Namespace, device: torch.device) -> int:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    texts, common = prompts(0, options.prompts, held_out=True), {"prompts": options.prompts, "seconds": options.seconds}
    finish = (lambda out: None) if options.no_table else write_table
    finish(options.out)

    def measured(policy: Policy) -> dict[str, Any]:
        trial = Trial(texts, (0,), tuple(options.seconds), batch=options.batch)
        return try_model(sampler(policy), trial, device)

    return measure_each(
        options.out,
        options.policies,
        lambda policy: {
            "policy": policy.name,
            "settings": list(policy.settings),
            **common,
        },
        measured,
        device,
        minutes=options.minutes,
        finish=finish,
    )


def measure_speeds(options: argparse.Namespace) -> int:
    """Measure frames a second, of ten seconds of video, on two cores of this machine."""
    torch.set_num_threads(2)
    path, (text,) = options.out / "speed.json", prompts(0, 1, held_out=True)
    speeds = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    seconds = min(10, *options.seconds)
    measure_speed(sampler(POLICIES[0]), text, 1)  # what is set up on first use
    for policy in options.policies:
        if policy.name not in speeds:
            speeds[policy.name] = measure_speed(sampler(policy), text, seconds)
            log.info("%s: %.1f FPS", policy.name, speeds[policy.name])
            atomic_write_text(path, json.dumps(speeds, indent=1) + "\n")
    write_table(options.out)
    return 0


def write_table(out: Path) -> None:
    """Write table.md, and plot.png where matplotlib is installed, of all that has been measured."""
    speeds = json.loads((out / "speed.json").read_text(encoding="utf-8")) if (out / "speed.json").exists() else {}
    scores = scores_of(out, POLICIES)
    lines = [
        {
            "past": name,
            "seconds": int(seconds),
            **{figure: shown(figures[figure], percent=True) for figure in FIGURES},
            "seam index": shown(figures["seam index"]),
            DRIFT: shown(figures[DRIFT], percent=True),
            "steps": STEPS,
            "FPS on two cores": f"{speeds[name]:.1f}" if name in speeds else "",
            "videos": f"{score['videos']} x {score['seeds']}",
        }
        for name, score in scores.items()
        for seconds, figures in score["figures"].items()
    ]
    if not lines:
        return
    atomic_write_text(out / "table.md", table(lines))
    if importlib.util.find_spec("matplotlib") is None:
        log.info("no plot: matplotlib is not installed")
        return
    plotted = [name for name in scores if name in PLOTTED or len(scores) <= len(PLOTTED)]
    plot({name: scores[name]["curves"] for name in plotted}, out / "plot.png", every=20, least=0.6)


def shown(value: Sequence[float | None], *, percent: bool = False) -> str:
    """Write the mean of a figure; nothing where there is none."""
    mean = value[0]
    if mean is None:
        return ""
    return f"{100 * mean:.1f} %" if percent else f"{mean:.3f}"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("output/policies"), help="(default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=32, help="held-out prompts (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=int, nargs="+", default=[60, 300], help="lengths from the start (default: 60 300)"
    )
    parser.add_argument("--batch", type=int, default=64, help="videos at a time (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="begin no policy that would end later (default: no limit)")
    parser.add_argument("--only", nargs="+", metavar="POLICY", help="these, by name (default: all)")
    parser.add_argument("--processes", type=int, default=1, help="that share the policies (default: %(default)s)")
    parser.add_argument(
        "--no_table", action="store_true", help="figures alone, as processes of this command write them"
    )
    parser.add_argument("--speed", action="store_true", help="frames a second on two cores, and nothing else")
    return parser.parse_args(arguments)


def prepare(arguments: Sequence[str]) -> argparse.Namespace:
    options: Any = parse(arguments)
    options.policies = chosen(POLICIES, options.only)
    if min(options.seconds) < 1:
        raise InputError(f"--seconds {min(options.seconds)}: must be at least 1")
    check_options(options, "prompts", "batch", "processes")
    return options


def main(arguments: Sequence[str]) -> int:
    def run(options: argparse.Namespace, world: World) -> int:
        if options.speed:
            return measure_speeds(options)
        return share_out(options) if options.processes > 1 else measure(options, world.device())

    return run_command(lambda world: prepare(arguments), run, connect=lambda world: None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
