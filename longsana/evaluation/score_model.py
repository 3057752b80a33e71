"""Scores of a model of the shapes world: many prompts, several seeds, by the length of the video."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longsana.chunks import ChunkPlan
from longsana.config import InferenceConfig
from longsana.data.prompts import Prompt
from longsana.encoders.loading import load_vae
from longsana.encoders.vae import VideoVAE
from longsana.evaluation.measures import (
    Measures,
    boundaries,
    drift,
    drift_curve,
    measure_pieces,
    per_second,
    seam_index,
)
from longsana.published import DISTILLED
from longsana.runtime.files import whole_file
from longsana.sampling.captions import caption_encoder
from longsana.sampling.engine import Engine, decode
from longsana.shapes.remembered import WORLDS, WorldName
from longsana.shapes.scenes import FPS, parse_caption, render
from longsana.shapes.sight import Seen, observe
from longsana.shapes.verifier import Verdicts, all_in_view, judge
from longsana.weights.build import resolve_dtype

FIGURES = Verdicts._fields
DRIFT = "saturation drift"
RIGHT = "right in every frame"
TRUTH = 1 << 20
"""Index of the first scene that is filmed as ground truth, far from those of training and of prompts."""


@dataclass(frozen=True)
class Trial:
    """prompts: those of `shapes.prompts` that are held out. lengths: seconds from the start, scored apart.

    world: whose scenes are ground truth.
    """

    prompts: Sequence[str]
    seeds: Sequence[int] = (0, 1, 2)
    lengths: Sequence[int] = (5, 30, 60)
    batch: int = 64  # videos at a time
    world: WorldName = "shapes"

    @property
    def frames(self) -> int:
        return max(self.lengths) * FPS + 1


def try_model(config: InferenceConfig, trial: Trial, device: torch.device) -> dict[str, Any]:
    """Sample the trial's videos and score them; see `summarise`."""
    return summarise(score_videos(config, trial, device), trial.lengths)


def score_videos(config: InferenceConfig, trial: Trial, device: torch.device) -> list[list[dict[str, Any]]]:
    """Sample the trial's videos: for each seed the scores of each, as `score_looks` has them."""
    films = _Films(config, trial.prompts, trial.frames, device)
    plan = films.engine.plan
    seam = seam_of(plan, films.engine.geometry.time_stride)
    runs = []
    for seed in trial.seeds:
        videos: list[dict[str, Any]] = []
        for first in range(0, len(trial.prompts), trial.batch):
            some = slice(first, first + trial.batch)
            videos += _score(films.sample(some, seed), trial.prompts[some], trial.lengths, seam, device)
        runs.append(videos)
    return runs


def measure_speed(config: InferenceConfig, prompt: str, seconds: int) -> float:
    """Frames a second, from caption to pixels, on the CPU with as many threads as torch has."""
    device = torch.device("cpu")
    films = _Films(config, [prompt], seconds * FPS + 1, device)
    started = time.perf_counter()
    frames = sum(pixels.shape[1] for pixels in films.sample())
    return frames / (time.perf_counter() - started)


class _Films:
    """Videos of so many frames of some texts, whose model is loaded."""

    def __init__(self, config: InferenceConfig, texts: Sequence[str], frames: int, device: torch.device) -> None:
        # On a GPU the passes of a network as small as this are over before the next ones are launched.
        replayed = config.scheduler.sampling_algo == DISTILLED
        sampling = dataclasses.replace(config.sampling, num_frames=frames, cuda_graphs=replayed)
        self.engine = Engine(dataclasses.replace(config, sampling=sampling), device)
        size = sampling.height, sampling.width
        self._prompts = [Prompt(line, text, (text,), 0, *size) for line, text in enumerate(texts, 1)]
        with caption_encoder(self.engine.config, self.engine.device) as encode:
            self._captions = [encode(prompt) for prompt in self._prompts]
        self._network, self._decoder = self.engine.load()

    def sample(self, some: slice = slice(None), seed: int | None = None) -> Iterator[Tensor]:
        """Pixels (B, F, H, W, 3), uint8, piece by piece. seed: None is the config's."""
        prompts = [dataclasses.replace(prompt, seed=seed) for prompt in self._prompts[some]]
        for frames in self.engine.sample(self._network, self._decoder, prompts, self._captions[some]):
            yield frames.pixels


def strips(
    config: InferenceConfig, prompts: Sequence[str], seconds: Sequence[int], path: Path, device: torch.device
) -> None:
    """A picture of the frames at these seconds, a prompt a row. Needs matplotlib."""
    from matplotlib import pyplot

    films = torch.cat(list(_Films(config, prompts, max(seconds) * FPS + 1, device).sample()), dim=1)
    rows = films[:, [second * FPS for second in seconds]]  # (B, columns, H, W, 3)
    rows = torch.nn.functional.pad(rows, (0, 0, 2, 2, 2, 2), value=255)
    picture = rows.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)
    with whole_file(path) as unfinished:
        pyplot.imsave(unfinished, picture.numpy())


