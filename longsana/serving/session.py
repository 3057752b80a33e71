"""A session: one video that is made while somebody watches it, and steers it."""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Literal

from longsana.runtime.arguments import TEXT
from longsana.runtime.errors import InputError
from longsana.serving.coders import Code
from longsana.serving.making import Event, Made, Point, Video, nbytes, thinned
from longsana.serving.media import ChunkEncoder
from longsana.serving.orders import event_of
from longsana.serving.owner import Dropped, Entry, Moved, Owner, Saved, Task, Ticket, ring
from longsana.serving.pace import Pace
from longsana.serving.values import Chunk, End, Full, Order, SessionFigures

log = logging.getLogger(__name__)

MOST_OF_AN_ID = 200
"""Characters of an event's id."""
KNOWN_IDS = 1024
"""Last events of a session whose ids may not be used again."""
FOR_A_PLACE = 5.0
"""Seconds in which a session that comes from elsewhere must have a place."""
PATIENCE = 5.0
"""Seconds after which a session without a pace has a turn before viewers who are not dry yet."""
UNPACED = 2
"""Chunks that are made ahead of a viewer that has no pace."""
TOLD = 64
"""Last chunks of which a session knows how their prompts changed: another studio makes at most so many again."""


class Session:
    """A live video. Any thread may call any method; none but `take` and `snapshot` waits for the worker or a disk.

    What was made and not yet taken is never binding: a change of prompt, a rewind or a fork counts from the last chunk
    that was taken, and what comes after that is made again. Then the session gives, to the bit, the pictures of one
    that was told the same from the start; where memory is short, a rewind does so to rounding (see `thinned`). One
    viewer takes its pieces; `fork` is for another one. It has its place, and the memory of its last chunks, until it is
    closed or fails, also when all of it was taken.

    id: 32 random hex digits. height, width, fps: of the video. started: when it was ordered (`time.monotonic`).
    """

    def __init__(
        self,
        owner: Owner,
        order: Order,
        video: Video,
        begin: Iterable[Point],
        opening: Iterator[Point | None] | None = None,
        id: str | None = None,
    ) -> None:
        """begin: the points that it may go back to, the last of which it begins at; none: `opening` makes it.

        id: of a session that was in another studio.
        """
        self.id = secrets.token_hex(16) if id is None else id
        self.height, self.width = video.size
        self.fps, self.started = video.fps, time.monotonic()
        self.order, self.video = order, video
        self.place = 0  # in the queue; 0: it has a place
        self.last_turn = 0.0
        self.saving = self.coding = False
        self._saved: deque[Saved] = deque()  # of itself
        self._stale: list[str] = []  # snapshots of what was rewound, which a viewer may still name
        self._told: deque[tuple[int, Event]] = deque()
        self._base: int | None = video.done
        self._rewinds = self._version = 0
        self._owner, self._opening = owner, opening
        self._state: Literal["running", "finished", "closed", "failed"] = "running"
        self._message, self._paused = "", False
        self._wakes = threading.Condition(owner.lock)
        self._callback: Callable[[], object] | None = None
        self._encoder: ChunkEncoder | None = None
        self._rate, self._init, self._mime = self.fps, b"", ""
        if order.media == "mp4":
            self._encoder = encoder = ChunkEncoder(self.width, self.height, self.fps, *owner.coding)
            self._rate, self._init, self._mime = float(encoder.rate), encoder.init, encoder.mime
        # The points that may be gone back to, the last one after the chunk that was taken last.
        self._points: deque[Point] = deque(begin)
        self._unsent: deque[Entry] = deque()
        self._pending: deque[Event] = deque()
        self._ids: deque[str] = deque(maxlen=KNOWN_IDS)
        self._carried: tuple[tuple[str, ...], tuple[str, ...]] = (), ()
        self._epoch = 0  # counts what has made the chunk in progress worthless
        self._pace = Pace()
        self._chunks = self._pictures = 0  # that were taken
        self._first: float | None = None

    @property
    def position(self) -> int:
        """The place in the queue, from 1; 0 once the session has a place of its own, or has ended."""
        with self._owner.lock:
            return self.place

    @property
    def state(self) -> str:
        """The state, of those that `SessionFigures` has."""
        with self._owner.lock:
            if self._state != "running":
                return self._state
            return "waiting" if self.place else "paused" if self._paused else "running"

    @property
    def init(self) -> bytes:
        """The init segment of the mp4, from the start on; b"" of pixels."""
        return self._init

    @property
    def mime(self) -> str:
        """The media's type, as in 'video/mp4; codecs="avc1.42c00b"'; "" of pixels."""
        return self._mime

    def take(self, timeout: float | None = 0.0) -> Chunk | End | None:
        """Take the next piece, if it is there and due.

        timeout: seconds to wait for one; None waits for ever. Returns None if nothing came; the end again and again.
        """
        end = None if timeout is None else time.monotonic() + timeout
        with self._owner.lock:
            while True:
                now = time.monotonic()
                due = self.due
                if due == 0:
                    chunk, pack = self._taken(now)
                    break
                if (ended := self._ended()) is not None:
                    return ended
                left = math.inf if end is None else end - now
                if left <= 0:
                    return None
                wait = min(left, math.inf if due is None else due)
                self._wakes.wait(None if wait == math.inf else wait)
        return replace(chunk, data=pack())  # the worker, who makes chunks, does not wait for the copy

    @property
    def due(self) -> float | None:
        """Seconds until the piece that is ready may be taken: 0 if it may be now; None if none is ready.

        A pace is kept by the clock, of which nobody is woken: after `take` gave None, wait for this long or for a call
        of `on_ready`'s, whichever is sooner.
        """
        with self._owner.lock:
            self._pass_empty()
            if not self._unsent or self._unsent[0].coded is None or self._paused:
                return None
            if not self.order.pace:
                return 0.0
            due = self._pace.due(self._seconds(self._pictures), self._owner.lead(self))
            return max(0.0, due - time.monotonic())

    def on_ready(self, callback: Callable[[], object] | None) -> None:
        """Have a function called, from any thread, whenever `take`, `due`, `position` or `state` may say something new.

        It is called at once, too, must return quickly and not call the session; in asyncio it is
        `lambda: loop.call_soon_threadsafe(event.set)`. None: nobody.
        """
        with self._owner.lock:
            self._callback = callback
            self.tell()

    def change(
        self, prompt: str, event_id: str = "", policy: str | None = None, transition_chunks: int | None = None
    ) -> str:
        """Change the prompt with the next chunk that is taken; returns the event's id, made here if it is "".

        prompt: a text that may begin with what becomes of the past, as in `[cut] a lighthouse`.
        policy: keep, recache=K, rebuild=W or cut, where the text does not say it; None: the session's own.
        transition_chunks: over which one caption becomes the other; None: the session's own.

        Raises:
            InputError: one of them is none, the id is that of an earlier event, the policy reaches farther back than
                `Limits.kept`, too many changes wait, or the session has ended.
        """
        with self._owner.lock:
            self._check_alive()
            done = self._points[-1].chunk if self._points else 0
            id = TEXT.settle("event_id", event_id) or secrets.token_hex(8)
            if len(id) > MOST_OF_AN_ID:
                raise InputError(f"event_id: of {len(id):,} characters; must have at most {MOST_OF_AN_ID}")
            if id in self._ids:
                raise InputError(f"event_id={id}: names an earlier change of this session; give each one of its own")
            event = event_of(prompt, id, policy, transition_chunks, self.video, done, self._owner.limits)
            waiting = sum(len(entry.events) for entry in self._unsent) + len(self._pending)
            if waiting >= self._owner.limits.most_events:
                raise InputError(f"prompt: {waiting} changes wait for a chunk that is taken; wait for one")
            if not self.video.length(done):
                raise InputError("prompt: the video has ended; rewind it, or begin another")
            self._drop()
            self._ids.append(id)
            self._pending.append(event)
            self._owner.wake()
            return id

    def pause(self) -> None:
        """Stop making chunks, and media time; what is ready is not given out until `resume`."""
        with self._owner.lock:
            self._check_alive()
            self._paused = True
            self._pace.pause(time.monotonic())
            self.tell()

    def resume(self) -> None:
        """Go on after `pause`; nothing in the pictures tells of it."""
        with self._owner.lock:
            self._check_alive()
            self._paused = False
            self._pace.resume(time.monotonic())
            self.tell()
            self._owner.wake()

    def snapshot(self) -> str:
        """Save the state after the last chunk that was taken; returns its id. Waits for the disk.

        Raises:
            InputError: the studio has no folder of snapshots, or nothing was taken yet.
            OSError: the disk is full, or failed; the session goes on.
        """
        with self._owner.lock:
            self._check_alive()
            if not self._points or self._points[-1].after is None:
                raise InputError("snapshot: nothing was taken yet that could be gone on from; take a chunk first")
            point = self._points[-1]
        return self._owner.save(self, point)

    def keep(self) -> None:
        """Save a state of itself at once, as `Order.snapshot_every` has it done; waits for the disk.

        Raises:
            InputError: the studio has no folder of snapshots.
            OSError: the disk is full, or failed.
        """
        with self._owner.lock:
            if not self._points or self._points[-1].after is None:
                return
            point, rewinds = self._points[-1], self._rewinds
        id = self._owner.save(self, point)
        with self._owner.lock:
            self.saved(id, point, rewinds)

    def fork(self) -> Session:
        """Begin a session that goes on from the last chunk that was taken as this one would; states are shared.

        Its pieces count from 0, changes that wait for a chunk wait in both, and it waits in the queue if there is no
        place.

        Raises:
            Full: see `Studio.start`.
            InputError: the session has ended by failure or `close`.
        """
        with self._owner.lock:
            self._check_alive()
            if not self._points:
                raise InputError("fork: its film is not absorbed yet; wait for the first chunk")
            events = [event for entry in self._unsent for event in entry.events]
            return self._owner.forked(self, list(self._points), [*events, *self._pending])

    def rewind(self, chunks: int) -> None:
        """Go back by so many of the chunks that were taken; the next one that is taken follows the one before them.

        Its number in the video falls, presentation time goes on. The prompt is again what it was there; changes that
        still wait for a chunk are forgotten.

        Raises:
            InputError: fewer are kept; the message says how many.
        """
        with self._owner.lock:
            self._check_alive()
            kept = len(self._points) - 1
            if not isinstance(chunks, int) or not 1 <= chunks <= kept:
                raise InputError(f"rewind={chunks!r:.20}: {max(kept, 0)} chunks are kept that were taken")
            for _ in range(chunks):
                self._points.pop()
            self._drop()
            self._pending.clear()
            self._carried = (), ()
            self._rewinds += 1
            while self._saved and self._saved[-1].index > self._index:
                self._stale.append(self._saved.pop().id)
            while self._told and self._told[-1][0] >= self._index:
                self._told.pop()
            self._owner.wake()

    def ticket(self) -> Ticket:
        """Say what another studio has to know to go on with this session."""
        with self._owner.lock:
            self._version += 1
            waiting = [event for entry in self._unsent for event in entry.events]
            return Ticket(
                self._version,
                self._base,
                self._index,
                self._chunks,
                self._pictures,
                self._rewinds,
                self._paused,
                self.video.telling.transition_chunks,
                tuple(self._saved),
                tuple(self._told),
                (*waiting, *self._pending),
            )

    def catch_up(self, moved: Moved, began: float, within: float) -> None:
        """Make again what the viewer of a session that was in another studio has had, and go on after it.

        To be called once, before anything is taken. It waits for a place, and for the chunks, none of which it gives
        out. They are those of the other studio to rounding: the decoder's memory is rebuilt from the last latents.

        began: the moment from which `moved` counts (`time.monotonic`). within: seconds from then, after which it is
            given up; sooner where there is no place, as another studio may have one.

        Raises:
            InputError: a change of prompt since reaches back to what the state does not hold, or the session has ended.
            Full: it took too long.
        """
        ticket, base = moved.ticket, moved.base
        told, end = dict(ticket.told), began + within
        with self._owner.lock:
            self._base, self._version = ticket.base, ticket.version
            self._told.extend(ticket.told)
            self._ids.extend(event.id for _, event in ticket.told)
            self._saved.extend(saved for saved in ticket.saved if base and saved.index <= base.index)
            self._wait(lambda: not self.place, min(end, began + FOR_A_PLACE))
            self._wait(lambda: self._points, end)
            while self._index < ticket.index:
                if (event := told.pop(self._index, None)) is not None:
                    self._check_reach(event)
                    self._drop()
                    self._pending.append(event)
                    self._owner.wake()
                self._wait(lambda: self._unsent, end)
                self._stand_at(self._unsent.popleft().point)
                self._owner.wake()
            self._chunks, self._pictures, self._rewinds = ticket.chunks, ticket.pictures, ticket.rewinds
            self._drop()
            for event in ticket.waiting:
                self._check_reach(event)
            self.await_events(list(ticket.waiting))
            if moved.ahead is not None:
                self._pace.zero = began + moved.ahead - self._seconds(self._pictures)
            if not self.video.length(self._points[-1].chunk):
                self._state = "finished"
            if ticket.paused:
                self.pause()
            self.tell()
            self._owner.wake()

    def close(self) -> None:
        """End the session, whatever it is doing; its memory is free when this returns, or when its chunk in progress
        has been dropped. Closing again does nothing."""
        with self._owner.lock:
            if self._state not in ("closed", "failed"):
                self._leave("closed")

    # For the studio, with its lock ------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """True until the session is closed or has failed."""
        return self._state in ("running", "finished")

    @property
    def seconds(self) -> float:
        """Seconds of a chunk, of those that are not the first."""
        return self._seconds(self._owner.pixel_frames(self.video.length(max(1, self._next_point.chunk))))

    @property
    def latents(self) -> int:
        """Latent frames of the chunk that would be made next, or of the last one."""
        chunk = self._next_point.chunk
        return self.video.length(chunk) or self.video.lengths[-1]

    def wants(self) -> bool:
        """Tell whether a turn would be of use: what is made ahead of the viewer is bounded, whatever it does."""
        if self._state != "running" or self.place or self._paused:
            return False
        if self._opening is not None:
            return True
        if not self.video.length(self._next_point.chunk):
            return False
        if not self._unsent or not self.order.pace:
            return len(self._unsent) < UNPACED
        ahead = self._seconds(sum(entry.frames for entry in self._unsent))
        return ahead < self._owner.lead(self) and len(self._unsent) <= max(1, self._owner.may_keep(self)[1])

    def dry(self) -> float:
        """The moment at which its viewer has nothing left of what was made; of one that had nothing, when it ordered.

        One that keeps no pace has a turn at least each few seconds, and otherwise what others leave.
        """
        if not self._owner.keeps_pace(self):
            return max(self.started, self.last_turn) + PATIENCE
        made = self._pictures + sum(entry.frames for entry in self._unsent)
        found = self._pace.dry(self._seconds(made))
        return self.started if found is None else found

    def turn(self) -> Task:
        """Begin a turn."""
        self.last_turn = time.monotonic()
        if self._opening is not None:
            return Task(self._epoch, None, ())
        events = tuple(self._pending)
        return Task(self._epoch, self._next_point, events)

    def await_events(self, events: list[Event]) -> None:
        """Have changes of prompt wait for the next chunk."""
        self._pending.extend(events)
        self._ids.extend(event.id for event in events)

    def check(self, epoch: int) -> None:
        """Raise Dropped if a turn of this epoch is not wanted any more; needs no lock."""
        if epoch != self._epoch:
            raise Dropped

    def open_on(self) -> None:
        """Make a step of the film that comes first; called by the worker, without the lock."""
        opening = self._opening
        if opening is not None:
            point = next(opening)
            with self._owner.lock:
                if point is not None and self._opening is opening:
                    self._points, self._opening = deque([point]), None
                    self._wakes.notify_all()

    def made(self, task: Task, made: Made, seconds: float) -> Entry | None:
        """Take in a chunk that was made in a turn; None if it is not wanted any more."""
        if task.epoch != self._epoch:
            return None
        for _ in task.events:
            self._pending.popleft()
        entry = Entry(made.pixels, len(made.pixels), made.point, task.events, made.completed, 1000 * seconds)
        self._unsent.append(entry)
        self._wakes.notify_all()
        return entry

    @property
    def uncoded(self) -> Entry | None:
        """The first chunk that is still to be coded; asked with the lock."""
        return next((entry for entry in self._unsent if entry.pixels is not None), None)

    def code(self, by: Code) -> None:
        """Code the first chunk that is not, if there is one; called without the lock, by one thread at a time."""
        with self._owner.lock:
            entry, encoder = self.uncoded, self._encoder  # which goes with the session's end
            if entry is None:  # it is not wanted any more
                return
            pixels, began = entry.pixels, time.monotonic()
            assert pixels is not None
        coded = pixels.tobytes() if encoder is None else by(encoder, pixels) if len(pixels) else []
        with self._owner.lock:
            entry.ready = time.monotonic()
            entry.coded, entry.pixels, entry.encode_ms = coded, None, 1000 * (entry.ready - began)
            self.tell()

    def fail(self, message: str) -> None:
        """End with a message; nothing of its memory stays."""
        if self.alive:
            self._message = message
            self._leave("failed")

    def tell(self) -> None:
        """Wake whoever waits for this session."""
        ring(self._wakes, self._callback, self.id)

    def points(self) -> list[Point]:
        """List the points that it holds."""
        return [*self._points, *(entry.point for entry in self._unsent)]

    def saved(self, id: str, point: Point, rewinds: int) -> list[str]:
        """Note a state that was saved of itself after so many rewinds; returns the snapshots to remove in its place."""
        gone, self._stale = self._stale, []
        index = self.video.done + point.chunk
        if rewinds != self._rewinds:  # it may be of what was rewound
            return [*gone, id]
        rest = self.video.lengths[point.chunk :]
        frames = None if self.video.endless else self._owner.pixel_frames(sum(rest))
        self._saved.append(Saved(id, index, frames, point.active))
        while len(self._saved) > self._owner.limits.own_snapshots:
            gone.append(self._saved.popleft().id)
        while self._told and self._told[0][0] < self._saved[0].index:
            self._forget()
        return gone

    def follow(self, other: Session) -> None:
        """Know of changes of prompt what another one knows, of which this is a fork."""
        self._base = other._base
        self._told.extend(other._told)

    @property
    def rewinds(self) -> int:
        """Rewinds so far."""
        return self._rewinds

    def trim(self) -> None:
        """Let go of what memory has no room for."""
        kept, whole = self._owner.may_keep(self)
        while len(self._points) > kept + 1:
            self._points.popleft()
        for number in range(len(self._points) - 1 - whole):
            self._points[number] = thinned(self._points[number])

    def figures(self) -> SessionFigures:
        """Measure the session."""
        ahead = self._seconds(sum(entry.frames for entry in self._unsent))
        return SessionFigures(
            self.id,
            self.state,
            self.place,
            self.height,
            self.width,
            self._chunks,
            nbytes(self.points()),
            ahead,
            self._pace.underruns,
            self._pace.stalled,
            self._first,
        )

    # ------------------------------------------------------------------------------------------------------------------

    @property
    def _index(self) -> int:
        """`Chunk.generation_index` of the chunk that comes after those that were taken."""
        return self.video.done + (self._points[-1].chunk if self._points else 0)

    @property
    def _next_point(self) -> Point:
        if self._unsent:
            return self._unsent[-1].point
        return self._points[-1] if self._points else Point()

    def _seconds(self, pictures: int) -> float:
        return pictures / self._rate

    def _check_alive(self) -> None:
        if not self.alive:
            raise InputError(f"session: has ended ({self._state}); begin another")

    def _check_reach(self, event: Event) -> None:
        if not self.video.reaches(event.change, self._points[-1].chunk):
            raise InputError(f"session: cannot go on elsewhere: [{event.change}] reaches back to what was not saved")

    def _wait(self, for_what: Callable[[], object], end: float) -> None:
        """Wait until there is something, at most until a moment; see `catch_up`."""
        while not for_what():
            self._check_alive()
            if self._points and not self.video.length(self._points[-1].chunk):
                raise InputError("session: cannot go on elsewhere: its video ends earlier there")
            if not self._wakes.wait(max(0.0, end - time.monotonic())) and time.monotonic() >= end:
                raise Full("full: no place for a session that was elsewhere, or no time to catch up; try again later")

    def _drop(self) -> None:
        """Let go of all that was made and not taken; its events wait again."""
        self._pending.extendleft(reversed([event for entry in self._unsent for event in entry.events]))
        self._owner.count_dropped(len(self._unsent))
        self._unsent.clear()
        self._epoch += 1
        self._state = "running"

    def _pass_empty(self) -> None:
        """Pass by chunks without pictures, which decoders that look ahead begin with."""
        while self._unsent and self._unsent[0].coded is not None and not self._unsent[0].frames:
            entry = self._unsent.popleft()
            self._note(entry)
            started, completed = self._carried
            self._carried = (*started, *(event.id for event in entry.events)), (*completed, *entry.completed)
            self._stand_at(entry.point)
            self._owner.wake()

    def _note(self, entry: Entry) -> None:
        """Note the change of prompt that a chunk begins with."""
        if entry.events:
            self._told.append((self._index, entry.events[-1]))
            while len(self._told) > TOLD:
                self._forget()

    def _forget(self) -> None:
        self._told.popleft()
        self._base = None

    def _stand_at(self, point: Point) -> None:
        self._points.append(point)
        self.trim()

    def _taken(self, now: float) -> tuple[Chunk, Callable[[], bytes]]:
        """Take the first chunk; returns it without its data, and what makes them, which needs no lock."""
        entry, pts = self._unsent.popleft(), self._seconds(self._pictures)
        self._note(entry)
        coded, (started, completed) = entry.coded, self._carried
        assert coded is not None
        self._carried = (), ()
        if isinstance(coded, bytes):
            pack: Callable[[], bytes] = partial(bytes, coded)
        else:
            assert self._encoder is not None
            pack = partial(self._encoder.pack, coded, before=self._pictures, number=self._chunks)
        chunk = Chunk(
            b"",
            self.init if not self._chunks else None,
            self._chunks,
            self.video.done + entry.point.chunk - 1,
            entry.frames,
            pts,
            self._seconds(entry.frames),
            (*started, *(event.id for event in entry.events)),
            entry.point.active,
            (*completed, *entry.completed),
            entry.generation_ms,
            entry.encode_ms,
            self._saved[-1].id if self._saved else "",
        )
        self._pace.took(pts, now, entry.ready)
        self._chunks, self._pictures = self._chunks + 1, self._pictures + entry.frames
        if self._first is None:
            self._first = now - self.started
        self._stand_at(entry.point)
        if not self.video.length(entry.point.chunk):
            self._state = "finished"
            self.tell()
        elif self.order.snapshot_every and self._chunks % self.order.snapshot_every == 0:
            self._owner.save_later(self, entry.point)
        self._owner.wake()
        return chunk, pack

    def _ended(self) -> End | None:
        if self._state == "running":
            return None
        return End(self._state, self._message, self._chunks)

    def _leave(self, state: Literal["closed", "failed"]) -> None:
        self._state, self._epoch, self._opening, self._encoder = state, self._epoch + 1, None, None
        self._points.clear()
        self._unsent.clear()
        self._pending.clear()
        self._owner.left(self)
        self.tell()
