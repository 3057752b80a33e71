"""From noise to latents. Inference, validation and training rollouts all run `denoise_chunk` and `absorb`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from longsana.chunks import ChunkPlan
from longsana.flow.schedule import TIMESTEPS, FlowSchedule, euler_sigmas
from longsana.models.embeddings import Text
from longsana.runtime.clock import Clock
from longsana.sampling.noise import Noise
from longsana.state import CausalState


class Network(Protocol):
    """What a sampler needs of the network."""

    def __call__(
        self, x: Tensor, t: Tensor, text: Text, *, state: CausalState | None = None
    ) -> tuple[Tensor, CausalState]: ...


class StepEnd(Protocol):
    """Is told what a chunk is after each of its steps, counted from 0, and returns what to go on with."""

    def __call__(self, step: int, x: Tensor) -> Tensor: ...


def go_on(step: int, x: Tensor) -> Tensor:
    """The plain `StepEnd`."""
    return x


@dataclass(frozen=True)
class Chunk:
    """A finished stretch of video: latents (B, C, T, H, W) in float32, and the state that includes it.

    The many-step samplers give no state.
    """

    index: int
    start: int
    latents: Tensor
    state: CausalState | None


def denoise_chunk(
    model: Network,
    schedule: FlowSchedule,
    noise: Tensor,
    text: Text,
    state: CausalState | None,
    *,
    rng: Callable[[int], Tensor],
    exit_at: int | None = None,
    on_step: StepEnd = go_on,
) -> Tensor:
    """Clean latents of one chunk.

    Args:
        noise: (B, C, T, H, W), the initial noise.
        rng: step index to fresh noise like `noise`.
        exit_at: index of the step whose x0 is returned; None is the last. Only this step builds a graph.
        on_step: is shown what the next step starts from, and in the end x0.
    """
    last = len(schedule.steps) - 1 if exit_at is None else exit_at
    x = noise
    for i in range(last + 1):
        seen = timestep(schedule.seen_steps[i], x)
        with torch.set_grad_enabled(torch.is_grad_enabled() and i == last):
            velocity, _ = model(x, seen, text, state=state)
            x0 = schedule.to_x0(x, velocity, seen)
        if i < last:
            x = on_step(i, schedule.add_noise(x0, rng(i + 1), timestep(schedule.steps[i + 1], x)))
    return on_step(last, x0)


@torch.no_grad()
def absorb(model: Network, x0: Tensor, text: Text, state: CausalState | None) -> CausalState:
    """The state after clean latents x0: one pass at t = 0, its velocity dropped."""
    _, state = model(x0, timestep(0, x0), text, state=state)
    return state


@torch.no_grad()
def generate(
    model: Network,
    schedule: FlowSchedule,
    texts: Iterable[Text],
    plan: ChunkPlan,
    *,
    shape: tuple[int, int, int],
    rng: Noise,
    device: torch.device | str,
    state: CausalState | None = None,
    clock: Clock | None = None,
    on_step: StepEnd = go_on,
) -> Iterator[Chunk]:
    """Chunk after chunk of a video; nothing here grows with its length.

    Args:
        texts: the caption of each chunk.
        shape: (C, H, W) of a latent frame.
        state: continues the video this state has absorbed.
        clock: is told the time of the parts "denoise" and "absorb".
        on_step: see `denoise_chunk`.
    """
    clock = clock or Clock(device)

    def draw(step: int, *, chunk: int, start: int) -> Tensor:
        return rng.draw(start, step, (shape[0], plan.lengths[chunk], *shape[1:]), device)

    noise: Tensor | None = None
    for index, text in zip(range(len(plan)), texts, strict=True):
        start = state.frames if state is not None else 0
        own = partial(draw, chunk=index, start=start)
        with clock.part("denoise"):
            x0 = denoise_chunk(
                model, schedule, own(0) if noise is None else noise, text, state, rng=own, on_step=on_step
            )
        with clock.part("absorb"):
            state = absorb(model, x0, text, state)
        noise = None
        if index + 1 < len(plan):
            # Now: whoever takes this chunk waits for the GPU, which noise that is drawn after that would leave idle.
            with clock.part("denoise"):
                noise = draw(0, chunk=index + 1, start=state.frames)
        yield Chunk(index, start, x0, state)


@torch.no_grad()
def sample_clip(
    model: Network,
    text: Text,
    negative: Text | None,
    *,
    shift: float,
    steps: int,
    cfg_scale: float | Callable[[], float],
    noise: Tensor,
    clock: Clock | None = None,
    on_step: StepEnd = go_on,
) -> Iterator[Chunk]:
    """A whole clip at once with many Euler steps and classifier-free guidance: the bidirectional base model.

    noise: (B, C, T, H, W). negative: the caption to move away from; None (with cfg_scale 1) runs no second pass.
    """
    clock = clock or Clock(noise.device)
    with clock.part("denoise"):
        for x in euler_path(
            model,
            [text] if negative is None else [text, negative],
            sigmas=euler_sigmas(shift, steps).tolist(),
            cfg_scale=cfg_scale,
            noise=noise,
            on_step=on_step,
        ):
            clean = x
    yield Chunk(0, 0, clean, None)


@torch.no_grad()
def sample_chunks(
    model: Network,
    captions: Sequence[Text],
    plan: ChunkPlan,
    *,
    sigmas: Sequence[float],
    cfg_scale: float,
    shape: tuple[int, int, int],
    rng: Noise,
    device: torch.device | str,
    clock: Clock | None = None,
) -> Iterator[Chunk]:
    """Chunk after chunk with many Euler steps each and guidance: the block-causal base model. See `euler_path`."""
    start = 0
    for index, kept in enumerate(
        trajectory(
            model,
            captions,
            plan,
            sigmas=sigmas,
            keep=[len(sigmas) - 1],
            cfg_scale=cfg_scale,
            shape=shape,
            rng=rng,
            device=device,
            clock=clock,
        )
    ):
        yield Chunk(index, start, kept[:, 0], None)
        start += kept.shape[3]


@torch.no_grad()
def trajectory(
    model: Network,
    captions: Sequence[Text],
    plan: ChunkPlan,
    *,
    sigmas: Sequence[float],
    keep: Sequence[int],
    cfg_scale: float,
    shape: tuple[int, int, int],
    rng: Noise,
    device: torch.device | str,
    clock: Clock | None = None,
) -> Iterator[Tensor]:
    """For each chunk, (B, S, C, T, H, W) in float32: x at the levels `sigmas[k]`, k in `keep`, noisiest first.

    A chunk is denoised with the clean ones before it as its past. With guidance there are two pasts: each caption, the
    one to move away from too, has absorbed the chunks as its own.

    Args:
        plan: one chunk is the bidirectional model's clip.
        shape: (C, H, W) of a latent frame.
    """
    clock = clock or Clock(device)
    states: list[CausalState | None] = [None] * len(captions)
    for index, (start, length) in enumerate(zip(plan.starts, plan.lengths, strict=True)):
        noise = rng.draw(start, 0, (shape[0], length, *shape[1:]), device)
        kept = []
        with clock.part("denoise"):
            path = euler_path(model, captions, sigmas=sigmas, cfg_scale=cfg_scale, noise=noise, states=states)
            for step, x in enumerate(path):
                if step in keep:
                    kept.append(x)
        yield torch.stack(kept, dim=1)
        if index + 1 < len(plan):
            with clock.part("absorb"):
                states = [absorb(model, x, text, state) for text, state in zip(captions, states, strict=True)]


@torch.no_grad()
def euler_path(
    model: Network,
    captions: Sequence[Text],
    *,
    sigmas: Sequence[float],
    cfg_scale: float | Callable[[], float],
    noise: Tensor,
    states: Sequence[CausalState | None] | None = None,
    on_step: StepEnd = go_on,
) -> Iterator[Tensor]:
    """x at every one of `sigmas`, falling noise levels from 1: the noise first, the clean latents last.

    x' = x + (sigma' - sigma) v, with v = away + cfg_scale (toward - away).

    Args:
        captions: the caption, and with guidance the one to move away from; without it cfg_scale is not used.
        cfg_scale: may be asked for at each step.
        noise: (B, C, T, H, W).
        states: what each caption has absorbed of the video so far; None is nothing.
        on_step: is shown x after every step.
    """
    states = states or [None] * len(captions)
    x = noise
    yield x
    for step, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        t = timestep(sigma * TIMESTEPS, x)
        velocity, *away = (
            model(x, t, text, state=state)[0].float() for text, state in zip(captions, states, strict=True)
        )
        if away:
            scale = cfg_scale() if callable(cfg_scale) else cfg_scale
            velocity = away[0] + scale * (velocity - away[0])
        x = on_step(step, x + (following - sigma) * velocity)
        yield x


def timestep(t: float, x: Tensor) -> Tensor:
    return torch.full((x.shape[0],), t, dtype=torch.float32, device=x.device)
