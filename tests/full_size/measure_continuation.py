"""Joints: films of the shapes world that videos go on from, and videos that go on from their last latents.

    python tests/full_size/measure_continuation.py --out output/continuation

Films of held-out scenes, drawn by the world itself, are absorbed by the shipped LongSANA, which goes on under the
scene's caption. The seam index is that of the joint alone, of the chunks' boundaries after it, and, at the same frame,
of videos of the same captions and seeds that begin from nothing. Then videos are gone on from in the middle by their
last 1, 3, 6 and 12 latents: PSNR of each chunk after that to the uncut video's, whose latents are the same to the bit.
Writes `joints.json`, `joints.md` and `joints.png` to OUT.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # it also runs from a checkout not installed

if __name__ == "__main__":
    from longsana.runtime.process import share_cores

    share_cores()  # before torch is imported

import torch
from PIL import Image
from torch import Tensor

from longsana.config import load_config
from longsana.data.prompts import Prompt
from longsana.evaluation.measures import measure, seam_index
from longsana.sampling.captions import caption_encoder
from longsana.sampling.continuation import KEPT, Moment, restored
from longsana.sampling.engine import Decoding, Engine
from longsana.sampling.films import absorb_film, film_latents
from longsana.shapes.scenes import draw_scene, render

CONFIG = Path(__file__).resolve().parents[2] / "configs/sana_video_config/longsana/shapes/longsana.yaml"
FILM, STRIDE, CHUNK = 81, 4, 40
"""Pixel frames of a film, of a latent and of a chunk."""
COLUMNS = (0, 40, 80, 81, 90, 105, 120, 160)
SCENES_SEED = 2_000_000


def seam(pixels: Tensor, *frames: int) -> float:
    """Seam index of these frames of a video's pixels (1, F, H, W, 3)."""
    return float(seam_index(measure(pixels).change, list(frames), STRIDE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--cuts", type=int, default=3, help="videos that are gone on from by their last latents")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    engine = Engine(load_config(CONFIG, [f"sampling.num_frames={FILM + 2 * CHUNK}", "vae.decoder=full"]), "cpu")
    scenes = [draw_scene(SCENES_SEED, index, held_out=True) for index in range(options.scenes)]
    prompts = [Prompt(n + 1, scene.caption, (scene.caption,), 0, 96, 160) for n, scene in enumerate(scenes)]
    with caption_encoder(engine.config, engine.device) as encode:
        captions = [encode(prompt) for prompt in prompts]
    parts = engine.load()
    found: dict[str, list[Any]] = {"joint": [], "after": [], "from nothing": []}
    rows = []
    for scene, prompt, caption in zip(scenes, prompts, captions, strict=True):
        drawn = render([scene], range(FILM), size=(96, 160))
        pictures = ((drawn[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
        film, begun = film_first(engine, parts, caption, pictures)
        for seed in range(options.seeds):
            own = dataclasses.replace(prompt, seed=seed, frames=2 * CHUNK + 1)
            new = [part.pixels for part in engine.sample(*parts, [own], [caption], begun=begun)]
            pixels = torch.cat([film, *new], dim=1)
            plain = dataclasses.replace(prompt, seed=seed)
            uncut = torch.cat([part.pixels for part in engine.sample(*parts, [plain], [caption])], dim=1)
            found["joint"].append(seam(pixels, FILM))
            found["after"].append(seam(pixels[:, FILM - 1 :], CHUNK + 1))
            found["from nothing"].append(seam(uncut, FILM))
            if not seed:
                rows.append(torch.cat([pixels[0, column] for column in COLUMNS], dim=1))
                Image.fromarray(torch.cat(rows[:6]).numpy()).save(options.out / "joints.png")
        print(prompt.text, {name: round(values[-1], 2) for name, values in found.items()}, flush=True)
    cuts = [gone_on(engine, parts, *pair) for pair in list(zip(prompts, captions, strict=True))[: options.cuts]]
    (options.out / "joints.json").write_text(json.dumps({"seams": found, "psnr": cuts}, indent=2))
    lines = ["| seam index | mean | median | largest |", "|---|---|---|---|"]
    for name, values in found.items():
        told = (statistics.fmean(values), statistics.median(values), max(values))
        lines.append(f"| {name} | {' | '.join(f'{value:.2f}' for value in told)} |")
    lines += ["", "| latents kept | lowest PSNR of the first chunk after the cut | of later ones |", "|---|---|---|"]
    for kept in cuts[0]:
        first, later = (min(cut[kept][part] for cut in cuts) for part in (0, 1))
        lines.append(f"| {kept} | {first:.1f} dB | {later:.1f} dB |")
    (options.out / "joints.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def film_first(engine: Engine, parts: Any, caption: Any, pictures: Any) -> tuple[Tensor, Moment]:
    """Pixels (1, F, H, W, 3) of a film, as the VAE gives it back, and what videos go on from after it."""
    latents = film_latents(parts[1], pictures, chunk_frames=engine.config.sampling.chunk_frames)
    absorbing, shown = absorb_film(*parts, [caption], latents), []
    while True:
        try:
            shown.append(next(absorbing).pixels)
        except StopIteration as end:
            return torch.cat(shown, dim=1), end.value


def gone_on(engine: Engine, parts: Any, prompt: Prompt, caption: Any) -> dict[int, tuple[float, float]]:
    """PSNR to the uncut video of the first chunk after a cut and the lowest of later ones, by the latents kept."""
    whole = dataclasses.replace(prompt, frames=FILM + 4 * CHUNK)
    pieces = engine.sample(*parts, [whole], [caption], wanted=lambda chunk: chunk == 1)
    uncut = [piece for piece in pieces if piece.latents.shape[2]]  # those with which a chunk ends
    after, found = uncut[1].after, {}
    assert after is not None and after.latents is not None and after.network.frames == 21
    for kept in (1, 3, 6, KEPT):
        # Latents are those of the uncut video (tests/sampling/test_continuation.py), so that decoding them is enough.
        moment = after._replace(decoder=None, latents=after.latents[:, :, -kept:])
        decoding, values = Decoding(parts[1], restored(moment, parts[1])), []
        for other in uncut[2:]:
            pixels = decoding(other.latents, "what follows", more=True)
            error = float((pixels.float() - other.pixels.float()).square().mean())
            values.append(10 * math.log10(255**2 / error) if error else math.inf)
        found[kept] = (values[0], min(values[1:]))
    return found


if __name__ == "__main__":
    main()
