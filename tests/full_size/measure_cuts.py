"""A cut to a picture: which latent shows the picture best in the middle of a video, and what the network makes of it.

    python tests/full_size/measure_cuts.py --out output/cuts

A video's first latent is one frame, every later one is four. A picture in the middle of a video may be encoded alone,
as one frame ("alone"), or be the second latent of a film of five frames in which it stands still ("still"). Of each
pair of held-out scenes of the shapes world the decoder has decoded a film of the first one, of 41 frames; the picture
is the first frame of the second one, and the caption is that scene's. Figures are PSNR in dB, the mean over pairs and
its standard error.

    picture     the four frames of the picture's latent, to the picture; by frame, too
    next        the four frames of the latent that the network makes after it, to those of a video with the same noise
                that begins with the picture
    chunk       the rest of the chunk, likewise

OUT gets table.md, and with `--strips` strips.png: of the first pairs a row for each latent and for the video that
begins with the picture, from two frames before the cut on, every second frame.

Exit status: 0 all is there, 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # it also runs from a checkout not installed

if __name__ == "__main__":
    from longsana.runtime.process import begin

    begin()  # before the imports below, which take seconds

import torch
from PIL import Image
from torch import Tensor

from longsana.chunks import ChunkPlan
from longsana.config import InferenceConfig, load_config
from longsana.data.prompts import Prompt
from longsana.encoders.closeness import decibels
from longsana.encoders.vae import VideoVAE
from longsana.evaluation.report import table
from longsana.flow.noise import PromptNoise
from longsana.flow.schedule import FlowSchedule
from longsana.runtime.commandline import Parser, run_command
from longsana.runtime.distributed import World
from longsana.runtime.files import atomic_write_text
from longsana.sampling.captions import caption_encoder, stacked
from longsana.sampling.engine import Engine
from longsana.sampling.sampler import generate
from longsana.shapes.scenes import HEIGHT, WIDTH, Scene, draw_scene, render
from tests.full_size.measure_pictures import CONFIG, SCENES
from tests.full_size.tables import check_options

LATENTS = ("alone", "still")
BEFORE = 41
"""Frames of the film before the cut: eleven latents."""


class Later(PromptNoise):
    """Noise of a video that begins with the picture, drawn as that after the cut."""

    def draw(self, start: int, step: int, shape: Sequence[int], device: torch.device | str) -> Tensor:
        return super().draw(start + (BEFORE + 3) // 4, step, shape, device)


def psnr(frames: Tensor, others: Tensor) -> float:
    """PSNR in dB of frames (..., H, W) in [-1, 1]."""
    return float(decibels((frames - others).square().mean().clamp(min=1e-12), 2))


def latents_of(vae: VideoVAE, picture: Tensor) -> dict[str, Tensor]:
    """The latent (1, C, 1, h, w) of a picture (1, 3, 1, H, W) by each way to encode it."""
    still = vae.encode(picture.expand(-1, -1, 1 + vae.geometry.time_stride, -1, -1).contiguous())
    return {"alone": vae.encode(picture), "still": still[:, :, 1:]}


class Pairs:
    """Films of scenes and pictures of others, with the models of the shapes world."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        settings = ["vae.decoder=full", *([f"model.load_from={options.weights}"] if options.weights else [])]
        config: InferenceConfig = load_config(CONFIG, [*settings, *options.settings])
        self.scenes = [draw_scene(SCENES, index, held_out=True) for index in range(2 * options.pairs)]
        engine = Engine(config, device)
        with caption_encoder(engine.config, device) as encode:
            self._captions = [encode(self._prompt(scene)).parts[0] for scene in self.scenes[1::2]]
        self._network, self.vae = engine.load()
        self._schedule, self._size = FlowSchedule.from_config(config.scheduler), config.sampling.chunk_frames
        self._apart, self._device = config.sampling.image_first == "absorb", device

    @staticmethod
    def _prompt(scene: Scene) -> Prompt:
        return Prompt(1, scene.caption, (scene.caption,), 0, HEIGHT, WIDTH)

    def made(self, pair: int, first: Tensor, *, cut: bool) -> Tensor:
        """A chunk's latents (1, C, T, h, w) that begin with a picture's (1, C, 1, h, w), after a cut or of a video."""
        shape = (first.shape[1], *first.shape[3:])
        text = self._network.cache_caption(stacked([self._captions[pair]], self._device))
        noise, start = (PromptNoise if cut else Later)(0, [(str(pair), 0)]), (BEFORE + 3) // 4
        state = self._network.empty_state(1, *shape[1:], frames=start) if cut else None
        plan = ChunkPlan((self._size,))
        how: dict[str, Any] = {"state": state, "first": {0: first}, "apart": self._apart, "device": self._device}
        chunks = generate(self._network, self._schedule, [text], plan, shape=shape, rng=noise, **how)
        return next(iter(chunks)).latents

    def figures(self, pair: int) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
        """Figures by latent, and frames (3, F, H, W) in [-1, 1] of each video, by name."""
        film, picture = (render([scene], range(n)) for scene, n in zip(self._pair(pair), (BEFORE, 1), strict=True))
        picture = ((picture + 1) * 127.5).round() / 127.5 - 1
        frames, cache = self.vae.decode_stream(self.vae.encode(film.to(self._device)), more=True)
        latents = latents_of(self.vae, picture.to(self._device))
        begins, _ = self.vae.decode_stream(self.made(pair, latents["alone"], cut=False))
        begins, figures, shown = begins.cpu(), dict[str, dict[str, float]](), dict[str, Tensor]()
        for name in LATENTS:
            own, _ = self.vae.decode_stream(self.made(pair, latents[name], cut=True), cache)
            own, stride = own.cpu(), self.vae.geometry.time_stride
            first = picture.expand(-1, -1, stride, -1, -1)
            figures[name] = {"picture": psnr(own[:, :, :stride], first)}
            figures[name] |= {f"frame {n + 1}": psnr(own[:, :, n], picture[:, :, 0]) for n in range(stride)}
            figures[name]["next"] = psnr(own[:, :, stride : 2 * stride], begins[:, :, 1 : 1 + stride])
            figures[name]["chunk"] = psnr(own[:, :, 2 * stride :], begins[:, :, 1 + stride :])
            shown[name] = torch.cat([frames.cpu(), own], dim=2)[0, :, BEFORE - 2 :]
        shown["begins"] = torch.cat([frames.cpu()[:, :, -2:], begins[:, :, :1].expand(-1, -1, 3, -1, -1), begins], 2)[0]
        return figures, shown

    def _pair(self, pair: int) -> list[Scene]:
        return self.scenes[2 * pair : 2 * pair + 2]


