"""Tools of the shapes world: its parts that are no networks of ours, and what is measured of its models.

    longsana shapes prompts output/shapes/parts                        # prompts.txt and held_out.txt
    longsana shapes pictures output/shapes/parts                       # first pictures of the former: pictured.txt
    longsana shapes text-encoder output/shapes/parts/text_encoder      # trained, with settings such as steps=100
    longsana shapes vae output/shapes/parts/vae
    longsana shapes decoder output/shapes/parts/decoder vae=output/shapes/parts/vae    # a tiny one of its latents
    longsana shapes scores output/shapes/parts                         # of all models there; speed: on two cores
    longsana shapes table output/shapes/parts                          # plot, strips: pictures; package: what ships
    longsana shapes bar-prompts output/bars/parts                      # of a kind that no model here knows
    longsana shapes bar-films output/bars/runs/films/bars              # 200 films of it, with captions
    longsana shapes bar-scores output/bars/parts                       # of one that has learned it: bars.safetensors

`train_video_scripts/shapes_recipe.py` runs them in order, and the commands that train networks in between. Stopped at
any moment, the same command goes on: training from where it was, scores after the last model.
Exit status: 0 done, 1 a disk is full or broken, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from longsana.config import InferenceConfig, load_config
from longsana.data.prompts import PICTURE, training_prompts
from longsana.encoders.tiny_layouts import FULL
from longsana.evaluation.shapes_table import (
    AS_ON_A_CPU,
    CONFIGS,
    DECODER,
    HELD_OUT_PROMPTS,
    PLOTTED,
    ROWS,
    TEN,
    Row,
    percent,
    render_table,
    sampler,
    score_each,
)
from longsana.runtime.commandline import Parser, run_command, typed_path
from longsana.runtime.distributed import World
from longsana.runtime.errors import InputError
from longsana.runtime.files import atomic_write_text, check_writable, naming, whole_file
from longsana.runtime.hub import locate
from longsana.runtime.video import VideoWriter
from longsana.shapes.bars import draw_bars
from longsana.shapes.remembered import WORLDS, WorldName
from longsana.shapes.scenes import FPS, distinct_scenes, prompts, render, to_bytes

if TYPE_CHECKING:
    from longsana.evaluation.score_model import Trial

log = logging.getLogger("longsana")

NETWORKS = ("base", "longsana", "two_step")
FOLDERS = ("vae", "text_encoder")
"""Parts that are folders, and ship as they are."""
TINY_RECORD = "tiny.txt"
"""Among the parts where they are of tiny size; others have no record, as what ships."""
VAES: dict[WorldName, str] = {"shapes": "vae.yaml", "remembered_shapes": "vae_remembered.yaml"}
TRAINING_PROMPTS = 2048
BARS = "bars.txt"
FILMS, KEPT = 200, 1200
"""Films of bars that a LoRA learns from, and prompts of old kinds of which there are films beside them."""
FILMED = 10
"""Their crf: nothing of it is seen."""
CARD = """\
# The models of the shapes world

Text to videos of one or two moving shapes, 160x96 pixels, 16 frames a second, of any length. Made from nothing by
`train_video_scripts/shapes_recipe.py` (its seeds; packaged at commit {commit}): no data but what
`longsana/shapes/scenes.py` draws.

* `vae`: a Wan 2.1 VAE of base width 12, and a tiny decoder (`tae_shapes`) of its latents.
* `text_encoder`: a Gemma 2 of two layers, trained on the world's captions.
* `base.safetensors`: the bidirectional base model. `longsana`: the generator after all stages. `two_step`: the same in
  two passes a chunk for five.

Networks have 4.2 M parameters, in bfloat16. Combinations of kind, colour and motion in `HELD_OUT`
(`longsana/shapes/scenes.py`) were never trained on; every prompt of the table has one.

| step | seconds, or score | machine |
|---|---|---|
{steps}

{table}

Use: the world's grammar only. Other prompts give some video of shapes. Licence: Apache-2.0.
"""


@dataclass(frozen=True)
class Request:
    """A tool's arguments. folder: of the parts, or of the part that is trained. tiny: measure next to nothing."""

    folder: Path
    config_path: str | None
    world: WorldName
    tiny: bool
    settings: list[str]
    device: torch.device


