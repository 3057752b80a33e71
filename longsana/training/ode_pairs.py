"""ODE trajectories for the first stage: what the teacher passes through on its way from noise to video (facts 8.5).

Every shard is a function of the settings and its prompts alone: any number of processes, stopped at any moment, write
the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from longsana.chunks import ChunkPlan
from longsana.config import InferenceConfig
from longsana.data.prompts import Prompt
from longsana.data.shards import DTYPES, Contents, ShardWriter
from longsana.data.trajectories import KIND, SIGMAS, check_grid
from longsana.encoders.text import instruction_text, negative_text, text_sha256
from longsana.flow.schedule import FlowSchedule, uniform_sigmas
from longsana.runtime.distributed import World
from longsana.runtime.errors import InputError
from longsana.sampling.pipeline import Caption, VideoPipeline, resolve_dtype
from longsana.sampling.request import check_config, source_digest
from longsana.sampling.sampler import trajectory
from longsana.training.config import OdePairsConfig

log = logging.getLogger(__name__)

INSTEAD = {
    "scheduler.sampling_algo": "pairs.causal",
    "scheduler.num_inference_steps": "pairs.num_steps",
    "scheduler.interval_k": "nothing: a chunk begins when the one before is clean",
    "scheduler.bf16_timesteps": "nothing: the teacher's timesteps are never rounded",
    "sampling.cfg_scale": "pairs.cfg_scale",
    "sampling.fps": "nothing: no video is written",
    "vae": "nothing: no video is decoded",
    "video": "nothing: no video is written",
}
"""Settings, or sections, of inference that mean nothing here, and what does."""


def teacher_config(config: OdePairsConfig) -> InferenceConfig:
    """The settings of inference that sample the teacher; the trajectories' own grid of noise levels is `pairs`'."""
    pairs = config.pairs
    return InferenceConfig(
        model=config.model,
        vae=config.vae,
        text_encoder=config.text_encoder,
        scheduler=dataclasses.replace(
            config.scheduler,
            sampling_algo="chunk_flow_euler" if pairs.causal else "flow_euler",
            inference_flow_shift=pairs.shift,
            num_inference_steps=pairs.num_steps,
            interval_k=1.0,
        ),
        sampling=dataclasses.replace(config.sampling, cfg_scale=pairs.cfg_scale),
    )


def check_settings(given: Sequence[str], config: OdePairsConfig) -> None:
    """Refuse settings, by name, that were given on the command line and would be ignored.

    Raises:
        InputError: the first one, with what takes its place.
    """
    guided, learned = config.pairs.cfg_scale != 1, config.sampling.null_caption == "learned"
    for setting in given:
        if instead := INSTEAD.get(setting) or INSTEAD.get(setting.partition(".")[0]):
            raise InputError(f"--{setting}: has no meaning for trajectories; instead: {instead}")
        if setting in ("sampling.negative_prompt", "sampling.null_caption") and not guided:
            raise InputError(f"--{setting}: has no meaning with pairs.cfg_scale=1, where nothing is guided away from")
        if setting == "sampling.negative_prompt" and learned and config.sampling.negative_prompt:
            raise InputError(f"--{setting}: has no meaning with sampling.null_caption=learned, which takes its place")
        if setting == "sampling.chunk_frames" and not config.pairs.causal:
            raise InputError(f"--{setting}: has no meaning without pairs.causal=true; the clip is one chunk")


def check_pairs(config: OdePairsConfig) -> None:
    """Refuse settings that give no trajectories, or none that the student's steps could use.

    Raises:
        InputError: the first one found, by name, with what would be right.
    """
    pairs = config.pairs
    for name, value in (("num_steps", pairs.num_steps), ("shard_size", pairs.shard_size)):
        if value < 1:
            raise InputError(f"pairs.{name}={value}: must be at least 1")
    check_config(config)
    check_config(teacher_config(config))
    kept_steps(config)


def kept_steps(config: OdePairsConfig) -> tuple[int, ...]:
    """The teacher's steps, from 0 (noise) to num_steps (clean), whose states the student starts from.

    Raises:
        InputError: the teacher's grid does not pass through the student's noise levels.
    """
    schedule = FlowSchedule(config.scheduler.inference_flow_shift, config.scheduler.denoising_step_list)
    wanted = torch.cat([schedule.sigma(torch.tensor(schedule.steps)), torch.zeros(1, dtype=torch.float64)])
    grid = uniform_sigmas(config.pairs.shift, config.pairs.num_steps)
    steps = (grid[None] - wanted[:, None]).abs().argmin(dim=1)
    check_grid(grid[steps].tolist(), wanted.tolist())
    if len(set(steps.tolist())) < len(steps):
        raise InputError(
            f"scheduler.denoising_step_list={schedule.steps}: two of them are one step of the teacher's "
            f"{config.pairs.num_steps}; raise pairs.num_steps"
        )
    return tuple(steps.tolist())


def distinct_prompts(config: OdePairsConfig, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts without those that came before; what differs in length, size or seed cannot be in one data set.

    Raises:
        InputError: a line asks for another length, size or seed.
    """
    sampling = config.sampling
    size = (sampling.height, sampling.width)
    for prompt in prompts:
        for name, own, ours in (("seed", prompt.seed, sampling.seed), ("frames", prompt.frames, sampling.num_frames)):
            if own not in (None, ours):
                raise InputError(
                    f"line {prompt.line}: asks for {name} {own}; all trajectories have {ours}; remove the field"
                )
        if (prompt.height, prompt.width) != size:
            raise InputError(
                f"line {prompt.line}: asks for {prompt.height}x{prompt.width}; all trajectories are of one size, "
                f"{size[0]}x{size[1]}; remove the flag"
            )
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.text, prompt)
    if len(first) < len(prompts):
        log.info("%d of %d prompts came before and are left out", len(prompts) - len(first), len(prompts))
    return list(first.values())


