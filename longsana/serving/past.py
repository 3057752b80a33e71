"""The last chunks of a video that others share: nothing that is held is ever written to."""

from __future__ import annotations

import torch
from torch import Tensor

from longsana.data.story import Change
from longsana.runtime.errors import InputError
from longsana.sampling.recent import Absorb, Held, Kept, emptied
from longsana.state import CausalState


class SharedPast:
    """Takes the place of `Recent` where states are values that are kept anyway, for rewinds and forks.

    Not a byte is copied: what it holds are the states that the video had. It gives the states that `Recent` gives.

    held: the chunks so far, of which those that a change reaches back to are made again. most: chunks that it holds.
    whole: False if the video had chunks before those held, which are gone.
    """

    def __init__(self, held: Held, most: int, *, whole: bool = True) -> None:
        self.held = held._replace(reach=most, chunks=held.chunks[-most:])
        self.whole = whole

    def copy(self) -> Held:
        """The chunks that are held, as a value."""
        return self.held

    def begin(self, change: Change | None, state: CausalState | None, absorb: Absorb) -> CausalState | None:
        """Return the state that a chunk begins with: see `Recent.begin`.

        Raises:
            InputError: the change reaches back to chunks that are not held.
        """
        if change is None or change.kind == "keep" or state is None:
            return state
        chunks = self.held.chunks
        if change.kind == "cut":
            self._hold((), whole=True)
            return emptied(state, state.frames)
        again = chunks[-change.chunks :]
        if change.chunks > (self.held.reach if self.whole else len(chunks)):
            raise InputError(f"{change}: reaches back to chunks that are not held; {len(chunks)} of this video are")
        if not again:
            return state if change.kind == "recache" else emptied(state, state.frames)
        if change.kind == "rebuild":
            state, earlier = emptied(state, again[0].start), chunks[:0]
        else:
            if any(kept.before is None for kept in again):
                raise InputError(
                    f"{change}: the states before these chunks were not saved; rebuild the past, or keep it"
                )
            state, earlier = again[0].before, chunks[: -len(again)]
        told = []
        for kept in again:
            told.append(kept._replace(before=state))
            for piece in kept.pieces:
                state = absorb(piece, state=state)
        self._hold((*earlier, *told), whole=self.whole or change.kind == "rebuild")
        return state

    def keep(self, x0: Tensor, before: CausalState | None, after: CausalState, *, joins: bool = False) -> CausalState:
        """Hold a chunk, in place of the oldest: x0 (B, C, T, H, W) and the state before it; see `Recent.keep`."""
        *earlier, last = self.held.chunks or (None,)
        if joins and last is not None:
            joined = last._replace(latents=torch.cat([last.latents, x0], dim=2), alone=last.latents.shape[2])
            self._hold((*earlier, joined))
        else:
            start = after.frames - x0.shape[2]
            self._hold((*self.held.chunks, Kept(x0, start, before or emptied(after, start))))
        return after

    def _hold(self, chunks: tuple[Kept, ...], *, whole: bool | None = None) -> None:
        self.held = self.held._replace(chunks=chunks[-self.held.reach :])
        self.whole = (self.whole if whole is None else whole) or len(self.held.chunks) == self.held.reach