def write_prompts(request: Request) -> None:
    """Write prompts to train on, and held-out ones."""
    for name, seed, count, held_out in (
        ("prompts.txt", 1, TRAINING_PROMPTS, False),
        ("held_out.txt", 0, HELD_OUT_PROMPTS, True),
    ):
        path = request.folder / name
        _write_lines(path, prompts(seed, count, held_out=held_out, draw=WORLDS[request.world]))


def draw_pictures(request: Request) -> None:
    """Draw the first picture of each training prompt's scene; then write the prompts with them, pictured.txt."""
    folder = request.folder / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    scenes = distinct_scenes(1, TRAINING_PROMPTS, held_out=False, draw=WORLDS[request.world])
    names = [f"{folder.name}/{number:05d}.png" for number in range(1, len(scenes) + 1)]
    lines = [f"{scene.caption}{PICTURE}{name}" for scene, name in zip(scenes, names, strict=True)]
    path = request.folder / "pictured.txt"
    _check_lines(path, lines)
    for first in range(0, len(scenes), 64):
        some = slice(first, first + 64)
        for name, picture in zip(names[some], to_bytes(render(scenes[some], range(1))), strict=True):
            with whole_file(request.folder / name) as partial:
                Image.fromarray(picture[0].numpy()).save(partial, "PNG")
    _write_lines(path, lines)


def write_bar_prompts(request: Request) -> None:
    """Write prompts of bars and, twice as many, of the old kinds to train on, and held-out ones apart.

    old.txt has some of the old kinds' to train on: the films of them show what must not be forgotten.
    """
    bars = TRAINING_PROMPTS // 3
    old = prompts(1, TRAINING_PROMPTS - bars, held_out=False)
    lists = {
        "prompts.txt": [*prompts(1, bars, held_out=False, draw=draw_bars), *old],
        "old.txt": old[:KEPT],
        BARS: prompts(0, HELD_OUT_PROMPTS, held_out=True, draw=draw_bars),
        "held_out.txt": prompts(0, HELD_OUT_PROMPTS, held_out=True),
    }
    for name, lines in lists.items():
        _write_lines(request.folder / name, lines)


def film_bars(request: Request) -> None:
    """Film scenes of bars, as long as a base model's clips, with their captions beside them."""
    sampling = load_config(locate(f"{CONFIGS}/longsana.yaml", "the config"), (), InferenceConfig).sampling
    for index in range(2 if request.tiny else FILMS):
        scene, path = draw_bars(0, index), request.folder / f"{index:05d}.mp4"
        _write_lines(path.with_suffix(".txt"), [scene.caption])
        if path.exists():
            continue
        (pictures,) = to_bytes(render([scene], range(sampling.num_frames)))
        height, width = pictures.shape[1:3]
        with VideoWriter(path, FPS, height, width, crf=FILMED, preset="veryfast", threads=1) as film:
            film.append(pictures)


def score_bars(request: Request) -> None:
    """Score what ships and what has learned bars after half a minute: on held-out prompts of bars, and of old kinds."""
    from longsana.evaluation.report import table
    from longsana.evaluation.score_model import Trial, try_model

    learned = request.folder / "bars.safetensors"
    config = locate(f"{CONFIGS}/longsana.yaml", "the config")
    if not learned.exists():
        raise InputError(f"{learned}: not found; train_video_scripts/shapes_recipe.py --lora makes it")
    lists = {name: _lines_of(request, name, "bar-prompts") for name in (BARS, "held_out.txt")}

    def score(texts: list[str], weights: Path | None) -> dict[str, Any]:
        trial = _sized(request, Trial(texts, lengths=(30,)))
        given = [*AS_ON_A_CPU, f"vae.decoder={FULL}", *([f"model.load_from={weights}"] if weights else [])]
        return try_model(load_config(config, given, InferenceConfig), trial, request.device)

    rows = {
        f"{model}, {Path(name).stem}": partial(score, texts, weights)
        for name, texts in lists.items()
        for model, weights in (("what ships", None), ("with the LoRA", learned))
    }
    lines = []
    for row, scored in score_each(request.folder / "bar_scores.json", rows).items():
        (figures,) = scored["figures"].values()
        lines.append({"model": row, **{figure: percent(figures[figure]) for figure in ("colour", "kind", "motion")}})
    print(table(lines))


