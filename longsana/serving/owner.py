"""The studio as its sessions know it, and what they hand each other."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from longsana.runtime.fragments import Picture
from longsana.serving.making import Event, Point
from longsana.serving.values import Limits

if TYPE_CHECKING:
    from longsana.serving.session import Session


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
        """Save a state in the background, if the last one was; called with the lock."""

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


class Task(NamedTuple):
    """A turn of a session: the chunk after a point; or None, a step of the film before it. epoch: see `Session`."""

    epoch: int
    point: Point | None
    events: tuple[Event, ...]
