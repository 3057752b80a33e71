"""Passes and scores of networks in float8 beside themselves in their own dtype.

    python tests/full_size/measure_float8.py --out output/float8                        # all
    python tests/full_size/measure_float8.py 480p 720p --out output/float8
    python tests/full_size/measure_float8.py scores --out output/float8

480p and 720p: ms of a pass of the 2B network over a chunk with a past, launched and replayed, and of each of its
kernels; the errors that float8 makes in products and in the latents of three chunks. Random weights, those of
`hub_cache.py`, which need no files; tiny decoders with random weights are measured beside them.

scores: the shipped LongSANA of the shapes world makes videos of held-out captions in both ways, with the same noise.
Judged are the first 5, 30 and 60 seconds by all figures of the verifier, with the difference between the ways, float8
less its own dtype, caption by caption; after a ± stands its standard error, over captions.

OUT gets a JSON and a table of each part when it is done. On a laptop: `scores --videos 2 --seconds 1`.

Exit status: 0 all is there, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # it also runs from a checkout not installed

if __name__ == "__main__":
    from longsana.runtime.process import begin

    begin()  # before the imports below, which take seconds

import torch

from longsana.commands.benchmark import short_name
from longsana.config import InferenceConfig, load_config
from longsana.evaluation.report import table
from longsana.evaluation.score_model import Trial, score_videos
from longsana.inference.benchmark import machine
from longsana.inference.microbenchmark import Loaded, measure_float8, measure_passes, measure_profile
from longsana.inference.sidecar import commit, versions
from longsana.models import float8
from longsana.models.dit import LongSanaDiT
from longsana.ops import backend
from longsana.runtime.commandline import Parser, run_command, typed_path
from longsana.runtime.errors import InputError
from longsana.runtime.files import atomic_write_text
from longsana.sampling.engine import Engine
from longsana.shapes.scenes import draw_scene
from longsana.weights.build import resolve_dtype
from tests.full_size.hub_cache import randomise
from tests.full_size.measure_stories import CONFIG, over_stories
from tests.full_size.tables import check_options

CONFIGS = CONFIG.parents[2]
SIZES = {
    "480p": ("Sana_2000M_480px_adamW_fsdp_longsana.yaml", "taew2_1", 0),
    "720p": ("Sana_2000M_720px_longsana.yaml", "taeltx_2", 4),
}
"""Config, tiny decoder, and the seed of the weights, that of `hub_cache.py`."""
SCORES = "scores"
WAYS = ("own dtype", "float8")
LONGEST = 25
"""Kernels that the table shows; the JSON has all."""


def random_network(config: InferenceConfig, seed: int, device: torch.device) -> LongSanaDiT:
    """The network of a config with random weights, those of `hub_cache.py`, frozen and in its own dtype."""
    with torch.device("meta"):
        network = LongSanaDiT(config.model)
    network.to_empty(device=device).requires_grad_(False)
    randomise(network, torch.Generator(device).manual_seed(seed))
    network.text_embed.null_tokens.zero_()
    return network.to(resolve_dtype(config.model.dtype, device)).eval()


@torch.no_grad()
def measure_network(size: str, settings: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Passes and kernels in both ways, and errors."""
    file, decoder, seed = SIZES[size]
    own = [f"vae.decoder={decoder}", "vae.decoder_pretrained=seeded:0"]
    config: InferenceConfig = load_config(CONFIGS / file, [*own, *settings])
    engine = Engine(config, device)
    network = random_network(config, seed, device)
    if device.type == "cuda" and backend() == "triton":
        network.optimize_layout()
    loaded, pixels = Loaded(engine, network, engine.load_decoder()), (config.sampling.height, config.sampling.width)
    result: dict[str, Any] = {}
    for way in WAYS:
        if way == "float8":
            result["errors"] = {
                name: error for name, error in measure_float8(loaded, pixels).items() if name.startswith("error")
            }
        result[way] = {
            "passes": measure_passes(loaded, pixels),
            "kernels": measure_profile(loaded, pixels)["forward"],
        }
    return result


def network_table(result: dict[str, Any]) -> str:
    """Passes and kernels, the longest first, in ms, and errors in percent."""
    spent: dict[str, dict[str, tuple[float, int]]] = defaultdict(dict)
    for way in WAYS:
        for kernel, row in result[way]["kernels"].items():
            ms, calls = spent[short_name(kernel)].get(way, (0.0, 0))
            spent[short_name(kernel)][way] = (ms + row["ms"], calls + row["calls"])
    longest = sorted(spent.items(), key=lambda item: -max(ms for ms, _ in item[1].values()))[:LONGEST]
    passes = {name: {way: result[way]["passes"][name] for way in WAYS} for name in result[WAYS[0]]["passes"]}
    lines = [
        *({"ms": name} | {way: f"{ms:.2f}" for way, ms in found.items()} for name, found in passes.items()),
        *(
            {"ms": name} | {way: f"{own[way][0]:.2f} in {own[way][1]}" if way in own else "" for way in WAYS}
            for name, own in longest
        ),
    ]
    errors = [{"float8": name, "%": f"{100 * error:.2f}"} for name, error in result["errors"].items()]
    return f"{table(lines)}\n{table(errors)}"


