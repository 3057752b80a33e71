"""A fleet: replicas in processes of their own, which sessions are spread over, and outlive."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol

from longsana.runtime.arguments import TEXT
from longsana.runtime.errors import InputError
from longsana.serving.owner import Moved, Ticket, ring
from longsana.serving.pace import Pace
from longsana.serving.replica import ABANDONED, Begun, Pulled
from longsana.serving.session import TOLD, Session
from longsana.serving.studio import Studio
from longsana.serving.values import Chunk, End, Figures, Full, Order

log = logging.getLogger(__name__)

POLL = 1.0
"""Seconds that a pull waits for a chunk; as often a place in the queue is looked at."""
HEAR = ABANDONED / 4
"""Seconds after which a replica is told that a session is still wanted of which nothing is pulled."""
MOVE_WITHIN = 120.0
"""Seconds in which a session whose replica is gone must have found another."""
RETRY, MOST_RETRY = 0.25, 5.0
"""Seconds between two looks for one, twice as many each time, and at most."""
FAREWELL = 5.0
"""Seconds that a fleet which is closed waits for a session's replica to hear of it."""


class Lost(Exception):
    """A replica is gone, or has not the session any more."""


class Replicas(Protocol):
    """The replicas that there are, by name. Any thread may call any method."""

    def call(self, name: str, method: str, *arguments: Any) -> Any:
        """Call a method of a `Replica`.

        Raises:
            Lost: there is no such replica, or it went while it was asked, or it does not know the session.
            InputError, Full, OSError: the replica's own.
        """

    def figures(self) -> dict[str, Figures]:
        """Measure all that answer."""

    def close(self) -> None:
        """Be done with them."""


class Fleet:
    """Takes the place of a `Studio` whose sessions are on replicas: those with the least to do get the next one.

    A session whose replica is gone, by accident or to be replaced, goes on with another one from its last snapshot:
    who watches it gets each chunk once and in order. The chunks that he has had since the snapshot are made again and
    not shown, for which he waits.

    Raises:
        InputError: no replica answers.
    """

    def __init__(self, replicas: Replicas, move_within: float = MOVE_WITHIN) -> None:
        self.replicas, self.move_within = replicas, move_within
        self.moves = self.failures = 0
        self._sessions: dict[str, FleetSession] = {}
        self._lock = threading.Lock()
        self._coming: Counter[str] = Counter()  # sessions that are on their way to a replica, and in no figures yet
        if not replicas.figures():
            raise InputError("a fleet without a replica that answers; look at its log")

    def start(self, order: Order) -> FleetSession:
        """Begin a session where there is most room; see `Studio.start`.

        Raises:
            InputError: no such video can be made, or no replica is there.
            Full: as many wait as may, everywhere.
        """
        where, begun = self.place(order, None)
        return self._take_in(FleetSession(self, order, where, begun))

    def check(self, order: Order) -> None:
        """Refuse an order as `start` would; see `Studio.check`."""
        for name in self.replicas.figures():
            try:
                self.replicas.call(name, "check", order)
                return
            except Lost:
                continue
        raise InputError("fleet: no replica is there; try again later")

    @property
    def is_alive(self) -> bool:
        """True as long as a replica answers."""
        return bool(self.replicas.figures())

    def session(self, id: str) -> FleetSession | None:
        """The session of this id, until it is closed or has failed."""
        with self._lock:
            return self._sessions.get(id)

    def figures(self) -> Figures:
        """Measure: sums over the replicas; of shares and times the mean, and the median of the first that has one."""
        found = list(self.replicas.figures().values())
        speeds = [one.real_time_factor for one in found if one.real_time_factor is not None]
        seconds = {key: value for one in reversed(found) for key, value in one.seconds_a_chunk.items()}

        def total(name: str) -> int:
            return sum(getattr(one, name) for one in found)

        return Figures(
            tuple(session for one in found for session in one.sessions),
            total("running"),
            total("waiting"),
            sum(one.load for one in found) / max(1, len(found)),
            total("memory_bytes"),
            total("most_memory_bytes"),
            seconds,
            sum(speeds) / len(speeds) if speeds else None,
            total("chunks_made"),
            total("chunks_dropped"),
            total("failures") + self.failures,
            total("snapshots"),
            total("snapshot_bytes"),
            len(found),
            self.moves,
        )

    def close(self) -> None:
        """End all sessions, and be done with the replicas."""
        with self._lock:
            sessions = list(self._sessions.values())
        for session in sessions:
            session.close()
        for session in sessions:
            session.join()
        self.replicas.close()

    # For its sessions -------------------------------------------------------------------------------------------------

    def place(self, order: Order, moved: Moved | None) -> tuple[str, Begun]:
        """Begin a session on the replica with most room; returns its name, and what has begun.

        Raises:
            InputError: the first one's that has room, which others would say too.
            Full: all are.
            Lost: none is there that can.
        """
        full: Full | None = None
        found = self.replicas.figures()

        def busy(name: str) -> tuple[float, ...]:
            one = found[name]
            held = one.memory_bytes / max(1, one.most_memory_bytes)
            return one.waiting + self._coming[name], one.load, held, one.running

        while found:
            with self._lock:
                name = min(found, key=busy)
                self._coming[name] += 1
            try:
                return name, self.replicas.call(name, "begin", order, moved)
            except Lost:
                del found[name]
            except Full as error:
                full = error
                del found[name]
            except InputError:
                raise
            except Exception:  # of that replica; another one may do
                log.exception("a replica could not begin a session")
                del found[name]
            finally:
                with self._lock:
                    self._coming[name] -= 1
        if full is not None:
            raise full
        if moved is None:
            raise InputError("fleet: no replica is there; try again later")
        raise Lost

    def forked(self, order: Order, where: str, begun: Begun) -> FleetSession:
        """Take in a session that a replica has forked off another one."""
        return self._take_in(FleetSession(self, order, where, begun))

    def left(self, session: FleetSession) -> None:
        """Forget a session that has ended."""
        with self._lock:
            self._sessions.pop(session.id, None)

    def _take_in(self, session: FleetSession) -> FleetSession:
        with self._lock:
            self._sessions[session.id] = session
        return session


