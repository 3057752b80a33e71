"""Checks of what trajectories may be asked for that need no network, made before anything is loaded."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import torch

from longsana.config import InferenceConfig
from longsana.data.prompts import Prompt
from longsana.data.trajectories import check_grid
from longsana.flow.schedule import FlowSchedule, uniform_sigmas
from longsana.runtime.errors import InputError
from longsana.sampling.checks import check_config, check_no_first_chunk, check_no_memory
from longsana.training.config import OdePairsConfig

log = logging.getLogger(__name__)

USED = ("model", "text_encoder")
"""Sections whose weights are used."""
INSTEAD = {
    **dict.fromkeys(("scheduler.sampling_algo", "scheduler.vis_sampler", "sampling_algo"), "pairs.causal"),
    "scheduler.num_inference_steps": "pairs.num_steps",
    "scheduler.interval_k": "nothing: a chunk begins when the one before is clean",
    "scheduler.bf16_timesteps": "nothing: the teacher's timesteps are never rounded",
    "scheduler.absorb": "nothing: the teacher absorbs clean chunks",
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
    check_config(config)
    check_config(teacher_config(config))
    check_no_first_chunk(config)
    check_no_memory(config)
    kept_steps(config)


def kept_steps(config: OdePairsConfig) -> tuple[int, ...]:
    """The teacher's steps, from 0 (noise) to num_steps (clean), whose states the student starts from.

    Raises:
        InputError: the teacher's grid does not pass through the student's noise levels.
    """
    schedule = FlowSchedule.from_config(config.scheduler)
    levels = schedule.sigma(torch.tensor(schedule.steps, dtype=torch.int64, device="cpu"))
    wanted = torch.cat([levels, levels.new_zeros(1)])
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
