"""From noise to latents: what the network is fed, in which order, and what is kept."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from longsana.chunks import ChunkPlan
from longsana.data.story import Change
from longsana.flow.noise import PromptNoise
from longsana.flow.schedule import FlowSchedule, euler_sigmas, uniform_sigmas
from longsana.flow.solvers import DPMSolver, Euler
from longsana.models.dit import LongSanaDiT
from longsana.models.embeddings import TextEmbedding, null_embedding
from longsana.runtime.errors import InputError
from longsana.sampling.sampler import (
    Chunk,
    absorb,
    denoise_chunk,
    generate,
    sample_chunks,
    sample_clip,
    solve,
    trajectory,
)
from longsana.state import CausalState
from tests.models import naive

SHAPE = (4, 4, 6)
SCHEDULE = FlowSchedule(7.0)
PROMPTS = (("a red ball", 0), ("a blue box", 0))


class Recorder:
    """A network that notes what it is fed and what it answers."""

    def __init__(self, model: Callable[..., tuple[Tensor, CausalState]]) -> None:
        self.model = model
        self.calls: list[SimpleNamespace] = []

    def __call__(
        self, x: Tensor, t: Tensor, text: TextEmbedding, *, state: CausalState | None = None
    ) -> tuple[Tensor, CausalState]:
        velocity, after = self.model(x, t, text, state=state)
        frames = 0 if state is None else state.frames
        self.calls.append(SimpleNamespace(t=t, frames=frames, text=text, grad=velocity.requires_grad))
        return velocity, after


@pytest.fixture
def model(small_config, random_model) -> LongSanaDiT:
    return random_model(small_config())


@pytest.fixture
def run(random_text) -> Callable[..., list[Chunk]]:
    """`run(model, lengths)`: all chunks of a video."""

    def build(
        network: Callable[..., tuple[Tensor, CausalState]],
        lengths: tuple[int, ...],
        *,
        prompts: tuple[tuple[str, int], ...] = PROMPTS,
        text: TextEmbedding | None = None,
        schedule: FlowSchedule = SCHEDULE,
        state: CausalState | None = None,
    ) -> list[Chunk]:
        texts = itertools.repeat(text or random_text(len(prompts)), len(lengths))
        rng = PromptNoise(3, prompts)
        return list(
            generate(network, schedule, texts, ChunkPlan(lengths), shape=SHAPE, rng=rng, device="cpu", state=state)
        )

    return build


# The sampler of few steps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [-1, 1])
def test_generate_is_the_published_loop(small_config, random_model, renamed, random_text, run, window):
    """Facts 3.3 by hand: four denoising passes and one that writes the cache, with the naive float64 network."""
    model, text = random_model(small_config(num_cached_blocks=window)), random_text(2)
    network = partial(naive.forward, renamed(model, "upstream"), head_dim=28, cross_heads=4)
    table = [7 * s / (1 + 6 * s) for s in (1 - k / 1000 for k in range(1000))]

    def sigma(t: int) -> float:
        return min(table, key=lambda level: abs(1000 * level - t))

    rng, steps, lengths = PromptNoise(3, PROMPTS), (1000, 960, 889, 727), (4, 3, 3)
    entries, start, expected = [], 0, []
    for frames in lengths:
        cache = naive.accumulate(entries, window)
        x = rng.draw(start, 0, (4, frames, 4, 6), "cpu").double()
        for i, t in enumerate(steps):
            velocity, _ = network(x, torch.full((2,), t), text.tokens, text.mask, start=start, cache=cache)
            x0 = x - sigma(t) * velocity
            if i < 3:
                level = sigma(steps[i + 1])
                x = (1 - level) * x0 + level * rng.draw(start, i + 1, (4, frames, 4, 6), "cpu").double()
        _, entry = network(x0, torch.zeros(2), text.tokens, text.mask, start=start, cache=cache)
        entries.append(entry)
        expected.append(x0)
        start += frames

    chunks = run(model, lengths)
    assert [(chunk.index, chunk.start) for chunk in chunks] == [(0, 0), (1, 4), (2, 7)]
    for chunk, latents in zip(chunks, expected, strict=True):
        assert chunk.latents.dtype == torch.float32
        assert float((chunk.latents - latents).abs().max()) < 1e-5
    assert chunks[-1].state.frames == 10


@pytest.mark.parametrize(
    ("bf16", "seen"), [(False, [1000, 960, 889, 727, 0]), (True, [1000, 960, 888, 728, 0])], ids=["exact", "bf16"]
)
def test_five_passes_for_each_chunk(model, run, bf16, seen):
    network = Recorder(model)
    run(network, (3, 2, 2), schedule=FlowSchedule(7.0, (1000, 960, 889, 727, 0), bf16_timesteps=bf16))
    assert [call.t.tolist() for call in network.calls] == [[t, t] for t in seen] * 3
    assert [call.frames for call in network.calls] == [0] * 5 + [3] * 5 + [5] * 5


def test_rounded_timesteps_change_the_conversion_and_not_the_noise():
    """As published: the network and x0 see 888, the noise that leads there is that of 889."""
    fed: list[Tensor] = []

    def network(x: Tensor, t: Tensor, text: object, *, state: object = None) -> tuple[Tensor, None]:
        fed.append(x)
        return torch.ones_like(x), None

    noise, zero = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64), torch.tensor([889])
    schedule = FlowSchedule(7.0, (1000, 889), bf16_timesteps=True)
    x0, _ = denoise_chunk(network, schedule, noise, None, None, rng=lambda step: noise)
    assert float(fed[1]) == pytest.approx(float(schedule.sigma(zero)))  # x0 of step 1 is 1 - 1
    assert float(x0) == pytest.approx(float(fed[1]) - float(schedule.sigma(torch.tensor([888]))))


def test_the_last_step_gives_the_state(model, random_text):
    """One pass less a chunk: the next one goes on from what that step has seen."""
    text, lengths, schedule = random_text(2), (3, 2, 4), FlowSchedule(7.0, (1000, 889), absorb="last_step")
    network, rng, state, start = Recorder(model), PromptNoise(3, PROMPTS), None, 0
    texts = itertools.repeat(text, len(lengths))
    made = generate(network, schedule, texts, ChunkPlan(lengths), shape=SHAPE, rng=rng, device="cpu")
    for chunk, frames in zip(made, lengths, strict=True):
        noises = [rng.draw(start, step, (SHAPE[0], frames, *SHAPE[1:]), "cpu") for step in range(2)]
        times = [torch.full((2,), float(step)) for step in schedule.steps]
        first = schedule.to_x0(noises[0], model(noises[0], times[0], text, state=state)[0], times[0])
        x = schedule.add_noise(first, noises[1], times[1])
        velocity, state = model(x, times[1], text, state=state)
        assert torch.equal(chunk.latents, schedule.to_x0(x, velocity, times[1]))
        assert chunk.state is not None and chunk.state[3:] == state[3:]
        assert all(torch.equal(own, part) for own, part in zip(chunk.state[:3], state[:3], strict=True))
        start += frames
    assert len(network.calls) == 2 * len(lengths)


@pytest.mark.parametrize("image_first", ["absorb", "pin"])
def test_what_took_no_last_step_is_absorbed_clean(model, random_text, image_first):
    """A picture by itself, chunks that are absorbed again, and those that training ends at an earlier step."""
    schedule, rng = FlowSchedule(7.0, (1000, 889), absorb="last_step"), PromptNoise(3, PROMPTS)
    picture = torch.randn(2, SHAPE[0], 1, *SHAPE[1:])
    plan = ChunkPlan.with_picture(9, 3, image_first)

    def passes(**settings) -> list[int]:
        network = Recorder(model)
        texts = itertools.repeat(random_text(2), len(plan))
        chunks = list(generate(network, schedule, texts, plan, shape=SHAPE, rng=rng, device="cpu", **settings))
        assert not any(part.requires_grad for chunk in chunks for part in chunk.state[:3])
        return [int(call.t.max()) for call in network.calls]

    alone = [0] if image_first == "absorb" else []
    rest = len(plan) - len(alone)
    assert passes(first=picture) == alone + [1000, 889] * rest
    again = passes(first=picture, changes={len(plan) - 1: Change.parse("recache=1")})
    assert again == alone + [1000, 889] * (rest - 1) + [0] + [1000, 889]
    exits = [*([0] * len(alone)), *([0, 1, 0, 1][:rest])]
    with torch.enable_grad():
        trained = passes(first=picture, exits=exits, learned_from=0)
    assert trained == alone + [t for end in exits[len(alone) :] for t in ([1000, 889] if end else [1000, 0])]


@pytest.mark.parametrize("exit_at", [0, 1, 3, None])
def test_exit_at_returns_that_step_and_builds_one_graph(model, random_text, exit_at):
    text, rng = random_text(2), PromptNoise(3, PROMPTS)
    draw = partial(rng.draw, 0, shape=(4, 3, 4, 6), device="cpu")
    answers: list[Tensor] = []
    network = Recorder(model)

    class Schedule(FlowSchedule):
        def to_x0(self, x: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
            answers.append(super().to_x0(x, velocity, t))
            return answers[-1]

    with torch.no_grad():
        denoise_chunk(model, Schedule(7.0), draw(0), text, None, rng=draw)
    x0, _ = denoise_chunk(network, SCHEDULE, draw(0), text, None, rng=draw, exit_at=exit_at)

    last = 3 if exit_at is None else exit_at
    assert torch.equal(x0, answers[last])
    assert [call.grad for call in network.calls] == [False] * last + [True]
    x0.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_no_graph_where_gradients_are_off(model, random_text, run):
    network = Recorder(model)
    chunks = run(network, (2, 2))
    assert not any(call.grad for call in network.calls)
    assert not any(part.requires_grad for chunk in chunks for part in (chunk.latents, *chunk.state[:3]))
    state = absorb(model, torch.zeros(2, *SHAPE[:1], 2, *SHAPE[1:]), random_text(2), None)
    assert not state.kv.requires_grad
    assert torch.is_grad_enabled()


def test_absorb_takes_the_clean_latents_at_time_zero(model, random_text, random_latents):
    x0, text, network = random_latents(2, 3), random_text(2), Recorder(model)
    state = absorb(network, x0, text, model.empty_state(2, 4, 6, frames=8))
    _, expected = model(x0, torch.zeros(2), text, state=model.empty_state(2, 4, 6, frames=8))
    assert [call.t.tolist() for call in network.calls] == [[0, 0]]
    assert all(torch.equal(a, b) for a, b in zip(state[:3], expected[:3], strict=True))
    assert state.frames == 11


def test_continuing_from_a_state_is_one_run(model, run):
    whole = run(model, (4, 3, 2, 2))
    first = run(model, (4, 3))
    second = run(model, (2, 2), state=first[-1].state)
    for a, b in zip(whole, first + second, strict=True):
        assert a.start == b.start
        assert torch.equal(a.latents, b.latents)
    assert all(torch.equal(a, b) for a, b in zip(whole[-1].state[:3], second[-1].state[:3], strict=True))


def test_a_prompt_gives_one_video_whatever_it_is_sampled_with(model, random_text, run):
    text = random_text(2)
    together = run(model, (3, 2))
    for i in range(2):
        own = TextEmbedding(text.tokens[i : i + 1], text.mask[i : i + 1])
        alone = run(model, (3, 2), prompts=PROMPTS[i : i + 1], text=own)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a.latents[i : i + 1], b.latents, rtol=0, atol=1e-5)


def test_each_chunk_may_have_its_own_caption(model, random_text):
    network, texts = Recorder(model), [random_text(2, seed=seed) for seed in (1, 2, 3)]
    plan, rng = ChunkPlan((3, 2, 2)), PromptNoise(3, PROMPTS)
    list(generate(network, SCHEDULE, iter(texts), plan, shape=SHAPE, rng=rng, device="cpu"))
    assert all(call.text is texts[i // 5] for i, call in enumerate(network.calls))


@pytest.mark.parametrize("captions", [1, 3])
def test_captions_must_match_the_chunks(model, random_text, captions):
    texts, rng = [random_text(2)] * captions, PromptNoise(3, PROMPTS)
    with pytest.raises(ValueError, match="zip"):
        list(generate(model, SCHEDULE, texts, ChunkPlan((2, 2)), shape=SHAPE, rng=rng, device="cpu"))


def test_generate_keeps_nothing_of_earlier_chunks(model, random_text):
    """Not the latents, not the states, not the noise but the next chunk's first: a video of any length fits."""
    noises: list[weakref.ref[Tensor]] = []

    class WatchedNoise(PromptNoise):
        def draw(self, *args: object, **kwargs: object) -> Tensor:
            noise = super().draw(*args, **kwargs)
            noises.append(weakref.ref(noise))
            return noise

    texts, rng, earlier = itertools.repeat(random_text(2), 4), WatchedNoise(3, PROMPTS), []
    for chunk in generate(model, SCHEDULE, texts, ChunkPlan((2, 2, 2, 2)), shape=SHAPE, rng=rng, device="cpu"):
        assert chunk.state is not None  # until now the one before it is needed
        gc.collect()
        assert not any(ref() is not None for ref in earlier)
        following = noises[-1:] if chunk.index < 3 else []
        assert [ref for ref in noises if ref() is not None] == following
        earlier = [weakref.ref(part) for part in (chunk.latents, *chunk.state[:3])]
        assert chunk.latents.untyped_storage().nbytes() == chunk.latents.nbytes
        del chunk
    assert len(noises) == 16


