"""Noise that depends on what it is for, and on nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PromptNoise:
    """Gaussian draws as a function of (seed, prompt, chunk, step): the same on any device, in any order or batch.

    prompts: for each sample of the batch its text and which repetition of that text it is.
    """

    seed: int
    prompts: Sequence[tuple[str, int]]

    def draw(self, start: int, step: int, shape: Sequence[int], device: torch.device | str) -> Tensor:
        """(B, *shape), float32, for denoising step `step` of the chunk whose first latent frame is `start`."""
        # Drawn on the CPU: a GPU's generator gives other numbers than a CPU's.
        draws = torch.stack([self._draw(prompt, start, step, shape) for prompt in self.prompts])
        if torch.device(device).type == "cuda":
            return draws.pin_memory().to(device, non_blocking=True)
        return draws.to(device)

    def _draw(self, prompt: tuple[str, int], start: int, step: int, shape: Sequence[int]) -> Tensor:
        key = json.dumps([self.seed, *prompt, start, step]).encode()
        seed = int.from_bytes(hashlib.sha256(key).digest()[:8], "little", signed=True)
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
