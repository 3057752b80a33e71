"""CUDA graphs for inference. See `training/graphs.py` for training.

After its first chunks a video's passes are one launch each, without gaps between kernels. The kernels are those of the
network itself, which is the slow twin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from longsana.models.dit import LongSanaDiT
from longsana.models.embeddings import Text
from longsana.runtime.graphs import Recording
from longsana.runtime.peers import Peers
from longsana.state import CausalState

PLAIN_PASSES = 5
"""Passes of a kind before one is recorded, the next chunk's: the operations' kernels are compiled by then."""


class _Kind(NamedTuple):
    """The kind of a recording: a caption, shapes and dtypes, and how many chunks have joined the sinks."""

    text: Text
    tensors: tuple[tuple[torch.Size, torch.dtype], ...]
    sinks: int

    def fits(self, other: _Kind) -> bool:
        return self.text is other.text and self[1:] == other[1:]


@dataclass
class _Known:
    kind: _Kind
    passes: int = 0
    recording: RecordedPass | None = None


class ReplayedNetwork:
    """A network on one GPU, for passes without gradients with a caption that is the same object for many of them.

    Values in, values out, like the network: what it returns is the caller's own. Passes without a state, and the first
    of each kind, are the network's own.

    most: recordings that are kept, the last ones used: of one video one, which another caption or length replaces.
        Each has two states, and all together a pass's activations.
    peers: processes that make each pass together.
    """

    def __init__(self, model: LongSanaDiT, most: int = 1, peers: Peers | None = None) -> None:
        self.model, self._most, self._peers = model, most, peers
        self._known: list[_Known] = []

    def __call__(
        self, x: Tensor, t: Tensor, text: Text, *, state: CausalState | None = None
    ) -> tuple[Tensor, CausalState]:
        if state is None:
            return self.model(x, t, text, peers=self._peers)
        kind = _Kind(text, tuple((part.shape, part.dtype) for part in (x, t, *state[:3])), state.sinks)
        own = next((known for known in self._known if known.kind.fits(kind)), None) or _Known(kind)
        # The last one used first; those that make room are gone before another is recorded.
        self._known = [own, *(known for known in self._known if known is not own)][: self._most]
        own.passes += 1
        if own.passes <= PLAIN_PASSES:
            return self.model(x, t, text, state=state, peers=self._peers)
        if own.recording is None:
            own.recording = RecordedPass(self.model, x, t, text, state, self._pool, self._peers)
        return own.recording.replay(x, t, state)

    @property
    def _pool(self) -> Any:
        """The memory of the recordings, of which one is replayed at a time."""
        return next((known.recording.pool for known in self._known if known.recording is not None), None)


class RecordedPass:
    """One pass, recorded. It reads the network's weights and the caption where they lie. pool: see `Recording`."""

    def __init__(
        self,
        model: LongSanaDiT,
        x: Tensor,
        t: Tensor,
        text: Text,
        state: CausalState,
        pool: Any = None,
        peers: Peers | None = None,
    ) -> None:
        def run(x: Tensor, t: Tensor, *past: Tensor) -> list[Tensor]:
            velocity, after = model(x, t, text, state=state_of(past, state.sinks), peers=peers)
            return [velocity, *after[:3]]

        self._recording = Recording(run, [x, t, *tensors_of(state)], warm_up=run, pool=pool)
        self._sinks = model.past.sunk(state.sinks, 1)  # after the pass

    @property
    def pool(self) -> Any:
        """The graph's memory."""
        return self._recording.pool

    def replay(self, x: Tensor, t: Tensor, state: CausalState) -> tuple[Tensor, CausalState]:
        """Velocity (B, C, T, H, W) and the state after x, of the shapes that were recorded; the caller's own."""
        velocity, kv, k_sum, tail = self._recording.replay([x, t, *tensors_of(state)])
        return velocity, CausalState(kv, k_sum, tail, state.frames + x.shape[2], self._sinks)


def tensors_of(state: CausalState) -> list[Tensor]:
    """List kv, k_sum, tail with the state's shapes, and frames as a scalar, int64: a graph would keep a number."""
    return [*state[:3], torch.full((), state.frames, dtype=torch.int64, device=state.kv.device)]


def state_of(tensors: Sequence[Tensor], sinks: int) -> CausalState:
    """The state for a pass that is recorded, of tensors with the shapes of `tensors_of`."""
    kv, k_sum, tail, frames = tensors
    return CausalState(kv, k_sum, tail, cast(int, frames), sinks)
