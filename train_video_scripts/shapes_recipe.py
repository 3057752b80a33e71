"""Train everything of the shapes world, one step after another, and measure it.

    python train_video_scripts/shapes_recipe.py --out output/shapes
    python train_video_scripts/shapes_recipe.py --out output/remembered_shapes --world remembered_shapes

A step is done when what it makes lies in OUT/parts, and is then passed over: stopped at any moment, the same command
goes on, training from where it was. OUT/parts is all that later steps need: carry it to another machine,
and the rest can be made there; a score stays until its file goes. Without a GPU `--size tiny` shows in two minutes that
all of it runs; it trains nothing.
Exit status: 0 done, else that of the step that stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts also run from a checkout not installed

if __name__ == "__main__":
    from longsana.runtime import stop

    stop.catch()  # before the imports below, which take seconds

import torch

from longsana.config import InferenceConfig, load_config
from longsana.data.prompts import training_prompts
from longsana.runtime.commandline import Parser, run_command, typed_path
from longsana.runtime.distributed import World
from longsana.runtime.errors import InputError
from longsana.runtime.files import atomic_write_text, naming
from longsana.runtime.stop import check as check_stop
from longsana.shapes.remembered import WORLDS, WorldName
from longsana.shapes.scenes import prompts

log = logging.getLogger("longsana")

CONFIGS = Path(__file__).resolve().parents[1] / "configs/sana_video_config/longsana/shapes"
NETWORKS = ("base", "ode", "self_forcing", "longsana")
BASE_PHASES = {"base_1": 10_000, "base_2": 3_500, "base_3": 5_500, "base_4": 8_000, "base": 2_000}
"""Iterations of the base model, in phases of at most 8 minutes on one H100. Each goes on from the one before, on clips
of its own: the second on clips with turns, the last with a lower learning rate."""
PHASES = {
    **dict.fromkeys(BASE_PHASES, "base"),
    "ode": "ode",
    "self_forcing": "self_forcing",
    "longsana": "streaming",
}
"""Training phases of networks, in order, each with its config."""
TRAINING_PROMPTS, HELD_OUT_PROMPTS = 2048, 64

TINY: dict[str, list[str]] = {
    "text": ["steps=2", "batch=4", "test_captions=4"],
    "vae": [
        "steps=[1,1]", "clips=[4,1]", "frames=[1,5]", "heights=[32,32]", "widths=[32,32]", "pool=[8,2]",
        "statistics_clips=1", "test_clips=1", "test_frames=5",
    ],
    "stage": [
        "train.max_iters=2", "train.log_iters=2", "train.batch_size=1", "train.mixed_precision=false",
        "train.ema_start_step=0", "train.compile=false", "rollout.num_training_frames=5",
    ],
    "base": ["data.num_clips=2"],
    "ode": ["sampling.chunk_frames=2"],
    "self_forcing": [
        "sampling.chunk_frames=2", "rollout.min_num_training_frames=5", "rollout.slice_last_frames=5",
    ],
    "streaming": [
        "sampling.chunk_frames=2", "rollout.min_num_training_frames=5", "rollout.slice_last_frames=5",
        "rollout.overlap_latents=2", "streaming.streaming_min_new_frame=4", "streaming.streaming_max_length=13",
    ],
    "pairs": ["pairs.num_steps=4", "pairs.shard_size=2", "sampling.num_frames=17", "sampling.bs=2"],
    "sample": ["scheduler.num_inference_steps=2"],
}  # fmt: skip
"""Settings that make a step take seconds on two cores."""


@dataclass(frozen=True)
class Row:
    """A line of the table. weights: of parts. settings: of the sampler. prompts and seeds: at most so many."""

    name: str
    weights: str
    settings: tuple[str, ...] = ()
    lengths: tuple[int, ...] = (5, 30, 60)
    prompts: int = HELD_OUT_PROMPTS
    seeds: int = 3
    steps: int = 4
    absorbs: bool = True


BASE_SETTINGS = (
    "scheduler.sampling_algo=flow_euler",
    "scheduler.inference_flow_shift=8.0",
    "scheduler.num_inference_steps=30",
    "sampling.cfg_scale=2.0",
    "sampling.null_caption=learned",
)
WHOLE_PAST = ("model.state_decay=1",)
"""The published sum of everything, with which all networks were trained; the default config forgets."""
TRUTH = "ground truth through the VAE"
ROWS = (
    Row(TRUTH, "", seeds=1, steps=0),
    Row("base model", "base", BASE_SETTINGS, lengths=(5,), steps=30),
    Row("ODE-initialised", "ode", WHOLE_PAST, seeds=1),
    Row("Self-Forcing", "self_forcing", WHOLE_PAST),
    Row("LongSANA", "longsana"),
    Row("LongSANA, the whole past", "longsana", WHOLE_PAST),
    Row("LongSANA, num_cached_blocks 2", "longsana", (*WHOLE_PAST, "model.num_cached_blocks=2"), prompts=32, seeds=1),
    Row("LongSANA, no clean absorbing pass", "longsana", prompts=32, seeds=1, absorbs=False),
    Row("Self-Forcing, state_decay 0.933", "self_forcing", prompts=32, seeds=1),
)


CARD = """\
# The models of the shapes world

