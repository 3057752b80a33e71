"""The studio as its sessions know it, and what they hand each other."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from longsana.runtime.fragments import Picture
from longsana.serving.making import Event, Point
from longsana.serving.values import Limits

if TYPE_CHECKING:
    from longsana.serving.session import Session

log = logging.getLogger(__name__)


def ring(wakes: threading.Condition, callback: Callable[[], object] | None, id: str) -> None:
    """Wake whoever waits for a session, and call whoever wants to be called; with the lock of `wakes`."""
    wakes.notify_all()
    if callback is not None:
        try:
            callback()
        except Exception as error:  # a loop that is closed has nobody who waits
            log.debug("session %s: %s", id, error)


class Dropped(Exception):
    """The chunk in progress is not wanted any more."""


class Owner(Protocol):
    """The studio, as its sessions know it. All of them share its lock."""

    lock: threading.RLock
    limits: Limits
    coding: tuple[int, int]
    """x264's crf and threads."""

    def pixel_frames(self, latents: int) -> int:
        """Count the pictures of so many latents that do not open a video."""

    def count_dropped(self, chunks: int) -> None:
        """Note chunks that were made and never taken."""

    def wake(self) -> None:
        """Look for work again; called with the lock."""

    def left(self, session: Session) -> None:
        """Give the place of a session that has ended to another; called with the lock."""

    def keeps_pace(self, session: Session) -> bool:
        """Tell whether a session has a viewer's pace, and chunks are made fast enough for it."""

    def lead(self, session: Session) -> float:
        """Seconds that a session should be ahead of its viewer."""

    def may_keep(self, session: Session) -> tuple[int, int]:
        """Count the chunks that memory lets a session go back by, and the last of them with the decoder's memory."""

    def save(self, session: Session, point: Point) -> str:
        """Save a state; returns its id. Called without the lock."""

    def save_later(self, session: Session, point: Point) -> None:
        """Save a state in the background, if the last one was; called with the lock. See `Session.saved`."""

    def forked(self, session: Session, points: list[Point], events: list[Event]) -> Session:
        """Begin a session at the last of these points of another; called with the lock."""


@dataclass
class Entry:
    """A chunk that was made and not taken. pixels: until it is coded; coded: pictures, or plain bytes, from then on."""

    pixels: np.ndarray | None
    frames: int
    point: Point
    events: tuple[Event, ...]
    completed: tuple[str, ...]
    generation_ms: float
    coded: list[Picture] | bytes | None = None
    encode_ms: float = 0.0
    ready: float = 0.0


@dataclass(frozen=True)
class Saved:
    """A state that a session has saved of itself.

    id: of the snapshot. index: `Chunk.generation_index` of the chunk that follows it. frames: pixel frames of the video
    that follow it; None: it has no end. active: see `Point`.
    """

    id: str
    index: int
    frames: int | None
    active: tuple[str, ...]


@dataclass(frozen=True)
class Ticket:
    """The facts about a session with which another studio goes on, beside its order and a state that was saved.

    version: grows with each that is made. index: `Chunk.generation_index` of the chunk that comes next. base: that of
    the order's first chunk; None: changes of prompt since then are forgotten, so that nothing can begin there again.
    chunks, pictures: that were taken. rewinds: so far. paused: whether it is. transition_chunks: of changes that do
    not say their own. saved: states to go on from, the newest last, of what is still the session's past. told: by
    index, the last change of prompt that each chunk since the first of them, or since `base`, began with. waiting:
    changes that no taken chunk has shown.
    """

    version: int
    base: int | None
    index: int
    chunks: int
    pictures: int
    rewinds: int
    paused: bool
    transition_chunks: int
    saved: tuple[Saved, ...]
    told: tuple[tuple[int, Event], ...]
    waiting: tuple[Event, ...]

    def shown(self, had: Ticket) -> Ticket:
        """The ticket of a session whose viewer has had the chunks of an earlier one alone, and none since."""
        if self.chunks == had.chunks:
            return self
        if self.rewinds != had.rewinds:  # back behind what he has not had, as well
            return replace(self, chunks=had.chunks, pictures=had.pictures)
        again = tuple(event for index, event in self.told if index >= had.index)
        return replace(
            self,
            index=had.index,
            chunks=had.chunks,
            pictures=had.pictures,
            saved=tuple(saved for saved in self.saved if saved.index <= had.index),
            told=tuple(one for one in self.told if one[0] < had.index),
            waiting=(*again, *self.waiting),
        )


@dataclass(frozen=True)
class Moved:
    """A session that goes on in another studio.

    id: which it keeps. ticket: that it had. base: the state that its order goes on from; None: as it began.
    ahead: seconds that its viewer has still to see, from the call on; None: nothing was shown yet.
    """

    id: str
    ticket: Ticket
    base: Saved | None
    ahead: float | None


class Task(NamedTuple):
    """A turn of a session: the chunk after a point; or None, a step of the film before it. epoch: see `Session`."""

    epoch: int
    point: Point | None
    events: tuple[Event, ...]