def generate_pairs(config: OdePairsConfig, prompts: Sequence[Prompt], *, world: World, device: torch.device) -> None:
    """Write the trajectories of distinct prompts to `pairs.out`; every process calls this.

    Raises:
        InputError: the folder holds something else, or weights are missing or do not fit.
    """
    maker = _Maker(config, prompts, world, device)
    maker.run()


class _Maker:
    """One process's share of the trajectories."""

    def __init__(self, config: OdePairsConfig, prompts: Sequence[Prompt], world: World, device: torch.device) -> None:
        self.pipeline = VideoPipeline(teacher_config(config), device)
        self.config, self.prompts, self.world, self.device = config, prompts, world, device
        # tqdm's None: no bar where there is no terminal.
        self.no_bar = None if world.is_main else True
        self.keep = kept_steps(config)
        self.grid = uniform_sigmas(config.pairs.shift, config.pairs.num_steps).tolist()
        self.plan: ChunkPlan = self.pipeline.plan
        height, width = self.pipeline.geometry.latent_size(config.sampling.height, config.sampling.width)
        self.shape = (self.pipeline.geometry.channels, height, width)

    def run(self) -> None:
        config = self.config
        digests = self.world.broadcast(self._digests() if self.world.is_main else {})
        if isinstance(digests, InputError):
            raise digests
        channels, height, width = self.shape
        contents = Contents(
            kind=KIND,
            made_by=self._made_by(digests),
            shape=(len(self.keep), channels, self.plan.frames, height, width),
            dtype=config.pairs.dtype,
            count=len(self.prompts),
            shard_size=config.pairs.shard_size,
        )
        writer = ShardWriter(Path(config.pairs.out), contents, self.world, "--out")
        if writer.mine:
            self._write(writer)
        writer.finish()

    def _write(self, writer: ShardWriter) -> None:
        shards = {number: [self.prompts[row] for row in writer.contents.rows(number)] for number in writer.mine}
        prompts = [prompt for shard in shards.values() for prompt in shard]
        captions = self._encode(prompts)
        self.pipeline.load_model()
        size = self.config.sampling.bs
        with tqdm(total=len(prompts), desc="trajectories", unit="clip", disable=self.no_bar) as bar:
            for number, shard in shards.items():
                parts = []
                for batch in (shard[i : i + size] for i in range(0, len(shard), size)):
                    parts.append(self._sample(batch, [captions[prompt.text] for prompt in batch]))
                    bar.update(len(batch))
                writer.write(number, torch.cat(parts), [prompt.text for prompt in shard])
                log.info("%s: shard %d, %d trajectories", writer.folder, number, len(shard))

    def _encode(self, prompts: Sequence[Prompt]) -> dict[str, Caption]:
        """Captions by text. A method of its own: the encoder is gone when it returns."""
        with self.pipeline.text_encoder() as encoder:
            return {
                prompt.text: self.pipeline.encode(encoder, prompt)
                for prompt in tqdm(prompts, desc="captions", unit="prompt", disable=self.no_bar, leave=False)
            }

    def _sample(self, batch: Sequence[Prompt], captions: Sequence[Caption]) -> Tensor:
        """(B, S, C, T, H, W), on the host, in pairs.dtype."""
        try:
            chunks = trajectory(
                self.pipeline.model,
                self.pipeline.captions(captions),
                self.plan,
                sigmas=self.grid,
                keep=self.keep,
                cfg_scale=self.config.pairs.cfg_scale,
                shape=self.shape,
                rng=self.pipeline.noise(batch),
                device=self.device,
            )
            states = torch.cat(list(chunks), dim=3).to(DTYPES[self.config.pairs.dtype]).cpu()
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"{len(batch)} clips at a time do not fit in memory; lower sampling.bs, or sampling.num_frames, height "
                "and width"
            ) from error
        if not states.isfinite().all():
            raise FloatingPointError(
                f"line {batch[0].line}: states are not finite in {self.config.pairs.dtype}; check the weights, "
                "model.dtype and pairs.dtype"
            )
        return states

    def _digests(self) -> dict[str, str] | InputError:
        try:
            return {section: source_digest(self.config, section) for section in ("model", "text_encoder")}
        except InputError as error:
            return error

    def _made_by(self, digests: dict[str, str]) -> dict[str, Any]:
        """All that decides the states, by the settings' own names; where files lie and who makes them is no part."""
        config, pairs, sampling = self.config, self.config.pairs, self.config.sampling
        model, text = dataclasses.asdict(config.model), dataclasses.asdict(config.text_encoder)
        model |= dataclasses.asdict(config.model.architecture())
        model |= {"load_from": digests["model"], "dtype": _name(resolve_dtype(config.model.dtype, self.device))}
        text |= {"text_encoder_name": digests["text_encoder"]}
        text |= {"dtype": _name(resolve_dtype(config.text_encoder.dtype, self.device))}
        text |= {"chi_prompt": text_sha256(instruction_text(config.text_encoder.chi_prompt))}
        made_by: dict[str, Any] = {f"model.{name}": value for name, value in model.items()}
        made_by |= {f"text_encoder.{name}": value for name, value in text.items()}
        made_by |= {f"pairs.{name}": getattr(pairs, name) for name in ("num_steps", "shift", "cfg_scale", "causal")}
        names = ["num_frames", "height", "width", "seed", "motion_score", "high_motion", "unified_noise"]
        if pairs.cfg_scale != 1:
            names += ["null_caption"]
            if sampling.null_caption != "learned":
                made_by |= {"sampling.negative_prompt": negative_text(sampling.negative_prompt)}
        made_by |= {f"sampling.{name}": getattr(sampling, name) for name in names}
        texts = json.dumps([prompt.text for prompt in self.prompts])
        return made_by | {
            "chunks": self.plan.lengths,
            "prompts_sha256": hashlib.sha256(texts.encode()).hexdigest(),
            "steps": self.keep,
            SIGMAS: [self.grid[step] for step in self.keep],
        }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