Text to videos of one or two moving shapes, 160x96 pixels, 16 frames a second, of any length. Made from nothing by
`train_video_scripts/shapes_recipe.py` (its seeds; packaged at commit {commit}): no data but what
`longsana/shapes/scenes.py` draws.

* `vae`: a Wan 2.1 VAE of base width 12. `text_encoder`: a Gemma 2 of two layers, trained on the world's captions.
* `base.safetensors`: the bidirectional base model. `ode`, `self_forcing`, `longsana`: the generator after each stage.

Networks have 2.9 M parameters, in bfloat16. Combinations of kind, colour and motion in `HELD_OUT`
(`longsana/shapes/scenes.py`) were never trained on; every prompt of the table has one.

| step | seconds, or score | machine |
|---|---|---|
{steps}

{table}

Use: the world's grammar only. Other prompts give some video of shapes. Licence: Apache-2.0.
"""


class Recipe:
    """The steps, in order; each makes one thing of `parts`. tiny: on a CPU, in seconds. world: whose clips."""

    def __init__(self, out: Path, *, tiny: bool, device: torch.device, world: WorldName = "shapes") -> None:
        self.parts, self.runs, self.tiny, self.world = out / "parts", out / "runs", tiny, world
        self.device = device
        self.parts.mkdir(parents=True, exist_ok=True)
        self._write_prompts()
        self.steps: dict[str, tuple[Path, Callable[[], int]]] = {
            "text": (self.parts / "text_encoder", self.text),
            "vae": (self.parts / "vae", self.vae),
            **{name: (self.parts / f"{name}.safetensors", self._stage(name)) for name in PHASES},
            "scores": (self.parts / "scores.json", self.scores),
            "speed": (self.parts / "speed.json", self.speed),
            "table": (self.parts / "table.md", self.table),
            "plot": (self.parts / "plot.png", self.plot),
            "strips": (self.parts / "strips.png", self.strips),
            "package": (self.parts / "asset", self.package),
        }

    def run(self, names: Sequence[str]) -> int:
        for name in names:
            check_stop()  # a run that was asked in its last moment has ended well
            _, make = self.steps[name]
            # Of the base model's phases, a later one is all that is wanted of those before it.
            phases = list(BASE_PHASES)
            serve = phases[phases.index(name) :] if name in phases else [name]
            if there := [product for product, _ in (self.steps[step] for step in serve) if product.exists()]:
                log.info("== %s: %s is there", name, there[0])
                continue
            log.info("== %s", name)
            started = time.perf_counter()
            if status := make():
                return status
            self._note(name, time.perf_counter() - started)
        return 0

    # Parts that are not networks of ours

    def text(self) -> int:
        from longsana.shapes.train_text_encoder import TextTrainingConfig, train_text_encoder

        config = load_config(CONFIGS / "text_encoder.yaml", self._small_world("text"), TextTrainingConfig)
        return self._finished("text_encoder", lambda folder: train_text_encoder(config, folder, self.device))

    def vae(self) -> int:
        from longsana.shapes.train_vae import VAETrainingConfig, train_vae

        name = "vae" if self.world == "shapes" else "vae_remembered"
        config = load_config(CONFIGS / f"{name}.yaml", self._small_world("vae"), VAETrainingConfig)
        return self._finished("vae", lambda folder: train_vae(config, folder, self.device))

    def _finished(self, name: str, train: Callable[[Path], float]) -> int:
        """A folder of parts that appears when it is whole."""
        unfinished = self.runs / name
        unfinished.mkdir(parents=True, exist_ok=True)
        with naming(unfinished):
            score = train(unfinished)
        self._note(f"{name} score", score)
        unfinished.rename(self.parts / name)
        return 0

    # Networks, by the commands that train the 2B ones

    def _stage(self, name: str) -> Callable[[], int]:
        def make() -> int:
            from longsana.commands import train

            if name == "ode" and (status := self._pairs()):
                return status
            critic = self.parts / "critic.safetensors"
            if name == "longsana" and not critic.exists():
                raise InputError(
                    f"{critic}: not found; Self-Forcing makes it and it does not ship: remove self_forcing.safetensors "
                    "there and run --steps self_forcing longsana"
                )
            given = [f"data.data_path={self.parts / 'prompts.txt'}", *self._from("real_score", "base")]
            settings: list[str] = {
                **{phase: self._base_phase(phase) for phase in BASE_PHASES},
                "ode": [*self._from("model", "base"), f"data.data_path={self.runs / 'pairs'}"],
                "self_forcing": [*given, *self._from("model", "ode"), *self._from("fake_score", "base")],
                "longsana": [*given, *self._from("model", "self_forcing"), *self._from("fake_score", "critic")],
            }[name]
            run = self.runs / name
            config = CONFIGS / f"{PHASES[name]}.yaml"
            status = train.main(
                [
                    "--config_path", str(config), "--logdir", str(run), "--no_visualize", "--disable-wandb",
                    *self._models(), *settings, *self._tiny("stage"), *self._tiny(PHASES[name]),
                ]
            )  # fmt: skip
            if status:
                return int(status)
            if name == "self_forcing" and (status := self._export(run, "critic", "critic")):
                return status
            return self._export(run, "ema", name)

        return make

    def _base_phase(self, name: str) -> list[str]:
        phases = list(BASE_PHASES)
        number = phases.index(name)
        settings = [f"train.seed={number}", f"train.max_iters={BASE_PHASES[name]}"]
        settings += [f"data.data_path=generated:{'turning_' if name == 'base_2' else ''}{self.world}"]
        if number > 0:
            settings += self._from("model", phases[number - 1])
        if name == "base_2":
            # The sense of an orbit is decided at sigma 0.93 to 0.985, where these lie.
            settings += ["flow_matching.logit_mean=0.5", "flow_matching.logit_std=1.0"]
        if name == "base":
            settings += ["optimizer.generator.lr=7.0e-4"]
        return settings

    def _pairs(self) -> int:
        from longsana.commands import ode_pairs

        _, text = self._models()  # no video is decoded
        status: int = ode_pairs.main(
            [
                "--config_path", str(CONFIGS / "ode_pairs.yaml"), "--out", str(self.runs / "pairs"),
                "--txt_file", str(self.parts / "prompts.txt"), "--end_index", "2" if self.tiny else "768",
                text, *self._from("model", "base"), *self._tiny("pairs"),
            ]
        )  # fmt: skip
        return status

    def _export(self, run: Path, weights: str, name: str) -> int:
        from longsana.commands import export

        newest = max(run.glob("checkpoint_model_*"))
        target = self.parts / f"{name}.safetensors"
        status: int = export.main(
            [
                str(newest), "--out", str(target), "--layout", "safetensors", "--weights", weights,
                "--dtype", "bfloat16", "--force",
            ]
        )  # fmt: skip
        return status

    def _models(self) -> list[str]:
        return [
            f"vae.vae_pretrained={self.parts / 'vae'}",
            f"text_encoder.text_encoder_name={self.parts / 'text_encoder'}",
        ]

    def _from(self, section: str, name: str) -> list[str]:
        return [f"{section}.load_from={self.parts / name}.safetensors"]

    # Measurement

    def scores(self) -> int:
        from longsana.evaluation.score_model import Trial, try_model, try_truth

        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        texts = training_prompts(self.parts / "held_out.txt")
        scores: dict[str, Any] = {}
        for row in ROWS:
            path = self.parts / f"scores_{row.name.replace(' ', '_').replace(',', '')}.json"
            if not path.exists():
                started = time.perf_counter()
                trial = Trial(
                    texts[: row.prompts], tuple(range(row.seeds)), row.lengths, absorbs=row.absorbs, world=self.world
                )
                if self.tiny:
                    trial = replace(trial, prompts=texts[:2], seeds=(0,), lengths=(1,), batch=2)
                attempt = try_truth if row.name == TRUTH else try_model
                result = attempt(self._sampler(row), trial, self.device)
                result["seconds"] = round(time.perf_counter() - started, 1)
                atomic_write_text(path, json.dumps(result) + "\n")
                log.info("%s: %.0f s", row.name, result["seconds"])
            scores[row.name] = json.loads(path.read_text(encoding="utf-8"))
        atomic_write_text(self.parts / "scores.json", json.dumps(scores) + "\n")
        return 0

    def speed(self) -> int:
        """Frames a second on two cores of this machine."""
        from longsana.evaluation.score_model import measure_speed

        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        prompt = training_prompts(self.parts / "held_out.txt")[0]
        speeds = {}
        for row in ROWS:
            if row.weights:
                seconds = 1 if self.tiny else min(10, max(row.lengths))
                speeds[row.name] = measure_speed(self._sampler(row), prompt, seconds, absorbs=row.absorbs)
                log.info("%s: %.1f FPS", row.name, speeds[row.name])
        torch.set_num_threads(threads)
        atomic_write_text(self.parts / "speed.json", json.dumps(speeds) + "\n")
        return 0

    def table(self) -> int:
        text = render_table(self._read("scores"), self._read("speed"))
        atomic_write_text(self.parts / "table.md", text)
        print(text)
        return 0

    def plot(self) -> int:
        """The long videos of all models, second by second. Needs matplotlib."""
        from longsana.evaluation.report import plot

        scores = self._read("scores")
        longest = max(len(score["curves"]["persistence"]) for score in scores.values())
        curves = {name: score["curves"] for name, score in scores.items()}
        plot({name: own for name, own in curves.items() if len(own["persistence"]) == longest}, self.parts / "plot.png")
        return 0

    def strips(self) -> int:
        """LongSANA's pictures every quarter of a minute, a prompt a row."""
        from longsana.evaluation.score_model import strips

        config = self._sampler(next(row for row in ROWS if row.name == "LongSANA"))
        texts = training_prompts(self.parts / "held_out.txt")
        seconds = (0, 1) if self.tiny else (0, 15, 30, 45, 60)
        strips(config, texts[:3], seconds, self.parts / "strips.png", self.device)
        return 0

    def package(self) -> int:
        """What ships, and the model card."""
        networks = [f"{name}.safetensors" for name in NETWORKS]
        measured = ["scores.json", "speed.json", "times.json", "plot.png", "strips.png"]
        wanted = ["vae", "text_encoder", *networks, "table.md", *measured]
        if missing := [name for name in wanted if not (self.parts / name).exists()]:
            raise InputError(f"{self.parts}: {', '.join(missing)} not found; run the steps that make them first")

        def gather(folder: Path) -> float:
            for part in ("vae", "text_encoder"):
                shutil.copytree(self.parts / part, folder / part, dirs_exist_ok=True)
            for name in networks + measured:
                shutil.copy(self.parts / name, folder)
            atomic_write_text(folder / "README.md", self._card())
            return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6

        return self._finished("asset", gather)

    def _card(self) -> str:
        from longsana.inference.sidecar import commit

        noted = self._read("times")
        lines = [f"| {name} | {entry['value']} | {entry['machine']} |" for name, entry in noted.items()]
        return CARD.format(
            commit=commit(),
            steps="\n".join(lines),
            table=(self.parts / "table.md").read_text(encoding="utf-8").strip(),
        )

    def _sampler(self, row: Row) -> InferenceConfig:
        settings = [*self._models(), *row.settings]
        if row.weights:
            settings += self._from("model", row.weights)
        if self.tiny and row.name == "base model":
            settings += TINY["sample"]
        return load_config(CONFIGS / "longsana.yaml", settings, InferenceConfig)

    def _read(self, name: str) -> dict[str, Any]:
        path = self.parts / f"{name}.json"
        if not path.exists():
            raise InputError(f"{path}: not found; run --steps {name} first")
        read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return read

    # What else

    def _tiny(self, step: str) -> list[str]:
        return TINY[step] if self.tiny else []

    def _small_world(self, step: str) -> list[str]:
        return [f"world={self.world}", *self._tiny(step)]

    def _write_prompts(self) -> None:
        for name, seed, count, held_out in (
            ("prompts.txt", 1, TRAINING_PROMPTS, False),
            ("held_out.txt", 0, HELD_OUT_PROMPTS, True),
        ):
            path = self.parts / name
            text = "\n".join(prompts(seed, count, held_out=held_out, draw=WORLDS[self.world])) + "\n"
            if not path.exists():
                atomic_write_text(path, text)
            elif path.read_text(encoding="utf-8") != text:
                raise InputError(f"{path}: not the prompts of --world {self.world}; give another --out")

    def _note(self, name: str, value: float) -> None:
        """times.json: seconds of each step, and scores of parts, with the machine."""
        path = self.parts / "times.json"
        noted = self._read("times") if path.exists() else {}
        machine = torch.cuda.get_device_name() if self.device.type == "cuda" else f"{os.cpu_count()} CPU cores"
        noted[name] = {"value": round(value, 2), "machine": machine, "torch": torch.__version__}
        atomic_write_text(path, json.dumps(noted, indent=1) + "\n")
        log.info("== %s: %.2f", name, value)


