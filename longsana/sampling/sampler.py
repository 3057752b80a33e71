"""Samplers, from noise to latents. Inference, validation and training rollouts all run `generate`."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from longsana.chunks import ChunkPlan
from longsana.data.story import Change
from longsana.flow.noise import Noise
from longsana.flow.schedule import FlowSchedule
from longsana.flow.solvers import Euler, Solver
from longsana.models.embeddings import Text
from longsana.runtime.clock import Clock
from longsana.runtime.later import Later
from longsana.sampling.recent import Holds, Recent, each_of_state
from longsana.state import CausalState


class Network(Protocol):
    """A network for a sampler."""

    def __call__(
        self, x: Tensor, t: Tensor, text: Text, *, state: CausalState | None = None
    ) -> tuple[Tensor, CausalState]: ...


class ChunkedNetwork(Protocol):
    """A network for a sampler of several chunks at once."""

    def __call__(
        self, x: Tensor, t: Tensor, text: Text, *, plan: ChunkPlan | None = None, state: CausalState | None = None
    ) -> tuple[Tensor, CausalState]: ...


class StepEnd(Protocol):
    """Is told what a chunk is after each of its steps, counted from 0, and returns what to go on with."""

    def __call__(self, step: int, x: Tensor) -> Tensor: ...


def go_on(step: int, x: Tensor) -> Tensor:
    """Go on with x, of any shape: the plain `StepEnd`."""
    return x


@dataclass(frozen=True)
class Chunk:
    """A finished stretch of video: latents (B, C, T, H, W) in float32, and the state that includes it.

    absorbed: makes the state, by the pass for which the latents do not wait, if it takes one. The many-step samplers
        give none.
    """

    index: int
    start: int
    latents: Tensor
    absorbed: Later[CausalState | None] | None = None

    @property
    def state(self) -> CausalState | None:
        return None if self.absorbed is None else self.absorbed()


def denoise_chunk(
    model: Network,
    schedule: FlowSchedule,
    noise: Tensor,
    text: Text,
    state: CausalState | None,
    *,
    rng: Callable[[int], Tensor],
    first: Tensor | None = None,
    exit_at: int | None = None,
    on_step: StepEnd = go_on,
) -> tuple[Tensor, CausalState | None]:
    """Denoise one chunk: its clean latents, and the state that its last step makes, if `schedule.absorb` takes it so.

    Args:
        noise: (B, C, T, H, W), the initial noise.
        rng: step index to fresh noise like `noise`.
        first: see `solve`; a chunk of one latent is it, without a step or a state.
        exit_at: index of the step whose x0 is returned; None is the last. Only this step builds a graph.
        on_step: is shown what the next step starts from, and in the end x0.
    """
    if first is not None and noise.shape[2] == 1:
        return first, None
    final = len(schedule.steps) - 1
    last, after = final if exit_at is None else exit_at, None
    x = begun_with(first, noise)
    for i in range(last + 1):
        seen = timestep(schedule.seen_steps[i], x)
        with torch.set_grad_enabled(torch.is_grad_enabled() and i == last):
            velocity, after = model(x, seen if first is None else after_clean(seen, x), text, state=state)
            x0 = begun_with(first, schedule.to_x0(x, velocity, seen))
        if i < last:
            x = begun_with(first, on_step(i, schedule.add_noise(x0, rng(i + 1), timestep(schedule.steps[i + 1], x))))
    return begun_with(first, on_step(last, x0)), after if schedule.absorb == "last_step" and last == final else None


@torch.no_grad()
def absorb(model: Network, x0: Tensor, text: Text, state: CausalState | None) -> CausalState:
    """The state after clean latents x0 (B, C, T, H, W): one pass at t = 0, its velocity dropped."""
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
    changes: Mapping[int, Change] | None = None,
    recent: Holds | None = None,
    first: Tensor | Mapping[int, Tensor] | None = None,
    apart: bool = False,
    clock: Clock | None = None,
    on_step: StepEnd = go_on,
    exits: Sequence[int] | None = None,
    learned_from: int | None = None,
    absorb_last: bool = True,
    noisy_absorb: bool = False,
) -> Iterator[Chunk]:
    """Chunk after chunk of a video; nothing grows with its length. The last four arguments are training's.

    A chunk is given before it is absorbed: whoever takes it may show it first, or ask for its state at once. If nobody
    has asked until the next chunk is asked for, it is absorbed then.

    Args:
        texts: the caption of each chunk. shape: (C, H, W) of a latent frame. state: of the video that goes on.
        changes: of the past, by the chunk of the plan before which each happens.
        recent: holds the video's last chunks, and what was held of those before this plan's; None: what `changes` need.
        first: (B, C, 1, H, W), of a picture that the plan begins with; or of several, by the chunk that each begins.
        apart: such a latent is absorbed by itself, before the others of its chunk; False: it is in each of their steps.
        clock: is told the time of the parts "denoise" and "absorb"; on_step: see `denoise_chunk`.
        exits: index of the step at which each chunk ends; None: all take all steps. See `denoise_chunk`.
        learned_from: chunks, not states, that end after this frame of the plan have a graph, of their exit step.
        absorb_last: False: the state of the last chunk is the one before it, for a video that nobody goes on with.
        noisy_absorb: absorb chunks with noise of the table's least sigma, 0.007, as published training did.
    """
    clock, changes = clock or Clock(device), changes or {}
    recent = Recent(changes.values(), max(plan.lengths)) if recent is None else recent
    begun = _Begun({0: first} if isinstance(first, Tensor) else first or {}, plan, apart)
    draw = partial(begun.draw, rng, shape, device)
    take_in = partial(_take_in, model, schedule, recent, rng if noisy_absorb else None)
    noise: Tensor | None = None
    for index, text in zip(range(len(plan)), texts, strict=True):
        start, last, alone = 0 if state is None else state.frames, index + 1 == len(plan), begun.alone(index)
        own, exit_at = partial(draw, index, start), None if exits is None else exits[index]
        learned = learned_from is not None and plan.starts[index] + plan.lengths[index] > learned_from
        with clock.part("absorb"):
            state = recent.begin(changes.get(index), state, partial(absorb, model, text=text))
        state = take_in(begun.pictures[index], text, state, clock=clock) if alone else state
        with clock.part("denoise"), torch.set_grad_enabled(learned):
            noise = own(0) if noise is None else noise
            how = begun.how(index, on_step) | {"rng": own, "exit_at": exit_at}
            x0, after = denoise_chunk(model, schedule, noise, text, state, **how)
        # Before the chunk is given: whoever takes it waits for the GPU, which would idle while noise is drawn then.
        with clock.part("denoise"):
            noise = None if last else draw(index + 1, start + plan.lengths[index], 0)
        absorbed: Later[CausalState | None] = Later(
            partial(take_in, x0, text, state, after=after, joins=alone, clock=clock)
            if absorb_last or not last
            else partial(_as_it_is, state)
        )
        state = after = None  # what absorbs holds it, and lets go of it then
        yield Chunk(index, start, begun.whole(index, x0), absorbed)
        state = absorbed()


def _as_it_is(state: CausalState | None) -> CausalState | None:
    return state


@torch.no_grad()
def _take_in(
    model: Network,
    schedule: FlowSchedule,
    recent: Holds,
    noise: Noise | None,
    x0: Tensor,
    text: Text,
    state: CausalState | None,
    *,
    clock: Clock,
    after: CausalState | None = None,
    joins: bool = False,
) -> CausalState:
    """The state after x0 (B, C, T, H, W), which is held.

    noise: of nearly clean latents; after: the state, where a step has made it; joins: see `Recent.keep`.
    """
    with clock.part("absorb"):
        clean = x0.detach()
        if after is not None:
            return recent.keep(clean, state, each_of_state(after, lambda tensor, batch: tensor.detach()), joins=joins)
        if noise is not None:
            fresh = noise.draw(0 if state is None else state.frames, len(schedule.steps), clean.shape[1:], clean.device)
            clean = schedule.add_noise(clean, fresh, timestep(0, clean))
        return recent.keep(clean, state, absorb(model, clean, text, state), joins=joins)


@dataclass(frozen=True)
class _Begun:
    """Pictures that chunks of a plan begin with: latents (B, C, 1, H, W), by chunk. apart: see `generate`."""

    pictures: Mapping[int, Tensor]
    plan: ChunkPlan
    apart: bool

    def alone(self, chunk: int) -> bool:
        """Tell whether a chunk's first latent is absorbed by itself before the others."""
        return self.apart and chunk in self.pictures and self.plan.lengths[chunk] > 1

    def draw(
        self, rng: Noise, shape: Sequence[int], device: torch.device | str, chunk: int, start: int, step: int
    ) -> Tensor:
        """Noise (B, C, T, H, W) of the latents of a chunk that are denoised; `start` is the chunk's first one."""
        own, (channels, *size) = int(self.alone(chunk)), shape
        return rng.draw(start + own, step, (channels, self.plan.lengths[chunk] - own, *size), device)

    def whole(self, chunk: int, x: Tensor) -> Tensor:
        """Put a chunk's picture before its latents x that are denoised: (B, C, T, H, W)."""
        return torch.cat([self.pictures[chunk], x], dim=2) if self.alone(chunk) else x

    def how(self, chunk: int, on_step: StepEnd) -> dict[str, Any]:
        """Arguments of `denoise_chunk`; `on_step` is shown the whole chunk."""
        if not self.alone(chunk):
            return {"first": self.pictures.get(chunk), "on_step": on_step}
        return {"on_step": lambda step, x: on_step(step, self.whole(chunk, x))[:, :, 1:]}


