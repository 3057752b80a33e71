"""A tiny decoder beside the full one: how close its pictures are, and what the verifier sees in both.

    python tests/full_size/measure_decoders.py --out output/decoders          # that which ships

The shipped LongSANA of the shapes world makes latents of single scenes held out of training, three seeds, once; both
decoders stream them, stretch by stretch as they come, in memory that does not grow with the length. Judged are the
first 1, 5, 30 and 60 seconds: PSNR and SSIM of the tiny decoder's pictures to the full one's, the mean over frames (of
100 dB at most) and then over videos, and the worst video's; the seam index of each decoder's videos (1 is seamless);
and all figures of the verifier, with the difference between the decoders, tiny less full, caption by caption. After a ±
stands the standard error, over captions. Frames a second are those of each decoder alone: of one video, of 15 seconds
at most, whose latents are there, to bytes on the host; the best of three times, in turn.

OUT gets decoders.json, with the machine, versions and commit, and table.md. Stopped before, it leaves nothing. On a
laptop: `--videos 2 --seeds 0 --seconds 1 5`; `--decoder_path seeded:0` is enough to see that it works.

Exit status: 0 all is there, 2 bad input.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # it also runs from a checkout not installed

if __name__ == "__main__":
    from longsana.runtime.process import begin

    begin()  # before the imports below, which take seconds

import torch
from torch import Tensor

from longsana.config import InferenceConfig, load_config
from longsana.data.prompts import Prompt
from longsana.encoders.closeness import psnr, ssim
from longsana.encoders.tiny_layouts import SHAPES, TINY, source_of
from longsana.encoders.vae import VideoVAE
from longsana.evaluation.measures import Measures, measure
from longsana.evaluation.report import table
from longsana.evaluation.score_model import score_looks, seam_of
from longsana.inference.benchmark import machine
from longsana.inference.sidecar import commit, versions
from longsana.runtime.commandline import Parser, run_command, typed_path
from longsana.runtime.errors import InputError
from longsana.runtime.files import atomic_write_text
from longsana.runtime.hub import file_sha256
from longsana.sampling.captions import Caption, caption_encoder
from longsana.sampling.engine import Decoding, Engine, sample_latents, stretches
from longsana.shapes.scenes import FPS, HEIGHT, WIDTH, draw_scene
from longsana.shapes.sight import Seen, observe
from tests.full_size.measure_stories import CONFIG, over_stories
from tests.full_size.tables import check_options

log = logging.getLogger("longsana")

FULL, TINIER, DIFFERENCE = "full", "tiny", "difference"
CLOSENESS = {"PSNR": psnr, "SSIM": ssim}
MOST = 100.0
"""dB that count: the PSNR of equal pictures is infinite, and has no mean."""
TIMED, TIMES = 15, 3
"""Seconds of video that are timed, and how often."""
SHOWN = ("kind", "motion", "persistence", "identity")
"""Figures of the verifier in the table; the others are in the JSON."""

Figures = dict[str, float]
"""Figures of a video by name; nan where there is nothing to judge."""


class Watch:
    """One decoder's side of a batch of videos: it decodes them as they come, and looks at the pictures."""

    def __init__(self, decoder: VideoVAE, device: torch.device) -> None:
        self._decoding, self._device = Decoding(decoder), device
        self._looks, self._seen = list[Measures](), list[Seen]()
        self._before: Tensor | None = None

    def __call__(self, latents: Tensor, name: str, *, more: bool) -> Tensor:
        """The next pictures (B, F, H, W, 3), uint8, on the device."""
        pictures = self._decoding(latents, name, more=more).to(self._device)
        self._looks.append(measure(pictures, self._before))
        self._seen.append(observe(pictures))
        self._before = pictures[:, -1]
        return pictures

    def scores(self, captions: Sequence[str], lengths: Sequence[int], engine: Engine) -> list[dict[int, Figures]]:
        """Figures of each video by length in seconds; see `score_looks`."""
        seam = seam_of(engine.plan, engine.geometry.time_stride)
        scored = score_looks(Seen.join(self._seen), Measures.join(self._looks), captions, lengths, seam)
        return [video["figures"] for video in scored]


