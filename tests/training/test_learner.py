"""A learner steps like AdamW and Muon, averages, and leaves no trace of numbers that are not finite."""

from __future__ import annotations

import pytest
import torch

from longsana.training.config import AdamWConfig
from longsana.training.learner import Learner, learns_by_muon, power


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
    moments = [p.tensors()["optimizer.generator"][f"{name}.exp_avg"] for p in (free, clipped)]
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
    assert [learner.pace(step) for step in (0, 5, 10, 15, 20)] == [0.25, 0.5, 0.75, 1, 1]
    assert make().pace(0) == 1


def test_rates_fall_with_the_root_of_the_learners_own_updates(make):
    learner = make(every=5, settings={"num_warmup_steps": 2, "decay_after": 4})
    assert [learner.pace(5 * update - 5) for update in (1, 2, 4, 16, 64)] == [0.5, 1, 1, 0.5, 0.25]


def test_muon_steps_the_matrices_of_blocks_and_adamw_the_rest(make):
    """Rates of both warm up; what is no matrix of a block's linear layer steps as without Muon."""
    options = {"max_grad_norm": 1e9, "num_warmup_steps": 2}
    mixed, plain = make(settings={**options, "muon_lr": 3e-2}), make(settings=options)
    twin = make()
    matrices = {name for name in twin.weights if learns_by_muon(mixed.settings, name, twin.weights[name])}
    assert {name.split(".", 2)[2] for name in matrices} == {
        *(f"attn.{name}.weight" for name in ("qkv", "out")),
        *(f"cross_attn.{name}.weight" for name in ("q", "kv", "out")),
        *(f"feed_forward.{name}.weight" for name in ("expand", "project")),
    }
    muon = torch.optim.Muon([twin.weights[name] for name in matrices], weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step, lr in enumerate((1.5e-2, 3e-2, 3e-2)):
        for learner in (mixed, plain, twin):
            fill(learner, step)
        mixed.update(step)
        plain.update(step)
        muon.param_groups[0]["lr"] = lr
        muon.step()
    for name, weight in mixed.weights.items():
        if name in matrices:  # of other orders of sums, in bfloat16
            torch.testing.assert_close(weight, twin.weights[name], rtol=0, atol=1e-4)
            assert (weight - plain.weights[name]).abs().max() > 1e-2
        else:
            assert torch.equal(weight, plain.weights[name]), name
    moments = {name.rpartition(".")[0] for name in mixed.tensors()["optimizer.generator"] if "momentum" in name}
    assert moments == matrices


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.25])
def test_an_average_by_a_power_has_its_relative_width_at_any_length(width):
    g = power(width)
    for updates in (2_000, 20_000):
        number = torch.arange(1, updates + 1, dtype=torch.float64)
        counts = (number / updates) ** g
        counts /= counts.sum()
        spread = (counts * (number - (counts * number).sum()) ** 2).sum().sqrt()
        assert float(spread / updates) == pytest.approx(width, rel=0.02)


@pytest.mark.parametrize(("every", "start"), [(1, 0), (1, 3), (2, 5)])
def test_updates_of_an_average_by_a_power_count_by_their_number_since_its_start(make, every, start):
    learner = make(every=every, ema_weight=0.5, ema_start=start, ema_relative_width=0.2)
    name, history = "blocks.1.feed_forward.expand.weight", []
    history.append(learner.weights[name].detach().clone())
    for step in range(0, 12, every):
        fill(learner, step)
        learner.update(step)
        if step < start:
            history.clear()
        history.append(learner.weights[name].detach().clone())
    number = torch.arange(len(history) + 1, dtype=torch.float64) ** (power(0.2) + 1)
    expected = sum(float(count / number[-1]) * weight for count, weight in zip(number.diff(), history, strict=True))
    torch.testing.assert_close(learner.average[name], expected)
