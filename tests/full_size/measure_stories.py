"""What becomes of the past where a prompt changes, untrained: the shipped LongSANA weights of the shapes world.

    python tests/full_size/measure_stories.py --out output/stories

Stories of two parts, three chunks each. The second caption is the first one, held out of training, with another colour,
kind, background or motion, in turn: 64 changes, three seeds. Each policy has the same noise. Judged is the new caption
in the first, second and third chunk after the change: what changed (in those stories where it did, and over all of
them as "the new caption"), what both captions say (but of an object whose colour changed nothing is found under the new
one before it is there: of those stories the background alone), whether all that the new caption says is in view and
nothing else (persistence), and the change of the picture at the joint against that within chunks (seam index, 1 is
seamless; a cut is no seam to be hidden). After a ± stands the largest standard error of a cell, over stories.

A policy's figures are written to OUT when it is done, and a table of all so far: stopped at any moment, the same
command goes on. With --minutes it begins no policy that would take longer than is left. On a laptop:
`--changes 4 --seeds 0 --chunk_frames 4`. `--strips` makes pictures instead: for each of the first stories, at most one
an aspect, OUT/strips_ASPECT.png with the frames around the change, a policy a row.

Exit status: 0 all policies are there, 2 bad input, 3 the time was up before.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # it also runs from a checkout not installed

if __name__ == "__main__":
    from longsana.runtime.process import begin

    begin()  # before the imports below, which take seconds

import numpy as np
import torch
from torch import Tensor

from longsana.config import InferenceConfig, load_config
from longsana.data.prompts import Prompt
from longsana.evaluation.measures import measure_pieces, seam_index
from longsana.evaluation.report import load_matplotlib, table
from longsana.inference.sidecar import told_parts
from longsana.runtime.commandline import Parser, run_command
from longsana.runtime.distributed import World
from longsana.runtime.files import atomic_write_text, whole_file
from longsana.sampling.captions import Caption, caption_encoder
from longsana.sampling.engine import CaptionedNetwork, Engine
from longsana.shapes.scenes import BACKGROUNDS, COLOURS, FPS, KINDS, MOTIONS, SPEEDS, Actor, describe, draw_scene
from longsana.shapes.scenes import parse_caption as promise_of
from longsana.shapes.sight import Seen, observe
from longsana.shapes.verifier import judge
from tests.full_size.tables import check_options, chosen, measure_each, scores_of

log = logging.getLogger("longsana")

CONFIG = Path(__file__).resolve().parents[2] / "configs/sana_video_config/longsana/shapes/longsana.yaml"
CHUNKS = 3
"""Chunks of each part."""
ASPECTS = ("colour", "kind", "background", "motion")
NEW, SHARED = "the new caption", "what both say"


@dataclass(frozen=True)
class Policy:
    """A way to change. settings: of the sampling."""

    name: str
    settings: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        return f"story_{self.name.replace(',', '').replace(' ', '_').replace('=', '_')}.json"


def change(text: str) -> str:
    return f"sampling.prompt_change={text}"


def blend(chunks: int, way: str = "linear") -> tuple[str, ...]:
    return (f"sampling.transition_chunks={chunks}", f"sampling.transition={way}")


POLICIES = (
    Policy("keep", (change("keep"),)),
    Policy("recache=1", (change("recache=1"),)),
    Policy("rebuild=1", (change("rebuild=1"),)),
    Policy("cut", (change("cut"),)),
    Policy("recache=2", (change("recache=2"),)),
    Policy("rebuild=2", (change("rebuild=2"),)),
    Policy("recache=3", (change("recache=3"),)),  # all that there is, as rebuild=3
    Policy("keep, linear over 1", (change("keep"), *blend(1))),
    Policy("keep, linear over 2", (change("keep"), *blend(2))),
    Policy("keep, spherical over 1", (change("keep"), *blend(1, "spherical"))),
    Policy("recache=1, linear over 1", (change("recache=1"), *blend(1))),
)
"""Those that decide most first."""


class Story(NamedTuple):
    """Two captions, and the one aspect in which they differ."""

    first: str
    second: str
    aspect: str


def stories(count: int) -> list[Story]:
    """Stories of one object each, the aspects in turn."""
    found: list[Story] = []
    index = 0
    while len(found) < count:
        scene = draw_scene(0, index, held_out=True)
        index += 1
        if len(scene.tracks) > 1:
            continue
        aspect, rng = ASPECTS[len(found) % len(ASPECTS)], np.random.default_rng((1, index))
        actor, background = scene.tracks[0].actor, scene.background
        if aspect == "background":
            background = _other(rng, tuple(BACKGROUNDS), background)
        else:
            actor = _changed(rng, actor, aspect)
        found.append(Story(scene.caption, describe(rng, [actor], background), aspect))
    return found


def _changed(rng: np.random.Generator, actor: Actor, aspect: str) -> Actor:
    choices = {"colour": tuple(COLOURS), "kind": KINDS, "motion": MOTIONS}[aspect]
    actor = dataclasses.replace(actor, **{aspect: _other(rng, choices, getattr(actor, aspect))})
    speed = "" if actor.motion == "still" else actor.speed or _other(rng, tuple(SPEEDS), "")
    return dataclasses.replace(actor, speed=speed)


def _other(rng: np.random.Generator, choices: Sequence[str], than: str) -> str:
    others = [choice for choice in choices if choice != than]
    return others[int(rng.integers(len(others)))]


class Films:
    """Videos of stories, whose captions are encoded and whose model is loaded, under one policy after another."""

    def __init__(self, told: Sequence[Story], chunk_frames: int, device: torch.device) -> None:
        self.told, self._chunk_frames, self._device = told, chunk_frames, device
        engine = self.engine(POLICIES[0])
        size = engine.config.sampling.height, engine.config.sampling.width
        self.prompts = [
            Prompt(line, f"{first}<split>{second}", (first, second), 0, *size)
            for line, (first, second, _) in enumerate(told, 1)
        ]
        with caption_encoder(engine.config, device) as encode:
            self._captions: list[Caption] = [encode(prompt) for prompt in self.prompts]
        network, self._decoder = engine.load()
        self._network: CaptionedNetwork = network

    def engine(self, policy: Policy) -> Engine:
        """On a GPU passes are recorded, which changes no bit."""
        frames = 4 * (2 * CHUNKS * self._chunk_frames) + 1
        settings = [f"sampling.chunk_frames={self._chunk_frames}", f"sampling.num_frames={frames}"]
        config: InferenceConfig = load_config(
            CONFIG, [*settings, "vae.decoder=full", "sampling.cuda_graphs=true", *policy.settings]
        )
        return Engine(config, self._device)

    def sample(self, engine: Engine, some: slice, seed: int) -> Iterator[Tensor]:
        """Pixels (B, F, H, W, 3), uint8, piece by piece."""
        prompts = [dataclasses.replace(prompt, seed=seed) for prompt in self.prompts[some]]
        for frames in engine.sample(self._network, self._decoder, prompts, self._captions[some]):
            yield frames.pixels

    def score(self, policy: Policy, seed: int, batch: int) -> list[dict[str, Any]]:
        """Figures of each story; see `figures_of`."""
        engine, scored = self.engine(policy), []
        (_, told) = told_parts(engine.config, self.prompts[0])
        stride = engine.geometry.time_stride
        for first in range(0, len(self.prompts), batch):
            some, seen = slice(first, first + batch), list[Seen]()

            def look(pictures: Tensor, seen: list[Seen] = seen) -> None:
                seen.append(observe(pictures))

            looks = measure_pieces(self.sample(engine, some, seed), self._device, look)
            seam = seam_index(looks.change, [told["frame"]], stride).tolist()
            after = since(Seen.join(seen), told["frame"])
            found = figures_of(after, self.told[some], stride * self._chunk_frames)
            scored += [figures | {"seam index": joint} for figures, joint in zip(found, seam, strict=True)]
        return scored


def since(seen: Seen, frame: int) -> Seen:
    """What the frames from `frame` on show."""
    *tensors, size = seen
    return Seen._make([*(values[:, frame:] for values in tensors), size])


def figures_of(after: Seen, told: Sequence[Story], chunk: int) -> list[dict[str, Any]]:
    """Figures of each story by name, one for each chunk of so many pictures after the change; nan: not judged."""
    verdicts = judge(after, [promise_of(story.second) for story in told])
    means = {
        name: torch.stack([part.nanmean(1) for part in getattr(verdicts, name).split(chunk, dim=1)[:CHUNKS]], dim=1)
        for name in (*ASPECTS, "persistence")
    }
    found = []
    for row, story in enumerate(told):
        both = ["background"] if story.aspect == "colour" else [name for name in ASPECTS if name != story.aspect]
        figures = {story.aspect: means[story.aspect][row], "persistence": means["persistence"][row]}
        figures[NEW] = means[story.aspect][row]
        figures[SHARED] = torch.stack([means[name][row] for name in both]).nanmean(0)
        found.append({name: values.tolist() for name, values in figures.items()})
    return found


def summarise(runs: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Means over the stories that have a figure, and over seeds, and their standard errors over stories.

    runs: a list of stories for each seed.
    """
    names = (*ASPECTS, NEW, SHARED, "persistence")
    figures: dict[str, Any] = {}
    errors: dict[str, Any] = {}
    for name in names:
        found = [
            over_stories([[story[name][chunk] for story in run if name in story] for run in runs])
            for chunk in range(CHUNKS)
        ]
        figures[name], errors[name] = map(list, zip(*found, strict=True))
    seam, error = over_stories([[story["seam index"] for story in run] for run in runs])
    return {"figures": figures, "standard errors": errors, "seam index": seam, "seam index's standard error": error}