def try_truth(config: InferenceConfig, trial: Trial, device: torch.device) -> dict[str, Any]:
    """Score the world itself, seen through the VAE: what no model can surpass. One seed; other prompts."""
    vae = load_vae(config.vae, device, resolve_dtype(config.vae.weight_dtype, device))
    frames, sampling = vae.geometry.latent_frames(trial.frames), config.sampling
    plan = ChunkPlan.split(frames, sampling.chunk_frames, sampling.first_chunk_frames)
    seam = seam_of(plan, vae.geometry.time_stride)
    videos: list[dict[str, Any]] = []
    batch = max(trial.batch // 8, 1)  # a film's pictures are encoded at once
    for first in range(0, len(trial.prompts), batch):
        indices = range(first, min(first + batch, len(trial.prompts)))
        scenes = [WORLDS[trial.world](0, TRUTH + index, held_out=True) for index in indices]
        latents = vae.encode(render(scenes, range(trial.frames), device=device))
        captions = [scene.caption for scene in scenes]
        videos += _score(_decoded(vae, latents, plan), captions, trial.lengths, seam, device)
    return summarise([videos], trial.lengths)


def _decoded(vae: VideoVAE, latents: Tensor, plan: ChunkPlan) -> Iterator[Tensor]:
    cache = None
    for part in plan.slices():
        stretch, name = latents[:, :, part], f"latents {part.start} to {part.stop - 1}"
        pixels, cache = decode(vae, stretch, cache, name, more=part.stop < plan.frames)
        yield pixels


def seam_of(plan: ChunkPlan, time_stride: int) -> Callable[[Tensor], Tensor]:
    """`seam_index` of changes (B, F), for videos in these chunks."""
    return partial(seam_index, boundaries=boundaries(plan, time_stride), time_stride=time_stride)


def _score(
    films: Iterable[Tensor],
    captions: Sequence[str],
    lengths: Sequence[int],
    seam: Callable[[Tensor], Tensor],
    device: torch.device,
) -> list[dict[str, Any]]:
    seen: list[Seen] = []
    looks = measure_pieces(films, device, lambda pictures: seen.append(observe(pictures)))
    return score_looks(Seen.join(seen), looks, captions, lengths, seam)


def score_looks(
    whole: Seen, looks: Measures, captions: Sequence[str], lengths: Sequence[int], seam: Callable[[Tensor], Tensor]
) -> list[dict[str, Any]]:
    """Figures of each video by length ("figures"), and curves by second ("curves").

    whole, looks: of all of the videos' frames. lengths: seconds from the start. seam: gives (B,) of changes (B, F).
    """
    promises = [parse_caption(caption) for caption in captions]
    assert all(promises), captions
    # Without what is away the picture has less colour, which is no drift.
    saturation = looks.saturation.where(all_in_view(whole, promises), torch.nan)
    figures: dict[int, dict[str, Tensor]] = {}
    for seconds in lengths:
        frames = seconds * FPS + 1
        verdicts = judge(whole.first(frames), promises)
        figures[seconds] = {name: getattr(verdicts, name).nanmean(1) for name in FIGURES}
        figures[seconds][RIGHT] = verdicts.right.all(1).double()
        figures[seconds]["seam index"] = seam(looks.change[:, :frames])
        figures[seconds][DRIFT] = drift(saturation[:, :frames], FPS).abs()
    verdicts = judge(whole, promises)
    curves = {
        "adherence": per_second(verdicts.adherence, FPS),
        "persistence": per_second(verdicts.persistence, FPS),
        "identity": per_second(verdicts.identity, FPS),
        DRIFT: drift_curve(saturation, FPS),
    }
    return [
        {
            "figures": {
                length: {name: float(each[i]) for name, each in own.items()} for length, own in figures.items()
            },
            "curves": {name: curve[i].tolist() for name, curve in curves.items()},
        }
        for i in range(len(captions))
    ]


def summarise(runs: Sequence[Sequence[dict[str, Any]]], lengths: Sequence[int]) -> dict[str, Any]:
    """runs: one list of videos for each seed.

    "figures": by seconds and name, [mean, spread]: the mean over videos, its mean and standard deviation over seeds.
    "curves": by name, the mean over all videos of each second. "videos", "seeds": how many.
    """
    figures = {}
    for seconds in lengths:
        names = runs[0][0]["figures"][seconds]
        means = {name: [_mean(video["figures"][seconds][name] for video in run) for run in runs] for name in names}
        figures[str(seconds)] = {name: [_mean(values), _spread(values)] for name, values in means.items()}
    videos = [video for run in runs for video in run]
    curves = {
        name: [_mean(values) for values in zip(*(video["curves"][name] for video in videos), strict=True)]
        for name in videos[0]["curves"]
    }
    return {"figures": figures, "curves": curves, "videos": len(runs[0]), "seeds": len(runs)}


def _spread(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return statistics.pstdev(numbers) if len(numbers) > 1 else None


def _mean(values: Iterable[float | None]) -> float | None:
    """Average those that are numbers; None of none."""
    numbers = [value for value in values if value is not None and value == value]
    return statistics.fmean(numbers) if numbers else None
