"""Train everything of the shapes world, one public command after another, and measure it.

    python train_video_scripts/shapes_recipe.py --show                 # the commands, which can be typed as they are
    python train_video_scripts/shapes_recipe.py --out output/shapes
    python train_video_scripts/shapes_recipe.py --out output/remembered_shapes --world remembered_shapes
    python train_video_scripts/shapes_recipe.py --out output/bars --lora       # what ships learns bars from 200 films

A step is done when what it makes lies in OUT/parts, and is then passed over: stopped at any moment, the same command
goes on, training from where it was. OUT/parts is all that later steps need: carry it to another machine,
and the rest can be made there; a score stays until its file goes. Without a GPU `--size tiny` shows in two minutes that
all of it runs; it trains nothing, and has a folder of its own.
Exit status: 0 done, else that of the step that stopped.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts also run from a checkout not installed

if __name__ == "__main__":
    from longsana.runtime.process import begin

    begin()  # before the imports below, which take seconds

from longsana.commands import run_here
from longsana.commands.shapes import FILMED, check_size, note
from longsana.config import load_config
from longsana.evaluation.shapes_table import BASE_SETTINGS, CONFIGS, TWO_STEPS, WHOLE_PAST
from longsana.runtime.commandline import Parser, run_command, typed_path
from longsana.runtime.distributed import World
from longsana.runtime.errors import InputError
from longsana.runtime.files import check_writable
from longsana.runtime.hub import locate
from longsana.runtime.stop import check as check_stop
from longsana.shapes.remembered import WORLDS, WorldName
from longsana.training.config import TrainingConfig

log = logging.getLogger("longsana")

BASE_PHASES = {"base_1": 8_500, "base_2": 5_500, "base_3": 4_000, "base": 4_000}
"""Iterations of the base model, in phases of at most 8 minutes on one H200. Each goes on from the one before, on clips
of its own, the last two with lower rates."""
MUON = "optimizer.generator.muon_lr"
PICTURES = "train.image_probability=0.2"
"""The base model is to be a teacher of videos that begin with a picture."""
LOWER_RATES = ("optimizer.generator.lr=7.0e-4", f"{MUON}=7.0e-4")
SHORT_FIRST_CHUNKS = ("train.first_chunk_probability=0.25", "sampling.first_chunk_frames=3")
BEGINNINGS = ("train.image_probability=0.25", "sampling.image_first=pin", *SHORT_FIRST_CHUNKS)
"""How videos of distillation begin: a quarter of them with a picture, a quarter with a short first chunk."""
WHOLE_STAGE = ("train.ema_start_step=0", "train.ema_relative_width=0.25")
"""The average of a stage that begins with good weights: over all of it, they count as much as what they became."""
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point", "linear_1", "linear_2")
"""The default, and the caption's way into the network: the word of the new kind is new to it."""
CRITICS = dict.fromkeys(("longsana", "two_step"), ("self_forcing", "critic"))
CRITICS["whole_longsana"] = ("whole_self_forcing", "whole_critic")
"""Steps that go on with a critic: the step that makes it beside its own product, and its name."""
PHASES = (*BASE_PHASES, "ode", "self_forcing", "longsana", "two_step")
"""Training phases of networks, in order."""
TINY: dict[str, list[str]] = {
    "text": ["steps=2", "batch=4", "test_captions=4"],
    "vae": [
        "steps=[1,1]", "clips=[4,1]", "frames=[1,5]", "heights=[32,32]", "widths=[32,32]", "pool=[8,2]",
        "statistics_clips=1", "test_clips=1", "test_frames=5",
    ],
    "decoder": [
        "steps=[1,1]", "clips=[2,1]", "frames=[5,5]", "heights=[32,32]", "widths=[32,32]", "pool=[4,1]",
        "test_clips=1", "test_frames=5",
    ],
    "stage": [
        "train.max_iters=2", "train.log_iters=2", "train.batch_size=1", "train.mixed_precision=false",
        "train.ema_start_step=0", "train.compile=false", "rollout.num_training_frames=5",
    ],
    "base": ["data.num_clips=2"],
    "base_causal": ["data.num_clips=2", "sampling.chunk_frames=2"],
    "consistency": ["data.num_clips=2", "sampling.chunk_frames=2"],
    "ode": ["sampling.chunk_frames=2"],
    "self_forcing": [
        "sampling.chunk_frames=2", "sampling.first_chunk_frames=2",
        "rollout.min_num_training_frames=5", "rollout.slice_last_frames=5",
    ],
    "streaming": [
        "sampling.chunk_frames=2", "sampling.first_chunk_frames=2",
        "rollout.min_num_training_frames=5", "rollout.slice_last_frames=5",
        "rollout.overlap_latents=2", "streaming.streaming_min_new_frame=4", "streaming.streaming_max_length=13",
    ],
    "films": ["sampling.num_frames=17", "sampling.bs=2", "scheduler.num_inference_steps=2"],
    "clips": ["rollout.num_training_frames=5"],
    "pairs": ["pairs.num_steps=4", "pairs.shard_size=2", "sampling.num_frames=17", "sampling.bs=2"],
}  # fmt: skip
"""Settings that make a step take seconds on two cores."""