@pytest.mark.parametrize("sampler", [generate, sample_clip])
def test_what_a_step_ends_with_goes_on(sampler, small_config, random_model, random_text):
    """on_step is told of every step; what it returns is the next one's input, and in the end the result."""
    model, text = random_model(small_config(), torch.float32), random_text(2)
    noise, passes, seen = PromptNoise(3, PROMPTS), [], []

    def network(x, t, text, *, state=None):
        passes.append(x)
        return model(x, t, text, state=state)

    def on_step(step: int, x: Tensor) -> Tensor:
        seen.append((step, x + 1))
        return seen[-1][1]

    if sampler is generate:
        plan = ChunkPlan((2, 2))
        chunks = list(
            generate(network, SCHEDULE, [text] * 2, plan, shape=SHAPE, rng=noise, device="cpu", on_step=on_step)
        )
        absorbed = passes[4::5]  # a chunk's fifth pass
        assert all(torch.equal(a, chunk.latents) for a, chunk in zip(absorbed, chunks, strict=True))
        del passes[4::5]
    else:
        begin = noise.draw(0, 0, (SHAPE[0], 2, *SHAPE[1:]), "cpu")
        chunks = list(
            sample_clip(network, [text], solver=Euler.shifted(8, 4), cfg_scale=1, noise=begin, on_step=on_step)
        )
    assert [step for step, _ in seen] == [0, 1, 2, 3] * len(chunks)
    for number, chunk in enumerate(chunks):
        own = [x for _, x in seen[4 * number : 4 * number + 4]]
        assert chunk.latents is own[3]
        assert all(a is b for a, b in zip(own, passes[4 * number + 1 : 4 * number + 4], strict=False))


