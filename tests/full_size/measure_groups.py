"""Where a base model of the shapes world errs: scores by what shapes are and do, and its loss on clips seen and unseen.

    python tests/full_size/measure_groups.py asset/shapes/base.safetensors --out groups.json         # one GPU, 90 s
    python tests/full_size/measure_groups.py W --out groups.json --clips 4 --prompts 2 --seconds 1   # a CPU, 2 min

Held-out combinations have 64 prompts and three seeds, trained ones eight times as many and one. "Seen" are the clips of
the phase of the recipe that had the seed given with --seen.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if __name__ == "__main__":
    from longsana.runtime.process import share_cores

    share_cores()  # before torch is imported

import torch

from longsana.config import load_config
from longsana.data.clips import ShapeClips
from longsana.evaluation.report import table
from longsana.evaluation.score_model import Trial, score_videos
from longsana.runtime.distributed import World
from longsana.shapes.scenes import parse_caption, prompts
from longsana.training.build import StageBuilder
from longsana.training.config import TrainingConfig
from longsana.training.stages.stage import MicroBatches
from longsana.weights.build import build_model

CONFIG = Path("configs/sana_video_config/longsana/shapes/base.yaml")
SIGMAS = (0.8, 0.93, 0.97, 0.985, 0.995)
UNSEEN, TRAINED = 50, 77
"""Seeds of clips and prompts that no training of the recipe has."""
FIGURES = ("kind", "motion", "persistence", "identity")


@torch.no_grad()
def losses(config: TrainingConfig, seed: int, count: int, device: torch.device) -> dict[str, list[float]]:
    """Mean loss by noise level, and its standard error, on `count` clips of the world's scenes of this seed."""
    builder = StageBuilder(
        config, micro_batches=MicroBatches(0, 1, 1), world=World(), device=device, folder=Path("/nowhere")
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = build_model(config.model, device=device, dtype=dtype).eval()
    frames, (channels, height, width) = config.rollout.num_training_frames, builder.latent_shape
    clips = ShapeClips((channels, frames, height, width), seed, count, builder.vae)
    builder.captions.prepare(clips.prompts())
    found = {}
    for sigma in SIGMAS:
        rng, errors = torch.Generator(device=device).manual_seed(5), []
        for first in range(0, count, 64):
            x0, texts = clips.batch(range(first, min(first + 64, count)))
            noise = torch.randn(x0.shape, generator=rng, dtype=torch.float32, device=device)
            t = torch.full((len(texts), frames), 1000 * sigma, dtype=torch.float32, device=device)
            x = (1 - sigma) * x0 + sigma * noise
            velocity, _ = model(x.to(dtype), t, builder.captions.embed(texts))
            errors.append((velocity.float() - (noise - x0)).square().mean((1, 2, 3, 4)))
        each = torch.cat(errors)
        found[str(sigma)] = [each.mean().item(), (each.std() / len(each) ** 0.5).item()]
    return found


def groups(caption: str) -> Iterator[str]:
    """Name the groups that a caption belongs to."""
    promise = parse_caption(caption)
    assert promise is not None
    yield "all"
    yield "one shape" if len(promise.actors) == 1 else "two shapes"
    for actor in promise.actors:
        yield f"{actor.motion} {actor.speed}".strip()
        yield f"{actor.size} {actor.kind}"


def scored(config: TrainingConfig, trial: Trial, device: torch.device) -> dict[str, dict[str, float | None]]:
    """Means of the figures by group, each with "videos"."""
    (seconds,), by_group = trial.lengths, defaultdict(list)
    for run in score_videos(config, trial, device):
        for caption, video in zip(trial.prompts, run, strict=True):
            for group in set(groups(caption)):
                by_group[group].append(video["figures"][seconds])
    return {
        group: {
            "videos": len(videos),
            **{name: _mean([video[name] for video in videos if video[name] == video[name]]) for name in FIGURES},
        }
        for group, videos in sorted(by_group.items())
    }


def _told(loss: Sequence[float]) -> str:
    return f"{loss[0]:.4f} ± {loss[1]:.4f}"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def main(arguments: Sequence[str]) -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("--out", type=Path, required=True, help="JSON of both")
    parser.add_argument("--seen", type=int, default=3)
    parser.add_argument("--clips", type=int, default=1024)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--set", nargs="*", default=[], metavar="SETTING", help="more settings, such as model.depth=12")
    options = parser.parse_args(arguments)
    device = World.from_environment().device()
    given = [f"model.load_from={options.weights}", "train.cuda_graphs=false", "train.compile=false", *options.set]
    config: TrainingConfig = load_config(CONFIG, given, TrainingConfig)
    result: dict[str, Any] = {"loss": {}, "scores": {}}
    for name, seed in (("seen", options.seen), ("unseen", UNSEEN)):
        result["loss"][name] = losses(config, seed, options.clips, device)
    lines = result["loss"].items()
    print(table([{"sigma": sigma, **{name: _told(own[sigma]) for name, own in lines}} for sigma in map(str, SIGMAS)]))
    held = Trial(prompts(0, options.prompts, held_out=True), (0, 1, 2), (options.seconds,))
    trained = Trial(prompts(TRAINED, 8 * options.prompts, held_out=False), (0,), (options.seconds,))
    for name, trial in (("held-out", held), ("trained", trained)):
        result["scores"][name] = own = scored(config, trial, device)
        print(table([{name: group, **figures} for group, figures in own.items()]))
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
