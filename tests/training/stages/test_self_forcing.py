"""Rollouts are inference that ends early, and gradients reach exactly what they should."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from longsana.chunks import ChunkPlan
from longsana.flow.schedule import FlowSchedule
from longsana.sampling.sampler import generate
from longsana.training.stages.self_forcing import SelfForcing
from longsana.training.stages.stage import MicroBatch
from tests.training.conftest import CHANNELS, HEIGHT, PROMPTS, WIDTH

SHAPE = (CHANNELS, HEIGHT, WIDTH)


@pytest.fixture
def build(distilled) -> Callable[..., SelfForcing]:
    """`build("rollout.last_step_only=true")`: the stage with random float32 networks."""
    return partial(distilled, SelfForcing, "self_forcing")


def micro_batch(role: str = "generator", step: int = 0, index: int = 0, batch: int = 1, seed: int = 0) -> MicroBatch:
    return MicroBatch(seed, step, role, index, range(index * batch, (index + 1) * batch), torch.device("cpu"))


class Recorder(torch.nn.Module):
    """A network that notes what it was called with, and whether a graph came of it."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls: list[SimpleNamespace] = []

    def forward(self, x: Tensor, t: Tensor, text: Any, *, state: Any = None) -> Any:
        velocity, after = self.model(x, t, text, state=state)
        self.calls.append(SimpleNamespace(x=x, t=t, text=text, state=state, grad=velocity.requires_grad))
        return velocity, after


class TurnNoise:
    """The noise of a turn for the sampler of inference."""

    def __init__(self, micro_batch: MicroBatch, batch: int) -> None:
        self.micro_batch, self.batch = micro_batch, batch

    def draw(self, start: int, step: int, shape: Sequence[int], device: Any) -> Tensor:
        return self.micro_batch.normal(f"chunk {start}, step {step}", (self.batch, *shape))


@pytest.mark.parametrize("batch", [1, 2])
def test_a_rollout_to_the_last_step_is_inference(build, embed, batch):
    stage = build("rollout.last_step_only=true")
    now = micro_batch(batch=batch)
    window = stage.rollout(now)
    chunks = generate(
        stage.generator,
        FlowSchedule(7.0),
        [window.text] * 2,
        ChunkPlan((3, 2)),
        shape=SHAPE,
        rng=TurnNoise(now, batch),  # type: ignore[arg-type]
        device="cpu",
    )
    assert torch.equal(window.latents, torch.cat([chunk.latents for chunk in chunks], dim=2))


@pytest.mark.parametrize("exit_at", [0, 2, 3])
def test_the_gradient_is_that_of_the_exit_steps_alone(build, exit_at, monkeypatch):
    stage = build()
    recorder = Recorder(stage.generator)
    stage.generator = recorder
    monkeypatch.setattr(stage, "_exit_steps", lambda micro_batch, chunks: [exit_at] * chunks)
    weights = list(recorder.model.parameters())
    window = stage.rollout(micro_batch())
    probe = torch.randn(window.latents.shape, generator=torch.Generator().manual_seed(9))
    gradients = torch.autograd.grad((window.latents * probe).sum(), weights)

    graded = [call for call in recorder.calls if call.grad]
    assert len(graded) == 2, "one exit step for each of two chunks"
    assert len(recorder.calls) == 2 * (exit_at + 1) + 1, "each chunk's steps, and the absorption of the first"
    assert all(not part.requires_grad for call in recorder.calls if call.state for part in call.state[:3])
    total = 0
    for call, part in zip(graded, probe.split([3, 2], dim=2), strict=True):
        velocity, _ = recorder.model(call.x.detach(), call.t, call.text, state=call.state)
        total = total + (stage.schedule.to_x0(call.x.detach(), velocity, call.t) * part).sum()
    expected = torch.autograd.grad(total, weights)
    for ours, by_hand in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, by_hand, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("role", "others"), [("generator", ["critic", "teacher"]), ("critic", ["generator", "teacher"])]
)
def test_a_loss_reaches_its_own_learner_alone(build, role, others):
    stage = build()
    stage.loss(micro_batch(role)).value.backward()
    networks = {"generator": stage.generator, "critic": stage.critic, "teacher": stage.teacher}
    assert all(weight.grad is not None and weight.grad.any() for weight in networks[role].parameters())
    assert all(weight.grad is None for name in others for weight in networks[name].parameters())


