"""The last chunks of a video, from which its past is made again where its prompt changes.

A state is a sum, which forgets nothing that was said under another prompt. What can be taken out of it again is what
was kept beside it: the state from before, and the clean latents to absorb (see `longsana.data.story.Change`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from longsana.data.story import Change
from longsana.state import CausalState

NAME = "recent_"
"""The beginning of the names of what is held, in checkpoints."""
STATE = CausalState._fields[:3]


class Absorb(Protocol):
    """Absorbs clean latents (B, C, T, H, W) under the prompt to come; returns the state after them."""

    def __call__(self, x0: Tensor, *, state: CausalState | None) -> CausalState: ...


class Recent:
    """The last chunks of a video, as many as its changes reach back, and the state before each if one recaches.

    Its memory is allocated with the first chunk and never grows; without a change that reaches back it is none.

    changes: the chunk before which each happens.
    frames: latent frames of the longest chunk.
    """

    def __init__(self, changes: Mapping[int, Change], frames: int) -> None:
        self.changes = {chunk: change for chunk, change in changes.items() if change.kind != "keep"}
        self._frames = frames
        self._length = max((change.chunks for change in self.changes.values()), default=0)
        self._with_states = any(change.kind == "recache" for change in self.changes.values())
        self._held: deque[_Held] = deque()
        self._spare: list[_Held] = []

    @property
    def nbytes(self) -> int:
        """Bytes that are held beside the video's own state: of K or W latents, and K states."""
        return sum(held.nbytes for held in (*self._held, *self._spare))

    def begin(self, chunk: int, state: CausalState | None, absorb: Absorb) -> CausalState | None:
        """Return the state that a chunk begins with: the one after the last chunk, or what a change makes of it."""
        change = self.changes.get(chunk)
        if change is None or state is None:
            return state
        if change.kind == "cut":
            self._forget(len(self._held))
            return emptied(state, state.frames)
        again = list(self._held)[-change.chunks :]
        assert again, f"{change}: no chunk of this video is held yet"
        if change.kind == "rebuild":
            self._forget(len(self._held) - len(again))  # what an empty state has not absorbed is no past of it
            state = emptied(state, again[0].start)
        else:
            state = again[0].before
        for held in again:
            assert state is not None
            held.keep_state(state)
            state = absorb(held.latents, state=state)
        return state

    def keep(self, x0: Tensor, before: CausalState | None, after: CausalState) -> CausalState:
        """Hold a chunk, in place of the oldest: its clean latents x0 (B, C, T, H, W) and the state before it.

        Returns the state after it, as it is.
        """
        if self._length:
            start = after.frames - x0.shape[2]
            self._hold(x0, start, (before or emptied(after, start)) if self._with_states else None)
        return after

    def tensors(self) -> dict[str, Tensor]:
        """Name what is held, the oldest chunk first, for `take`. Numbers are scalars, on the CPU."""
        found: dict[str, Tensor] = {}
        for number, held in enumerate(self._held):
            own, numbers = {"x0": held.latents}, {"start": held.start}
            if held.before is not None:
                own |= dict(zip(STATE, held.before[:3], strict=True))
                numbers["sinks"] = held.before.sinks
            own |= {name: torch.tensor(value, dtype=torch.int64, device="cpu") for name, value in numbers.items()}
            found |= {f"{NAME}{number:03d}_{name}": tensor for name, tensor in own.items()}
        return found

    def take(self, tensors: Mapping[str, Tensor], device: torch.device | str) -> None:
        """Hold what `tensors` gave, of the same shapes, on a device; others that it holds beside them are not read."""
        count = sum(name.startswith(NAME) and name.endswith("_x0") for name in tensors) if self._length else 0
        for number in range(count):
            own = {name: tensors[f"{NAME}{number:03d}_{name}"] for name in ("x0", "start")}
            before, start = None, int(own["start"])
            if self._with_states:
                kv, k_sum, tail = (tensors[f"{NAME}{number:03d}_{name}"].to(device) for name in STATE)
                before = CausalState(kv, k_sum, tail, start, int(tensors[f"{NAME}{number:03d}_sinks"]))
            self._hold(own["x0"].to(device), start, before)

    def _hold(self, x0: Tensor, start: int, before: CausalState | None) -> None:
        if not self._held and not self._spare:
            size = (*x0.shape[:2], self._frames, *x0.shape[3:])
            self._spare = [_Held.empty(x0, size, before) for _ in range(self._length)]
        held = self._spare.pop() if self._spare else self._held.popleft()
        held.keep_latents(x0, start)
        if before is not None:
            held.keep_state(before)
        self._held.append(held)

    def _forget(self, oldest: int) -> None:
        self._spare += [self._held.popleft() for _ in range(oldest)]


def emptied(state: CausalState, frames: int) -> CausalState:
    """A state without a past, with the shapes of `state`, whose next frame is `frames`."""
    kv, k_sum, tail = map(torch.zeros_like, state[:3])
    return CausalState(kv, k_sum, tail, frames)


@dataclass
class _Held:
    """A place for one chunk: its latents in a flat buffer, of their shape `shape`, and the state before it."""

    buffer: Tensor
    shape: tuple[int, ...]
    before: CausalState | None
    start: int = 0

    @classmethod
    def empty(cls, like: Tensor, shape: tuple[int, ...], state: CausalState | None) -> _Held:
        """A place for latents like `like` of at most this shape, and for a state like `state`, if there is one."""
        room = torch.Size(shape).numel()
        return cls(like.new_empty(room), shape, None if state is None else emptied(state, 0))

    @property
    def latents(self) -> Tensor:
        return self.buffer[: torch.Size(self.shape).numel()].view(self.shape)

    @property
    def nbytes(self) -> int:
        return self.buffer.nbytes + (0 if self.before is None else self.before.nbytes)

    def keep_latents(self, x0: Tensor, start: int) -> None:
        self.shape, self.start = tuple(x0.shape), start
        self.latents.copy_(x0)

    def keep_state(self, state: CausalState) -> None:
        """Copy a state, if it has a place here and is not the one that lies here already."""
        if self.before is None or state is self.before:
            return
        for place, values in zip(self.before[:3], state[:3], strict=True):
            place.copy_(values)
        self.before = self.before._replace(frames=state.frames, sinks=state.sinks)
