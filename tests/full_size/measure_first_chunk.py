"""What a short first chunk costs in quality: the shipped LongSANA weights of the shapes world.

    python tests/full_size/measure_first_chunk.py --out output/first_chunk

Single scenes held out of training, three seeds, each length of the first chunk on the same captions; its noise is
another where it is another length. Judged are the first seconds and the whole video: all figures of the verifier,
saturation drift, and the seam index (1 is seamless). Figures are written to OUT as they are made, with a table of all
so far, and the same command goes on. On a laptop: `--videos 4 --seeds 0 --seconds 1 5 --only 0 3`.

Exit status: 0 all lengths are there, 2 bad input, 3 the time was up before.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # it also runs from a checkout not installed

if __name__ == "__main__":
    from longsana.runtime.process import begin

    begin()  # before the imports below, which take seconds

import torch

from longsana.config import InferenceConfig, load_config
from longsana.evaluation.report import table
from longsana.evaluation.score_model import Trial, try_model
from longsana.runtime.commandline import Parser, run_command
from longsana.runtime.distributed import World
from longsana.runtime.errors import InputError
from longsana.runtime.files import atomic_write_text
from longsana.shapes.scenes import draw_scene
from tests.full_size.measure_stories import CONFIG
from tests.full_size.tables import check_options, measure_each, scores_of


class First(NamedTuple):
    """A length of the first chunk, in latents; 0: it has what remains."""

    latents: int

    @property
    def name(self) -> str:
        return f"{self.latents or 'as published'}"

    @property
    def file(self) -> str:
        return f"first_{self.latents}.json"


LENGTHS = tuple(map(First, (0, 1, 2, 3, 5, 8)))


def prepare(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("output/first_chunk"))
    parser.add_argument("--videos", type=int, default=64, help="captions")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=int, nargs="+", default=[1, 5, 15], help="from the start, judged apart")
    parser.add_argument("--batch", type=int, default=32, help="videos sampled together")
    parser.add_argument(
        "--only", type=int, nargs="+", metavar="LATENTS", help="lengths of the first chunk (default: all)"
    )
    parser.add_argument("--minutes", type=float, help="begin no length that would take longer than is left of these")
    options = parser.parse_args(arguments)
    known = [first.latents for first in LENGTHS]
    if unknown := sorted(set(options.only or ()) - set(known)):
        raise InputError(f"--only {unknown[0]}: is not measured; there are {', '.join(map(str, known))}")
    check_options(options, "videos", "batch")
    return options


def measure(options: argparse.Namespace, device: torch.device) -> int:
    captions = [draw_scene(0, index, held_out=True).caption for index in range(options.videos)]
    trial = Trial(captions, options.seeds, options.seconds, options.batch)
    common = {"videos": options.videos, "seeds": options.seeds, "seconds": options.seconds}

    def measured(first: First) -> dict[str, Any]:
        settings = ["vae.decoder=full", "sampling.cuda_graphs=true", f"sampling.first_chunk_frames={first.latents}"]
        config: InferenceConfig = load_config(CONFIG, settings)
        return try_model(config, trial, device)

    return measure_each(
        options.out,
        [first for first in LENGTHS if options.only is None or first.latents in options.only],
        lambda first: {"first": first.latents, **common},
        measured,
        device,
        minutes=options.minutes,
        finish=write_table,
    )


def write_table(out: Path) -> None:
    """Write table.md of all that has been measured, a row for a length and a time from the start, in hundredths."""
    lines = [
        {"first chunk": name, "seconds": seconds}
        | {figure: "-" if mean is None else f"{100 * mean:.1f}" for figure, (mean, _) in figures.items()}
        for name, score in scores_of(out, LENGTHS).items()
        for seconds, figures in score["figures"].items()
    ]
    atomic_write_text(out / "table.md", table(lines))


def main(arguments: Sequence[str]) -> int:
    def run(options: argparse.Namespace, world: World) -> int:
        return measure(options, world.device())

    return run_command(lambda world: prepare(arguments), run, connect=lambda world: None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