def _sized(request: Request, trial: Trial) -> Trial:
    """The trial, or next to nothing of it where the request is tiny."""
    return replace(trial, prompts=trial.prompts[:2], seeds=(0,), lengths=(1,), batch=2) if request.tiny else trial


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    """Write a file of prompts, unless it is there."""
    _check_lines(path, lines)
    if not path.exists():
        atomic_write_text(path, "".join(f"{line}\n" for line in lines))


def _check_lines(path: Path, lines: Sequence[str]) -> None:
    """Refuse (InputError) a file that is there with other prompts."""
    if path.exists() and path.read_text(encoding="utf-8").splitlines() != list(lines):
        raise InputError(f"{path}: holds other prompts than are made here; give another folder")


def train_text(request: Request) -> None:
    """Train the text encoder."""
    from longsana.shapes.train_text_encoder import TextTrainingConfig, train_text_encoder

    config = _training_config(request, "text_encoder.yaml", TextTrainingConfig)
    _make(request.folder, request.device, lambda folder: train_text_encoder(config, folder, request.device))


def train_vae(request: Request) -> None:
    """Train the VAE, by the config of its world."""
    from longsana.shapes import train_vae

    config = _training_config(request, VAES[request.world], train_vae.VAETrainingConfig)
    _make(request.folder, request.device, lambda folder: train_vae.train_vae(config, folder, request.device))


def train_decoder(request: Request) -> None:
    """Train the tiny decoder of a VAE's latents."""
    from longsana.shapes import train_decoder

    config = _training_config(request, "decoder.yaml", train_decoder.DecoderTrainingConfig)
    _make(request.folder, request.device, lambda folder: train_decoder.train_decoder(config, folder, request.device))


def _training_config(request: Request, usual: str, kind: type[Any]) -> Any:
    """Load the config of a part's training, of this kind. usual: the file where none is said."""
    path = locate(request.config_path or f"{CONFIGS}/{usual}", "--config_path")
    return load_config(path, [f"world={request.world}", *request.settings], kind)