class Step(NamedTuple):
    """A step: its product, in OUT/parts, and the commands of `longsana` that make it, in order.

    prints: they also print it, and do so alone where it is there.
    """

    product: Path
    commands: list[list[str]]
    prints: bool = False


def recipe(out: Path, *, tiny: bool = False, world: WorldName = "shapes") -> dict[str, Step]:
    """All steps, in order. tiny: on a CPU, in seconds. world: whose clips."""
    parts, runs, text = out / "parts", out / "runs", out / "parts/text_encoder"
    models = [f"vae.vae_pretrained={parts / 'vae'}", f"text_encoder.text_encoder_name={text}"]
    teacher = _from(parts, real_score="base")
    given = [f"data.data_path={parts / 'pictured.txt'}", *BEGINNINGS, *teacher]
    hard = {"shapes": "mixed_shapes", "remembered_shapes": "turning_remembered_shapes"}[world]

    def shapes(tool: str, folder: Path, *more: str) -> list[list[str]]:
        return [["shapes", tool, str(folder), *more]]

    of_world, measured = ["--world", world], ["--tiny"] if tiny else []

    def train(name: str, config: str, *settings: str, critic: str | None = None) -> Step:
        own = [*settings, *_tiny(tiny, "stage", config)]
        command = ["train", "--config_path", f"{CONFIGS}/{config}.yaml", "--logdir", str(runs / name)]
        last = load_config(
            locate(f"{CONFIGS}/{config}.yaml", "the config"), [*models, *own], TrainingConfig
        ).train.max_iters
        checkpoint = runs / name / f"checkpoint_model_{last:06d}"
        exports = [_export(checkpoint, parts, "critic", critic)] if critic else []
        return Step(
            parts / f"{name}.safetensors",
            [
                [*command, "--no_visualize", "--disable-wandb", *models, *own],
                *exports,
                _export(checkpoint, parts, "ema", name),
            ],
        )

    def base(name: str, before: str | None, *settings: str) -> Step:
        number = list(BASE_PHASES).index(name)
        start = _from(parts, model=before) if before else []
        iterations = f"train.max_iters={BASE_PHASES[name]}"
        clips = f"data.data_path=generated:{hard}"
        return train(name, "base", f"train.seed={number}", iterations, clips, f"{MUON}=3.0e-3", *start, *settings)

    pairs = ["ode-pairs", "--config_path", f"{CONFIGS}/ode_pairs.yaml", "--out", str(runs / "pairs")]
    pairs += ["--txt_file", str(parts / "prompts.txt"), "--end_index", "2" if tiny else "768", models[1]]
    pairs += [*_from(parts, model="base"), *_tiny(tiny, "pairs")]
    ode = train("ode", "ode", *_from(parts, model="base"), f"data.data_path={runs / 'pairs'}")
    return {
        "prompts": Step(parts / "held_out.txt", shapes("prompts", parts, *of_world)),
        "text": Step(
            parts / "text_encoder", shapes("text-encoder", parts / "text_encoder", *of_world, *_tiny(tiny, "text"))
        ),
        "vae": Step(parts / "vae", shapes("vae", parts / "vae", *of_world, *_tiny(tiny, "vae"))),
        "decoder": Step(
            parts / "decoder",
            shapes("decoder", parts / "decoder", *of_world, f"vae={parts / 'vae'}", *_tiny(tiny, "decoder")),
        ),
        "base_1": base("base_1", None),
        # The sense of an orbit is decided at sigma 0.93 to 0.985, where these lie.
        "base_2": base("base_2", "base_1", PICTURES, "flow_matching.logit_mean=0.5", "flow_matching.logit_std=1.0"),
        "base_3": base("base_3", "base_2", PICTURES, *LOWER_RATES),
        # The rates fall further, to 0.3 of that.
        "base": base("base", "base_3", PICTURES, *LOWER_RATES, "optimizer.generator.decay_after=400"),
        "ode": ode._replace(commands=[pairs, *ode.commands]),
        "pictures": Step(parts / "pictured.txt", shapes("pictures", parts, *of_world)),
        "self_forcing": train(
            "self_forcing", "self_forcing", *given, *_from(parts, model="ode", fake_score="base"), critic="critic"
        ),
        "longsana": train(
            "longsana",
            "streaming",
            "train.max_iters=1344",
            *WHOLE_STAGE,
            *given,
            *_from(parts, model="self_forcing", fake_score="critic"),
        ),
        "two_step": train(
            "two_step",
            "streaming",
            "train.max_iters=1200",
            *TWO_STEPS,
            *given,
            *_from(parts, model="longsana", fake_score="critic"),
        ),
        # What the choices above are compared with.
        "whole_self_forcing": train(
            "whole_self_forcing",
            "self_forcing",
            *WHOLE_PAST,
            *given,
            *_from(parts, model="ode", fake_score="base"),
            critic="whole_critic",
        ),
        "whole_longsana": train(
            "whole_longsana",
            "streaming",
            "train.max_iters=1344",
            "streaming.streaming_max_length=261",  # a past that grows is to be seen as long as it gets
            *WHOLE_STAGE,
            *WHOLE_PAST,
            *given,
            *_from(parts, model="whole_self_forcing", fake_score="whole_critic"),
        ),
        "base_causal": train("base_causal", "base_causal", *_from(parts, model="base")),
        "two_step_consistency": train(
            "two_step_consistency",
            "consistency",
            *TWO_STEPS,
            *_from(parts, model="base_causal", real_score="base_causal"),
        ),
        "scores": Step(parts / "scores.json", shapes("scores", parts, *of_world, *measured)),
        "speed": Step(parts / "speed.json", shapes("speed", parts, *measured)),
        "table": Step(parts / "table.md", shapes("table", parts)),
        "plot": Step(parts / "plot.png", shapes("plot", parts)),
        "strips": Step(parts / "strips.png", shapes("strips", parts, *measured)),
        "package": Step(parts / "asset", shapes("package", parts)),
    }