# Noise ----------------------------------------------------------------------------------------------------------------


def draw(seed: int = 3, prompts: tuple[tuple[str, int], ...] = PROMPTS, start: int = 0, step: int = 0) -> Tensor:
    return PromptNoise(seed, prompts).draw(start, step, (4, 2, 4, 6), "cpu")


def test_noise_is_its_own_whatever_the_batch():
    both = draw()
    assert both.shape == (2, 4, 2, 4, 6)
    assert both.dtype == torch.float32
    torch.manual_seed(0)
    assert torch.equal(draw(), both), "not from the global generator"
    assert torch.equal(draw(prompts=PROMPTS[:1]), both[:1])
    assert torch.equal(draw(prompts=PROMPTS[::-1]), both.flip(0))
    assert torch.equal(draw(prompts=(("x", 0), *PROMPTS)), torch.cat([draw(prompts=(("x", 0),)), both]))


def test_a_seed_for_each_sample():
    both = PromptNoise([3, 4], PROMPTS).draw(0, 0, (4, 2, 4, 6), "cpu")
    assert torch.equal(both, torch.cat([draw(3, PROMPTS[:1]), draw(4, PROMPTS[1:])]))


def test_noise_of_different_things_is_different():
    changes = {
        "itself": {},
        "seed": {"seed": 4},
        "chunk": {"start": 1},
        "step": {"step": 1},
        "text": {"prompts": (("a red cube", 0),)},
        "repetition": {"prompts": (("a red ball", 1),)},
        "chunk 1, step 12": {"start": 1, "step": 12},
        "chunk 11, step 2": {"start": 11, "step": 2},
        "repetition 1 in the text": {"prompts": (("a red ball1", 0),)},
    }
    draws = {name: draw(**{"prompts": PROMPTS[:1], **change}).flatten() for name, change in changes.items()}
    for (name, a), (other, b) in itertools.combinations(draws.items(), 2):
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.35, f"{name} and {other}"


