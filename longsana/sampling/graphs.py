"""CUDA graphs for inference. See `training/graphs.py` for training.

After the first chunks of a process passes are one launch each, without gaps between kernels. The kernels are those of
the network itself, which is the slow twin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from longsana.models.dit import LongSanaDiT
from longsana.models.embeddings import Text, TextMemory
from longsana.runtime.graphs import Recording
from longsana.runtime.peers import Peers
from longsana.state import CausalState

PLAIN_PASSES = 5
"""Passes of a kind before one is recorded, the next chunk's: the operations' kernels are compiled by then."""


class _Kind(NamedTuple):
    """The kind of a recording: shapes and dtypes, and how many chunks have joined the sinks."""

    tensors: tuple[tuple[torch.Size, torch.dtype], ...]
    sinks: int


class _Place:
    """A place for a batch of captions, of any length up to `most` tokens, that recordings read.

    text: what is there, as the network takes it. Captions with a mask are all of its length.
    """

    def __init__(self, like: TextMemory, most: int) -> None:
        batch, heads, length, dim = like.layers[0][0].shape
        most = most if like.mask is None else length
        # Zeros, since plain operations look at what they then leave out.
        layers = [(k.new_zeros(batch, heads, most, dim), v.new_zeros(batch, heads, most, dim)) for k, v in like.layers]
        lengths = torch.zeros(batch, dtype=torch.int32, device=like.layers[0][0].device)
        self.text = TextMemory(layers, lengths if like.mask is None else like.mask.clone())
        self._last: TextMemory | None = None

    def takes(self, text: TextMemory) -> bool:
        """Tell whether there is room for these captions."""
        (own, _), (given, _) = self.text.layers[0], text.layers[0]
        masks = None if text.mask is None else text.mask.shape
        if masks is not None or self.text.mask is None or self.text.mask.dim() == 2:
            return self.text.mask is not None and self.text.mask.shape == masks
        return len(own) == len(given) and given.shape[2] <= own.shape[2]

    def put(self, text: TextMemory) -> None:
        """Put captions there, unless they are those of the last call."""
        if text is self._last:
            return
        self._last, length = text, text.layers[0][0].shape[2]
        own = [part[:, :, :length] for layer in self.text.layers for part in layer]
        torch._foreach_copy_(own, [part for layer in text.layers for part in layer])
        assert self.text.mask is not None
        if text.mask is None:
            self.text.mask.fill_(length)
        else:
            self.text.mask.copy_(text.mask)


@dataclass
class _Known:
    kind: _Kind
    passes: int = 0
    recording: RecordedPass | None = None


class ReplayedNetwork:
    """A network on one GPU, for passes without gradients, each with a caption that `cache_caption` made.

    Values in, values out, like the network: what it returns is the caller's own. The first passes of each kind are the
    network's own. A caption is copied to where recordings read it, so that they serve any.

    most: recordings that are kept, the last ones used: of videos two, the first chunk's and the others', which other
        lengths replace. Each has two states, and all together a pass's activations.
    peers: processes that make each pass together.
    """

    def __init__(self, model: LongSanaDiT, most: int = 2, peers: Peers | None = None) -> None:
        self.model, self._most, self._peers = model, most, peers
        self._known: list[_Known] = []
        self._place: _Place | None = None

    def __call__(
        self, x: Tensor, t: Tensor, text: Text, *, state: CausalState | None = None
    ) -> tuple[Tensor, CausalState]:
        assert isinstance(text, TextMemory), "captions whose keys and values are there"
        if self._place is None or not self._place.takes(text):
            self._known, self._place = [], _Place(text, self.model.config.caption_length)
        self._place.put(text)
        text, state = self._place.text, state or self.model.empty_state(len(x), *x.shape[3:])
        kind = _Kind(tuple((part.shape, part.dtype) for part in (x, t, *state[:3])), state.sinks)
        own = next((known for known in self._known if known.kind == kind), None) or _Known(kind)
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
    """One pass, recorded. It reads the network's weights and the captions where they lie. pool: see `Recording`."""

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
