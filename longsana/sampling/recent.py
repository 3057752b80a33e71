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
REACH = f"{NAME}reach"
TENSORS = CausalState._fields[:3]
"""The tensors of a state, in files too."""


class Absorb(Protocol):
    """Absorbs clean latents (B, C, T, H, W) under the prompt to come; returns the state after them."""

    def __call__(self, x0: Tensor, *, state: CausalState | None) -> CausalState: ...


class Holds(Protocol):
    """Holds a video's last chunks for a sampler; see `Recent`, which does it in place."""

    def begin(self, change: Change | None, state: CausalState | None, absorb: Absorb) -> CausalState | None: ...

    def keep(self, x0: Tensor, before: CausalState | None, after: CausalState, *, joins: bool = False) -> CausalState:
        """Hold a chunk, x0 (B, C, T, H, W)."""

    def copy(self) -> Held: ...


class Kept(NamedTuple):
    """A chunk that is kept: its clean latents (B, C, T, H, W), its first latent frame in the video, the state before it
    where somebody may recache, and how many latents, of a picture, were absorbed by themselves before the others."""

    latents: Tensor
    start: int
    before: CausalState | None
    alone: int = 0

    @property
    def pieces(self) -> list[Tensor]:
        """The latents (B, C, t, H, W) that were absorbed together, one after another."""
        return [piece for piece in self.latents.tensor_split([self.alone], dim=2) if piece.shape[2]]


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
        again = self.chunks[done - change.chunks :]
        with_states = change.kind != "recache" or all(kept.before is not None for kept in again)
        return change.chunks <= self.reach and with_states

    def check(self, change: Change, done: int) -> None:
        """Refuse (InputError) a change `done` chunks after these that reaches back to chunks that are not here."""
        if not self.reaches(change, done):
            raise InputError(
                f"{change}: reaches back {change.chunks} chunks, where the state holds {len(self.chunks)} and {done} "
                "come after it; go on from one that was saved with this change to come, or keep the past"
            )

    def tensors(self) -> dict[str, Tensor]:
        """Name all that is held, the oldest chunk first, for `named`. Numbers are scalars, on the CPU."""
        found: dict[str, Tensor] = {}
        if self.reach:
            found[REACH] = torch.tensor(self.reach, dtype=torch.int64, device="cpu")
        for number, kept in enumerate(self.chunks):
            own, numbers = {"x0": kept.latents}, {"start": kept.start}
            if kept.alone:
                numbers["alone"] = kept.alone
            if kept.before is not None:
                own |= dict(zip(TENSORS, kept.before[:3], strict=True))
                numbers["sinks"] = kept.before.sinks
            own |= {name: torch.tensor(value, dtype=torch.int64, device="cpu") for name, value in numbers.items()}
            found |= {f"{NAME}{number:03d}_{name}": tensor for name, tensor in own.items()}
        return found

    @classmethod
    def named(cls, tensors: Mapping[str, Tensor], device: torch.device | str | None = None) -> Held:
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
            alone = int(tensors.get(f"{NAME}{number:03d}_alone", 0))
            if "kv" in own:
                sinks = int(tensors[f"{NAME}{number:03d}_sinks"])
                before = CausalState(own["kv"], own["k_sum"], own["tail"], start, sinks)
            chunks.append(Kept(own["x0"], start, before, alone))
        # Files from before the reach was in them hold as many chunks as it.
        return cls(int(tensors[REACH]) if REACH in tensors else len(chunks), tuple(chunks))