def test_noise_is_standard_normal():
    noise = PromptNoise(0, PROMPTS).draw(0, 0, (16, 10, 30, 30), "cpu")
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.std()) - 1) < 0.01
    assert abs(float(noise.pow(4).mean()) - 3) < 0.05


# The sampler of many steps --------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(1, 2, 2), (3, 2)])
def test_chunks_that_begin_with_a_picture(model, random_text, lengths):
    """By hand. A first chunk of one latent is the picture, absorbed as it is; in a longer one its latent is pinned."""
    text, network, plan = random_text(2), Recorder(model), ChunkPlan(lengths)
    noise = PromptNoise(3, [("a", 0), ("b", 0)])
    first = torch.randn(2, *SHAPE[:1], 1, *SHAPE[1:], generator=torch.Generator().manual_seed(3))
    options: dict[str, Any] = {"shape": SHAPE, "rng": noise, "device": "cpu"}
    chunks = list(generate(network, SCHEDULE, [text] * len(plan), plan, first=first, **options))
    assert torch.equal(chunks[0].latents[:, :, :1], first)

    def drawn(step: int) -> Tensor:
        return noise.draw(0, step, (SHAPE[0], lengths[0], *SHAPE[1:]), "cpu")

    x = torch.cat([first, drawn(0)[:, :, 1:]], dim=2)
    for step, seen in enumerate(SCHEDULE.seen_steps if lengths[0] > 1 else ()):
        times = torch.full((2, lengths[0]), float(seen))
        times[:, 0] = 0
        x0 = SCHEDULE.to_x0(x, model(x, times, text)[0], torch.full((2,), float(seen)))
        if step + 1 < len(SCHEDULE.steps):
            x0 = SCHEDULE.add_noise(x0, drawn(step + 1), torch.full((2,), float(SCHEDULE.steps[step + 1])))
        x = torch.cat([first, x0[:, :, 1:]], dim=2)
    assert torch.equal(chunks[0].latents, x)
    state = absorb(model, x, text, None)
    rest = ChunkPlan(lengths[1:])
    others = generate(model, SCHEDULE, [text] * len(rest), rest, state=state, **options)
    for one, other in zip(chunks[1:], others, strict=True):
        assert torch.equal(one.latents, other.latents)


