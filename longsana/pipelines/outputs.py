"""Results of the pipeline, as diffusers' users expect them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers.utils import BaseOutput

from longsana.runtime.later import Later
from longsana.sampling.continuation import Continuation


@dataclass
class LongSanaVideoOutput(BaseOutput):
    """frames: of each video a list of pictures (pil); or (B, F, H, W, 3) in [0, 1] (np); or (B, F, 3, H, W) (pt); or
    normalised latents (B, C, T, h, w), float32 (latent).
    """

    frames: Any


class LongSanaVideoChunk(LongSanaVideoOutput):
    """A finished stretch of a video, and the state to go on after it.

    The frames do not wait for the pass that absorbs them: the state is made when it is first asked for, or else when
    its stream is asked for what follows. It is the same state, whenever that is, of the network as it is then.
    """

    def __init__(self, frames: Any, state: Continuation | Later[Continuation]) -> None:
        super().__init__(frames)
        self._later: Callable[[], Continuation] = state if isinstance(state, Later) else Later(lambda: state)
        super().__setitem__("state", None)  # its place among the keys

    @property
    def state(self) -> Continuation:
        return self._later()

    @state.setter
    def state(self, state: Continuation | None) -> None:
        if state is not None:
            self._later = Later(lambda: state)

    # A dict's own readers would find what stands in the state's place.

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self:
            raise KeyError(key)
        return getattr(self, key)

    def values(self) -> Any:
        return [self[key] for key in self]

    def items(self) -> Any:
        return [(key, self[key]) for key in self]

    def __reduce__(self) -> Any:
        return type(self), (self.frames, self.state)