class Recent:
    """The last chunks of a video, as many as its changes reach back, and the states before them as far as one recaches.

    Its memory is allocated with the first chunk and never grows; without a change that reaches back it is none.

    changes: all that may happen.
    frames: latent frames of the longest chunk.
    most: chunks that there will ever be to reach back to, at most; None: any number.
    """

    def __init__(self, changes: Iterable[Change], frames: int, most: int | None = None) -> None:
        changes, self._frames = tuple(changes), frames
        self._reach = max((change.chunks for change in changes), default=0)
        recached = max((change.chunks for change in changes if change.kind == "recache"), default=0)
        self._count = self._reach if most is None else min(self._reach, most)
        self._count_of_states = min(recached, self._count)
        self._places: deque[_Place] = deque()
        self._states: deque[CausalState] = deque()  # before the last places
        self._spare: list[_Place] = []
        self._spare_states: list[CausalState] = []
        self._whole = True  # False: the video has chunks before those held that a change may reach back to

    @property
    def nbytes(self) -> int:
        """Bytes that are held beside the video's own state: of K or W latents, and K states."""
        places, states = (*self._places, *self._spare), (*self._states, *self._spare_states)
        return sum(place.buffer.nbytes for place in places) + sum(state.nbytes for state in states)

    @property
    def held(self) -> Held:
        """The chunks that are held, in place: the next one overwrites them."""
        without: list[CausalState | None] = [None] * (len(self._places) - len(self._states))
        pairs = zip(self._places, [*without, *self._states], strict=True)
        return Held(
            self._reach, tuple(Kept(place.latents, place.start, before, place.alone) for place, before in pairs)
        )

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
            return emptied(state, state.frames)
        if change.chunks > (self._reach if self._whole else len(self._places)):
            raise InputError(
                f"{change}: reaches back to chunks that are not held; {len(self._places)} of this video are"
            )
        again = list(self._places)[-change.chunks :]
        if change.kind == "rebuild":
            self._forget(len(self._places) - len(again))  # what an empty state has not absorbed is no past of it
            state = emptied(state, again[0].start)
        else:
            assert len(self._states) >= len(again), f"{change}: these chunks are held for rebuilds alone"
            state = self._states[-len(again)]
        for number, place in enumerate(again, start=-len(again)):
            assert state is not None
            if -number <= len(self._states):
                self._states[number] = copied(state, self._states[number])
            for piece in place.pieces:
                state = absorb(piece, state=state)
        return state

    def keep(self, x0: Tensor, before: CausalState | None, after: CausalState, *, joins: bool = False) -> CausalState:
        """Hold a chunk, in place of the oldest: its clean latents x0 (B, C, T, H, W) and the state before it.

        Returns the state after it, as it is. joins: the latent of the call before, a picture's that was absorbed by
        itself, is the first of this chunk.
        """
        if self._count and joins:
            self._places[-1].join(x0)
        elif self._count:
            start = after.frames - x0.shape[2]
            self._hold(Kept(x0, start, (before or emptied(after, start)) if self._count_of_states else None))
        return after

    def take(self, held: Held) -> None:
        """Hold what a video held that goes on; what it did not hold, no change can reach back to."""
        chunks = held.chunks[-self._count :] if self._count else ()
        if any(kept.before is None for kept in chunks[-self._count_of_states :] if self._count_of_states):
            chunks, held = (), Held()
        self._whole = held.reach >= self._reach
        for kept in chunks:
            self._hold(kept)

    def _hold(self, kept: Kept) -> None:
        x0, before = kept.latents, kept.before
        if not self._places and not self._spare:
            room = torch.Size((*x0.shape[:2], self._frames, *x0.shape[3:])).numel()
            self._spare = [_Place(x0.new_empty(room), ()) for _ in range(self._count)]
        place = self._spare.pop() if self._spare else self._places.popleft()
        place.keep(kept)
        self._places.append(place)
        if before is not None and self._count_of_states:
            if not self._states and not self._spare_states:
                self._spare_states = [emptied(before, 0) for _ in range(self._count_of_states)]
            self._states.append(
                copied(before, self._spare_states.pop() if self._spare_states else self._states.popleft())
            )
        self._whole = self._whole or len(self._places) == self._reach

    def _forget(self, oldest: int) -> None:
        """Let go of the oldest chunks, before which there is no past."""
        self._spare += [self._places.popleft() for _ in range(oldest)]
        surplus = max(len(self._states) - len(self._places), 0)
        self._spare_states += [self._states.popleft() for _ in range(surplus)]
        self._whole = True


def emptied(state: CausalState, frames: int) -> CausalState:
    """A state without a past, with the shapes of `state`, whose next frame is `frames`."""
    kv, k_sum, tail = map(torch.zeros_like, state[:3])
    return CausalState(kv, k_sum, tail, frames)


def each_of_state(state: CausalState, change: Callable[[Tensor, int], Tensor]) -> CausalState:
    """Change every tensor of a state, of any shape; `change` is told which of its dimensions is the batch."""
    kv, k_sum, tail = (change(tensor, 1) for tensor in state[:3])
    return state._replace(kv=kv, k_sum=k_sum, tail=tail)


def copied(state: CausalState, place: CausalState) -> CausalState:
    """Copy a state's tensors, of any shape, into those of `place`; returns the state with these."""
    if state is not place:
        for own, values in zip(place[:3], state[:3], strict=True):
            own.copy_(values)
    return place._replace(frames=state.frames, sinks=state.sinks)


@dataclass
class _Place:
    """A place for one chunk's latents, of their shape `shape`, in a flat buffer."""

    buffer: Tensor
    shape: tuple[int, ...]
    start: int = 0
    alone: int = 0

    @property
    def pieces(self) -> list[Tensor]:
        return Kept(self.latents, self.start, None, self.alone).pieces

    @property
    def latents(self) -> Tensor:
        return self.buffer[: torch.Size(self.shape).numel()].view(self.shape)

    def keep(self, kept: Kept) -> None:
        self.shape, self.start, self.alone = tuple(kept.latents.shape), kept.start, kept.alone
        self.latents.copy_(kept.latents)

    def join(self, x0: Tensor) -> None:
        """Put latents (B, C, T, H, W) behind those that are here, which were absorbed by themselves."""
        self.keep(Kept(torch.cat([self.latents, x0], dim=2), self.start, None, self.shape[2]))