def measure(options: argparse.Namespace, device: torch.device) -> int:
    pairs, found, rows = Pairs(options, device), list[dict[str, dict[str, float]]](), list[Tensor]()
    for pair in range(options.pairs):
        figures, shown = pairs.figures(pair)
        found.append(figures)
        if pair < options.strips:
            rows += [strip(shown[name]) for name in (*LATENTS, "begins")]
    lines = []
    for name in LATENTS:
        values = {figure: torch.tensor([one[name][figure] for one in found]) for figure in found[0][name]}
        lines.append({"latent": name, **{figure: cell(own) for figure, own in values.items()}})
    atomic_write_text(options.out / "table.md", table(lines))
    print(table(lines))
    if rows:
        Image.fromarray(torch.cat(rows).numpy()).save(options.out / "strips.png")
    return 0


def strip(frames: Tensor) -> Tensor:
    """Every second of the first 20 frames (3, F, H, W), in [-1, 1], beside each other: (H, W', 3), uint8."""
    pictures = ((frames[:, :20:2] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pictures.permute(2, 1, 3, 0).flatten(1, 2)


def cell(values: Tensor) -> str:
    """The mean of values (n,) and its standard error."""
    error = f" ± {float(values.std()) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{float(values.mean()):.2f}{error}"


def prepare(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("output/cuts"), help="(default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=48, help="(default: %(default)s)")
    parser.add_argument("--strips", type=int, default=0, help="pairs that are drawn (default: %(default)s)")
    parser.add_argument("--weights", type=Path, help="of another LongSANA of the shapes world (default: what ships)")
    parser.add_argument("--settings", nargs="+", default=[], metavar="KEY=VALUE", help="of the config")
    options: Any = parser.parse_args(arguments)
    check_options(options, "pairs")
    return options


def main(arguments: Sequence[str]) -> int:
    def run(options: argparse.Namespace, world: World) -> int:
        with torch.no_grad():
            return measure(options, world.device())

    return run_command(lambda world: prepare(arguments), run, connect=lambda world: None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
