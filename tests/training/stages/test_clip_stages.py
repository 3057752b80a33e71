"""The stages that learn from clips on disk: what the network is fed, and what it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from longsana.data.clips import open_clips
from longsana.data.trajectories import open_trajectories
from longsana.models.embeddings import TextEmbedding
from longsana.training.learner import Learner
from longsana.training.stages.consistency import Consistency
from longsana.training.stages.flow_matching import FlowMatching
from longsana.training.stages.ode import OdeInitialisation
from longsana.training.stages.stage import MicroBatch
from tests.training.conftest import CHANNELS, HEIGHT, WIDTH

CLIP = (CHANNELS, 5, HEIGHT, WIDTH)


class Recorder(torch.nn.Module):
    """A network that notes what it is fed."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model, self.calls = model, []

    def forward(self, x: Tensor, t: Tensor, text: TextEmbedding, *, plan: Any = None) -> Any:
        velocity, state = self.model(x, t, text, plan=plan)
        self.calls.append(SimpleNamespace(x=x, t=t, text=text, plan=plan, velocity=velocity))
        return velocity, state


def micro_batch(step: int, batch: int) -> MicroBatch:
    return MicroBatch(0, step, "generator", 0, range(step * batch, (step + 1) * batch), torch.device("cpu"))


@pytest.fixture
def build(training_config, random_model, network, embed, trajectories) -> Callable[..., Any]:
    """`build("ode")`: the stage, whose network is a Recorder."""

    def make(trainer: str, *overrides: str) -> Any:
        stage: Any
        config = training_config(trainer, *overrides)
        learner = Learner("generator", random_model(network, torch.float32), config.optimizer.generator)
        if trainer == "consistency":
            teacher = random_model(replace(network, depth=1), torch.float32, 1).requires_grad_(False)
            negative = TextEmbedding(torch.full((1, 48, 64), 7.0), torch.arange(48)[None] < 2)
            clips = open_clips("generated:blobs", shape=CLIP)
            stage = Consistency(
                config, learner, Recorder(teacher), embed=embed, negative=negative, clips=clips, frames=5
            )
        elif trainer == "ode":
            opened = open_trajectories(str(trajectories), shape=CLIP)
            stage = OdeInitialisation(config, learner, embed=embed, trajectories=opened, frames=5)
        else:
            null = TextEmbedding(torch.full((1, 48, 64), 7.0), torch.arange(48)[None] < 2)
            clips = open_clips("generated:blobs", shape=CLIP)
            stage = FlowMatching(config, learner, embed=embed, null=null, clips=clips, frames=5)
        stage.generator = Recorder(stage.generator)
        return stage

    return make


@pytest.mark.parametrize("trainer", ["flow_matching", "ode", "consistency"])
def test_what_was_made_ahead_is_what_would_be_made_now(build: Callable[..., Any], trainer: str) -> None:
    stage, twin = build(trainer), build(trainer)
    stage.inputs.begin(micro_batch(7, 2))
    stage.inputs.begin(micro_batch(3, 2))
    for step in (3, 4, 7):  # made ahead; now; and now, as another took its place
        given, expected = stage.loss(micro_batch(step, 2)), twin.loss(micro_batch(step, 2))
        assert torch.equal(given.value, expected.value)
        assert torch.equal(stage.generator.calls[-1].x, twin.generator.calls[-1].x)