def lora_recipe(out: Path, *, tiny: bool = False) -> dict[str, Step]:
    """The steps by which what ships learns a kind of shape that it does not know from 200 films.

    The base model learns it by flow matching, from these films and from 1,200 that it makes itself of old kinds: they
    show what is to stay. Adapted, it is then teacher and critic of Self-Forcing, which starts from LongSANA itself.
    """
    parts, runs, measured = out / "parts", out / "runs", ["--tiny"] if tiny else []
    base, longsana = "asset/shapes/base.safetensors", "asset/shapes/longsana.safetensors"
    rank = ["train.lora.rank=32", f"train.lora.targets=[{','.join(LORA_TARGETS)}]"]

    def train(name: str, config: str, start: str, product: str, iterations: int, *settings: str) -> Step:
        own = [*rank, f"model.load_from={start}", f"train.max_iters={iterations}", *settings]
        own += _tiny(tiny, "stage", config)
        last = load_config(locate(f"{CONFIGS}/{config}.yaml", "the config"), own, TrainingConfig).train.max_iters
        command = ["train", "--config_path", f"{CONFIGS}/{config}.yaml", "--logdir", str(runs / name)]
        lora, fused = parts / f"{product}_lora.safetensors", parts / f"{product}.safetensors"
        checkpoint = str(runs / name / f"checkpoint_model_{last:06d}")
        of_small = ["--config", f"{CONFIGS}/longsana.yaml", "--dtype", "float32", "--force"]
        return Step(
            fused,
            [
                [*command, "--no_visualize", "--disable-wandb", *own],
                ["convert", checkpoint, str(lora), "--to", "lora", "--key", "generator_ema", "--force"],
                ["convert", start, str(fused), "--to", "safetensors", "--fuse", str(lora), *of_small],
            ],
        )

    films, clips = runs / "films", runs / "clips"
    old = ["--txt_file", str(parts / "old.txt"), "--work_dir", str(films / "old")]
    # Forty encoders at a time, of one thread each: with 16, the default, each takes twice the CPU (on two cores).
    old += [f"video.crf={FILMED}", "video.threads=1", f"model.load_from={base}", *BASE_SETTINGS]
    old += _tiny(tiny, "films") or ["sampling.bs=40"]
    encode = ["encode", str(films), "--out", str(clips), "--config_path", f"{CONFIGS}/base.yaml"]
    make_clips = [
        ["shapes", "bar-films", str(films / "bars"), *measured],
        ["generate", *old, *(["--end_index", "2"] if tiny else [])],
        [*encode, *_tiny(tiny, "clips")],
    ]
    # With rates that fall in both runs old kinds lost 1.7 points, with constant ones and a shorter second run 2.3.
    shown = [f"data.data_path={clips / '96x160'}", "optimizer.generator.lr=1e-3", "optimizer.generator.decay_after=250"]
    averages = ["train.ema_start_step=0", "train.ema_weight=0.99"]
    teacher = train("teacher", "base", base, "teacher", 1000, *shown, *averages)
    adapted = _from(parts, real_score="teacher", fake_score="teacher")
    videos = [f"data.data_path={parts / 'prompts.txt'}", *SHORT_FIRST_CHUNKS, *adapted]
    rates = ["optimizer.generator.lr=5e-4", "optimizer.generator.decay_after=300", "optimizer.critic.lr=1e-3"]
    return {
        "prompts": Step(parts / "bars.txt", [["shapes", "bar-prompts", str(parts)]]),
        "teacher": teacher._replace(commands=[*make_clips, *teacher.commands]),
        "bars": train("bars", "self_forcing", longsana, "bars", 1200, *videos, *rates),
        "scores": Step(parts / "bar_scores.json", [["shapes", "bar-scores", str(parts), *measured]], prints=True),
    }