@pytest.mark.parametrize("cfg_scale", [1.0, 6.0])
def test_a_clip_that_begins_with_a_picture(model, random_text, cfg_scale):
    """By hand: its latent is there in every step, seen at timestep 0, and the others take Euler's steps."""
    captions, network, solver = [random_text(2), random_text(2, seed=8)], Recorder(model), Euler.shifted(8.0, 4)
    captions, noise = captions[: 1 if cfg_scale == 1 else 2], draw()
    first = torch.randn(2, noise.shape[1], 1, *noise.shape[3:], generator=torch.Generator().manual_seed(3))
    (chunk,) = sample_clip(network, captions, solver=solver, cfg_scale=cfg_scale, noise=noise, first=first)
    x = torch.cat([first, noise[:, :, 1:]], dim=2)
    with torch.no_grad():
        for step, t in enumerate(solver.timesteps):
            times = torch.full((2, noise.shape[2]), t)
            times[:, 0] = 0
            velocity, *away = (model(x, times, text)[0].float() for text in captions)
            velocity = velocity if not away else away[0] + cfg_scale * (velocity - away[0])
            x = torch.cat([first, solver.step(step, velocity, x)[:, :, 1:]], dim=2)
    assert torch.equal(chunk.latents, x) and torch.equal(chunk.latents[:, :, :1], first)
    for call in network.calls:
        assert call.t.shape == (2, noise.shape[2]) and not call.t[:, 0].any() and (call.t[:, 1:] == call.t[0, 1]).all()
    changed = []
    path = solve(
        model, captions, solver=solver, cfg_scale=cfg_scale, noise=noise, first=first, on_step=lambda step, x: 0 * x
    )
    for x in path:
        changed.append(torch.equal(x[:, :, :1], first))
    assert all(changed) and len(changed) == 5, "whatever a callback makes of it"


