"""Noise levels as published, and the algebra of rectified flow as round trips."""

from __future__ import annotations

import pytest
import torch

from longsana.config import SchedulerConfig
from longsana.flow.schedule import FlowSchedule, euler_sigmas, shift_sigma, uniform_sigmas

# Timestep: (index, sigma) for each shift; from the published table's definition, to six digits.
TABLE = {
    7.0: {
        1000: (0, 1.0),
        960: (226, 0.959957),
        889: (466, 0.889153),
        888: (469, 0.887960),
        728: (723, 0.728400),
        727: (724, 0.727410),
        0: (999, 0.006958),
    },
    5.0: {
        1000: (0, 1.0),
        960: (172, 0.960111),
        889: (384, 0.889145),
        888: (387, 0.887891),
        728: (651, 0.728297),
        727: (652, 0.727425),
        0: (999, 0.004980),
    },
    3.0: {
        1000: (0, 1.0),
        960: (111, 0.960043),
        889: (273, 0.888753),
        888: (275, 0.887755),
        728: (528, 0.728395),
        727: (530, 0.726804),
        0: (999, 0.002994),
    },
}
SHIFTS = list(TABLE)


def randn(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shift", SHIFTS)
def test_sigma_is_the_nearest_entry_of_the_shifted_table(shift):
    schedule = FlowSchedule(shift)
    t = torch.tensor(list(TABLE[shift]))
    index, sigma = zip(*TABLE[shift].values(), strict=True)
    assert schedule.sigma(t).dtype == torch.float64
    assert torch.equal(schedule.sigma(t), schedule.table()[list(index)])
    torch.testing.assert_close(schedule.sigma(t), torch.tensor(sigma, dtype=torch.float64), rtol=0, atol=5.1e-7)


@pytest.mark.parametrize("shift", SHIFTS)
def test_table(shift):
    table = FlowSchedule(shift).table()
    assert table.shape == (1000,)
    assert (table.diff() < 0).all()
    for k in (0, 1, 500, 998, 999):
        s = 1 - k / 1000
        assert float(table[k]) == pytest.approx(shift * s / (1 + (shift - 1) * s), abs=1e-14)


def test_sigma_keeps_any_shape():
    schedule, t = FlowSchedule(7.0), torch.tensor([[1000.0, 0.0, 727.0], [889.0, 960.0, 31.0]])
    assert torch.equal(schedule.sigma(t), torch.stack([schedule.sigma(row) for row in t]))
    assert schedule.sigma(torch.tensor(727)).shape == ()


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("t", [torch.tensor([889, 31]), torch.tensor([[1000, 960, 0, 5], [727, 727, 999, 1]])])
def test_round_trips(shift, t):
    schedule, x0, noise = FlowSchedule(shift), randn(0), randn(1)
    x, velocity = schedule.add_noise(x0, noise, t), noise - x0
    torch.testing.assert_close(schedule.to_x0(x, velocity, t), x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(schedule.to_velocity(x, x0, t), velocity, rtol=0, atol=1e-12)


def test_noise_of_each_frame_follows_its_own_timestep():
    schedule, x0, noise = FlowSchedule(7.0), randn(0), randn(1)
    t = torch.tensor([[1000, 960, 889, 0], [727, 31, 500, 1000]])
    x = schedule.add_noise(x0, noise, t)
    assert torch.equal(x[0, :, 0], noise[0, :, 0])
    for b in range(2):
        for f in range(4):
            sigma = float(schedule.sigma(t[b, f]))
            expected = (1 - sigma) * x0[b, :, f] + sigma * noise[b, :, f]
            torch.testing.assert_close(x[b, :, f], expected, rtol=0, atol=1e-14)


def test_x0_of_half_precision_velocities_is_computed_in_float64():
    schedule, t = FlowSchedule(7.0), torch.tensor([727, 960])
    x, velocity = randn(0, torch.float32), randn(1).bfloat16()
    sigma = schedule.sigma(t).view(2, 1, 1, 1, 1)
    x0 = schedule.to_x0(x, velocity, t)
    assert x0.dtype == torch.float32
    assert torch.equal(x0, (x.double() - sigma * velocity.double()).float())


@pytest.mark.parametrize(
    "steps",
    [(), (0,), (960, 1000), (960, 960), (1001, 500), (960, -1), (960, 0, 0), (960, 0, 727)],
)
def test_steps_that_do_not_fall_are_refused(steps):
    with pytest.raises(ValueError, match="falling timesteps"):
        FlowSchedule(7.0, steps)


@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_a_shift_that_is_not_positive_is_refused(shift):
    with pytest.raises(ValueError, match="shift"):
        FlowSchedule(shift)


def test_seen_steps():
    published = (1000, 960, 889, 727, 0)
    assert FlowSchedule(7.0, published).steps == FlowSchedule(7.0, published).seen_steps == (1000, 960, 889, 727)
    rounded = FlowSchedule(7.0, published, bf16_timesteps=True)
    assert rounded.seen_steps == (1000, 960, 888, 728)
    assert rounded.steps == (1000, 960, 889, 727)


def test_schedule_of_a_config():
    config = SchedulerConfig(inference_flow_shift=5.0, denoising_step_list=(1000, 500, 0), bf16_timesteps=True)
    assert FlowSchedule.from_config(config) == FlowSchedule(5.0, (1000, 500), bf16_timesteps=True)


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0, 8.0])
@pytest.mark.parametrize("steps", [1, 2, 20, 50])
def test_euler_grid_is_that_of_diffusers(shift, steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    ours = euler_sigmas(shift, steps)
    assert len(ours) == steps + 1
    torch.testing.assert_close(ours.float(), scheduler.sigmas, rtol=0, atol=2e-7)
    # The network truncates its timestep, so that the whole part is what matters.
    assert torch.equal((ours[:-1] * 1000).float().long(), scheduler.timesteps.long())


def test_every_twelfth_of_48_uniform_levels_is_one_of_the_four_steps():
    sigmas = uniform_sigmas(8.0, 48)
    assert sigmas.shape == (49,)
    assert sigmas.dtype == torch.float64
    expected = torch.tensor([1, 24 / 25, 8 / 9, 8 / 11, 0], dtype=torch.float64)
    torch.testing.assert_close(sigmas[::12], expected, rtol=0, atol=1e-15)
    assert (sigmas[::12] * 1000).round().tolist() == [*FlowSchedule(7.0).steps, 0]


@pytest.mark.parametrize("shift", [1.0, *SHIFTS])
@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_uniform_levels(shift, steps):
    sigmas = uniform_sigmas(shift, steps)
    assert (sigmas[0], sigmas[-1]) == (1, 0)
    assert (sigmas.diff() < 0).all()
    # The inverse of the shift is the shift by its inverse.
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    torch.testing.assert_close(shift_sigma(sigmas, 1 / shift), u, rtol=0, atol=1e-14)
    if steps == 1000:
        assert torch.equal(sigmas[:-1], FlowSchedule(shift).table())
