"""Videos of a few fixed prompts while training goes on, and what can be measured on them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longsana.config import InferenceConfig
from longsana.data.prompts import Prompt
from longsana.encoders.geometry import geometry
from longsana.encoders.vae import VideoVAE
from longsana.evaluation.measures import Measures, boundaries, end_drift, measure, motion, seam_index
from longsana.models.dit import LongSanaDiT
from longsana.models.embeddings import CaptionEmbedding, Text, TextEmbedding
from longsana.published import DISTILLED
from longsana.runtime.distributed import World
from longsana.runtime.errors import InputError
from longsana.runtime.files import naming
from longsana.runtime.peers import Peers
from longsana.runtime.strips import Row, Strip, write_sheet
from longsana.runtime.teams import Team
from longsana.runtime.video import VideoWriter
from longsana.sampling.captions import Caption, caption_encoder
from longsana.sampling.checks import check_pictures, placed_parts
from longsana.sampling.engine import CaptionedNetwork, Engine
from longsana.training.checks import validation_prompts
from longsana.training.config import TrainingConfig

log = logging.getLogger(__name__)


class Probe(NamedTuple):
    """The look of a video in plain numbers: a model that collapses shows in them before it shows in the loss.

    They are those of `longsana evaluate` (longsana/evaluation/measures.py), nan where a video has none: saturation,
    contrast and sharpness, means over its frames; movement, the change a second; drifts, the relative change of the
    last 15 % of a video against its first 15 %; and the seam index.
    """

    saturation: float
    movement: float
    contrast: float
    sharpness: float
    saturation_drift: float
    contrast_drift: float
    sharpness_drift: float
    movement_drift: float
    seam_index: float


class Report(NamedTuple):
    """The outcome of a validation, the same on every process.

    metrics: probe_{saturation, ... of Probe}_len_{latent frames}, means over the prompts that have the figure. videos:
    every file of all processes, sorted. broken: videos whose numbers were not finite, which are in neither. sheet: a
    PNG with a row of pictures of each video; None without any.
    """

    metrics: dict[str, float]
    videos: list[Path]
    broken: int
    sheet: Path | None = None


class Validation:
    """Samples the first `val_samples` prompts of a file with the engine of inference, at each of `vis_video_lengths`.

    Noise, prompts and captions are the same every time, on any number of processes. Captions are encoded here, each
    process its own, and kept on the host.

    folder: videos go to `{folder}/vis`.

    Raises:
        InputError: the prompt file, a length, a picture or the text encoder does not fit; the message names the
            setting.
    """

    def __init__(self, config: TrainingConfig, folder: Path, device: torch.device | str, world: World) -> None:
        self._folder, self._world = folder, world
        self._team = team = Team.of(world, config.validation.gpus_per_video, torch.device(device))
        lengths = config.validation.vis_video_lengths
        self._engines = {length: _engine(config, length, device, team.peers) for length in lengths}
        prompts, checked = validation_prompts(config), set[tuple[Path, int, int]]()
        for length, engine in self._engines.items():
            absorbed: set[tuple[int, ...]] = set()
            for prompt in prompts:
                try:
                    absorbed.add(_check_prompt(engine.config, prompt, checked, alone=world.size == 1))
                    if world.size > 1 and len(absorbed) > 1:
                        raise InputError(
                            "a picture that is absorbed takes a pass that other processes do not make; in validation "
                            "all prompts or none begin with one, or set sampling.image_first=pin"
                        )
                except InputError as error:
                    raise InputError(f"validation.vis_video_lengths={length}: line {prompt.line}: {error}") from error
        self._count, self._texts = len(prompts), [prompt.text for prompt in prompts]
        # Prompts in turn, and the first ones again until every team has as many: under FSDP all processes must take
        # part in every forward pass.
        turns = range(team.index, -(-self._count // team.count) * team.count, team.count)
        with caption_encoder(config, torch.device(device)) as encode:
            self._mine = [
                _Sample(turn, prompt, encode(prompt))
                for turn, prompt in ((turn, prompts[turn % self._count]) for turn in turns)
            ]

    @torch.no_grad()
    def run(
        self, step: int, model: LongSanaDiT, vae: VideoVAE, stop: Callable[[], bool] | None = None
    ) -> Report | None:
        """Sample, measure and write every video of iteration `step`; all processes call this together.

        stop: whether some process was asked to stop; called before each video, by all processes together. Then the
            rest is left out, and there is no report.

        Raises:
            OSError: a video could not be written.
        """
        started = time.perf_counter()
        folder = self._folder / "vis" / f"step_{step:07d}"
        folder.mkdir(parents=True, exist_ok=True)
        measured: list[_Measured] = []
        for length, engine in self._engines.items():
            for sample in self._mine:
                if stop is not None and stop():
                    return None
                name = f"step_{step:07d}_rank_{self._world.rank}_sample_{sample.turn}_len_{length}.mp4"
                path = folder / name if sample.turn < self._count and self._team.leads else None
                # One at a time: training fills the memory.
                with divided(vae, engine.peers):
                    found = _sample(engine, InTraining(model), vae, sample, path)
                if path is not None:
                    measured.append(_Measured(length, sample.turn, path, *(found or (None, []))))
        # In one order: sums must not depend on who made what.
        everyone = sorted(
            (one for part in self._world.gather(measured) for one in part), key=lambda one: (one.length, one.turn)
        )
        whole = [one for one in everyone if one.probe is not None]
        broken = len(everyone) - len(whole)
        if self._world.is_main:
            log.info("step %d: %d videos in %.1f s: %s", step, len(whole), time.perf_counter() - started, folder)
            if broken:
                log.warning(
                    "step %d: numbers of %d of %d validation videos are not finite, and no files are made of them",
                    *(step, broken, len(everyone)),
                )
        metrics = {}
        for length in self._engines:
            probes = [one.probe for one in whole if one.length == length and one.probe is not None]
            for name, values in zip(Probe._fields, zip(*probes, strict=True), strict=False):
                if numbers := [value for value in values if math.isfinite(value)]:
                    metrics[f"probe_{name}_len_{length}"] = sum(numbers) / len(numbers)
        sheet = folder.with_suffix(".png") if whole else None
        if self._world.is_main and sheet is not None:
            write_sheet([Row(f"{one.length} latents: {self._texts[one.turn]}", one.strip) for one in whole], sheet)
        return Report(metrics, sorted(one.path for one in whole), broken, sheet)


class _Sample(NamedTuple):
    """turn: number of the prompt, from 0; beyond the last one it is there to keep the others company."""

    turn: int
    prompt: Prompt
    caption: Caption


class _Measured(NamedTuple):
    """probe: None of a video whose numbers were not finite. strip: pictures of it, (H, W, 3), uint8."""

    length: int
    turn: int
    path: Path
    probe: Probe | None
    strip: list[np.ndarray]


class InTraining:
    """A network in training. Its captions are not cached: sharded weights are whole in its passes alone."""

    def __init__(self, model: LongSanaDiT) -> None:
        self._model = model

    @property
    def text_embed(self) -> CaptionEmbedding:
        return self._model.text_embed

    def cache_caption(self, text: TextEmbedding) -> Text:
        return text

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self._model(*inputs, **options)


def _check_prompt(
    config: InferenceConfig, prompt: Prompt, checked: set[tuple[Path, int, int]], *, alone: bool
) -> tuple[int, ...]:
    """Refuse (InputError) a prompt whose video cannot be made; returns the chunks before which a picture is absorbed.

    checked: see `check_pictures`. alone: there is one process, whose passes need not be those of others.
    """
    outline = placed_parts(config, prompt)
    if not alone and any(change.chunks for change in outline.changes.values()):
        raise InputError(
            "a change of prompt that absorbs chunks again takes passes that other processes do not make; use keep or "
            "cut in validation"
        )
    check_pictures(config, prompt, config.sampling.num_frames, checked)
    apart = config.scheduler.sampling_algo == DISTILLED and config.sampling.image_first == "absorb"
    return tuple(outline.parts[number].chunk for number in prompt.pictures) if apart else ()


@contextmanager
def divided(vae: VideoVAE, peers: Peers | None) -> Iterator[None]:
    """Have a VAE decode with other processes inside; training's own decodings are each process' own."""
    before, vae.peers = vae.peers, peers
    try:
        yield
    finally:
        vae.peers = before


def _engine(config: TrainingConfig, length: int, device: torch.device | str, peers: Peers | None) -> Engine:
    frames = geometry(config.vae).pixel_frames(length)
    # Weights that change, and may be sharded, are not those that a graph has recorded.
    sampling = replace(config.sampling, num_frames=frames, cuda_graphs=False)
    return Engine(replace(config, sampling=sampling), device, peers)


def _sample(
    engine: Engine, network: CaptionedNetwork, decoder: VideoVAE, sample: _Sample, path: Path | None
) -> tuple[Probe, list[np.ndarray]] | None:
    """Make one video, write it unless `path` is None, and measure it; None, and no file, if it is not finite."""
    config, strip = engine.config, Strip()
    stride = engine.geometry.time_stride
    meter = Meter(config.sampling.fps, boundaries(engine.plan, stride), stride)
    try:
        with naming(path), ExitStack() as stack:
            writer = None
            if path is not None:
                writer = stack.enter_context(
                    VideoWriter(
                        path,
                        fps=config.sampling.fps,
                        height=sample.prompt.height,
                        width=sample.prompt.width,
                        **asdict(config.video),
                    )
                )
            # To the end: under FSDP the others wait for this process in each of their forward passes.
            for frames in engine.sample(network, decoder, [sample.prompt], [sample.caption], to_the_end=True):
                meter.add(frames.pixels)
                strip.add(frames.pixels[0].cpu().numpy())
                if writer is not None:
                    writer.append(frames.pixels[0])
    except FloatingPointError:
        return None
    return meter.result(), strip.pictures()


class Meter:
    """Measures a video that comes in pieces, of which it keeps one frame.

    fps: pictures a second. seams, time_stride: where its chunks begin, and the pixel frames of a latent, as
        `seam_index` takes them.
    """

    def __init__(self, fps: float, seams: Sequence[int] = (), time_stride: int = 1) -> None:
        self._fps, self._seams, self._stride = fps, seams, time_stride
        self._last: Tensor | None = None
        self._looks: list[Measures] = []

    def add(self, pixels: Tensor) -> None:
        """The next frames: (B, F, H, W, 3), uint8; B, H and W are the same in all pieces."""
        self._looks.append(measure(pixels, self._last))
        self._last = pixels[:, -1].clone()

    def result(self) -> Probe:
        """Means over all frames so far."""
        looks = Measures.join(self._looks)
        return Probe(
            saturation=float(looks.saturation.mean()),
            movement=float(motion(looks.change, self._fps).nanmean()),
            contrast=float(looks.contrast.mean()),
            sharpness=float(looks.sharpness.mean()),
            saturation_drift=float(end_drift(looks.saturation).nanmean()),
            contrast_drift=float(end_drift(looks.contrast).nanmean()),
            sharpness_drift=float(end_drift(looks.sharpness).nanmean()),
            movement_drift=float(end_drift(looks.change).nanmean()),
            seam_index=float(seam_index(looks.change, self._seams, self._stride).nanmean()),
        )
