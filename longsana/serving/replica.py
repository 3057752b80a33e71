"""A replica: the sessions of one GPU behind plain calls, as of another process, or another machine."""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass
from types import TracebackType

from longsana.runtime.errors import InputError
from longsana.serving.owner import Moved, Ticket
from longsana.serving.session import Session
from longsana.serving.studio import Studio
from longsana.serving.values import Chunk, End, Figures, Order

log = logging.getLogger(__name__)

ABANDONED = 60.0
"""Seconds after which a session ends of which nobody has asked anything: whoever had begun it is gone."""

CATCH_UP = 45.0
"""Seconds in which a session that was elsewhere must have a place here, and have caught up."""


class Elsewhere(Exception):
    """The session is not here, or no longer."""


@dataclass(frozen=True)
class Begun:
    """A session that has begun. init, mime, position: see `Session`."""

    id: str
    height: int
    width: int
    fps: float
    init: bytes
    mime: str
    position: int
    ticket: Ticket


@dataclass(frozen=True)
class Pulled:
    """An answer to `Replica.pull`. piece: None: none came in time. position: in the queue; 0: it has a place."""

    piece: Chunk | End | None
    position: int
    ticket: Ticket


class Replica:
    """The sessions of a studio, by calls from any thread, of which none holds more than a chunk of a session's.

    A chunk is pulled, one a call: for whoever does not ask nothing is made ahead that its session would not hold
    anyway, and nothing lies on the way. Each answer has the session's `Ticket`, with which and the last snapshot
    another replica goes on, should this one be gone.

    studio: of a fleet; whoever made it closes it, after this.
    """

    def __init__(self, studio: Studio, abandoned: float = ABANDONED) -> None:
        self.studio = studio
        self._abandoned = abandoned
        self._sessions: dict[str, Session] = {}  # those that have failed too, until somebody has heard of it
        self._heard: dict[str, float] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._watch = threading.Thread(target=self._look, name="sessions that nobody wants", daemon=True)
        self._watch.start()

    def check(self, order: Order) -> None:
        """Refuse an order as `begin` would; see `Studio.check`."""
        self.studio.check(order)

    def begin(self, order: Order, moved: Moved | None = None) -> Begun:
        """Begin a session. moved: go on with one that was elsewhere; it returns when that has caught up.

        Raises:
            InputError: see `Studio.start` and `Session.catch_up`.
            Full: as many wait as may, or it took too long.
            Elsewhere: the studio is closed.
        """
        began = time.monotonic()
        try:
            if moved is None:
                return self._begun(self.studio.start(order))
            self.close(moved.id)  # of an earlier stay
            session = self.studio.start(order, moved)
            try:
                session.catch_up(moved, began, CATCH_UP)
            except BaseException:
                session.close()
                raise
            return self._begun(session)
        except InputError as error:
            if self.studio.is_alive:
                raise
            raise Elsewhere(str(error)) from error

    def pull(self, id: str, timeout: float) -> Pulled:
        """Take the next piece of a session, as soon as it is there and due, or say after `timeout` seconds that there
        is none."""
        session = self._known(id)
        piece = session.take(timeout)
        return Pulled(piece, session.position, session.ticket())

    def hear(self, id: str) -> Ticket:
        """Note that somebody still wants a session."""
        return self._known(id).ticket()

    def change(self, id: str, prompt: str, event_id: str, policy: str | None, transition_chunks: int | None) -> Ticket:
        """Change the prompt; see `Session.change`."""
        session = self._known(id)
        session.change(prompt, event_id, policy, transition_chunks)
        return session.ticket()

    def pause(self, id: str) -> Ticket:
        """Stop a session's time; see `Session.pause`."""
        session = self._known(id)
        session.pause()
        return session.ticket()

    def resume(self, id: str) -> Ticket:
        """Go on after a pause."""
        session = self._known(id)
        session.resume()
        return session.ticket()

    def rewind(self, id: str, chunks: int) -> Ticket:
        """Go back; see `Session.rewind`."""
        session = self._known(id)
        session.rewind(chunks)
        return session.ticket()

    def snapshot(self, id: str) -> str:
        """Save a state; see `Session.snapshot`."""
        return self._known(id).snapshot()

    def fork(self, id: str) -> Begun:
        """Begin a session that goes on from the last chunk as well; see `Session.fork`."""
        fork = self._known(id).fork()
        try:
            fork.keep()  # it has no snapshot to go on from elsewhere
        except OSError as error:
            log.warning("session %s: no snapshot was saved: %s", fork.id, error)
        except BaseException:
            fork.close()
            raise
        return self._begun(fork)

    def close(self, id: str) -> None:
        """End a session, if it is here."""
        with self._lock:
            session = self._sessions.pop(id, None)
            self._heard.pop(id, None)
        if session is not None:
            session.close()

    def figures(self) -> Figures:
        """Measure; see `Studio.figures`."""
        return self.studio.figures()

    def pid(self) -> int:
        """The process, for whoever looks after it."""
        return os.getpid()

    def stop(self) -> None:
        """Look after sessions no more; the studio's end is its own."""
        self._closed.set()
        self._watch.join()

    def __enter__(self) -> Replica:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _known(self, id: str) -> Session:
        with self._lock:
            session = self._sessions.get(id)
            if session is None:
                raise Elsewhere(id)
            self._heard[id] = time.monotonic()
        return session

    def _begun(self, session: Session) -> Begun:
        with self._lock:
            self._sessions[session.id], self._heard[session.id] = session, time.monotonic()
        parts = session.id, session.height, session.width, session.fps, session.init, session.mime
        return Begun(*parts, session.position, session.ticket())

    def _look(self) -> None:
        while not self._closed.wait(self._abandoned / 4):
            now = time.monotonic()
            with self._lock:
                old = [id for id, heard in self._heard.items() if now - heard > self._abandoned]
            for id in old:
                log.warning("session %s: nobody has asked for it in %g s; it ends", id, self._abandoned)
                self.close(id)