class Films:
    """Videos of captions as latents, and both decoders, whose models are loaded."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self._options, self._device = options, device
        engine = self.engine = Engine(config_of(options), device)
        tiny = Engine(config_of(options, options.decoder), device)
        self._texts = [draw_scene(0, index, held_out=True).caption for index in range(options.videos)]
        self._prompts = [Prompt(line, text, (text,), 0, HEIGHT, WIDTH) for line, text in enumerate(self._texts, 1)]
        with caption_encoder(engine.config, device) as encode:
            self._captions: list[Caption] = [encode(prompt) for prompt in self._prompts]
        self._network = engine.load_network()
        self.decoders = {FULL: engine.load_decoder(), TINIER: tiny.load_decoder()}

    def latents(self, some: slice, seed: int) -> Iterator[Tensor]:
        """Latents (B, C, T, h, w) of these videos, in the stretches that the engine decodes at once."""
        prompts = [dataclasses.replace(prompt, seed=seed) for prompt in self._prompts[some]]
        for chunk in sample_latents(self._network, self._captions[some], self.engine.videos(prompts)):
            yield from stretches(chunk.latents, chunk.start, self.engine.config.sampling.chunk_frames)

    def score(self, seed: int) -> list[dict[int, dict[str, Figures]]]:
        """Figures of each video by length in seconds, and there by decoder; closeness to the full one is the tiny's."""
        videos: list[dict[int, dict[str, Figures]]] = []
        for first in range(0, len(self._prompts), self._options.batch):
            videos += self._score(slice(first, first + self._options.batch), seed)
            log.info("seed %d: %d of %d videos", seed, len(videos), len(self._prompts))
        return videos

    def _score(self, some: slice, seed: int) -> Iterator[dict[int, dict[str, Figures]]]:
        watches = {name: Watch(decoder, self._device) for name, decoder in self.decoders.items()}
        close: dict[str, list[Tensor]] = {name: [] for name in CLOSENESS}
        left = self.engine.plan.frames
        for number, latents in enumerate(self.latents(some, seed)):
            left -= latents.shape[2]
            pictures = [watch(latents, f"stretch {number}", more=left > 0) for watch in watches.values()]
            for name, figure in CLOSENESS.items():
                close[name].append(figure(*pictures).clamp(max=MOST))
        frames = {name: torch.cat(parts, dim=1) for name, parts in close.items()}
        lengths, captions = self._options.seconds, self._texts[some]
        scores = {name: watch.scores(captions, lengths, self.engine) for name, watch in watches.items()}
        for row in range(len(captions)):
            found = {length: {name: scores[name][row][length] for name in scores} for length in lengths}
            for length, own in found.items():
                own[TINIER] |= {name: float(each[row, : FPS * length + 1].mean()) for name, each in frames.items()}
            yield found

    def speed(self) -> dict[str, float]:
        """Frames a second of each decoder alone."""
        most = self.engine.geometry.latent_frames(FPS * TIMED + 1)
        pieces, left = list[Tensor](), min(most, self.engine.plan.frames)
        for latents in self.latents(slice(1), self._options.seeds[0]):
            pieces.append(latents[:, :, :left])
            left -= pieces[-1].shape[2]
            if not left:
                break
        frames = self.engine.geometry.pixel_frames(sum(piece.shape[2] for piece in pieces), first=True)
        times: dict[str, list[float]] = {name: [] for name in self.decoders}
        for _ in range(1 + TIMES):  # the first to warm up
            for name, decoder in self.decoders.items():
                started, decoding = time.perf_counter(), Decoding(decoder)
                for number, latents in enumerate(pieces, 1):
                    decoding(latents, f"stretch {number}", more=number < len(pieces))
                times[name].append(time.perf_counter() - started)
        return {name: frames / min(own[1:]) for name, own in times.items()}


def config_of(options: argparse.Namespace, decoder: str = FULL) -> InferenceConfig:
    settings = [
        f"sampling.num_frames={FPS * max(options.seconds) + 1}",
        "sampling.cuda_graphs=true",
        f"vae.decoder={decoder}",
    ]
    settings += [f"vae.decoder_pretrained={path}"] if decoder != FULL and (path := options.decoder_path) else []
    config: InferenceConfig = load_config(CONFIG, [*options.settings, *settings])
    return config


