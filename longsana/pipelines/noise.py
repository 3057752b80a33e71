"""Noise of a diffusers pipeline, from generators or latents that are given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longsana.flow.noise import Noise, PromptNoise
from longsana.pipelines.arguments import check_numbers
from longsana.runtime.errors import InputError

SEEDS = 2**63 - 1
LARGEST = 1e4
"""A latent that is given. Noise has a standard deviation of 1."""


def check_generator(generator: object) -> None:
    """Refuse what is no generator.

    Raises:
        InputError: it is none.
    """
    if not isinstance(generator, torch.Generator):
        raise InputError(f"generator: a {type(generator).__name__}; a torch.Generator is needed")


def take_seed(generator: torch.Generator | None) -> int:
    """The seed that a generator stands for, which is then another: it is advanced by one draw.

    `initial_seed()` if nothing was drawn from it yet, else the draw. None is torch's global generator, which draws.

    Raises:
        InputError: it is no generator.
    """
    if generator is None:
        return int(torch.randint(SEEDS, (), dtype=torch.int64, device="cpu"))
    check_generator(generator)
    fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    unused = torch.equal(generator.get_state(), fresh.get_state())
    drawn = int(torch.randint(SEEDS, (), generator=generator, dtype=torch.int64, device=generator.device))
    return generator.initial_seed() if unused else drawn


@dataclass(frozen=True)
class GivenNoise:
    """Latents (B, C, T, h, w) of a whole video to begin with; later steps draw from `later`."""

    latents: Tensor
    later: Noise

    def draw(self, start: int, step: int, shape: Sequence[int], device: torch.device | str) -> Tensor:
        """Give (B, *shape), float32; see `Noise`."""
        if step > 0:
            return self.later.draw(start, step, shape, device)
        return self.latents[:, :, start : start + shape[1]].to(device, torch.float32)


def check_noise(
    count: int,
    generator: torch.Generator | list[torch.Generator] | None,
    latents: Tensor | None,
    shape: tuple[int, ...],
) -> None:
    """Refuse what `batch_noise` cannot make noise of for `count` videos; no generator is advanced.

    Raises:
        InputError: `latents` has another shape or dtype, or numbers that are not finite or too large; there are more
            or fewer generators than prompts, or they are none.
    """
    if latents is not None:
        if tuple(latents.shape) != shape:
            raise InputError(f"latents has shape {tuple(latents.shape)}: this batch needs {shape}")
        check_numbers("latents", latents, LARGEST)
    if isinstance(generator, list | tuple):
        if len(generator) != count:
            raise InputError(f"generator: {len(generator)} for {count} videos; give one, or one for each")
        for own in generator:
            check_generator(own)
    elif generator is not None:
        check_generator(generator)


def batch_noise(
    texts: Sequence[str],
    generator: torch.Generator | list[torch.Generator] | None,
    latents: Tensor | None,
) -> Noise:
    """Noise for a batch of prompts; equal ones are told apart by their place, unless each has a generator of its own.

    generator: one, which is advanced, or one for each prompt. latents: (B, C, T, h, w), to begin with instead of
    noise. Both have passed `check_noise`.
    """
    if isinstance(generator, list | tuple):
        noise = PromptNoise([take_seed(own) for own in generator], [(text, 0) for text in texts])
    else:
        seen: Counter[str] = Counter()
        prompts = []
        for text in texts:
            prompts.append((text, seen[text]))
            seen[text] += 1
        noise = PromptNoise(take_seed(generator), prompts)
    return noise if latents is None else GivenNoise(latents, noise)
