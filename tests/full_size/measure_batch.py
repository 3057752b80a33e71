"""Time of a pass over the chunks of one, two and four videos at once: what sessions of a server would win by a batch.

    python tests/full_size/measure_batch.py --out batch.json        # on a GPU
    python tests/full_size/measure_batch.py small --out batch.json  # on a laptop

Replayed passes of the 2B network with random weights over chunks of 3 and of 10 latents with a past, in bfloat16 and in
float8, each video with a caption of its own of 300 tokens. The table has milliseconds of a pass for each of its videos.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if __name__ == "__main__":
    from longsana.runtime.process import share_cores

    share_cores()  # before torch is imported

import torch

from longsana.commands.generate import DEFAULT_CONFIG
from longsana.config import InferenceConfig, load_config
from longsana.evaluation.report import table
from longsana.models.dit import LongSanaDiT
from longsana.models.embeddings import TextEmbedding
from longsana.models.float8 import to_float8
from longsana.sampling.engine import Engine
from longsana.sampling.graphs import ReplayedNetwork
from tests.full_size.measure_float8 import CONFIGS, SIZES, random_network

BATCHES, CHUNKS, TOKENS, PASSES = (1, 2, 4), (3, 10), 300, 6


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of a pass, the best of three means."""
    best = float("inf")
    for _ in range(3):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(PASSES if device.type == "cuda" else 1):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - began) / (PASSES if device.type == "cuda" else 1))
    return 1000 * best


@torch.no_grad()
def measure(file: Path, seed: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of each kind of pass."""
    config: InferenceConfig = load_config(file, [])
    engine = Engine(config, device)
    network = random_network(config, seed, device)
    found = {}
    for way in ("bfloat16", "float8") if device.type == "cuda" else ("own dtype",):
        if way == "float8":
            to_float8(network)
        if device.type == "cuda":
            network.optimize_layout()
        for chunk in CHUNKS:
            for batch in BATCHES:
                found[f"{way}, {chunk} latents, {batch} videos"] = _pass(engine, network, chunk, batch, device)
    return found


def _pass(engine: Engine, network: LongSanaDiT, chunk: int, batch: int, device: torch.device) -> float:
    sampling, model = engine.config.sampling, engine.config.model
    size = engine.geometry.latent_size(sampling.height, sampling.width)
    x = torch.randn(batch, engine.geometry.channels, chunk, *size, device=device)
    t = torch.full((batch,), 500.0, device=device)
    tokens = torch.randn(batch, TOKENS, model.caption_channels, device=device).to(network.dtype)
    text = network.cache_caption(TextEmbedding(tokens, torch.ones(batch, TOKENS, dtype=torch.bool, device=device)))
    replayed: Any = ReplayedNetwork(network) if device.type == "cuda" else network
    _, state = network(x, t, text, state=network.empty_state(batch, *size))
    for _ in range(4):
        replayed(x, t, text, state=state)
    return timed(lambda: replayed(x, t, text, state=state), device)


def main(arguments: Sequence[str]) -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", help="480p, 720p, small (default: the first two)")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU"}
    for size in options.sizes or SIZES:
        file, seed = (Path(DEFAULT_CONFIG), 0) if size == "small" else (CONFIGS / SIZES[size][0], SIZES[size][2])
        found[size] = measure(file, seed, device)
        rows = []
        for name, ms in found[size].items():
            kind, _, videos = name.rpartition(", ")
            if videos == f"{BATCHES[0]} videos":
                rows.append({size: kind})
            rows[-1][videos] = f"{ms / int(videos.split()[0]):.2f}"
        print(table(rows))
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