def summarize(runs: Sequence[Sequence[dict[int, dict[str, Figures]]]]) -> dict[str, Any]:
    """Means of videos' figures: by length, decoder and name [mean, standard error], both null where nothing is judged.

    runs: one list of videos, in the order of their captions, for each seed. The decoders' "difference" is that of each
    video, tiny less full. "worst": of closeness, the video's that has least.
    """
    found: dict[str, Any] = {}
    for length, first in runs[0][0].items():
        own: dict[str, Any] = {
            decoder: {
                name: over_stories([[video[length][decoder][name] for video in run] for run in runs]) for name in each
            }
            for decoder, each in first.items()
        }
        own[DIFFERENCE] = {
            name: over_stories(
                [[video[length][TINIER][name] - video[length][FULL][name] for video in run] for run in runs]
            )
            for name in first[FULL]
        }
        own["worst"] = {name: min(video[length][TINIER][name] for run in runs for video in run) for name in CLOSENESS}
        found[str(length)] = own
    return found


def rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """Lines of the table: for each length the full decoder, the tiny one, and the difference; shares in percent."""
    lines = []
    for length, own in result["figures"].items():
        for name in (FULL, TINIER, DIFFERENCE):
            line = {"seconds": length, "decoder": result["asked"]["decoder"] if name == TINIER else name}
            for close, form in (("PSNR", "{:.2f}"), ("SSIM", "{:.4f}")):
                line[f"{close}, worst"] = ""
                if name == TINIER:
                    line[f"{close}, worst"] = f"{cell(form, own[name][close])}, {form.format(own['worst'][close])}"
            line["seam index"] = cell("{:+.3f}" if name == DIFFERENCE else "{:.3f}", own[name]["seam index"])
            for figure in SHOWN:
                line[figure] = cell("{:+.2f}" if name == DIFFERENCE else "{:.1f}", own[name][figure], 100)
            lines.append(line)
    return lines


def cell(form: str, values: Sequence[float | None], scale: float = 1) -> str:
    """A mean and its standard error, as `summarize` gives them."""
    mean, error = values
    if mean is None:
        return ""
    return form.format(scale * mean) + ("" if error is None else " ± " + form.replace("+", "").format(scale * error))


@torch.no_grad()
def run(options: argparse.Namespace, device: torch.device) -> int:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    started, films = time.perf_counter(), Films(options, device)
    figures = summarize([films.score(seed) for seed in options.seeds])
    asked = {name: getattr(options, name) for name in ("videos", "seeds", "seconds", "batch", "settings", "decoder")}
    path = Path(source_of(config_of(options, options.decoder).vae))
    result = {
        "asked": asked | {"decoder_path": str(path)},
        "SHA-256 of the decoder's file": file_sha256(path) if path.is_file() else None,
        "machine": machine(device),
        "versions": versions(),
        "commit": commit(),
        "dtypes": {name: str(decoder.dtype) for name, decoder in films.decoders.items()},
        "figures": figures,
        "frames a second": films.speed(),
        "wall, s": round(time.perf_counter() - started, 1),
    }
    speeds = ", ".join(f"{name} {speed:.0f}" for name, speed in result["frames a second"].items())
    lines = f"{table(rows(result))}\nFrames a second, each decoder alone: {speeds}.\n"
    atomic_write_text(options.out / "decoders.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    atomic_write_text(options.out / "table.md", lines)
    print(lines)
    return 0


def prepare(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=typed_path, default=Path("output/decoders"), help="(default: %(default)s)")
    parser.add_argument("--decoder", choices=list(TINY), default=SHAPES, help="its kind (default: %(default)s)")
    parser.add_argument("--decoder_path", help="its file, or seeded:N for random weights (default: beside the VAE)")
    parser.add_argument("--videos", type=int, default=64, help="captions (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument(
        "--seconds",
        type=int,
        nargs="+",
        default=[1, 5, 30, 60],
        help="from the start, judged apart (default: 1 5 30 60)",
    )
    parser.add_argument("--batch", type=int, default=64, help="videos at a time (default: %(default)s)")
    parser.add_argument("--settings", nargs="+", default=[], metavar="KEY=VALUE", help="of the config")
    options: Any = parser.parse_args(arguments)
    if min(options.seconds) < 1:
        raise InputError(f"--seconds {min(options.seconds)}: must be at least 1")
    options.seconds = sorted(set(options.seconds))
    config_of(options, options.decoder)
    check_options(options, "videos", "batch")
    return options


def main(arguments: Sequence[str]) -> int:
    return run_command(
        lambda world: prepare(arguments),
        lambda options, world: run(options, world.device()),
        connect=lambda world: None,
        after_stop="nothing was written",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
