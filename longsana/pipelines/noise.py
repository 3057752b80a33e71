"""Where a diffusers pipeline's noise comes from: generators, or latents that are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longsana.sampling.noise import Noise

SEEDS = 2**63 - 1


def take_seed(generator: torch.Generator | None) -> int:
    """The seed that a generator stands for, which is then another: it is advanced by one draw.

    `initial_seed()` if nothing was drawn from it yet, else the draw. None is torch's global generator, which draws.
    """
    if generator is None:
        return int(torch.randint(SEEDS, ()))
    fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    unused = torch.equal(generator.get_state(), fresh.get_state())
    drawn = int(torch.randint(SEEDS, (), generator=generator, device=generator.device))
    return generator.initial_seed() if unused else drawn


@dataclass(frozen=True)
class GivenNoise:
    """Latents (B, C, T, h, w) of a whole video to begin with; later steps draw from `later`."""

    latents: Tensor
    later: Noise

    def draw(self, start: int, step: int, shape: Sequence[int], device: torch.device | str) -> Tensor:
        if step > 0:
            return self.later.draw(start, step, shape, device)
        return self.latents[:, :, start : start + shape[1]].to(device, torch.float32)
