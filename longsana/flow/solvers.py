"""Solvers of many-step samplers: from noise to a clean video along the network's velocity."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor

from longsana.flow.schedule import TIMESTEPS, euler_sigmas
from longsana.runtime.defaults import plain_defaults
from longsana.runtime.errors import InputError


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
        """x (B, C, T, H, W) after step `index`, from 0, along a velocity of its shape."""
        return x + (self.sigmas[index + 1] - self.sigmas[index]) * velocity


PUBLISHED = {
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
}
"""Settings of the published base command's scheduler that are not diffusers' defaults, and the solver's order."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, diffusers hands tensors to NumPy, which warns of how PyTorch takes part in that at each call."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="__array__ .*copy keyword", category=DeprecationWarning)
        yield


class DPMSolver:
    """The sampler flow_dpm-solver: DPM-Solver++ (2M, arXiv 2211.01095) as diffusers has it, on shifted noise levels.

    Its timesteps are whole. The published base command samples with it, in 50 steps.

    scheduler: a `DPMSolverMultistepScheduler` whose settings are taken but for the shift; it is left as it is.

    Raises:
        InputError: the scheduler is not made for flows, or draws noise of its own.
    """

    @plain_defaults()
    def __init__(self, shift: float, steps: int, scheduler: Any = None) -> None:
        import diffusers

        kind: Any = diffusers.DPMSolverMultistepScheduler
        settings: Mapping[str, Any] = PUBLISHED if scheduler is None else scheduler.config
        for name in ("prediction_type", "use_flow_sigmas"):
            if settings[name] != PUBLISHED[name]:
                raise InputError(f"scheduler: {name} is {settings[name]}; for flows it must be {PUBLISHED[name]}")
        if settings["algorithm_type"].startswith("sde"):
            raise InputError("scheduler: an sde algorithm draws noise of its own; needed is dpmsolver++")
        self._steps = steps
        with _quiet():
            self._scheduler = kind.from_config(settings, flow_shift=shift)
            self._scheduler.set_timesteps(steps)
        self.timesteps: tuple[int, ...] = tuple(self._scheduler.timesteps.tolist())

    @plain_defaults()
    def step(self, index: int, velocity: Tensor, x: Tensor) -> Tensor:
        """x (B, C, T, H, W) after step `index`, from 0; steps are taken in order, each from what the last returned."""
        if index == 0:
            with _quiet():
                self._scheduler.set_timesteps(self._steps)  # forgets the video before
            # Else the first timestep is looked up, and where it stands twice, as in many steps, the second is taken.
            self._scheduler.set_begin_index(0)
        following: Tensor = self._scheduler.step(velocity, self._scheduler.timesteps[index], x, return_dict=False)[0]
        return following