def measure_scores(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Figures by length and name: [mean, standard error] of each way and of the difference."""
    captions = [draw_scene(0, index, held_out=True).caption for index in range(options.videos)]
    trial = Trial(captions, options.seeds, options.seconds, options.batch)
    runs = []
    for way in WAYS:
        settings = ["vae.decoder=full", "sampling.cuda_graphs=true", f"model.float8={way == 'float8'}".lower()]
        config: InferenceConfig = load_config(CONFIG, [*settings, *options.settings])
        runs.append([[video["figures"] for video in videos] for videos in score_videos(config, trial, device)])
    result: dict[str, Any] = {}
    for length, figures in runs[0][0][0].items():
        for name in figures:
            before, after = ([[video[length][name] for video in videos] for videos in run] for run in runs)
            change = [[b - a for a, b in zip(*pair, strict=True)] for pair in zip(before, after, strict=True)]
            found = dict(zip((*WAYS, "difference"), map(over_stories, (before, after, change)), strict=True))
            result.setdefault(str(length), {})[name] = found
    return result


def scores_table(result: dict[str, Any]) -> str:
    """A row for a length and a figure, in hundredths; figures that nothing was judged by are left out."""
    lines = [
        {"seconds": length, "figure": name}
        | {
            way: f"{100 * mean:.2f}" + ("" if error is None else f" ± {100 * error:.2f}")
            for way, (mean, error) in found.items()
        }
        for length, figures in result.items()
        for name, found in figures.items()
        if found["difference"][0] is not None
    ]
    return table(lines)


def run(options: argparse.Namespace, device: torch.device) -> int:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    float8.PRODUCTS = tuple(name for name in float8.PRODUCTS if name not in options.leave)
    for part in options.parts:
        if part == SCORES:
            result = measure_scores(options, device)
            lines = scores_table(result)
        else:
            result = measure_network(part, options.settings, device)
            lines = network_table(result)
        asked = {name: getattr(options, name) for name in ("videos", "seeds", "seconds", "leave", "settings")}
        made = {"asked": asked, "machine": machine(device), "versions": versions(), "commit": commit()}
        atomic_write_text(options.out / f"{part}.json", json.dumps(made | {"result": result}, indent=1) + "\n")
        atomic_write_text(options.out / f"{part}.md", lines)
        print(f"{part}\n\n{lines}", flush=True)
    return 0


def prepare(arguments: Sequence[str], device: torch.device) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(SIZES)}, {SCORES} (default: all)")
    parser.add_argument("--out", type=typed_path, default=Path("output/float8"), help="(default: %(default)s)")
    parser.add_argument("--videos", type=int, default=64, help="captions (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="(default: 0)")
    parser.add_argument("--seconds", type=int, nargs="+", default=[5, 30, 60], help="judged apart (default: 5 30 60)")
    parser.add_argument("--batch", type=int, default=64, help="videos at a time (default: %(default)s)")
    parser.add_argument("--leave", nargs="+", default=[], metavar="LAYER", help="products that stay in their own dtype")
    parser.add_argument("--settings", nargs="+", default=[], metavar="KEY=VALUE", help="of the config")
    options: Any = parser.parse_args(arguments)
    known = [*SIZES, SCORES]
    options.parts = options.parts or known
    if unknown := [part for part in options.parts if part not in known]:
        raise InputError(f"{unknown[0]}: is not measured; there are {', '.join(known)}")
    if min(options.seconds) < 1:
        raise InputError(f"--seconds {min(options.seconds)}: must be at least 1")
    check_options(options, "videos", "batch")
    if unknown := [name for name in options.leave if name not in float8.PRODUCTS]:
        raise InputError(f"--leave {unknown[0]}: is no product in float8; there are {', '.join(float8.PRODUCTS)}")
    try:
        float8.check_float8(device, resolve_dtype("auto", device))
    except ValueError as error:
        raise InputError(str(error)) from error
    return options


def main(arguments: Sequence[str]) -> int:
    return run_command(
        lambda world: prepare(arguments, world.device()),
        lambda options, world: run(options, world.device()),
        connect=lambda world: None,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