def render_table(scores: dict[str, Any], speeds: dict[str, float]) -> str:
    """Markdown: a line a model and length."""
    from longsana.evaluation.report import table
    from longsana.evaluation.score_model import DRIFT, FIGURES

    lines = []
    steps = {row.name: row.steps for row in ROWS}
    for name, score in scores.items():
        for seconds, figures in score["figures"].items():
            lines.append(
                {
                    "model": name,
                    "seconds": int(seconds),
                    **{figure: _percent(figures[figure]) for figure in FIGURES if figure in figures},
                    "seam index": _number(figures["seam index"]),
                    DRIFT: _percent(figures[DRIFT]),
                    "steps": steps[name] or "",
                    "FPS on two cores": f"{speeds[name]:.1f}" if name in speeds else "",
                    "videos": f"{score['videos']} x {score['seeds']}",
                }
            )
    return table(lines)


def _percent(value: Sequence[float | None]) -> str:
    mean, spread = value
    if mean is None:
        return ""
    return f"{100 * mean:.1f} %" if spread is None else f"{100 * mean:.1f} ± {100 * spread:.1f} %"


def _number(value: Sequence[float | None]) -> str:
    mean, spread = value
    if mean is None:
        return ""
    return f"{mean:.3f}" if spread is None else f"{mean:.3f} ± {spread:.3f}"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=typed_path, default=Path("output/shapes"), help="(default: %(default)s)")
    parser.add_argument("--steps", nargs="+", metavar="STEP", help="only these (default: all, in order)")
    parser.add_argument("--world", choices=list(WORLDS), default="shapes", help="whose clips (default: %(default)s)")
    parser.add_argument("--size", choices=["full", "tiny"], default="full")
    return parser.parse_args(arguments)


def prepare(arguments: Sequence[str], world: World) -> tuple[Recipe, list[str]]:
    options = parse(arguments)
    recipe = Recipe(options.out.resolve(), tiny=options.size == "tiny", world=options.world, device=world.device())
    names = options.steps or list(recipe.steps)
    if unknown := [name for name in names if name not in recipe.steps]:
        raise InputError(f"--steps {unknown[0]}: no such step; there are {', '.join(recipe.steps)}")
    return recipe, names


def main(arguments: Sequence[str]) -> int:
    # The stages' commands meet their processes themselves.
    return run_command(
        lambda world: prepare(arguments, world), lambda asked, world: asked[0].run(asked[1]), connect=lambda world: None
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
