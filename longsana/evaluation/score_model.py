"""What a model of the shapes world can do: many prompts, several seeds, and scores by the length of the video."""

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
from longsana.encoders.vae import VideoVAE, load_vae
from longsana.evaluation.measures import boundaries, drift, drift_curve, measure_pieces, per_second, seam_index
from longsana.models.embeddings import Text
from longsana.runtime.clock import Clock
from longsana.runtime.files import whole_file
from longsana.runtime.finite import to_host
from longsana.sampling.pipeline import Caption, VideoPipeline, resolve_dtype
from longsana.sampling.sampler import Network
from longsana.shapes.remembered import WORLDS, WorldName
from longsana.shapes.scenes import FPS, parse_caption, render
from longsana.shapes.sight import Seen, observe
from longsana.shapes.verifier import Verdicts, all_in_view, judge
from longsana.state import CausalState

FIGURES = Verdicts._fields
DRIFT = "saturation drift"
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
    absorbs: bool = True  # False, an ablation: a chunk's state is that of its last denoising pass
    world: WorldName = "shapes"

    @property
    def frames(self) -> int:
        return max(self.lengths) * FPS + 1


def try_model(config: InferenceConfig, trial: Trial, device: torch.device) -> dict[str, Any]:
    """Sample the trial's videos and score them; see `summarise`."""
    pipeline, prompts, captions = _loaded(config, trial.prompts, trial.frames, device, absorbs=trial.absorbs)
    config, plan = pipeline.config, pipeline.plan
    seam = _seam(plan.frames, plan.lengths[-1], pipeline.geometry.time_stride)
    runs = []
    for seed in trial.seeds:
        pipeline.config = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, seed=seed))
        videos: list[dict[str, Any]] = []
        for first in range(0, len(prompts), trial.batch):
            some = slice(first, first + trial.batch)
            films = (film.pixels for film in pipeline.sample(prompts[some], captions[some], Clock(device)))
            videos += _score(films, trial.prompts[some], trial.lengths, seam, device)
        runs.append(videos)
    return summarise(runs, trial.lengths)


def measure_speed(config: InferenceConfig, prompt: str, seconds: int, *, absorbs: bool = True) -> float:
    """Frames a second, from caption to pixels, on the CPU with as many threads as torch has."""
    device = torch.device("cpu")
    pipeline, prompts, captions = _loaded(config, [prompt], seconds * FPS + 1, device, absorbs=absorbs)
    started = time.perf_counter()
    frames = sum(film.pixels.shape[1] for film in pipeline.sample(prompts, captions, Clock(device)))
    return frames / (time.perf_counter() - started)


def _loaded(
    config: InferenceConfig, texts: Sequence[str], frames: int, device: torch.device, *, absorbs: bool = True
) -> tuple[VideoPipeline, list[Prompt], list[Caption]]:
    """A pipeline that is ready to sample videos of so many frames, its prompts and their captions."""
    sampling = dataclasses.replace(config.sampling, num_frames=frames)
    pipeline = VideoPipeline(dataclasses.replace(config, sampling=sampling), device)
    prompts = [Prompt(line, text, (text,), 0, sampling.height, sampling.width) for line, text in enumerate(texts, 1)]
    with pipeline.text_encoder() as encoder:
        captions = [pipeline.encode(encoder, prompt) for prompt in prompts]
    pipeline.load()
    if not absorbs:
        network: Any = _Unabsorbing(pipeline.model)
        pipeline.model = network
    return pipeline, prompts, captions


def strips(
    config: InferenceConfig, prompts: Sequence[str], seconds: Sequence[int], path: Path, device: torch.device
) -> None:
    """A picture of the frames at these seconds, a prompt a row. Needs matplotlib."""
    from matplotlib import pyplot

    pipeline, asked, captions = _loaded(config, prompts, max(seconds) * FPS + 1, device)
    films = torch.cat([film.pixels for film in pipeline.sample(asked, captions, Clock(device))], dim=1)
    rows = films[:, [second * FPS for second in seconds]]  # (B, columns, H, W, 3)
    rows = torch.nn.functional.pad(rows, (0, 0, 2, 2, 2, 2), value=255)
    picture = rows.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)
    with whole_file(path) as unfinished:
        pyplot.imsave(unfinished, picture.numpy())


class _Unabsorbing:
    """A network without the clean pass at t = 0: asked for one, it gives the state of the pass before."""

    def __init__(self, model: Network) -> None:
        self.model = model
        self.state: CausalState | None = None

    def __call__(
        self, x: Tensor, t: Tensor, text: Text, *, state: CausalState | None = None
    ) -> tuple[Tensor, CausalState]:
        if self.state is not None and not t.any():
            return x, self.state
        velocity, self.state = self.model(x, t, text, state=state)
        return velocity, self.state


def try_truth(config: InferenceConfig, trial: Trial, device: torch.device) -> dict[str, Any]:
    """Score the world itself, seen through the VAE: what no model can surpass. One seed; other prompts."""
    vae = load_vae(config.vae, device, resolve_dtype(config.vae.weight_dtype, device))
    plan = ChunkPlan.split(vae.geometry.latent_frames(trial.frames), config.sampling.chunk_frames)
    seam = _seam(plan.frames, config.sampling.chunk_frames, vae.geometry.time_stride)
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
        frames, cache = vae.decode_stream(latents[:, :, part], cache, more=part.stop < plan.frames)
        yield to_host(vae.to_uint8(frames), f"latents {part.start} to {part.stop - 1}", {"decoded frames": frames})


def _seam(latent_frames: int, chunk_frames: int, time_stride: int) -> Callable[[Tensor], Tensor]:
    """`seam_index` of changes."""
    seams = boundaries(latent_frames, chunk_frames, time_stride)
    return partial(seam_index, boundaries=seams, time_stride=time_stride)


def _score(
    films: Iterable[Tensor],
    captions: Sequence[str],
    lengths: Sequence[int],
    seam: Callable[[Tensor], Tensor],
    device: torch.device,
) -> list[dict[str, Any]]:
    """Figures of each video by length, and curves by second. films: pieces (B, F, H, W, 3), uint8."""
    seen: list[Seen] = []
    looks = measure_pieces(films, device, lambda pictures: seen.append(observe(pictures)))
    whole = Seen.join(seen)
    promises = [parse_caption(caption) for caption in captions]
    assert all(promises), captions
    # Without what is away the picture has less colour, which is no drift.
    saturation = looks.saturation.where(all_in_view(whole, promises), torch.nan)
    figures: dict[int, dict[str, Tensor]] = {}
    for seconds in lengths:
        frames = seconds * FPS + 1
        verdicts = judge(whole.first(frames), promises)
        figures[seconds] = {name: getattr(verdicts, name).nanmean(1) for name in FIGURES}
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