class FleetSession:
    """Takes the place of a `Session` that is on a replica; see there. Any thread may call any method.

    A piece is pulled when somebody wants one, and not before, so that at most one is here. `change`, `rewind`, `fork`,
    `pause`, `resume` and `snapshot` wait for the replica, and for another one where it is gone.

    where: the replica's name.
    """

    def __init__(self, fleet: Fleet, order: Order, where: str, begun: Begun) -> None:
        self.id, self.height, self.width, self.fps = begun.id, begun.height, begun.width, begun.fps
        self.init, self.mime = begun.init, begun.mime
        self.order, self.where, self.started = order, where, time.monotonic()
        self._fleet, self._position = fleet, begun.position
        self._stay = 0  # grows when a move begins: answers of an earlier stay are none any more
        self._ticket = self._had = begun.ticket  # the newest, and that of the last chunk which is here
        self._wakes = threading.Condition()
        self._moving, self._steering = threading.Lock(), threading.Lock()
        self._callback: Callable[[], object] | None = None
        self._piece: Chunk | End | None = None
        self._wanted = self._closed = False
        self._pace, self._until = Pace(), 0.0  # media time of all that was pulled
        self._puller = threading.Thread(target=self._pull, name=f"puller of {self.id[:8]}", daemon=True)
        self._puller.start()

    @property
    def position(self) -> int:
        """The place in the queue, from 1; 0 once the session has a place of its own, or has ended."""
        with self._wakes:
            return self._position

    @property
    def state(self) -> str:
        """The state, of those that `SessionFigures` has."""
        with self._wakes:
            if self._closed:
                return "closed"
            if isinstance(self._piece, End):
                return self._piece.reason
            return "waiting" if self._position else "paused" if self._ticket.paused else "running"

    @property
    def due(self) -> float | None:
        """Seconds until the piece that is here may be taken: none, if there is one; else None."""
        with self._wakes:
            return None if self._piece is None else 0.0

    def take(self, timeout: float | None = 0.0) -> Chunk | End | None:
        """Take the next piece, if it is there and due; see `Session.take`."""
        with self._wakes:
            if self._piece is None and not self._closed:
                self._wanted = True
                self._wakes.notify_all()
                self._wakes.wait_for(lambda: self._piece is not None or self._closed, timeout)
            if self._closed and not isinstance(self._piece, End):
                self._piece = End("closed", "", self._had.chunks)
            piece = self._piece
            if isinstance(piece, Chunk):
                self._piece = None
            return piece

    def on_ready(self, callback: Callable[[], object] | None) -> None:
        """Have a function called whenever `take`, `position` or `state` may say something new; see `Session`."""
        with self._wakes:
            self._callback = callback
            self._wanted = self._wanted or callback is not None  # a pull tells of the queue as well
            self._tell()

    def change(
        self, prompt: str, event_id: str = "", policy: str | None = None, transition_chunks: int | None = None
    ) -> str:
        """Change the prompt with the next chunk that is taken; see `Session.change`."""
        id = TEXT.settle("event_id", event_id) or secrets.token_hex(8)

        def is_done(ticket: Ticket) -> bool:
            return any(event.id == id for event in (*(event for _, event in ticket.told), *ticket.waiting))

        self._steer("change", prompt, id, policy, transition_chunks, is_done=is_done)
        return id

    def pause(self) -> None:
        """Stop making chunks, and media time."""
        self._steer("pause", is_done=lambda ticket: ticket.paused)
        with self._wakes:
            self._pace.pause(time.monotonic())

    def resume(self) -> None:
        """Go on after `pause`."""
        self._steer("resume", is_done=lambda ticket: not ticket.paused)
        with self._wakes:
            self._pace.resume(time.monotonic())

    def rewind(self, chunks: int) -> None:
        """Go back by so many of the chunks that were taken; see `Session.rewind`.

        After a move a replica has no more of them than it has made again.
        """
        before = self._ticket.rewinds
        self._steer("rewind", chunks, is_done=lambda ticket: ticket.rewinds > before, back=chunks)
        with self._wakes:
            if isinstance(self._piece, End):
                self._piece = None
            self._tell()

    def snapshot(self) -> str:
        """Save the state after the last chunk that was taken; returns its id."""
        with self._steering:
            return str(self._ask("snapshot")[1])

    def fork(self) -> FleetSession:
        """Begin a session that goes on from the last chunk that was taken, on the same replica; see `Session.fork`."""
        with self._steering:
            return self._fleet.forked(self.order, *self._ask("fork"))

    def close(self) -> None:
        """End the session; the replica is told in the background."""
        with self._wakes:
            self._closed, self._position = True, 0
            self._tell()
        self._fleet.left(self)

    def join(self) -> None:
        """Wait until the replica knows that a session which was closed has ended, or for `FAREWELL`."""
        self._puller.join(FAREWELL)

    # ------------------------------------------------------------------------------------------------------------------

    def _steer(self, method: str, *arguments: Any, is_done: Callable[[Ticket], bool], back: int = 0) -> None:
        """Do something to the session once: not again where a replica was lost after it, and before it could say so.

        back: chunks that another replica must be able to go back by.
        """
        with self._steering:
            while True:
                where, stay = self._here()
                try:
                    if self._note(self._fleet.replicas.call(where, method, self.id, *arguments), stay):
                        break
                except Lost:
                    pass
                self._move(stay, back)
                if is_done(self._ticket):
                    break
        with self._wakes:
            self._tell()

    def _ask(self, method: str) -> tuple[str, Any]:
        """Ask the replica for something that changes nothing; returns its name, and the answer."""
        while True:
            where, stay = self._here()
            try:
                return where, self._fleet.replicas.call(where, method, self.id)
            except Lost:
                self._move(stay)

    def _here(self) -> tuple[str, int]:
        """The replica's name, and which stay it is; after a move that is under way."""
        with self._moving, self._wakes:
            return self.where, self._stay

    def _note(self, ticket: Ticket, stay: int) -> bool:
        """Take a ticket; False if the session has left that stay."""
        with self._wakes:
            if stay != self._stay:
                return False
            if ticket.version > self._ticket.version:
                self._ticket = ticket
            return True

    def _pull(self) -> None:
        """The thread: it pulls a piece when one is wanted, and otherwise says now and then that somebody is there."""
        while not self._closed:
            with self._wakes:
                wants = self._wakes.wait_for(lambda: self._closed or self._wants(), HEAR)
                if self._closed or self.state == "failed":
                    continue
            try:
                where, stay = self._here()
                try:
                    if wants:
                        self._pulled(self._fleet.replicas.call(where, "pull", self.id, POLL), stay)
                    else:
                        self._note(self._fleet.replicas.call(where, "hear", self.id), stay)
                except Lost:
                    self._move(stay)
            except InputError as error:
                if not self._closed:  # meanwhile, by its viewer
                    self._fail(str(error))
            except Exception:
                log.exception("session %s", self.id)
                self._fail("an error of the server ended this video")
        self._leave()

    def _leave(self) -> None:
        """Tell the replica that the session has ended."""
        try:
            self._fleet.replicas.call(self._here()[0], "close", self.id)
        except Lost:
            log.debug("session %s: its replica is gone", self.id)
        except Exception:
            log.exception("session %s", self.id)

    def _wants(self) -> bool:
        return self._wanted and self._piece is None and not self._ticket.paused

    def _pulled(self, pulled: Pulled, stay: int) -> None:
        with self._wakes:
            if not self._note(pulled.ticket, stay):
                return  # it is made again where the session is now
            news = pulled.piece is not None or pulled.position != self._position
            self._position = pulled.position
            if (piece := pulled.piece) is not None:
                self._piece, self._wanted = piece, False
            if isinstance(piece, Chunk):
                self._had = pulled.ticket
                now, self._until = time.monotonic(), piece.pts_seconds + piece.duration_seconds
                self._pace.took(piece.pts_seconds, now, now)
            if news:
                self._tell()

    def _tell(self) -> None:
        ring(self._wakes, self._callback, self.id)

    def _fail(self, message: str) -> None:
        with self._wakes:
            self._piece, self._position = End("failed", message, self._had.chunks), 0
            self._tell()
        self._fleet.failures += 1

    # Moves ------------------------------------------------------------------------------------------------------------

    def _move(self, stay: int, back: int = 0) -> None:
        """Go on with another replica after a stay whose replica is lost.

        back: chunks that it must be able to go back by.

        Raises:
            InputError: there is none in time, or no state to go on from; or the session is closed.
        """
        with self._moving:
            with self._wakes:
                if self._stay != stay:  # another thread has moved it
                    return
                self._stay += 1
                ticket = self._ticket = self._ticket.shown(self._had)
            where, begun = self._moved(ticket, back)
            with self._wakes:
                self.where, self._ticket = where, begun.ticket
                self._had = begun.ticket
            self._fleet.moves += 1
            log.info("session %s: goes on with another replica from chunk %d", self.id, ticket.index)

    def _moved(self, ticket: Ticket, back: int) -> tuple[str, Begun]:
        """Find a replica, and have it go on from a ticket."""
        end, retry, said = time.monotonic() + self._fleet.move_within, RETRY, "no replica is there"
        while not self._closed and time.monotonic() < end:
            first = ""
            for way in self._ways(ticket, back):
                try:
                    return self._fleet.place(*way)
                except Lost:
                    break
                except Full as error:
                    said = str(error)
                    break
                except InputError as error:  # of this state; an earlier one may do
                    first = first or str(error)
            else:
                said = first or "no state of it was saved"
                break
            time.sleep(retry)
            retry = min(2 * retry, MOST_RETRY)
        raise InputError(f"session: the machine that made this video is gone, and no other could go on ({said})")

    def _ways(self, ticket: Ticket, back: int) -> Iterator[tuple[Order, Moved]]:
        """Orders with which a replica can go on, that with the least to make again first."""
        own = replace(self.order, transition_chunks=ticket.transition_chunks)
        enough = [saved for saved in ticket.saved if saved.index <= ticket.index - back] or ticket.saved
        for saved in reversed(enough):
            later = replace(own, prompt=None, image=None, film=None, snapshot=saved.id, num_frames=saved.frames)
            yield later, Moved(self.id, ticket, saved, self._ahead())
        if ticket.base is not None and ticket.index - ticket.base <= TOLD:
            yield self.order, Moved(self.id, ticket, None, self._ahead())

    def _ahead(self) -> float | None:
        with self._wakes:
            return self._pace.ahead(self._until, time.monotonic())


AnyStudio = Studio | Fleet
AnySession = Session | FleetSession