@torch.no_grad()
def sample_clip(
    model: Network,
    captions: Sequence[Text],
    *,
    solver: Solver,
    cfg_scale: float | Callable[[], float],
    noise: Tensor,
    first: Tensor | None = None,
    clock: Clock | None = None,
    on_step: StepEnd = go_on,
) -> Iterator[Chunk]:
    """A whole clip at once with many steps and classifier-free guidance: the bidirectional base model.

    captions: the caption, and with guidance the negative one. noise: (B, C, T, H, W). first: see `solve`.
    """
    clock = clock or Clock(noise.device)
    with clock.part("denoise"):
        path = solve(model, captions, solver=solver, cfg_scale=cfg_scale, noise=noise, first=first, on_step=on_step)
        for x in path:
            clean = x
    yield Chunk(0, 0, clean)


@dataclass
class _InProgress:
    """A chunk that is being denoised: its index and first frame, x, and the steps it has done."""

    index: int
    start: int
    x: Tensor
    done: int = 0


@torch.no_grad()
def sample_chunks(
    model: ChunkedNetwork,
    captions: Sequence[Text],
    plan: ChunkPlan,
    *,
    sigmas: Sequence[float],
    interval: float,
    cfg_scale: float,
    shape: tuple[int, int, int],
    rng: Noise,
    device: torch.device | str,
    clock: Clock | None = None,
) -> Iterator[Chunk]:
    """Chunks with many Euler steps each and guidance, staggered: the block-causal base model (method.md 4.3).

    A chunk begins when the one before has done the share `interval` of its steps, so that about 1 / interval chunks are
    in progress; with 1 they come one after another, with 0 all at once. Each sees those before it as noisy as they
    are, and finished ones through the state. With guidance there are two states: the caption and the
    negative one have each absorbed the chunks as their own.

    Args:
        captions: the caption, and with guidance the negative one.
        sigmas: falling noise levels of a chunk, from 1 to 0.
        interval: in [0, 1].
        shape: (C, H, W) of a latent frame.
    """
    clock = clock or Clock(device)
    euler = Euler(sigmas)
    steps = len(euler.timesteps)
    lead = math.ceil(round(interval * steps, 6))  # rounded first: 0.07 * 100 is a little more than 7
    states: list[CausalState | None] = [None] * len(captions)
    waiting = deque(enumerate(zip(plan.starts, plan.lengths, strict=True)))
    active: deque[_InProgress] = deque()
    while waiting or active:
        with clock.part("denoise"):
            while waiting and (not active or active[-1].done >= lead):
                index, (start, length) = waiting.popleft()
                active.append(_InProgress(index, start, rng.draw(start, 0, (shape[0], length, *shape[1:]), device)))
            lengths = [chunk.x.shape[2] for chunk in active]
            times = [timestep(euler.timesteps[chunk.done], chunk.x) for chunk in active]
            x, t, network = torch.cat([chunk.x for chunk in active], dim=2), times[0], model
            if len(active) > 1:
                t, network = per_chunk(times, lengths), partial(model, plan=ChunkPlan(tuple(lengths)))
            velocity = guided_velocity(network, x, t, captions, states, cfg_scale)
            for chunk, own in zip(active, velocity.split(lengths, dim=2), strict=True):
                chunk.x = euler.step(chunk.done, own, chunk.x)
                chunk.done += 1
        while active and active[0].done == steps:
            finished = active.popleft()
            if waiting or active:
                with clock.part("absorb"):
                    states = [absorb(model, finished.x, *pair) for pair in zip(captions, states, strict=True)]
            yield Chunk(finished.index, finished.start, finished.x)