@pytest.mark.parametrize("name", ["flow_euler", "flow_dpm-solver"])
@pytest.mark.parametrize("shift", [3.0, 8.0])
@pytest.mark.parametrize("cfg_scale", [1.0, 6.0])
def test_sample_clip_is_that_of_diffusers_scheduler(model, random_text, name, shift, cfg_scale):
    diffusers = pytest.importorskip("diffusers")
    scheduler, solver = {
        "flow_euler": (diffusers.FlowMatchEulerDiscreteScheduler(shift=shift), Euler.shifted(shift, 12)),
        "flow_dpm-solver": (
            diffusers.DPMSolverMultistepScheduler(
                use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift
            ),
            DPMSolver(shift, 12),
        ),
    }[name]
    scheduler.set_timesteps(12)
    text, negative, network = random_text(2), random_text(2, seed=8) if cfg_scale != 1 else None, Recorder(model)
    noise = draw()

    x = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            velocity = model(x, t.expand(2), text)[0].float()
            if negative is not None:
                unconditional = model(x, t.expand(2), negative)[0].float()
                velocity = unconditional + cfg_scale * (velocity - unconditional)
            x = scheduler.step(velocity, t, x).prev_sample

    captions = [text] if negative is None else [text, negative]
    (chunk,) = sample_clip(network, captions, solver=solver, cfg_scale=cfg_scale, noise=noise)
    passes = len(captions)
    seen = torch.stack([call.t[0] for call in network.calls[::passes]])
    assert len(network.calls) == 12 * passes
    assert all(call.frames == 0 for call in network.calls)
    torch.testing.assert_close(seen, scheduler.timesteps.float(), rtol=0, atol=2e-4)
    torch.testing.assert_close(chunk.latents, x, rtol=1e-4, atol=1e-4)
    assert (chunk.index, chunk.start, chunk.state) == (0, 0, None)
    (again,) = sample_clip(network, captions, solver=solver, cfg_scale=cfg_scale, noise=noise)
    assert torch.equal(again.latents, chunk.latents), "nothing is left of the clip before"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prediction_type": "epsilon"}, "prediction_type is epsilon"),
        ({"use_flow_sigmas": False}, "use_flow_sigmas is False"),
        ({"algorithm_type": "sde-dpmsolver++"}, "draws noise of its own"),
    ],
)
def test_a_scheduler_that_fits_no_flow_is_refused(changes: dict[str, Any], says: str) -> None:
    import diffusers

    settings: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True} | changes
    with pytest.raises(InputError, match=says):
        DPMSolver(8.0, 20, diffusers.DPMSolverMultistepScheduler(**settings))


def test_a_schedulers_own_settings_are_taken() -> None:
    import diffusers

    settings: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    third = diffusers.DPMSolverMultistepScheduler(**settings, solver_order=3)
    x0, noise = draw(seed=4), draw()

    def network(x: Tensor, t: Tensor, text: object, *, state: object = None) -> tuple[Tensor, None]:
        return (noise - x0) * torch.cos(t / 200).view(-1, 1, 1, 1, 1), None

    def end(solver: DPMSolver) -> Tensor:
        *_, x = solve(network, [None], solver=solver, cfg_scale=1.0, noise=noise)  # type: ignore[list-item]
        return x

    assert DPMSolver(8.0, 9, third).timesteps == DPMSolver(8.0, 9).timesteps != DPMSolver(3.0, 9).timesteps
    assert not torch.allclose(end(DPMSolver(8.0, 9, third)), end(DPMSolver(8.0, 9)), rtol=1e-3, atol=1e-3)
    assert third.config.flow_shift == 3.0 and third.num_inference_steps is None, "it is left as it was"


@pytest.mark.parametrize("steps", [1, 2, 3, 150, 1000])
def test_any_number_of_dpm_steps(steps: int) -> None:
    """Of many steps the first whole timesteps are equal; a straight flow is still followed to its end."""
    x0, noise = draw(seed=4), draw()

    def network(x: Tensor, t: Tensor, text: object, *, state: object = None) -> tuple[Tensor, None]:
        return noise - x0, None

    path = list(solve(network, [None], solver=DPMSolver(8.0, steps), cfg_scale=1.0, noise=noise))  # type: ignore[list-item]
    assert len(path) == steps + 1
    # The first noise level is not quite 1.
    torch.testing.assert_close(path[-1], x0, rtol=0, atol=2e-3 * float((noise - x0).abs().max()))


def test_dpm_solver_is_of_higher_order_than_euler() -> None:
    """On a flow that bends it comes nearer to where a thousand steps lead."""
    noise = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)

    def network(x: Tensor, t: Tensor, text: object, *, state: object = None) -> tuple[Tensor, None]:
        return x + 1e-3 * t.view(-1, 1, 1, 1, 1), None

    def end(solver: Euler | DPMSolver) -> float:
        *_, x = solve(network, [None], solver=solver, cfg_scale=1.0, noise=noise)  # type: ignore[list-item]
        return float(x)

    truth = end(Euler.shifted(3.0, 1000))
    assert 5 * abs(end(DPMSolver(3.0, 25)) - truth) < abs(end(Euler.shifted(3.0, 25)) - truth)


