"""A learner steps like AdamW, averages like a moving average, and leaves no trace of numbers that are not finite."""

from __future__ import annotations

import pytest
import torch

from longsana.training.config import AdamWConfig
from longsana.training.learner import Learner


@pytest.fixture
def make(random_model, network):
    def build(**options) -> Learner:
        settings = AdamWConfig(**{"lr": 1e-2, "beta1": 0.9, "weight_decay": 0.1, **options.pop("settings", {})})
        return Learner("generator", random_model(network, torch.float32), settings, **options)

    return build


def fill(learner: Learner, seed: int, scale: float = 1.0) -> None:
    rng = torch.Generator().manual_seed(seed)
    for weight in learner.weights.values():
        weight.grad = scale * torch.randn(weight.shape, generator=rng)


def test_steps_are_those_of_adamw_made_when_it_first_steps(make):
    """The moments are made in advance; torch makes them in its first step. Same numbers."""
    learner, twin = make(settings={"max_grad_norm": 1e9}), make(settings={"max_grad_norm": 1e9})
    plain = torch.optim.AdamW(twin.weights.values(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for step in range(3):
        fill(learner, step)
        fill(twin, step)
        learner.update(step)
        plain.step()
    assert all(torch.equal(learner.weights[name], twin.weights[name]) for name in learner.weights)


def test_clipping_limits_the_norm_and_reports_it_before(make):
    free, clipped = make(settings={"max_grad_norm": 1e9}), make(settings={"max_grad_norm": 0.5})
    fill(free, 0)
    fill(clipped, 0)
    norm = torch.stack([weight.grad.norm() for weight in free.weights.values()]).norm()
    torch.testing.assert_close(free.update(0), norm)
    torch.testing.assert_close(clipped.update(0), norm)
    name = "blocks.0.attn.qkv.weight"
    moments = [p.optimizer.state[p.weights[name]]["exp_avg"] for p in (free, clipped)]
    torch.testing.assert_close(moments[1], moments[0] * 0.5 / norm)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(make, value):
    learner = make(ema_weight=0.5)
    fill(learner, 0)
    learner.update(0)
    before = {f"{group}/{name}": t.clone() for group, held in learner.tensors().items() for name, t in held.items()}
    fill(learner, 1)
    learner.weights["final.linear.bias"].grad[3] = value
    assert not learner.update(1).isfinite()
    after = {f"{group}/{name}": t for group, held in learner.tensors().items() for name, t in held.items()}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(weight.grad is None for weight in learner.weights.values())


def test_the_average_is_the_weights_until_it_starts_and_then_follows_them(make):
    learner = make(ema_weight=0.75, ema_start=2)
    name, history = "blocks.1.feed_forward.expand.weight", []
    for step in range(4):
        fill(learner, step)
        learner.update(step)
        history.append(learner.weights[name].detach().clone())
        if step < 2:
            assert torch.equal(learner.average[name], history[-1])
    expected = 0.75 * (0.75 * history[1] + 0.25 * history[2]) + 0.25 * history[3]
    torch.testing.assert_close(learner.average[name], expected)


def test_the_network_computes_with_its_average_inside_the_block_alone(make):
    learner = make(ema_weight=0.9)
    fill(learner, 0)
    learner.update(0)
    raw = {name: weight.detach().clone() for name, weight in learner.weights.items()}

    def fail_inside() -> None:
        with learner.averaged():
            assert all(torch.equal(learner.weights[name], value) for name, value in learner.average.items())
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert all(torch.equal(learner.weights[name], value) for name, value in raw.items())


def test_without_an_average_there_is_none_to_save(make):
    assert set(make(ema_weight=0.0).tensors()) == {"generator", "optimizer.generator"}
    assert set(make(ema_weight=0.1).tensors()) == {"generator", "optimizer.generator", "generator_ema"}


def test_warm_up_counts_the_learners_own_updates(make):
    learner = make(every=5, settings={"num_warmup_steps": 4})
    assert [learner.learns_in(step) for step in range(6)] == [True, False, False, False, False, True]
    assert [learner.lr(step) for step in (0, 5, 10, 15, 20)] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])
    assert make().lr(0) == 0.01