def _from(parts: Path, **weights: str) -> list[str]:
    """Settings by which a network, named as its section, starts from a part."""
    return [f"{section}.load_from={parts / name}.safetensors" for section, name in weights.items()]


def _export(checkpoint: Path, parts: Path, weights: str, name: str) -> list[str]:
    target = ["--out", str(parts / f"{name}.safetensors"), "--layout", "safetensors", "--weights", weights]
    return ["export", str(checkpoint), *target, "--dtype", "bfloat16", "--force"]


def _tiny(tiny: bool, *names: str) -> list[str]:
    return [setting for name in names for setting in TINY[name]] if tiny else []


def run(steps: dict[str, Step], names: Sequence[str], world: World) -> int:
    """Make what is not there; returns the status of the command that stopped, or 0."""
    for name in dict.fromkeys(["prompts", *names]):  # they are there at once, and tell whose world this is
        check_stop()  # a run that was asked in its last moment has ended well
        # Of the base model's phases, a later one is all that is wanted of those before it.
        phases = list(BASE_PHASES)
        serve = phases[phases.index(name) :] if name in phases else [name]
        there = [steps[step].product for step in serve if steps[step].product.exists()]
        if there and name != "prompts":
            log.info("== %s: %s is there", name, there[0])
            if not steps[name].prints:
                continue
        parts = steps[name].product.parent
        forced, critic = CRITICS.get(name, ("", ""))
        if critic and not (parts / f"{critic}.safetensors").exists():
            raise InputError(
                f"{parts / critic}.safetensors: not found; Self-Forcing makes it and it does not ship: run --steps "
                f"{forced} {name}, without {forced}.safetensors there"
            )
        started = time.perf_counter()
        for command in steps[name].commands:
            log.info("== %s: longsana %s", name, shlex.join(command))
            if status := run_here(*command):
                return status
        if name != "prompts" and not there:
            note(parts, name, time.perf_counter() - started, world.device())
    return 0


def show(steps: dict[str, Step], names: Sequence[str]) -> None:
    """Print the commands, folded."""
    for name in names:
        print(f"\n# {name}")
        for command in steps[name].commands:
            lines = ["longsana"]
            for word in command:
                # A setting and an option have a line each, with what belongs to it.
                if word.startswith("--") or "=" in word:
                    lines.append(shlex.quote(word))
                else:
                    lines[-1] += f" {shlex.quote(word)}"
            print(" \\\n    ".join(lines))


def prepare(arguments: Sequence[str]) -> tuple[dict[str, Step], list[str], bool]:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=typed_path, default=Path("output/shapes"), help="(default: %(default)s)")
    parser.add_argument("--steps", nargs="+", metavar="STEP", help="only these (default: all, in order)")
    parser.add_argument("--world", choices=list(WORLDS), default="shapes", help="whose clips (default: %(default)s)")
    parser.add_argument("--lora", action="store_true", help="a LoRA on what ships, which learns bars from 200 films")
    parser.add_argument("--size", choices=["full", "tiny"], default="full")
    parser.add_argument("--show", action="store_true", help="print the commands instead of running them")
    options: argparse.Namespace = parser.parse_args(arguments)
    out = options.out if options.show else options.out.resolve()
    if options.lora and options.world != "shapes":
        raise InputError(f"--world {options.world}: what ships, on which --lora is put, is of the world shapes")
    tiny = options.size == "tiny"
    steps = lora_recipe(out, tiny=tiny) if options.lora else recipe(out, tiny=tiny, world=options.world)
    names = options.steps or list(steps)
    if unknown := [name for name in names if name not in steps]:
        raise InputError(f"--steps {unknown[0]}: no such step; there are {', '.join(steps)}")
    if not options.show:
        check_writable(out, "--out")
        check_size(out / "parts", tiny=tiny)
    return steps, names, options.show


def main(arguments: Sequence[str]) -> int:
    def begin(asked: tuple[dict[str, Step], list[str], bool], world: World) -> int:
        steps, names, shown = asked
        if shown:
            show(steps, names)
            return 0
        return run(steps, names, world)

    # The commands meet their processes themselves.
    return run_command(lambda world: prepare(arguments), begin, connect=lambda world: None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