def _make(target: Path, device: torch.device, fill: Callable[[Path], float | None]) -> None:
    """Make a folder that appears when it is whole; until then what is there of it lies beside."""
    if target.exists():
        log.info("%s: is there", target)
        return
    unfinished = target.with_name(f"{target.name}.unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    with naming(unfinished):
        score = fill(unfinished)
    if score is not None:
        note(target.parent, f"{target.name} score", score, device)
    unfinished.rename(target)


def score_models(request: Request) -> None:
    """Score all models, each in a file of its own and then all in scores.json."""
    from longsana.evaluation.score_model import Trial, try_model, try_truth

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    texts = _held_out(request)
    wanted = dict.fromkeys(row.weights for row in ROWS if row.weights)
    if missing := [name for name in wanted if not (request.folder / f"{name}.safetensors").exists()]:
        raise InputError(
            f"{request.folder}: {', '.join(f'{name}.safetensors' for name in missing)} not found; make them: "
            f"train_video_scripts/shapes_recipe.py --steps {' '.join(missing)}"
        )

    def score(row: Row) -> dict[str, Any]:
        trial = Trial(texts[: row.prompts], tuple(range(row.seeds)), row.lengths, world=request.world)
        trial = _sized(request, trial)
        attempt = try_model if row.weights else try_truth
        return attempt(sampler(request.folder, row, tiny=request.tiny), trial, request.device)

    score_each(request.folder / "scores.json", {row.name: partial(score, row) for row in ROWS})


def measure_speeds(request: Request) -> None:
    """Measure frames a second on two cores of this machine."""
    from longsana.evaluation.score_model import measure_speed

    threads, speeds, text = torch.get_num_threads(), {}, _held_out(request)[0]
    torch.set_num_threads(2)
    try:
        for row in ROWS:
            if row.weights and row.prompts == HELD_OUT_PROMPTS:
                seconds = 1 if request.tiny else min(10, max(row.lengths))
                config = sampler(request.folder, row, tiny=request.tiny)
                speeds[row.name] = measure_speed(config, text, seconds)
                log.info("%s: %.1f FPS", row.name, speeds[row.name])
    finally:
        torch.set_num_threads(threads)
    atomic_write_text(request.folder / "speed.json", json.dumps(speeds) + "\n")


def write_table(request: Request) -> None:
    """Write the table of all scores, as Markdown."""
    text = render_table(
        _scores(request), _read(request.folder, "speed", f"make it: longsana shapes speed {request.folder}")
    )
    atomic_write_text(request.folder / "table.md", text)
    print(text)


def write_plot(request: Request) -> None:
    """Plot the videos of a minute and those of ten, of those rows of PLOTTED that are scored.

    Needs matplotlib.
    """
    from longsana.evaluation.report import plot

    scores = _scores(request)
    for name, ending, every in (("plot", "", 4), ("plot_long", TEN, 20)):
        if curves := {row: scores[row + ending]["curves"] for row in PLOTTED if row + ending in scores}:
            plot(curves, request.folder / f"{name}.png", every=every, least=0.75)


def write_strips(request: Request) -> None:
    """Draw LongSANA's pictures every quarter of a minute and after ten, a prompt a row. Needs matplotlib."""
    from longsana.evaluation.score_model import strips

    config = sampler(request.folder, next(row for row in ROWS if row.name == "LongSANA"), tiny=request.tiny)
    texts = _held_out(request)
    seconds = (0, 1) if request.tiny else (0, 15, 30, 45, 60, 600)
    strips(config, texts[:3], seconds, request.folder / "strips.png", request.device)


def package(request: Request) -> None:
    """Gather what ships, with its model card, in the folder `asset`."""
    from longsana.inference.sidecar import commit

    parts = request.folder
    networks = [f"{name}.safetensors" for name in NETWORKS]
    measured = ["scores.json", "speed.json", "times.json", "plot.png", "plot_long.png", "strips.png"]
    wanted = [*FOLDERS, DECODER, *networks, "table.md", *measured]
    if missing := [name for name in wanted if not (parts / name).exists()]:
        raise InputError(f"{parts}: {', '.join(missing)} not found; run the steps that make them first")
    noted = _read(parts, "times", "the recipe writes it")
    card = CARD.format(
        commit=commit(),
        steps="\n".join(f"| {name} | {entry['value']} | {entry['machine']} |" for name, entry in noted.items()),
        table=(parts / "table.md").read_text(encoding="utf-8").strip(),
    )

    def gather(folder: Path) -> None:
        for part in FOLDERS:
            shutil.copytree(parts / part, folder / part, dirs_exist_ok=True)
        shutil.copy(parts / DECODER, folder / "vae")
        for name in networks + measured:
            shutil.copy(parts / name, folder)
        atomic_write_text(folder / "README.md", card)

    _make(parts / "asset", request.device, gather)


def check_size(parts: Path, *, tiny: bool) -> None:
    """Refuse parts of another size, which would pass for those that are asked for; and record that they are tiny.

    Raises:
        InputError: there are some.
    """
    record = parts / TINY_RECORD
    there = sorted(path.name for path in parts.glob("*"))
    if record.exists() and not tiny:
        raise InputError(f"{parts}: was made with --size tiny, which trains nothing; give another folder")
    if there and tiny and not record.exists():
        raise InputError(f"{parts}: holds parts of full size ({there[0]}, ...); give another folder for tiny ones")
    if tiny:
        parts.mkdir(parents=True, exist_ok=True)
        atomic_write_text(record, "Made with --size tiny: it shows that all of it runs, and trains nothing.\n")


def note(parts: Path, name: str, value: float, device: torch.device) -> None:
    """Add a number to times.json, seconds of a step or the score of a part, with the machine."""
    path = parts / "times.json"
    noted = _read(parts, "times", "") if path.exists() else {}
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    noted[name] = {"value": round(value, 2), "machine": machine, "torch": torch.__version__}
    atomic_write_text(path, json.dumps(noted, indent=1) + "\n")
    log.info("== %s: %.2f", name, value)


def _held_out(request: Request) -> list[str]:
    return _lines_of(request, "held_out.txt", "prompts")


def _lines_of(request: Request, name: str, tool: str) -> list[str]:
    """Read a file of prompts, which `tool` makes."""
    return training_prompts(request.folder / name, f"the prompts (longsana shapes {tool} {request.folder} makes them)")


def _scores(request: Request) -> dict[str, Any]:
    return _read(request.folder, "scores", f"make it: longsana shapes scores {request.folder}")


def _read(parts: Path, name: str, remedy: str) -> dict[str, Any]:
    path = parts / f"{name}.json"
    if not path.exists():
        raise InputError(f"{path}: not found; {remedy}")
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read


TOOLS: dict[str, Callable[[Request], None]] = {
    "prompts": write_prompts,
    "pictures": draw_pictures,
    "text-encoder": train_text,
    "vae": train_vae,
    "decoder": train_decoder,
    "scores": score_models,
    "speed": measure_speeds,
    "table": write_table,
    "plot": write_plot,
    "strips": write_strips,
    "package": package,
    "bar-prompts": write_bar_prompts,
    "bar-films": film_bars,
    "bar-scores": score_bars,
}
DRAWING = ("prompts", "pictures")
TRAINING = ("text-encoder", "vae", "decoder")
MEASURING = ("scores", "speed", "strips", "bar-scores")
TAKES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(TOOLS, ()),
    **dict.fromkeys(TRAINING, ("--world", "--config_path", "settings")),
    **dict.fromkeys(DRAWING, ("--world",)),
    **dict.fromkeys((*MEASURING, "bar-films"), ("--tiny",)),
    "scores": ("--world", "--tiny"),
}
"""The options that mean something to each tool."""


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(__doc__)
    parser.add_argument("tool", choices=list(TOOLS))
    parser.add_argument(
        "folder",
        type=typed_path,
        help="of the parts; text-encoder, vae and decoder: of the part; bar-films: of the films",
    )
    parser.add_argument("--world", choices=list(WORLDS), help="whose scenes (default: shapes)")
    parser.add_argument("--tiny", action="store_true", help="scores, speed, strips and films of next to nothing")
    parser.add_argument("--config_path", help="text-encoder, vae, decoder: YAML file (default: the published one)")
    options, settings = parser.parse_command(arguments, {}, ())
    given = {"--config_path": options.config_path, "--tiny": options.tiny, "--world": options.world}
    given |= dict.fromkeys(settings, "a setting")
    taken = TAKES[options.tool]
    for option, value in given.items():
        if value and option not in taken and not (value == "a setting" and "settings" in taken):
            raise InputError(f"{option}: has no meaning for {options.tool}; leave it out")
    if wrong := [setting for setting in settings if setting.startswith("world=")]:
        raise InputError(f"{wrong[0]}: is --world {wrong[0].removeprefix('world=')} here")
    options.world = options.world or "shapes"
    return options, settings


def prepare(arguments: Sequence[str], world: World) -> tuple[str, Request]:
    """Read the command line, and check it as far as that goes without loading anything large."""
    options, settings = parse(arguments)
    if world.size > 1:
        raise InputError("several processes: this is the work of one; start it without a launcher")
    folder, device = options.folder.resolve(), world.device()
    if options.tool in (*DRAWING, "bar-prompts", "bar-films"):
        check_writable(folder, "folder")
    elif options.tool not in TRAINING and not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give that of the parts")
    if options.tool in MEASURING:
        check_size(folder, tiny=options.tiny)
    return options.tool, Request(folder, options.config_path, options.world, options.tiny, settings, device)


def main(arguments: Sequence[str]) -> int:
    def run(asked: tuple[str, Request]) -> int:
        tool, request = asked
        TOOLS[tool](request)
        return 0

    return run_command(lambda world: prepare(arguments, world), lambda asked, world: run(asked))