# Many steps, chunk after chunk ----------------------------------------------------------------------------------------

SIGMAS = uniform_sigmas(8.0, 4).tolist()


def by_hand(
    weights: dict[str, Tensor],
    captions: list[TextEmbedding],
    lengths: tuple[int, ...],
    cfg_scale: float,
    *,
    window: int = -1,
    absorbed_as: tuple[int, ...] = (0, 1),
) -> list[list[Tensor]]:
    """Every x of every chunk with the naive float64 network; `absorbed_as`: the caption that each past has seen."""
    network, rng = partial(naive.forward, weights, head_dim=28, cross_heads=4), PromptNoise(3, PROMPTS)
    entries: list[list] = [[] for _ in captions]
    start, chunks = 0, []
    for frames in lengths:
        caches = [naive.accumulate(past, window) for past in entries]
        path = [rng.draw(start, 0, (4, frames, 4, 6), "cpu").double()]
        for k in range(4):
            sigma, following = (8 * (1 - j / 4) / (1 + 7 * (1 - j / 4)) for j in (k, k + 1))
            v = [
                network(path[-1], torch.full((2,), 1000 * sigma), c.tokens, c.mask, start=start, cache=cache)[0]
                for c, cache in zip(captions, caches, strict=True)
            ]
            velocity = v[0] if len(v) == 1 else v[1] + cfg_scale * (v[0] - v[1])
            path.append(path[-1] + (following - sigma) * velocity)
        for past, cache, seen in zip(entries, caches, absorbed_as, strict=False):
            text = captions[seen]
            past.append(network(path[-1], torch.zeros(2), text.tokens, text.mask, start=start, cache=cache)[1])
        chunks.append(path)
        start += frames
    return chunks


@pytest.mark.parametrize(("window", "cfg_scale"), [(-1, 1.0), (-1, 3.0), (1, 3.0)])
def test_trajectory_is_euler_chunk_after_chunk(
    small_config, random_model, renamed, random_text, window: int, cfg_scale: float
) -> None:
    model = random_model(small_config(num_cached_blocks=window))
    captions = [random_text(2), random_text(2, seed=8)][: 1 if cfg_scale == 1 else 2]
    lengths, weights = (3, 2, 2), renamed(model, "upstream")
    common = {"sigmas": SIGMAS, "cfg_scale": cfg_scale, "shape": SHAPE, "rng": PromptNoise(3, PROMPTS), "device": "cpu"}
    kept = list(trajectory(model, captions, ChunkPlan(lengths), keep=[0, 2, 4], **common))
    expected = by_hand(weights, captions, lengths, cfg_scale, window=window)
    for own, path in zip(kept, expected, strict=True):
        assert own.dtype == torch.float32
        torch.testing.assert_close(own.double(), torch.stack([path[k] for k in (0, 2, 4)], 1), rtol=0, atol=1e-4)
    chunks = list(sample_chunks(model, captions, ChunkPlan(lengths), interval=1.0, **common))
    assert [(chunk.index, chunk.start) for chunk in chunks] == [(0, 0), (1, 3), (2, 5)]
    assert all(torch.equal(chunk.latents, own[:, -1]) for chunk, own in zip(chunks, kept, strict=True))
    if cfg_scale != 1 and window == -1:
        wrong = by_hand(weights, captions, lengths[:2], cfg_scale, absorbed_as=(0, 0))
        assert float((kept[1][:, -1] - wrong[1][-1]).abs().max()) > 1e-2, "each past is absorbed with its own caption"


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
@pytest.mark.parametrize(("interval", "lead"), [(0.0, 0), (0.2, 2), (0.5, 3), (0.84, 6), (1.0, 6)])
@pytest.mark.parametrize("window", [-1, 1])
def test_staggered_chunks_are_those_of_the_whole_video(
    small_config, random_model, random_text, window: int, interval: float, lead: int, cfg_scale: float
) -> None:
    """All chunks in every pass, as published: those that have not begun at t = 1000, finished ones at t = 0."""
    model, lengths, steps = random_model(small_config(num_cached_blocks=window)), (3, 2, 2, 2), 6
    captions = [random_text(2), random_text(2, seed=8)][: 1 if cfg_scale == 1 else 2]
    rng, plan, sigmas = PromptNoise(3, PROMPTS), ChunkPlan(lengths), euler_sigmas(8.0, steps).tolist()
    x = [rng.draw(start, 0, (4, frames, 4, 6), "cpu") for start, frames in zip(plan.starts, lengths, strict=True)]
    done = [0] * len(lengths)
    while done[-1] < steps:
        t = torch.cat([torch.full((2, n), 1000 * sigmas[k]) for n, k in zip(lengths, done, strict=True)], dim=1)
        with torch.no_grad():
            v = [model(torch.cat(x, dim=2), t, caption, plan=plan)[0].float() for caption in captions]
        velocity = (v[0] if len(v) == 1 else v[1] + cfg_scale * (v[0] - v[1])).split(lengths, dim=2)
        begun = [done[c] < steps and (c == 0 or done[c - 1] >= lead or lead == 0) for c in range(len(lengths))]
        for c in range(len(lengths)):
            if begun[c]:
                x[c] = x[c] + (sigmas[done[c] + 1] - sigmas[done[c]]) * velocity[c]
                done[c] += 1

    common = {"sigmas": sigmas, "cfg_scale": cfg_scale, "shape": SHAPE, "rng": rng, "device": "cpu"}
    chunks = list(sample_chunks(model, captions, plan, interval=interval, **common))
    assert [(chunk.index, chunk.start) for chunk in chunks] == [(0, 0), (1, 3), (2, 5), (3, 7)]
    for chunk, expected in zip(chunks, x, strict=True):
        torch.testing.assert_close(chunk.latents, expected, rtol=0, atol=2e-4 * float(expected.abs().max()))