def over_stories(runs: Sequence[Sequence[float]]) -> tuple[float | None, float | None]:
    """Mean over stories of their mean over seeds, and its standard error; stories without a figure are left out."""
    stories = [[value for value in values if value == value] for values in zip(*runs, strict=True)]
    means = [statistics.fmean(values) for values in stories if values]
    if len(means) < 2:
        return (means[0] if means else None), None
    return statistics.fmean(means), statistics.stdev(means) / len(means) ** 0.5


def measure(options: argparse.Namespace, device: torch.device) -> int:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    common = {"changes": options.changes, "seeds": options.seeds, "chunk_frames": options.chunk_frames}

    @cache
    def films() -> Films:
        return Films(stories(options.changes), options.chunk_frames, device)

    def measured(policy: Policy) -> dict[str, Any]:
        return summarise([films().score(policy, seed, options.batch) for seed in options.seeds])

    return measure_each(
        options.out,
        options.policies,
        lambda policy: {"policy": policy.name, "settings": list(policy.settings), **common},
        measured,
        device,
        minutes=options.minutes,
        finish=write_table,
    )


def write_strips(options: argparse.Namespace, device: torch.device) -> int:
    """Write a picture for each of the first stories: rows of the frames a second before the change until the end."""
    load_matplotlib()
    from matplotlib import pyplot

    films = Films(stories(min(options.changes, len(ASPECTS))), options.chunk_frames, device)
    rows: dict[str, list[Tensor]] = {story.aspect: [] for story in films.told}
    for policy in options.policies:
        engine = films.engine(policy)
        video = torch.cat(list(films.sample(engine, slice(None), options.seeds[0])), dim=1)
        change = told_parts(engine.config, films.prompts[0])[1]["frame"]
        columns = [change - FPS, change - 1, change, *range(change + FPS // 2, video.shape[1], FPS)]
        for story, pictures in zip(films.told, video[:, columns], strict=True):
            rows[story.aspect].append(torch.nn.functional.pad(pictures, (0, 0, 2, 2, 2, 2), value=255))
    for story in films.told:
        picture = torch.stack(rows[story.aspect]).permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)
        path = options.out / f"strips_{story.aspect}.png"
        with whole_file(path) as unfinished:
            pyplot.imsave(unfinished, picture.numpy(), format="png")
        log.info("%s: %s; rows: %s", path, f"{story.first} | {story.second}", ", ".join(map(str, options.only or ())))
    return 0


def write_table(out: Path) -> None:
    """Write table.md of all that has been measured, the three chunks of a figure in one cell, in percent."""
    scores = scores_of(out, POLICIES)
    lines = [
        {
            "change": name,
            **{figure: _cell(score, figure) for figure in score["figures"]},
            "seam index": _seam(score["seam index"], score["seam index's standard error"]),
            "stories": f"{score['asked']['changes']} x {len(score['asked']['seeds'])}",
        }
        for name, score in scores.items()
    ]
    atomic_write_text(out / "table.md", table(lines))


def _cell(score: dict[str, Any], figure: str) -> str:
    """A figure in its three chunks, and where all stories have it the largest standard error of them."""
    cell = " / ".join("-" if share is None else f"{100 * share:.0f}" for share in score["figures"][figure])
    errors = [100 * error for error in score["standard errors"][figure] if error is not None]
    return cell if figure in ASPECTS else cell + _margin(max(errors, default=None), "{:.0f}")


def _seam(index: float | None, error: float | None) -> str:
    return "" if index is None else f"{index:.2f}" + _margin(error, "{:.2f}")


def _margin(error: float | None, form: str) -> str:
    return "" if error is None else " ± " + form.format(error)


def prepare(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("output/stories"), help="(default: %(default)s)")
    parser.add_argument("--changes", type=int, default=64, help="stories (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--chunk_frames", type=int, default=10, help="latent frames of a chunk (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="videos at a time (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="begin no policy that would end later (default: no limit)")
    parser.add_argument("--strips", action="store_true", help="pictures of the first stories, and nothing else")
    parser.add_argument("--only", nargs="+", metavar="POLICY", help="these, by name (default: all)")
    options: Any = parser.parse_args(arguments)
    options.policies = chosen(POLICIES, options.only)
    check_options(options, "changes", "batch", "chunk_frames")
    return options


def main(arguments: Sequence[str]) -> int:
    def run(options: argparse.Namespace, world: World) -> int:
        return (write_strips if options.strips else measure)(options, world.device())

    return run_command(lambda world: prepare(arguments), run, connect=lambda world: None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
