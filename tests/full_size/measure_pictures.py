"""A picture first: what of it the videos of the shapes world keep, absorbed or pinned, and the seam after it.

    python tests/full_size/measure_pictures.py --out output/pictures

Pictures are first frames of held-out scenes, drawn by the world itself, and captions are the scenes' own. In the shapes
world they say all but the place: a colour has one hue there, and a word of size one size. In the remembered one
(`--world remembered_shapes`) they leave open which hue, which size and what paint. Each way of beginning has the same
noise. Judged is, in the first, fifth, thirtieth and sixtieth second (those that the length has), the share of objects
that are the picture's (identity: kind, hue, size, marking) and of frames in which all that the caption says is in view
and nothing else (persistence); the share of objects that are, in the four frames after the picture, within PLACE pixels
of where they are in it, which those of the scenes themselves are; and the change of the picture at the joint against
that within chunks (seam index, 1 is seamless). "nothing" begins with no picture: what is alike by the caption, or by
chance. After a ± stands the standard error, over pictures.

A way's figures are written to OUT when it is done, and a table of all so far: stopped at any moment, the same command
goes on. `--weights` measures others than those that ship, `--settings` sets what else differs from the shapes world's
config. On a laptop: `--pictures 4 --seeds 0 --seconds 5`.

Exit status: 0 all ways are there, 2 bad input, 3 the time was up before.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # it also runs from a checkout not installed

if __name__ == "__main__":
    from longsana.runtime.process import begin

    begin()  # before the imports below, which take seconds

import torch
from PIL import Image
from torch import Tensor

from longsana.config import InferenceConfig, load_config
from longsana.data.prompts import Prompt
from longsana.evaluation.measures import measure_pieces, seam_index
from longsana.evaluation.report import table
from longsana.runtime.commandline import Parser, run_command
from longsana.runtime.distributed import World
from longsana.runtime.files import atomic_write_text
from longsana.sampling.captions import Caption, caption_encoder
from longsana.sampling.engine import CaptionedNetwork, Engine
from longsana.shapes.remembered import WORLDS
from longsana.shapes.scenes import FPS, Scene, parse_caption, render, to_bytes
from longsana.shapes.sight import Seen, observe
from longsana.shapes.verifier import judge
from tests.full_size.measure_stories import over_stories
from tests.full_size.tables import check_options, chosen, measure_each, scores_of

CONFIG = Path(__file__).resolve().parents[2] / "configs/sana_video_config/longsana/shapes/longsana.yaml"
SCENES = 3_000_000
"""Seed of the scenes, far from those of training and of prompts."""
AT = (1, 5, 30, 60)
"""Seconds that are judged."""
PLACE = 10
"""What is quick moves 8.4 pixels in four frames."""
AFTER = 4
"""Frames of the first latent after the picture."""


@dataclass(frozen=True)
class Way:
    """A way to begin. first: of `sampling.image_first`; None: without a picture."""

    name: str
    first: str | None

    @property
    def file(self) -> str:
        return f"pictures_{self.name}.json"


WAYS = (Way("absorb", "absorb"), Way("pin", "pin"), Way("nothing", None))


class Films:
    """Videos of captions, with and without the pictures that their scenes begin with, whose model is loaded."""

    def __init__(self, options: argparse.Namespace, device: torch.device, folder: Path) -> None:
        self._options, self._device = options, device
        draw = WORLDS[options.world]
        self._scenes = [draw(SCENES, index, held_out=True) for index in range(options.pictures)]
        self.pictures = to_bytes(render(self._scenes, range(1)))
        self._prompts = list(map(self._prompt, range(options.pictures), self._scenes, [folder] * options.pictures))
        engine = self.engine(WAYS[0])
        with caption_encoder(engine.config, device) as encode:
            self._captions: list[Caption] = [encode(prompt) for prompt in self._prompts]
        network, self._decoder = engine.load()
        self._network: CaptionedNetwork = network

    def _prompt(self, number: int, scene: Scene, folder: Path) -> Prompt:
        path, (height, width) = folder / f"{number}.png", self.pictures.shape[2:4]
        Image.fromarray(self.pictures[number, 0].numpy()).save(path)
        return Prompt(number + 1, scene.caption, (scene.caption,), 0, height, width, image=path)

    def engine(self, way: Way) -> Engine:
        """On a GPU passes are recorded, which changes no bit."""
        settings = [
            f"sampling.num_frames={FPS * self._options.seconds + 1}",
            "sampling.cuda_graphs=true",
            "vae.decoder=full",
        ]
        settings += [f"sampling.image_first={way.first or 'absorb'}"]
        settings += [f"model.load_from={self._options.weights}"] if self._options.weights else []
        config: InferenceConfig = load_config(CONFIG, [*settings, *self._options.settings])
        return Engine(config, self._device)

    def sample(self, way: Way, some: slice, seed: int) -> Iterator[Tensor]:
        """Pixels (B, F, H, W, 3), uint8, piece by piece."""
        prompts = [dataclasses.replace(prompt, seed=seed) for prompt in self._prompts[some]]
        if way.first is None:
            prompts = [dataclasses.replace(prompt, image=None) for prompt in prompts]
        for frames in self.engine(way).sample(self._network, self._decoder, prompts, self._captions[some]):
            yield frames.pixels

    def score(self, way: Way, seed: int) -> list[dict[str, float]]:
        """Figures of each video, by name; nan: not judged."""
        stride, scored = self.engine(way).geometry.time_stride, []
        for first in range(0, len(self._prompts), self._options.batch):
            some, seen = slice(first, first + self._options.batch), list[Seen]()

            def look(pictures: Tensor, seen: list[Seen] = seen) -> None:
                seen.append(observe(pictures))

            looks = measure_pieces(self.sample(way, some, seed), self._device, look)
            seams = seam_index(looks.change, [1], stride).tolist()
            then = observe(self.pictures[some].to(self._device))
            found = figures_of(Seen.join(seen), then, [prompt.text for prompt in self._prompts[some]])
            scored += [figures | {"seam index": seam} for figures, seam in zip(found, seams, strict=True)]
        return scored


def figures_of(seen: Seen, picture: Seen, captions: Sequence[str]) -> list[dict[str, float]]:
    """Figures of each video, of what its frames show and what the picture does that it begins with."""
    # A second of the picture before them: that is what `judge` compares identity with.
    verdicts = judge(Seen.join([*[picture] * FPS, seen]), [parse_caption(caption) for caption in captions])
    seconds = {second: slice(FPS * second, FPS * (second + 1)) for second in AT}
    length = verdicts.identity.shape[1]
    there = picture.present[:, :1]
    away = (seen.centre[:, 1 : 1 + AFTER] - picture.centre[:, :1]).abs()
    size = torch.tensor([picture.size[1], picture.size[0]], device=away.device)
    near = torch.minimum(away, size - away).norm(dim=-1) <= PLACE  # what leaves comes back on the other side
    figures = [
        {
            f"{name}, {second} s": float(getattr(verdicts, name)[row, part].nanmean())
            for name in ("identity", "persistence")
            for second, part in seconds.items()
            if part.stop <= length
        }
        for row in range(len(captions))
    ]
    for row, own in enumerate(figures):
        own["place"] = float(near[row][there[row].expand_as(near[row])].float().mean())
    return figures


def measure(options: argparse.Namespace, device: torch.device) -> int:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    common = {name: getattr(options, name) for name in ("pictures", "seeds", "seconds", "world", "settings")}
    common["weights"] = None if options.weights is None else str(options.weights)
    with tempfile.TemporaryDirectory() as folder:

        @cache
        def films() -> Films:
            return Films(options, device, Path(folder))

        def measured(way: Way) -> dict[str, Any]:
            runs = [films().score(way, seed) for seed in options.seeds]
            return {"figures": {name: over_stories([[v[name] for v in run] for run in runs]) for name in runs[0][0]}}

        return measure_each(
            options.out,
            options.ways,
            lambda way: {"way": way.name, **common},
            measured,
            device,
            minutes=options.minutes,
            finish=write_table,
        )


def write_table(out: Path) -> None:
    """Write table.md of all that has been measured, shares in percent."""
    lines = [
        {"begins with": name, **{figure: _cell(figure, *values) for figure, values in score["figures"].items()}}
        for name, score in scores_of(out, WAYS).items()
    ]
    atomic_write_text(out / "table.md", table(lines))


def _cell(figure: str, mean: float | None, error: float | None) -> str:
    form, scale = ("{:.2f}", 1) if figure == "seam index" else ("{:.1f}", 100)
    if mean is None:
        return ""
    return form.format(scale * mean) + ("" if error is None else " ± " + form.format(scale * error))


def prepare(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("output/pictures"), help="(default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--seconds", type=int, default=60, help="length of the videos (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="videos at a time (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="begin no way that would end later (default: no limit)")
    parser.add_argument("--weights", type=Path, help="of another LongSANA of the shapes world (default: what ships)")
    parser.add_argument("--world", choices=list(WORLDS), default="shapes", help="whose pictures (default: %(default)s)")
    parser.add_argument("--settings", nargs="+", default=[], metavar="KEY=VALUE", help="of the config")
    parser.add_argument("--only", nargs="+", metavar="WAY", help="these, by name (default: all)")
    options: Any = parser.parse_args(arguments)
    options.ways = chosen(WAYS, options.only)
    check_options(options, "pictures", "seconds", "batch")
    return options


def main(arguments: Sequence[str]) -> int:
    def run(options: argparse.Namespace, world: World) -> int:
        return measure(options, world.device())

    return run_command(lambda world: prepare(arguments), run, connect=lambda world: None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
