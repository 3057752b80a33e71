"""Which words of a caption the base model of the shapes world heeds, and at what noise.

    python tests/full_size/measure_words.py asset/shapes/base.safetensors

Its loss on clips with their own captions, and by how much more it errs when a word is exchanged for its opposite:
nothing, if the word tells it nothing.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    from longsana.runtime.process import share_cores

    share_cores()  # before torch is imported

import torch
from torch import Tensor

from longsana.config import InferenceConfig, load_config
from longsana.encoders.vae import WanVAE
from longsana.models.dit import LongSanaDiT
from longsana.models.embeddings import TextEmbedding
from longsana.runtime.distributed import World
from longsana.shapes.scenes import TURNS, Actor, Scene, draw_scene, render
from longsana.training.captions import Captions
from longsana.weights.build import build_model

CONFIG = "configs/sana_video_config/longsana/shapes/longsana.yaml"
CLIPS, NOISES, FRAMES = 16, 3, 81
SIGMAS = (0.7, 0.85, 0.93, 0.97, 0.985, 0.995)
OPPOSITES = {
    "direction": (("right", "left"), {"right": "left", "left": "right"}),
    "speed": (("right", "left"), {"slowly": "quickly", "quickly": "slowly"}),
    "turn": (tuple(TURNS), {"clockwise": "counterclockwise", "counterclockwise": "clockwise"}),
}
"""Of a word: the motions that are looked at, and what it is exchanged for."""


def scenes(motions: tuple[str, ...]) -> list[Scene]:
    def lone_actors() -> Iterator[tuple[Scene, Actor]]:
        for index in itertools.count():
            scene = draw_scene(11, index)
            if len(scene.tracks) == 1:
                yield scene, scene.tracks[0].actor

    return list(itertools.islice((scene for scene, actor in lone_actors() if actor.motion in motions), CLIPS))


def exchanged(caption: str, opposites: dict[str, str]) -> str:
    other = re.sub(r"\w+", lambda word: opposites.get(word[0], word[0]), caption)
    assert other != caption
    return other


@torch.no_grad()
def loss(model: LongSanaDiT, x0: Tensor, text: TextEmbedding, sigma: float) -> float:
    errors = []
    for seed in range(NOISES):
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed)).to(x0)
        t = torch.full((x0.shape[0], x0.shape[2]), 1000 * sigma, device=x0.device)
        velocity, _ = model((1 - sigma) * x0 + sigma * noise, t, text)
        errors.append((velocity - (noise - x0)).square().mean().item())
    return sum(errors) / NOISES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    world = World.from_environment()
    device = world.device()
    config = load_config(
        CONFIG, [f"model.load_from={parser.parse_args().weights}", "vae.decoder=full"], InferenceConfig
    )
    vae = WanVAE.load(config.vae, device, torch.float32)
    model = build_model(config.model, device=device, dtype=torch.float32)
    captions = Captions(config, device, world, "keep", Path("/nowhere"), together=CLIPS)
    print("exchanged | " + " | ".join(f"sigma {sigma}" for sigma in SIGMAS))
    for name, (motions, opposites) in OPPOSITES.items():
        drawn = scenes(motions)
        x0 = vae.encode(render(drawn, range(FRAMES), device=device)).float()
        own = captions.embed([scene.caption for scene in drawn])
        other = captions.embed([exchanged(scene.caption, opposites) for scene in drawn])
        more = [loss(model, x0, other, sigma) / loss(model, x0, own, sigma) - 1 for sigma in SIGMAS]
        print(f"{name} | " + " | ".join(f"{100 * value:+.1f} %" for value in more), flush=True)


if __name__ == "__main__":
    main()
