"""CUDA graphs of a tiny decoder: its calls are so short that a GPU would wait for their launches."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from longsana.encoders.tiny_decoder import decode
from longsana.encoders.tiny_network import TinyNetwork
from longsana.runtime.graphs import Recording

PLAIN_CALLS = 2
"""Calls of a kind before one is recorded: the operations' kernels are compiled by then."""
MOST_KINDS = 4
"""Kinds that are recorded. A chunk's groups of latents have one size, and its ends a few others."""

Kind: TypeAlias = tuple[tuple[torch.Size, torch.dtype], ...]


class ReplayedDecoder:
    """`tiny_decoder.decode` of a network on one GPU, whose later calls of a kind are replayed.

    Values in, values out, like `decode`: what it returns is the caller's own. A kind is the shapes and dtypes of
    latents and features. The recordings share their memory. The start of a video is always `decode` itself.
    """

    def __init__(self, network: TinyNetwork) -> None:
        self._network = network
        self._calls: dict[Kind, int] = {}
        self._recordings: dict[Kind, Recording] = {}

    def __call__(self, latents: Tensor, features: tuple[Tensor, ...] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Frames (B, 3, F, H, W) and features (B, C, 1, H, W) of latents (B, C, T, h, w); see `tiny_decoder.decode`."""
        if features is None:
            return decode(self._network, latents, None)
        inputs = [latents, *features]
        kind = tuple((part.shape, part.dtype) for part in inputs)
        self._calls[kind] = self._calls.get(kind, 0) + 1
        if kind not in self._recordings:
            if self._calls[kind] <= PLAIN_CALLS or len(self._recordings) == MOST_KINDS:
                return decode(self._network, latents, features)
            pool = next((recording.pool for recording in self._recordings.values()), None)
            self._recordings[kind] = Recording(self._run, inputs, warm_up=self._run, pool=pool)
        frames, *after = self._recordings[kind].replay(inputs)
        return frames, tuple(after)

    def _run(self, latents: Tensor, *features: Tensor) -> list[Tensor]:
        frames, after = decode(self._network, latents, features)
        return [frames, *after]