def test_the_base_model_learns_the_velocity_of_a_clip_at_one_level(build):
    stage = build("flow_matching", "flow_matching.class_dropout_prob=0.0")
    now = micro_batch(3, 4)
    loss = stage.loss(now)
    (call,) = stage.generator.calls
    x0 = torch.stack([stage.clips[stage.order[i]].latents for i in now.samples])
    noise = now.normal("noise", x0.shape)
    sigma = stage.schedule.sigma(call.t).float()[:, None, :, None, None]
    torch.testing.assert_close(call.x, (1 - sigma) * x0 + sigma * noise)
    assert call.plan.lengths == (5,)
    assert (call.t == call.t[:, :1]).all()
    assert len(set(call.t[:, 0].tolist())) > 1
    expected = (call.velocity - (noise - x0)).square().mean()
    assert float(loss.value.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_errors_count_by_how_much_of_the_clip_is_left(build, share):
    """Of a picture that comes first none does."""
    stage = build(
        "flow_matching",
        "flow_matching.class_dropout_prob=0.0",
        "flow_matching.weight_power=1.5",
        f"train.image_probability={share}",
    )
    now = micro_batch(3, 4)
    loss = stage.loss(now)
    (call,) = stage.generator.calls
    x0 = torch.stack([stage.clips[stage.order[i]].latents for i in now.samples])
    error = (call.velocity - (now.normal("noise", x0.shape) - x0)).square().mean((1, 3, 4))
    weighted = (1 - stage.schedule.sigma(call.t)) ** 1.5 * error
    expected = weighted[:, 1:].mean() if share else weighted.mean()
    assert float(loss.value.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert loss.value.dtype == torch.float32


CAUSAL = ("flow_matching.causal=true", "flow_matching.chunk_sampling_strategy=")


@pytest.mark.parametrize("strategy", ["incremental", "uniform"])
def test_chunks_of_the_causal_model_have_timesteps_of_their_own(build, strategy):
    stage = build("flow_matching", CAUSAL[0], CAUSAL[1] + strategy)
    for step in range(8):
        stage.loss(micro_batch(step, 4))
    first, second = [], []
    for call in stage.generator.calls:
        assert call.plan.lengths == (3, 2)
        assert (call.t[:, :3] == call.t[:, :1]).all() and (call.t[:, 3:] == call.t[:, 3:4]).all()
        first.append(call.t[:, 0])
        second.append(call.t[:, 3])
    rises = torch.cat(second) - torch.cat(first)
    assert (rises > 0).any()
    assert bool((rises < 0).any()) == (strategy == "uniform"), "incremental: later chunks are never less noisy"


def test_one_timestep_for_all_chunks(build):
    stage = build("flow_matching", CAUSAL[0], CAUSAL[1] + "uniform", "flow_matching.same_timestep_prob=1.0")
    for step in range(4):
        stage.loss(micro_batch(step, 4))
    assert all((call.t == call.t[:, :1]).all() for call in stage.generator.calls)


def pinning(share: float) -> str:
    return f"train.image_probability={share}"


@pytest.mark.parametrize("causal", [False, True])
def test_a_picture_first_is_clean_and_has_no_loss(build, causal):
    """By hand: latent 0 as it is, at t = 0; all others as without it; the mean is over the others alone."""
    own = ["flow_matching.causal=true"] if causal else []
    stage, plain = (build("flow_matching", pinning(share), *own) for share in (1.0, 0.0))
    now = micro_batch(3, 4)
    loss = stage.loss(now)
    plain.loss(now)
    (call,), (without,) = stage.generator.calls, plain.generator.calls
    x0 = torch.stack([stage.clips[stage.order[i]].latents for i in now.samples])
    assert call.t.shape == (4, 5) and (call.t[:, 0] == 0).all() and (call.t[:, 1:] > 0).all()
    assert torch.equal(call.x[:, :, 0], x0[:, :, 0])
    assert torch.equal(call.t[:, 1:], without.t[:, 1:]) and torch.equal(call.x[:, :, 1:], without.x[:, :, 1:])
    assert torch.equal(call.text.tokens, without.text.tokens)
    assert call.plan == without.plan
    error = call.velocity - (now.normal("noise", x0.shape) - x0)
    expected = error[:, :, 1:].double().square().sum() / (4 * CHANNELS * 4 * HEIGHT * WIDTH)
    assert float(loss.value.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


class OtherNoise(MicroBatch):
    """A micro-batch whose latent 0 has other noise, and so another target."""

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        noise = super().normal(name, shape)
        noise[:, :, 0] += 1
        return noise


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_is_learned_of_the_picture_itself(build, share):
    """Its target changes neither loss nor gradients. The picture itself changes both."""
    stage = build("flow_matching", pinning(share))

    def learn(now: MicroBatch) -> list[Tensor]:
        weights = [weight for weight in stage.generator.parameters() if weight.requires_grad]
        loss = stage.loss(now).value
        return [loss.detach(), *torch.autograd.grad(loss, weights, materialize_grads=True)]

    now = micro_batch(0, 2)
    before, other = learn(now), learn(OtherNoise(**vars(now)))
    assert all(map(torch.equal, before, other)) == (share == 1)
    latents, prompts = stage.clips.batch([stage.order[number] for number in now.samples])
    latents = latents.clone()
    latents[:, :, 0] += 1
    stage.clips = SimpleNamespace(batch=lambda indices: (latents, prompts))
    assert not torch.equal(before[0], learn(now)[0])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_pictures_come_first_in_a_share_of_updates(build, share):
    """All micro-batches of an update agree, so that processes count as many frames."""
    stage = build("flow_matching", pinning(share))
    stage.generator = lambda x, t, text, plan: seen.append((t == 0).any(1)) or (torch.zeros_like(x), None)
    pinned = 0
    for step in range(200):
        seen: list[Tensor] = []
        for index in range(2):
            stage.loss(replace(micro_batch(step, 2), index=index))
        assert len({*torch.cat(seen).tolist()}) == 1
        pinned += bool(seen[0].all())
    assert pinned == pytest.approx(200 * share, abs=4 * (200 * share * (1 - share)) ** 0.5)


@pytest.mark.parametrize("becomes", ["masked_null", "null_caption"])
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_dropped_captions_become_the_null(build, share, becomes):
    """As published the caption keeps its own mask; otherwise it takes the null's."""
    stage = build(
        "flow_matching", f"flow_matching.class_dropout_prob={share}", f"flow_matching.dropped_caption={becomes}"
    )
    dropped = 0
    for step in range(40):
        now = micro_batch(step, 4)
        stage.generator = lambda x, t, text, plan: seen.append(text) or (torch.zeros_like(x).requires_grad_(), None)  # noqa: B023
        seen: list[TextEmbedding] = []
        stage.loss(now)
        own = stage.embed([stage.clips[stage.order[i]].prompt for i in now.samples])
        for row in range(4):
            is_null = torch.equal(seen[0].tokens[row], stage.null.tokens[0])
            takes = is_null and becomes == "null_caption"
            assert torch.equal(seen[0].mask[row], stage.null.mask[0] if takes else own.mask[row])
            assert is_null or torch.equal(seen[0].tokens[row], own.tokens[row])
            dropped += is_null
    assert dropped == pytest.approx(160 * share, abs=4 * (160 * share * (1 - share)) ** 0.5)


def test_each_chunk_of_a_trajectory_has_a_state_of_its_own_and_the_end_as_its_target(build):
    stage = build("ode")
    levels = torch.tensor([1000.0, 960.0, 889.0, 727.0, 0.0])
    seen = set()
    for step in range(12):
        now = micro_batch(step, 2)
        loss = stage.loss(now)
        call = stage.generator.calls[-1]
        items = [stage.trajectories[stage.order[i]] for i in now.samples]
        errors = []
        for row, item in enumerate(items):
            for start, stop in ((0, 3), (3, 5)):
                (index,) = {int((levels == t).nonzero()) for t in call.t[row, start:stop].tolist()}
                seen.add(index)
                x = item.states[index, :, start:stop]
                assert torch.equal(call.x[row, :, start:stop], x)
                sigma = float(stage.schedule.sigma(levels[index]))
                x0 = x - sigma * call.velocity[row, :, start:stop]
                if index < 4:  # what is clean already teaches nothing
                    errors.append((x0 - item.states[-1, :, start:stop]).square().flatten())
        expected = float(torch.cat(errors).mean().detach()) if errors else 0.0
        assert float(loss.value.detach()) == pytest.approx(expected, rel=1e-4)
        assert torch.equal(call.text.tokens, stage.embed([item.prompt for item in items]).tokens)
    assert seen == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("causal", [True, False])
def test_consistency_by_hand(build: Callable[..., Any], causal: bool) -> None:
    """One step of the guided teacher's, and the student's answers before and after it."""
    stage = build("consistency", f"consistency.causal_teacher={causal}", "consistency.num_steps=4")
    times, seen = stage.times.tolist(), set()
    assert times == [1000, 960, 889, 727, 0]
    for step in range(12):
        now = micro_batch(step, 2)
        value = stage.loss(now).value
        (cond, uncond), (after, before) = stage.teacher.calls[-2:], stage.generator.calls[-2:]
        x0 = torch.stack([stage.clips[stage.order[i]].latents for i in now.samples])
        noise, losses = now.normal("noise", x0.shape), []
        assert torch.equal(uncond.text.tokens, torch.full((2, 48, 64), 7.0)) and (cond.x is uncond.x)
        assert before.plan.lengths == after.plan.lengths == (3, 2)
        assert cond.plan == (before.plan if causal else None)
        assert before.velocity.requires_grad and not after.velocity.requires_grad
        for row in range(2):
            clean = 3 if causal and before.t[row, 0] == 0 else 0
            level = times.index(float(before.t[row, 4]))
            seen.add((clean, level))
            assert before.t[row].tolist() == [0.0] * clean + [times[level]] * (5 - clean)
            assert after.t[row].tolist() == [0.0] * clean + [times[level + 1]] * (5 - clean)
            assert torch.equal(before.x[row, :, :clean], x0[row, :, :clean])
            assert torch.equal(after.x[row, :, :clean], x0[row, :, :clean])
            own = slice(clean, None)
            sigma, nearer = (float(stage.schedule.sigma(torch.tensor(times[at]))) for at in (level, level + 1))
            nearer *= level < 3
            x = (1 - sigma) * x0[row, :, own] + sigma * noise[row, :, own]
            torch.testing.assert_close(before.x[row, :, own], x)
            velocity = 4 * cond.velocity[row, :, own] - 3 * uncond.velocity[row, :, own]
            further = x + (nearer - sigma) * velocity
            torch.testing.assert_close(after.x[row, :, own], further, rtol=1e-4, atol=1e-5)
            target = further - nearer * after.velocity[row, :, own]
            error = x - sigma * before.velocity[row, :, own] - target
            c = 0.00054 * x0[row].numel() ** 0.5
            losses.append((float((error.square().sum().detach() + c * c) ** 0.5) - c) / x0[row, :, 0].numel() ** 0.5)
        assert float(value.detach()) == pytest.approx(sum(losses) / 2, rel=1e-4)
    assert {clean for clean, _ in seen} == ({0, 3} if causal else {0}) and {level for _, level in seen} == {0, 1, 2, 3}


class Straight(torch.nn.Module):
    """A network whose ways all end at the same video, wherever they begin."""

    def __init__(self, stage: Consistency, end: Tensor) -> None:
        super().__init__()
        self.schedule, self.end = stage.schedule, torch.nn.Parameter(end)

    def forward(self, x: Tensor, t: Tensor, text: TextEmbedding, *, plan: Any = None) -> Any:
        return (x - self.end) / self.schedule.sigma(t).float()[:, None, :, None, None], None


def test_answers_that_agree_along_the_way_cost_nothing(build: Callable[..., Any]) -> None:
    """Whatever the guidance; others are drawn to where the way ends, by its last step."""
    stage, end = build("consistency"), torch.randn(1, *CLIP)
    stage.teacher, stage.generator = Straight(stage, end), Straight(stage, end.clone())
    for step in range(8):
        assert float(stage.loss(micro_batch(step, 2)).value.detach()) < 1e-4
    stage.generator = Straight(stage, end + 1)
    stage.times = torch.tensor([800.0, 0.0])
    loss = stage.loss(micro_batch(0, 2)).value
    loss.backward()
    assert float(loss.detach()) > 0.5 and stage.teacher.end.grad is None
    grad = stage.generator.end.grad
    assert (grad >= 0).all() and (grad[:, :, 3:] > 0).all()


@pytest.mark.parametrize("image_first", ["absorb", "pin"])
def test_a_picture_first_is_clean_for_student_and_teacher(build: Callable[..., Any], image_first: str) -> None:
    stage = build("consistency", pinning(1.0), f"sampling.image_first={image_first}")
    for step in range(6):
        now = micro_batch(step, 2)
        loss = stage.loss(now)
        x0 = torch.stack([stage.clips[stage.order[i]].latents for i in now.samples])
        for call in (*stage.teacher.calls[-2:], *stage.generator.calls[-2:]):
            assert (call.t[:, 0] == 0).all() and torch.equal(call.x[:, :, 0], x0[:, :, 0])
        assert (stage.generator.calls[-1].t[:, -1] > 0).all() and float(loss.value.detach()) > 0
