"""CUDA graphs for inference: after its first chunks a video's passes are one launch each, without gaps between kernels.

The kernels are those of the network itself, which is the slow twin. See `training/graphs.py` for training.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from longsana.models.dit import LongSanaDiT
from longsana.models.embeddings import Text
from longsana.state import CausalState

PLAIN_PASSES = 5
"""Passes of a kind before one is recorded, the next chunk's: the operations' kernels are compiled by then."""


class _Kind(NamedTuple):
    """What a recording is of: a caption, shapes and dtypes, and how many chunks have joined the sinks."""

    text: Text
    tensors: tuple[tuple[torch.Size, torch.dtype], ...]
    sinks: int

    def fits(self, other: _Kind) -> bool:
        return self.text is other.text and self[1:] == other[1:]


class ReplayedNetwork:
    """A network on one GPU, for passes without gradients with a caption that is the same object for many of them.

    Values in, values out, like the network: what it returns is the caller's own. One recording is kept until a video
    begins or another caption comes. Its memory, beside all else: a pass's activations, and two states. Passes without
    a state, of guidance (whose captions alternate), and the first of each kind are the network's own.
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
            self._kind = self._recording = None
            return self.model(x, t, text)
        kind = _Kind(text, tuple((part.shape, part.dtype) for part in (x, t, *state[:3])), state.sinks)
        if self._kind is None or not self._kind.fits(kind):
            self._kind, self._passes, self._recording = kind, 0, None
        self._passes += 1
        if self._passes <= PLAIN_PASSES:
            return self.model(x, t, text, state=state)
        if self._recording is None:
            self._recording = Recording(self.model, x, t, text, state)
        return self._recording.replay(x, t, state)


class Recording:
    """One pass, recorded. It reads the network's weights and the caption where they lie."""

    def __init__(self, model: LongSanaDiT, x: Tensor, t: Tensor, text: Text, state: CausalState) -> None:
        self._model, self._text = model, text
        # The state's number of frames too: as a number, a graph would keep that of its first call.
        self._frames = torch.full((), state.frames, dtype=torch.int64, device=x.device)
        self._x, self._t = x.clone(), t.clone()
        kv, k_sum, tail = (part.clone() for part in state[:3])
        self._state = CausalState(kv, k_sum, tail, cast(int, self._frames), state.sinks)
        self._sinks = model.past.sunk(state.sinks, 1)  # after the pass
        side = torch.cuda.Stream()  # what a pass sets up on first use must not be part of the graph
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._run()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # whatever other threads do
            self._outputs = self._run()

    def replay(self, x: Tensor, t: Tensor, state: CausalState) -> tuple[Tensor, CausalState]:
        self._x.copy_(x)
        self._t.copy_(t)
        torch._foreach_copy_(list(self._state[:3]), list(state[:3]))
        self._frames.fill_(state.frames)
        self._graph.replay()
        velocity, kv, k_sum, tail = (output.clone() for output in self._outputs)
        return velocity, CausalState(kv, k_sum, tail, state.frames + x.shape[2], self._sinks)

    def _run(self) -> tuple[Tensor, ...]:
        velocity, after = self._model(self._x, self._t, self._text, state=self._state)
        return velocity, after.kv, after.k_sum, after.tail