def test_the_dmd_gradient_with_linear_scores(build):
    """Scores whose velocity is a multiple of their input: everything can be worked out by hand."""
    stage = build("distillation.guidance_scale=3.0")

    def scaled(by: float) -> Any:
        return lambda x, t, text: ((by + 0.1 * text.mask.float().mean()) * x, None)

    stage.critic, stage.teacher = scaled(0.5), scaled(0.2)
    # Half of its tokens: the teacher sees another caption there, and guidance has something to do.
    stage.negative.mask[:, 24:] = False
    x = torch.randn(1, *SHAPE[:1], 5, *SHAPE[1:], generator=torch.Generator().manual_seed(1)).requires_grad_()
    now = micro_batch()
    stage.rollout = lambda micro_batch: window._replace(latents=x)  # type: ignore[method-assign]
    window = SelfForcing.rollout(stage, now)
    loss = stage.loss(now)
    (gradient,) = torch.autograd.grad(loss.value, x)

    t = stage._timesteps(now, window.exit_steps)
    sigma = stage.schedule.sigma(t).float()
    noisy = stage.schedule.add_noise(x.detach(), now.normal("score", x.shape), t)
    fake = (1 - 0.6 * sigma) * noisy
    cond, uncond = (1 - 0.3 * sigma) * noisy, (1 - 0.25 * sigma) * noisy
    real = cond + 3 * (cond - uncond)
    expected = (fake - real) / (x.detach() - real).abs().mean() / x.numel()
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-8)
    assert float(loss.metrics["generator_distance_to_real"]) == pytest.approx(
        float((x.detach() - real).abs().mean()), rel=1e-4
    )


def test_guidance_moves_away_from_the_negative_caption(build):
    stage = build("distillation.guidance_scale=3.0")
    seen = []

    def teacher(x: Tensor, t: Tensor, text: Any) -> Any:
        seen.append(text)
        return torch.zeros_like(x), None

    stage.teacher = teacher
    stage.loss(micro_batch(batch=2))
    assert len(seen) == 2
    assert torch.equal(seen[0].tokens, stage.embed([PROMPTS[stage.order["generator"][i]] for i in range(2)]).tokens)
    assert torch.equal(seen[1].tokens, stage.negative.tokens.expand(2, -1, -1))


def test_the_critic_learns_the_flow_of_the_students_video(build):
    stage = build()
    now = micro_batch("critic")
    with torch.no_grad():
        window = stage.rollout(now)
        x, noise = window.latents, now.normal("score", window.latents.shape)
        t = stage._timesteps(now, window.exit_steps)
        velocity, _ = stage.critic(stage.schedule.add_noise(x, noise, t), t, window.text)
    loss = stage.loss(now)
    assert float(loss.value.detach()) == pytest.approx(float((velocity - (noise - x)).square().mean()), rel=1e-5)


def test_exit_steps_are_shared_by_all_micro_batchs_and_cover_all_steps(build):
    stage, free = build(), build("rollout.same_step_across_blocks=false")
    drawn = [stage._exit_steps(micro_batch(step=step), 4) for step in range(60)]
    assert all(len(set(steps)) == 1 for steps in drawn)
    assert {steps[0] for steps in drawn} == {0, 1, 2, 3}
    assert any(len(set(free._exit_steps(micro_batch(step=step), 4))) > 1 for step in range(60))
    assert all(
        stage._exit_steps(micro_batch(step=s), 4) == stage._exit_steps(micro_batch(step=s, index=5), 4)
        for s in range(9)
    )
    last = build("rollout.last_step_only=true")
    assert all(last._exit_steps(micro_batch(step=step), 2) == [3, 3] for step in range(9))


