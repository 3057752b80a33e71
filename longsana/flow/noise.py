"""Noise that depends on what it is for, and on nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Noise(Protocol):
    """A source of a sampler's noise."""

    def draw(self, start: int, step: int, shape: Sequence[int], device: torch.device | str) -> Tensor:
        """(B, *shape), float32, for denoising step `step` of the chunk whose first latent frame is `start`."""


@dataclass(frozen=True)
class PromptNoise:
    """Gaussian draws as a function of (seed, prompt, chunk, step): the same on any device, in any order or batch.

    seed: of the whole batch, or one for each of its samples.
    prompts: for each sample of the batch its text and which repetition of that text it is.
    """

    seed: int | Sequence[int]
    prompts: Sequence[tuple[str, int]]

    def draw(self, start: int, step: int, shape: Sequence[int], device: torch.device | str) -> Tensor:
        """(B, *shape), float32, for denoising step `step` of the chunk whose first latent frame is `start`."""
        seeds = [self.seed] * len(self.prompts) if isinstance(self.seed, int) else self.seed
        # Drawn on the CPU: a GPU's generator gives other numbers than a CPU's.
        drawn = [
            torch.randn(
                *shape, generator=keyed_generator(seed, *prompt, start, step), dtype=torch.float32, device="cpu"
            )
            for seed, prompt in zip(seeds, self.prompts, strict=True)
        ]
        return to_device(torch.stack(drawn), device)


def keyed_generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose draws are a function of the key and the kind of device, independent of other keys'."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor of any shape and dtype to a device, without waiting for a GPU."""
    if torch.device(device).type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)
