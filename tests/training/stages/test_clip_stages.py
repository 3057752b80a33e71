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
        config = training_config(trainer, *overrides)
        learner = Learner("generator", random_model(network, torch.float32), config.optimizer.generator)
        if trainer == "ode":
            opened = open_trajectories(str(trajectories), shape=CLIP)
            stage: Any = OdeInitialisation(config, learner, embed=embed, trajectories=opened, frames=5)
        else:
            null = TextEmbedding(torch.full((1, 48, 64), 7.0), torch.arange(48)[None] < 2)
            clips = open_clips("generated:blobs", shape=CLIP)
            stage = FlowMatching(config, learner, embed=embed, null=null, clips=clips, frames=5)
        stage.generator = Recorder(stage.generator)
        return stage

    return make


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