def test_score_timesteps_keep_their_bounds(build):
    plain, bounded = build(), build("distillation.ts_schedule=true", "distillation.ts_schedule_max=true")
    drawn = [float(plain._timesteps(micro_batch(step=step), [1])) for step in range(300)]
    assert min(drawn) >= 20
    assert max(drawn) <= 980
    assert len(set(drawn)) > 100
    # Between the second step, 960, and the third, 889, then shifted by 5.
    drawn = [float(bounded._timesteps(micro_batch(step=step), [1])) for step in range(50)]
    assert 5 * 0.889 / (1 + 4 * 0.889) * 1000 - 1 <= min(drawn) <= max(drawn) <= 980


def test_longer_rollouts_learn_on_their_last_frames(build, vae):
    stage = build("rollout.num_training_frames=9")
    lengths = {stage._length(micro_batch(step=step)) for step in range(40)}
    assert lengths == {5, 7, 9}
    step = next(step for step in range(40) if stage._length(micro_batch(step=step)) == 9)
    now = micro_batch(step=step)
    recorder = Recorder(stage.generator)
    stage.generator = recorder
    window = stage.rollout(now)
    assert window.latents.shape == (1, CHANNELS, 5, HEIGHT, WIDTH)
    assert window.learned_from == 1
    assert [call.grad for call in recorder.calls].count(True) == 2, "the last two chunks of four"
    with torch.no_grad():
        plan = ChunkPlan.split(9, 2)
        whole, _ = stage.generate(now, plan, window.text, None, window.exit_steps)
    assert torch.equal(window.latents[:, :, 1:], whole[:, :, 5:])
    # The earlier frames are decoded, and their last picture is encoded again.
    assert torch.equal(window.latents[:, :, :1], vae.encode(vae.decode_stream(whole[:, :, :5])[0][:, :, -1:]))
    (gradient,) = torch.autograd.grad(stage._generator_loss(window, now).value, window.latents)
    assert not gradient[:, :, 0].any()
    assert gradient[:, :, 1:].flatten(3).any(-1).all()


@pytest.mark.parametrize("noisy", [False, True])
def test_published_training_absorbed_a_little_noise(build, noisy):
    stage, now = build(f"rollout.noisy_absorb={noisy}"), micro_batch("critic", 0)
    network, absorbed = stage.generator, []

    def watched(x, t, text, *, state=None):
        if not t.any():
            absorbed.append(x)
        return network(x, t, text, state=state)

    stage.generator = watched
    plan = ChunkPlan((3, 2))
    with torch.no_grad():
        made, _ = stage.generate(now, plan, stage.embed(["a"] * len(now.samples)), None, [3, 3])
    (chunk,), first = absorbed, made[:, :, :3]
    noise = now.normal("chunk 0, step 4", first.shape)
    torch.testing.assert_close(chunk, first + 0.006958 * (noise - first) if noisy else first, rtol=0, atol=1e-5)


def test_draws_depend_on_who_draws_and_on_nothing_else(build):
    stage = build()
    first = stage.loss(micro_batch("critic", 3, 1)).value
    stage.loss(micro_batch("generator", 3, 1))
    assert torch.equal(stage.loss(micro_batch("critic", 3, 1)).value, first)
    others = [
        micro_batch("critic", 4, 1),
        micro_batch("critic", 3, 2),
        micro_batch("generator", 3, 1),
        micro_batch("critic", 3, 1, seed=1),
    ]
    assert all(
        not torch.equal(stage.rollout(other).latents, stage.rollout(micro_batch("critic", 3, 1)).latents)
        for other in others
    )
