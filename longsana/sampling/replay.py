"""CUDA graphs for inference: after its first chunks a video's passes are one launch each, without gaps between kernels.

The kernels are those of the network itself, which is the slow twin. See `training/replay.py` for training.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from longsana.models.dit import LongSanaDiT
from longsana.models.embeddings import Text
from longsana.state import CausalState

PLAIN_PASSES = 5
"""Passes of a kind before one is recorded, a chunk's: all kernels are compiled, and short videos are not worth it."""


class _Kind(NamedTuple):
    """What a recording holds on to: the caption it reads, and the shapes it was made for."""

    text: Text
    shapes: tuple[torch.Size, ...]

    def fits(self, text: Text, shapes: tuple[torch.Size, ...]) -> bool:
        return self.text is text and self.shapes == shapes


class ReplayedNetwork:
    """A network on one GPU, for passes without gradients with a caption that is the same object for many of them.

    Values in, values out, like the network: what it returns is the caller's own. One recording is kept; its memory is a
    pass's activations, once. Passes without a state, of guidance (whose captions alternate), and the first of each kind
    are the network's own.
    """

    def __init__(self, model: LongSanaDiT) -> None:
        self.model = model
        self._kind: _Kind | None = None
        self._passes = 0
        self._recording: Recording | None = None

    def __call__(
        self, x: Tensor, t: Tensor, text: Text, *, state: CausalState | None = None
    ) -> tuple[Tensor, CausalState]:
        if state is None:
            return self.model(x, t, text)
        shapes = (x.shape, t.shape, *(part.shape for part in state[:3]))
        if self._kind is None or not self._kind.fits(text, shapes):
            self._kind, self._passes, self._recording = _Kind(text, shapes), 0, None
        self._passes += 1
        if self._passes <= PLAIN_PASSES:
            return self.model(x, t, text, state=state)
        if self._recording is None:
            self._recording = Recording(self.model, x, t, text, state)
        return self._recording.replay(x, t, state)


class Recording:
    """One pass, recorded."""

    def __init__(self, model: LongSanaDiT, x: Tensor, t: Tensor, text: Text, state: CausalState) -> None:
        # The state's number of frames too: as a number, a graph would keep that of its first call.
        self._frames = torch.zeros((), dtype=torch.int64, device=x.device)
        self._x, self._t = x.clone(), t.clone()
        self._state = CausalState(state.kv.clone(), state.k_sum.clone(), state.tail.clone(), cast(int, self._frames))
        self._given: CausalState | None = None
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # whatever other threads do
            velocity, after = model(self._x, self._t, text, state=self._state)
        self._outputs = (velocity, *after[:3])

    def replay(self, x: Tensor, t: Tensor, state: CausalState) -> tuple[Tensor, CausalState]:
        self._x.copy_(x)
        self._t.copy_(t)
        if state is not self._given:  # a chunk's denoising steps all see the same past
            torch._foreach_copy_(list(self._state[:3]), list(state[:3]))
            self._frames.fill_(state.frames)
            self._given = state
        self._graph.replay()
        velocity, kv, k_sum, tail = (output.clone() for output in self._outputs)
        return velocity, CausalState(kv, k_sum, tail, state.frames + x.shape[2])