def test_chunks_in_progress_are_bounded_by_the_interval(model, random_text) -> None:
    """Memory of a long video is that of a few chunks."""
    most = 0

    def network(x: Tensor, t: Tensor, text: object, **options: object) -> tuple[Tensor, CausalState]:
        nonlocal most
        most = max(most, x.shape[2])
        return model(x, t, text, **options)

    for interval, expected in ((1.0, 2), (0.5, 4), (0.25, 8)):
        most = 0
        list(
            sample_chunks(
                network,
                [random_text(2)],
                ChunkPlan((2,) * 12),
                sigmas=SIGMAS,
                interval=interval,
                cfg_scale=1.0,
                shape=SHAPE,
                rng=PromptNoise(3, PROMPTS),
                device="cpu",
            )
        )
        assert most == expected, interval


def test_one_chunk_is_the_clip_at_once(model, random_text) -> None:
    network, captions, rng = Recorder(model), [random_text(2), random_text(2, seed=8)], PromptNoise(3, PROMPTS)
    (kept,) = trajectory(
        network,
        captions,
        ChunkPlan((5,)),
        sigmas=SIGMAS,
        keep=range(5),
        cfg_scale=2.0,
        shape=SHAPE,
        rng=rng,
        device="cpu",
    )
    noise = rng.draw(0, 0, (4, 5, 4, 6), "cpu")
    path = list(solve(model, captions, solver=Euler(SIGMAS), cfg_scale=2.0, noise=noise))
    assert torch.equal(kept, torch.stack(path, dim=1))
    assert len(network.calls) == 8, "nothing is absorbed at the end"
    assert not kept.requires_grad


def test_a_straight_flow_is_followed_exactly() -> None:
    """With the velocity noise - x0 of one clip, every x is (1 - sigma) x0 + sigma noise, and the last is x0."""
    x0, noise = draw(seed=4), draw()

    def network(x: Tensor, t: Tensor, text: object, *, state: object = None) -> tuple[Tensor, None]:
        return noise - x0, None

    path = list(solve(network, [None], solver=Euler(SIGMAS), cfg_scale=1.0, noise=noise))  # type: ignore[list-item]
    for sigma, x in zip(SIGMAS, path, strict=True):
        torch.testing.assert_close(x, (1 - sigma) * x0 + sigma * noise, rtol=0, atol=1e-5)


# The null caption -----------------------------------------------------------------------------------------------------


def test_the_null_caption_is_the_checkpoints(model) -> None:
    tokens, mask = null_embedding(model, 3)
    assert tokens.shape == (3, *model.text_embed.null_tokens.shape)
    assert all(torch.equal(row, model.text_embed.null_tokens) for row in tokens)
    assert mask.dtype == torch.bool
    assert mask.shape == tokens.shape[:2]
    assert mask.all()


def test_a_checkpoint_without_a_null_caption(small_config, random_model) -> None:
    model = random_model(small_config())
    model.text_embed.null_tokens.zero_()
    with pytest.raises(ValueError, match="no null caption"):
        null_embedding(model, 1)