def per_chunk(times: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    """(B, T): the timesteps (B,) of each chunk, for each of its latent frames."""
    return torch.cat([t[:, None].expand(-1, length) for t, length in zip(times, lengths, strict=True)], dim=1)


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
    """Yield for each chunk (B, S, C, T, H, W) in float32: x at the levels `sigmas[k]`, k in `keep`, noisiest first.

    A chunk is denoised with the clean ones before it as its past. With guidance there are two pasts: the caption and
    the negative one have each absorbed the chunks as their own.

    Args:
        plan: one chunk is the bidirectional model's clip.
        shape: (C, H, W) of a latent frame.
    """
    clock, euler = clock or Clock(device), Euler(sigmas)
    states: list[CausalState | None] = [None] * len(captions)
    for index, (start, length) in enumerate(zip(plan.starts, plan.lengths, strict=True)):
        noise = rng.draw(start, 0, (shape[0], length, *shape[1:]), device)
        kept = []
        with clock.part("denoise"):
            path = solve(model, captions, solver=euler, cfg_scale=cfg_scale, noise=noise, states=states)
            for step, x in enumerate(path):
                if step in keep:
                    kept.append(x)
        yield torch.stack(kept, dim=1)
        if index + 1 < len(plan):
            with clock.part("absorb"):
                states = [absorb(model, x, text, state) for text, state in zip(captions, states, strict=True)]


@torch.no_grad()
def solve(
    model: Network,
    captions: Sequence[Text],
    *,
    solver: Solver,
    cfg_scale: float | Callable[[], float],
    noise: Tensor,
    first: Tensor | None = None,
    states: Sequence[CausalState | None] | None = None,
    on_step: StepEnd = go_on,
) -> Iterator[Tensor]:
    """x before the solver's first step and after each of them: the noise first, the clean latents last.

    Args:
        captions: the caption, and with guidance the negative one; without it cfg_scale is not used.
        cfg_scale: may be asked for at each step.
        noise: (B, C, T, H, W).
        first: (B, C, 1, H, W), the clean first latent, of a picture: it stands in the noise's place before every step
            and after it, and its timestep is 0; None: the first latent is sampled as the others are.
        states: what each caption has absorbed of the video so far; None is nothing.
        on_step: is shown x after every step.
    """
    states = states or [None] * len(captions)
    x = begun_with(first, noise)
    yield x
    for step, t in enumerate(solver.timesteps):
        scale = cfg_scale() if callable(cfg_scale) else cfg_scale
        times = timestep(t, x) if first is None else after_clean(timestep(t, x), x)
        velocity = guided_velocity(model, x, times, captions, states, scale)
        x = begun_with(first, on_step(step, solver.step(step, velocity, x)))
        yield x


def after_clean(t: Tensor, x: Tensor) -> Tensor:
    """(B, T): timesteps of the latent frames of x (B, C, T, H, W), t (B,) of all but the first, which is clean."""
    times = t[:, None].repeat(1, x.shape[2])
    times[:, 0] = 0
    return times


def begun_with(first: Tensor | None, x: Tensor) -> Tensor:
    """x (B, C, T, H, W) with the latents `first` (B, C, 1, H, W) at its beginning; as it is where there are none."""
    return x if first is None else torch.cat([first, x[:, :, 1:]], dim=2)


def guided_velocity(
    model: Network,
    x: Tensor,
    t: Tensor,
    captions: Sequence[Text],
    states: Sequence[CausalState | None],
    cfg_scale: float,
) -> Tensor:
    """(B, C, T, H, W), float32: v = v_negative + cfg_scale (v_caption - v_negative); v_caption alone where there is no
    negative caption.

    x, t: see `LongSanaDiT.forward`. captions, states: of the caption, and of the negative one.
    """
    velocity, *negative = (
        model(x, t, text, state=state)[0].float() for text, state in zip(captions, states, strict=True)
    )
    return negative[0] + cfg_scale * (velocity - negative[0]) if negative else velocity


def timestep(t: float, x: Tensor) -> Tensor:
    """(B,), float32: t for each video of x (B, ...)."""
    return torch.full((x.shape[0],), t, dtype=torch.float32, device=x.device)
