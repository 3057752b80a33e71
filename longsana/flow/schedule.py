"""Rectified flow: x_t = (1 - sigma) x0 + sigma noise, velocity = noise - x0. All of its algebra lives here."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from longsana.chunks import Absorb
from longsana.config import SchedulerConfig

TIMESTEPS = 1000


@dataclass(frozen=True)
class FlowSchedule:
    """The shifted noise table and the timesteps of the distilled sampler, and how it takes a chunk into the state.

    shift: s in sigma = s u / (1 + (s - 1) u), for u = 1, 0.999, ..., 0.001.
    steps: timesteps, noisiest first, at which the distilled model denoises.
    bf16_timesteps: let the network and the x0 conversion see the steps rounded to bfloat16 (889 as 888, 727 as 728), as
        the published code does at inference.
    absorb: clean: by a pass over the chunk's clean latents at t = 0, as published; last_step: by the pass of the last
        step, if the chunk takes it.
    """

    shift: float
    steps: tuple[int, ...] = (1000, 960, 889, 727)
    bf16_timesteps: bool = False
    absorb: Absorb = "clean"

    @classmethod
    def from_config(cls, config: SchedulerConfig) -> FlowSchedule:
        """
        Raises:
            ValueError: the steps do not fall, or the shift is not positive.
        """
        return cls(config.inference_flow_shift, config.denoising_step_list, config.bf16_timesteps, config.absorb)

    def __post_init__(self) -> None:
        # Published lists end in a 0 that is not a denoising step.
        steps = self.steps[:-1] if self.steps and self.steps[-1] == 0 else self.steps
        if not steps or list(steps) != sorted(set(steps), reverse=True) or not 0 < steps[-1] <= steps[0] <= TIMESTEPS:
            raise ValueError(f"denoising steps {self.steps}: need falling timesteps in [1, {TIMESTEPS}]")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"flow shift {self.shift}: must be positive")
        object.__setattr__(self, "steps", steps)

    @property
    def seen_steps(self) -> tuple[int, ...]:
        """`steps` as the network sees them."""
        if not self.bf16_timesteps:
            return self.steps
        return tuple(torch.tensor(self.steps, dtype=torch.int64, device="cpu").to(torch.bfloat16).int().tolist())

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        """(1000,), float64: the noise levels, noisiest first."""
        u = 1 - torch.arange(TIMESTEPS, dtype=torch.float64, device=device) / TIMESTEPS
        return shift_sigma(u, self.shift)

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level of timesteps of any shape, float64: the nearest entry of the table.

        The least is that of entry 999 (0.006958 for shift 7), also for t = 0: a clean input is passed as it is.
        """
        table = self.table(t.device)
        return table[(table * TIMESTEPS - t.double()[..., None]).abs().argmin(-1)]

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, in x0's dtype. x0, noise: (B, C, T, H, W); t: (B,) or (B, T)."""
        sigma = per_frame(self.sigma(t), x0)
        return ((1 - sigma) * x0 + sigma * noise).to(x0.dtype)

    def to_x0(self, x: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
        """x0 = x_t - sigma v, (B, C, T, H, W) like x and v, computed in float64, in x's dtype. t: (B,) or (B, T)."""
        return (x - per_frame(self.sigma(t), x) * velocity).to(x.dtype)

    def to_velocity(self, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """v = (x_t - x0) / sigma, (B, C, T, H, W) like both, computed in float64, in x's dtype. t: (B,) or (B, T)."""
        return ((x - x0) / per_frame(self.sigma(t), x)).to(x.dtype)


def shift_sigma(u: Tensor, shift: float) -> Tensor:
    """Shift noise levels u in [0, 1], of any shape, towards 1: shift u / (1 + (shift - 1) u)."""
    return shift * u / (1 + (shift - 1) * u)


def euler_sigmas(shift: float, steps: int) -> Tensor:
    """(steps + 1,), float64: noise levels of the many-step Euler sampler, from 1 to 0.

    The grid of diffusers' `FlowMatchEulerDiscreteScheduler(shift=shift)`: it shifts the least level twice.
    """
    least = shift_sigma(torch.tensor(1 / TIMESTEPS, dtype=torch.float64, device="cpu"), shift)
    levels = torch.linspace(1, float(least), steps, dtype=torch.float64, device="cpu")
    return torch.cat([shift_sigma(levels, shift), levels.new_zeros(1)])


def uniform_sigmas(shift: float, steps: int) -> Tensor:
    """(steps + 1,), float64: u = 1, 1 - 1/steps, ..., 0, shifted: the grid of ODE trajectories (method.md 7.5)."""
    return shift_sigma(1 - torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps, shift)


def per_frame(values: Tensor, like: Tensor) -> Tensor:
    """(B,) or (B, T) to a shape that broadcasts over (B, C, T, H, W)."""
    return values.view(like.shape[0], 1, -1, 1, 1)
