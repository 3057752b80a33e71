"""The last chunks of a video, from which its past is made again where its prompt changes.

A state is a sum, which forgets nothing that was said under another prompt. What can be taken out of it again is what
was kept beside it: the state from before, and the clean latents to absorb (see `longsana.data.story.Change`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from longsana.data.story import Change
from longsana.runtime.errors import InputError
from longsana.state import CausalState

NAME = "recent_"
"""The beginning of the names of what is held, in files."""
TENSORS = CausalState._fields[:3]
"""The tensors of a state, in files too."""


class Absorb(Protocol):
    """Absorbs clean latents (B, C, T, H, W) under the prompt to come; returns the state after them."""

    def __call__(self, x0: Tensor, *, state: CausalState | None) -> CausalState: ...


class Kept(NamedTuple):
    """A chunk that is kept: its clean latents (B, C, T, H, W), its first latent frame in the video, and the state
    before it where somebody may recache."""

    latents: Tensor
    start: int
    before: CausalState | None


class Held(NamedTuple):
    """The last chunks of a video, as a value.

    reach: chunks that a change may reach back. chunks: the oldest first; fewer where the video, or what is left of it
    after a cut, has fewer.
    """

    reach: int = 0
    chunks: tuple[Kept, ...] = ()

    def each(self, change: Callable[[Tensor, int], Tensor]) -> Held:
        """Change every tensor, of any shape; `change` is told which of its dimensions is the batch."""
        return self._replace(
            chunks=tuple(
                kept._replace(
                    latents=change(kept.latents, 0), before=kept.before and each_of_state(kept.before, change)
                )
                for kept in self.chunks
            )
        )

    def reaches(self, change: Change, done: int) -> bool:
        """Tell whether a change can be made `done` chunks after these."""
        if change.chunks <= done:
            return True
        with_states = all(kept.before is not None for kept in self.chunks)
        return change.chunks <= self.reach and (change.kind != "recache" or with_states)

    def tensors(self) -> dict[str, Tensor]:
        """Name all that is held, the oldest chunk first, for `named`. Numbers are scalars, on the CPU."""
        found: dict[str, Tensor] = {}
        for number, kept in enumerate(self.chunks):
            own, numbers = {"x0": kept.latents}, {"start": kept.start}
            if kept.before is not None:
                own |= dict(zip(TENSORS, kept.before[:3], strict=True))
                numbers["sinks"] = kept.before.sinks
            own |= {name: torch.tensor(value, dtype=torch.int64, device="cpu") for name, value in numbers.items()}
            found |= {f"{NAME}{number:03d}_{name}": tensor for name, tensor in own.items()}
        return found

    @classmethod
    def named(cls, tensors: Mapping[str, Tensor], reach: int, device: torch.device | str | None = None) -> Held:
        """Read what `tensors` named, of any shape; others beside them are not read.

        device: to put them on; None: where they are.

        Raises:
            KeyError: one of them is missing.
        """
        chunks = []
        for number in range(sum(name.startswith(NAME) and name.endswith("_x0") for name in tensors)):
            own = {
                name: tensors[full].to(device or tensors[full].device)
                for name in ("x0", *TENSORS)
                if (full := f"{NAME}{number:03d}_{name}") in tensors
            }
            start, before = int(tensors[f"{NAME}{number:03d}_start"]), None
            if "kv" in own:
                sinks = int(tensors[f"{NAME}{number:03d}_sinks"])
                before = CausalState(own["kv"], own["k_sum"], own["tail"], start, sinks)
            chunks.append(Kept(own["x0"], start, before))
        return cls(reach, tuple(chunks))


class Recent:
    """The last chunks of a video, as many as its changes reach back, and the state before each if one recaches.

    Its memory is allocated with the first chunk and never grows; without a change that reaches back it is none.

    changes: all that may happen.
    frames: latent frames of the longest chunk.
    """

    def __init__(self, changes: Iterable[Change], frames: int) -> None:
        changes = tuple(changes)
        self._frames = frames
        self._reach = max((change.chunks for change in changes), default=0)
        self._with_states = any(change.kind == "recache" for change in changes)
        self._places: deque[_Place] = deque()
        self._spare: list[_Place] = []
        self._whole = True  # False: the video has chunks before those held that a change may reach back to

    @property
    def nbytes(self) -> int:
        """Bytes that are held beside the video's own state: of K or W latents, and K states."""
        return sum(place.nbytes for place in (*self._places, *self._spare))

    @property
    def held(self) -> Held:
        """The chunks that are held, in place: the next one overwrites them."""
        return Held(self._reach, tuple(Kept(place.latents, place.start, place.before) for place in self._places))

    def copy(self) -> Held:
        """The chunks that are held, as a value of its own."""
        return self.held.each(lambda tensor, batch: tensor.clone())

    def begin(self, change: Change | None, state: CausalState | None, absorb: Absorb) -> CausalState | None:
        """Return the state that a chunk begins with: the one after the last chunk, or what a change makes of it.

        Raises:
            InputError: the change reaches back to chunks that are not held.
        """
        if change is None or change.kind == "keep" or state is None:
            return state
        if change.kind == "cut":
            self._forget(len(self._places))
            self._whole = True
            return emptied(state, state.frames)
        if change.chunks > (self._reach if self._whole else len(self._places)):
            raise InputError(
                f"{change}: reaches back to chunks that are not held; {len(self._places)} of this video are"
            )
        again = list(self._places)[-change.chunks :]
        if change.kind == "rebuild":
            self._forget(len(self._places) - len(again))  # what an empty state has not absorbed is no past of it
            self._whole = True
            state = emptied(state, again[0].start)
        else:
            assert again[0].before is not None, f"{change}: these chunks are held for rebuilds alone"
            state = again[0].before
        for place in again:
            assert state is not None
            place.keep_state(state)
            state = absorb(place.latents, state=state)
        return state

    def keep(self, x0: Tensor, before: CausalState | None, after: CausalState) -> CausalState:
        """Hold a chunk, in place of the oldest: its clean latents x0 (B, C, T, H, W) and the state before it.

        Returns the state after it, as it is.
        """
        if self._reach:
            start = after.frames - x0.shape[2]
            self._hold(x0, start, (before or emptied(after, start)) if self._with_states else None)
        return after

    def take(self, held: Held) -> None:
        """Hold what a video held that goes on; what it did not hold, no change can reach back to."""
        chunks = held.chunks[-self._reach :] if self._reach else ()
        if self._with_states and any(kept.before is None for kept in chunks):
            chunks, held = (), Held()
        self._whole = held.reach >= self._reach
        for kept in chunks:
            self._hold(kept.latents, kept.start, kept.before if self._with_states else None)

    def _hold(self, x0: Tensor, start: int, before: CausalState | None) -> None:
        if not self._places and not self._spare:
            size = (*x0.shape[:2], self._frames, *x0.shape[3:])
            self._spare = [_Place.empty(x0, size, before) for _ in range(self._reach)]
        place = self._spare.pop() if self._spare else self._places.popleft()
        place.keep_latents(x0, start)
        if before is not None:
            place.keep_state(before)
        self._places.append(place)
        self._whole = self._whole or len(self._places) == self._reach

    def _forget(self, oldest: int) -> None:
        self._spare += [self._places.popleft() for _ in range(oldest)]


def emptied(state: CausalState, frames: int) -> CausalState:
    """A state without a past, with the shapes of `state`, whose next frame is `frames`."""
    kv, k_sum, tail = map(torch.zeros_like, state[:3])
    return CausalState(kv, k_sum, tail, frames)


def each_of_state(state: CausalState, change: Callable[[Tensor, int], Tensor]) -> CausalState:
    """Change every tensor of a state, of any shape; `change` is told which of its dimensions is the batch."""
    kv, k_sum, tail = (change(tensor, 1) for tensor in state[:3])
    return state._replace(kv=kv, k_sum=k_sum, tail=tail)


@dataclass
class _Place:
    """A place for one chunk: its latents in a flat buffer, of their shape `shape`, and the state before it."""

    buffer: Tensor
    shape: tuple[int, ...]
    before: CausalState | None
    start: int = 0

    @classmethod
    def empty(cls, like: Tensor, shape: tuple[int, ...], state: CausalState | None) -> _Place:
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
