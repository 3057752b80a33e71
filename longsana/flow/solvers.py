"""How many-step samplers go from noise to a clean video along the network's velocity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from longsana.flow.schedule import TIMESTEPS, euler_sigmas


class Solver(Protocol):
    """Steps of falling noise level. A solver may remember earlier steps: a video begins with step 0.

    timesteps: (steps,), in (0, 1000], what the network is told at each step; it truncates fractions.
    """

    @property
    def timesteps(self) -> Sequence[float]: ...

    def step(self, index: int, velocity: Tensor, x: Tensor) -> Tensor:
        """The next x. velocity, x: (B, C, T, H, W), float32, at step `index`."""


class Euler:
    """x' = x + (sigma' - sigma) v between falling noise levels, from 1 to 0."""

    def __init__(self, sigmas: Sequence[float]) -> None:
        self.sigmas = tuple(sigmas)
        self.timesteps = tuple(sigma * TIMESTEPS for sigma in self.sigmas[:-1])

    @classmethod
    def shifted(cls, shift: float, steps: int) -> Euler:
        """The sampler flow_euler: the grid of `euler_sigmas`."""
        return cls(euler_sigmas(shift, steps).tolist())

    def step(self, index: int, velocity: Tensor, x: Tensor) -> Tensor:
        return x + (self.sigmas[index + 1] - self.sigmas[index]) * velocity


class DPMSolver:
    """The sampler flow_dpm-solver: DPM-Solver++ (2M, arXiv 2211.01095) as diffusers has it, on shifted noise levels.

    Its timesteps are whole. The published base command samples with it, in 50 steps.
    """

    def __init__(self, shift: float, steps: int) -> None:
        import diffusers

        self._steps = steps
        scheduler: Any = diffusers.DPMSolverMultistepScheduler
        self._scheduler = scheduler(
            solver_order=2,
            algorithm_type="dpmsolver++",
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=shift,
        )
        self._scheduler.set_timesteps(steps)
        self.timesteps: tuple[int, ...] = tuple(self._scheduler.timesteps.tolist())

    def step(self, index: int, velocity: Tensor, x: Tensor) -> Tensor:
        if index == 0:
            self._scheduler.set_timesteps(self._steps)  # forgets the video before
        following: Tensor = self._scheduler.step(velocity, self._scheduler.timesteps[index], x, return_dict=False)[0]
        return following
