"""A studio: one network that makes the chunks of many sessions, whose viewers would run dry first."""

from __future__ import annotations

import logging
import statistics
import threading
import time
import traceback
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from longsana.config import InferenceConfig
from longsana.published import DISTILLED
from longsana.runtime.distributed import usable_cores
from longsana.runtime.errors import InputError
from longsana.runtime.gpu_memory import free_memory
from longsana.sampling.captions import caption_encoder
from longsana.sampling.engine import Engine
from longsana.sampling.memory import fit_memory, work_of
from longsana.serving.coders import Code, Coders
from longsana.serving.making import Bytes, Event, Maker, Point, Video, nbytes
from longsana.serving.orders import video_of
from longsana.serving.owner import Dropped, Moved, Task
from longsana.serving.session import Session
from longsana.serving.snapshots import Snapshots
from longsana.serving.values import Figures, Full, Limits, Order

log = logging.getLogger(__name__)

MEASURED = 32
"""Last chunks that medians are taken of."""
MARGIN, SPARE = 1.3, 0.1
"""A lead is `SPARE` seconds and `MARGIN` times what making a chunk again takes by measure."""
ON_CPU = 2 << 30
"""Bytes for all sessions' memory where there is no GPU."""
OF_FREE = 0.8
"""The share of a GPU's free memory that is for sessions; the rest is for what a chunk needs while it is made."""
CODERS = 4
"""Sessions whose chunks are coded at once, at most: half of the cores are for it, of which each x264 takes some."""
WARM_UP = "a warm-up"
"""The prompt of the chunks that are made before the first session, and by which times and memory are known."""


class Times:
    """The median of the last `MEASURED` times, in seconds."""

    def __init__(self, first: float) -> None:
        self._last, self.median = deque([first], MEASURED), first

    def add(self, seconds: float) -> None:
        self._last.append(seconds)
        self.median = statistics.median(self._last)


class Studio:
    """Loads what a config names, and makes the chunks of all sessions on one thread, until it is closed.

        with Studio(config, device="cuda", snapshots=Path("snapshots")) as studio:
            session = studio.start(Order("a harbour at dawn"))
            while not isinstance(piece := session.take(None), End):
                ...

    A chunk that fails, or for which the GPU has no memory, ends its session and no other.

    snapshots: the folder that has them, made if it is missing, for this process alone; None: none can be saved.
    fleet: see `Snapshots`. coders_apart: chunks are coded in processes of their own; None: on a GPU.

    Raises:
        InputError: the config is not of the distilled model, files are missing or do not fit, or another process has
            the folder.
    """

    def __init__(
        self,
        config: InferenceConfig,
        device: torch.device | str = "cpu",
        limits: Limits | None = None,
        snapshots: Path | None = None,
        *,
        fleet: bool = False,
        coders_apart: bool | None = None,
    ) -> None:
        self.limits = limits or Limits()
        config = fit_memory(config, torch.device(device), work_of(config, encodes=True, live=True))
        engine = Engine(config, device)
        if engine.config.scheduler.sampling_algo != DISTILLED:
            raise InputError(
                f"scheduler.sampling_algo={engine.config.scheduler.sampling_algo}: makes whole clips; live videos need "
                f"the distilled model ({DISTILLED})"
            )
        self._config, self._device = engine.config, engine.device
        self.coding = engine.config.video.crf, engine.config.video.threads
        self.lock = threading.RLock()
        self._work, self._closed, self._busy = threading.Condition(self.lock), False, False
        self._sessions: dict[str, Session] = {}
        self._queue: deque[Session] = deque()
        self._seconds: dict[tuple[int, int, int], Times] = {}
        self._recent: deque[tuple[float, float]] = deque(maxlen=MEASURED)
        self._bytes: dict[tuple[int, int], Bytes] = {}
        self._given = 0.0  # seconds of chunks that were made while another one waited
        scheduler = engine.config.scheduler
        self._passes = sum(step > 0 for step in scheduler.denoising_step_list) + (scheduler.absorb == "clean")
        self._made = self._dropped = self._failures = 0
        with ExitStack() as undo:
            self._snapshots: Snapshots | None = None
            if snapshots is not None:
                most = self.limits.snapshots, self.limits.snapshot_bytes, self.limits.session_snapshots
                self._snapshots = undo.enter_context(Snapshots.opened(snapshots, *most, fleet=fleet))
            encode = undo.enter_context(caption_encoder(engine.config, engine.device, engine.turns))
            apart = engine.device.type == "cuda" if coders_apart is None else coders_apart
            self._coders = Coders(max(1, min(CODERS, usable_cores() // 2)), apart=apart)
            undo.callback(self._coders.close)
            self._maker = Maker(engine, encode, self.limits.captions)
            self._warm_up()
            self._most_bytes = self.limits.memory_bytes or self._room()
            self._saver = ThreadPoolExecutor(1, "snapshots")
            undo.callback(self._saver.shutdown)
            self._worker = threading.Thread(target=self._run, name="maker of chunks", daemon=True)
            self._worker.start()
            self._undo = undo.pop_all()

    def start(self, order: Order, moved: Moved | None = None) -> Session:
        """Begin a session; it waits in the queue where there is no place (`Session.position`).

        moved: of one that was in another studio, which goes on here after `Session.catch_up`. It waits before others.

        A snapshot is a value that nobody changes: all sessions that go on from one, or beside the session that saved
        it, are sessions of their own, with ids and snapshots of their own. So no two ever write the same one.

        It reads all of a picture, a film or a snapshot, which may take seconds, for which no other session waits.

        Raises:
            InputError: no such video can be made; one line, which begins with the field of the order.
            Full: as many wait as may.
        """
        video, begin = self._read(order)
        opening = None if video.film is None else self._maker.opening(video)
        if moved is not None and moved.base is not None:
            begin = replace(begin, active=moved.base.active)
        id = None if moved is None else moved.id
        session = Session(self, order, video, [begin] if opening is None else [], opening, id)
        with self.lock:
            return self._take_in(session, first=moved is not None)

    def check(self, order: Order) -> None:
        """Refuse an order as `start` would, as far as that is known without a place for it.

        Raises:
            InputError: no such video can be made; one line, which begins with the field of the order.
        """
        self._read(order)

    @property
    def is_alive(self) -> bool:
        """True as long as chunks can be made."""
        return not self._closed and self._worker.is_alive()

    def session(self, id: str) -> Session | None:
        """The session of this id, until it is closed or has failed."""
        with self.lock:
            return self._sessions.get(id)

    def figures(self) -> Figures:
        """Measure. It takes no part in the work, and waits for none."""
        sizes = [] if self._snapshots is None else self._snapshots.sizes()
        with self.lock:
            sessions = list(self._sessions.values())
            running = [session for session in sessions if not session.place]
            wall, shown = (sum(part) for part in zip(*self._recent, strict=True)) if self._recent else (0.0, 0.0)
            return Figures(
                tuple(session.figures() for session in sessions),
                len(running),
                len(self._queue),
                sum(map(self._load, running)),
                nbytes(point for session in sessions for point in session.points()),
                self._most_bytes,
                {key: times.median for key, times in self._seconds.items()},
                wall / shown if shown else None,
                self._made,
                self._dropped,
                self._failures,
                len(sizes),
                sum(sizes),
            )

    def close(self) -> None:
        """End all sessions and the thread. Snapshots that are being written are finished."""
        with self.lock:
            if self._closed:
                return
            self._closed = True
            for session in list(self._sessions.values()):
                session.close()
            self._work.notify_all()
        self._worker.join()
        self._undo.close()

    def __enter__(self) -> Studio:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # For sessions, with the lock --------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Look for work again."""
        self._work.notify_all()

    def pixel_frames(self, latents: int) -> int:
        """Count the pictures of so many latents that do not open a video."""
        return self._maker.engine.geometry.pixel_frames(latents, first=False)

    def count_dropped(self, chunks: int) -> None:
        """Note chunks that were made and never taken."""
        self._dropped += chunks

    def left(self, session: Session) -> None:
        """Give the place of a session that has ended to another."""
        self._sessions.pop(session.id, None)
        if session in self._queue:
            self._queue.remove(session)
        session.place = 0
        self._admit()

    def lead(self, session: Session) -> float:
        """Seconds that a session is to be ahead of its viewer: what making its next chunk again takes, and the longest
        that others hold it up."""
        if session.order.lead is not None:
            return session.order.lead
        others = [
            self._estimate(other) / (1 if self.keeps_pace(other) else self._passes)
            for other in self._running()
            if other is not session
        ]
        return min(self.limits.most_lead, SPARE + MARGIN * self._estimate(session) + max(others, default=0.0))

    def keeps_pace(self, session: Session) -> bool:
        """Tell whether a session has a viewer's pace, and chunks are made fast enough for it if nobody else has any.

        One that does not takes what others leave, and counts for nothing where others are taken in.
        """
        return 0 < self._load(session) <= self.limits.load

    def may_keep(self, session: Session) -> tuple[int, int]:
        """Count the chunks that memory lets a session go back by, at least one, and the last of them with the decoder's
        memory."""
        own = self._bytes_of(session)
        share = self._most_bytes // max(1, len(self._running())) - own.state * session.video.kept
        # The point that it stands at, as many that wait, one more, and the one in progress; and states before chunks.
        whole = max(0, min(self.limits.kept, (share // max(1, own.whole) - 3) // 2))
        left = (share - (2 * whole + 3) * own.whole) // max(1, own.thin)
        return max(1, min(self.limits.kept, whole + max(0, left))), whole

    def save(self, session: Session, point: Point) -> str:
        """Save a state; returns its id. Called without the lock."""
        if self._snapshots is None:
            raise InputError("snapshot: this studio keeps none; start it with a folder for them")
        return self._snapshots.save(self._maker.state(session.video, point), session.id)

    def save_later(self, session: Session, point: Point) -> None:
        """Save a state in the background; not if the last one is still being written, so that nothing piles up."""
        if self._snapshots is None or session.saving or self._closed:
            return
        session.saving = True
        self._saver.submit(self._save, session, point, session.rewinds)

    def forked(self, session: Session, points: list[Point], events: list[Event]) -> Session:
        """Begin a session at the last of these points of another."""
        fork = Session(self, session.order, session.video, points)
        fork.await_events(events)
        fork.follow(session)
        return self._take_in(fork)

    # ------------------------------------------------------------------------------------------------------------------

    def _read(self, order: Order) -> tuple[Video, Point]:
        """The video that is asked for, and the point that it begins at."""
        if order.snapshot is None:
            video = video_of(order, self._config, self.limits, None)
            self._check_speed(video)
            return video, Point()
        if self._snapshots is None:
            raise InputError("snapshot: this studio keeps none; start it with a folder for them")
        state = self._snapshots.load(order.snapshot)
        video = video_of(order, self._config, self.limits, state)
        self._check_speed(video)
        return video, self._maker.point(state, video.last)

    def _check_speed(self, video: Video) -> None:
        """Refuse a video whose passes, for which all others wait, would take too long by measured speed."""
        (height, width), sampling = video.size, self._config.sampling
        if height * width <= sampling.height * sampling.width:
            return
        with self.lock:
            one = self._seconds_of(video.size, max(video.lengths)) / self._passes
        if one > self.limits.pass_seconds:
            raise InputError(
                f"height={height}, width={width}: a pass of it takes about {one:.0f} s here, while others wait; "
                f"at most {self.limits.pass_seconds:g} s are taken: choose a smaller size, or shorter chunks"
            )

    def _take_in(self, session: Session, *, first: bool = False) -> Session:
        if self._closed:
            raise InputError("studio: is closed")
        if session.id in self._sessions:
            raise InputError(f"session={session.id}: is here already")
        # Who had a place waits wherever he must, and who need not wait is none too many.
        if not first and len(self._queue) >= self.limits.queue and (self._queue or not self._has_room(session)):
            raise Full(f"full: all places are taken, and {len(self._queue)} sessions wait already; try again later")
        self._sessions[session.id] = session
        self._queue.insert(0 if first else len(self._queue), session)
        session.place = len(self._queue)
        self._admit()
        return session

    def _admit(self) -> None:
        """Give places to those that wait, in their order, as long as there is time and memory."""
        while self._queue and not self._closed and self._has_room(self._queue[0]):
            self._queue.popleft().place = 0
            for session in self._running():
                session.trim()
        for place, session in enumerate(self._queue, 1):
            session.place = place
        for session in self._sessions.values():
            session.tell()
        self._work.notify_all()

    def _has_room(self, session: Session) -> bool:
        running = self._running()
        if len(running) >= self.limits.sessions:
            return False
        if not running:
            return True
        paced = [self._load(one) for one in (*running, session) if self.keeps_pace(one)]
        if sum(paced) > self.limits.load and self.keeps_pace(session):
            return False
        return sum(map(self._least_bytes, (*running, session))) <= self._most_bytes

    def _running(self) -> list[Session]:
        return [session for session in self._sessions.values() if not session.place]

    def _load(self, session: Session) -> float:
        """The share of the worker's time that a session takes at its viewer's pace."""
        return self._estimate(session) / session.seconds if session.order.pace and session.seconds else 0.0

    def _estimate(self, session: Session) -> float:
        """Seconds that the next chunk of a session will take."""
        return self._seconds_of(session.video.size, session.latents)

    def _seconds_of(self, size: tuple[int, int], latents: int) -> float:
        """Seconds that a chunk takes: measured of its size, or in proportion to another."""
        height, width, _ = key = _key(size, latents)
        if key in self._seconds:
            return self._seconds[key].median
        # The nearest in work; more of it is taken to take as much more time.
        work = height * width * latents
        near = min(self._seconds, key=lambda known: abs(known[0] * known[1] * known[2] - work))
        return self._seconds[near].median * work / (near[0] * near[1] * near[2])

    def _bytes_of(self, session: Session) -> Bytes:
        """The memory of a point of a session's size."""
        size = session.video.size
        if size in self._bytes:
            return self._bytes[size]
        near = min(self._bytes, key=lambda known: abs(known[0] * known[1] - size[0] * size[1]))
        return self._bytes[near].times(size[0] * size[1] / (near[0] * near[1]))

    def _least_bytes(self, session: Session) -> int:
        own = self._bytes_of(session)
        # See `may_keep`.
        return own.state * session.video.kept + 4 * own.whole + own.thin

    def _room(self) -> int:
        if self._device.type != "cuda":
            return ON_CPU
        return int(OF_FREE * free_memory(self._device))

    def _warm_up(self) -> None:
        """Make chunks of the config's size, so that times and memory are known before a session is taken in.

        The last one's time counts: kernels of a chunk without a past, and with one, are compiled in those before.
        """
        video = video_of(Order(WARM_UP, prompt_change="keep"), self._config, self.limits, None)
        point = Point()
        for _ in range(3):
            began = time.monotonic()
            point = self._maker.make(video, point).point
            assert point.after is not None
            memory = point.after()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._seconds[_key(video.size, video.length(1))] = Times(time.monotonic() - began)
        self._bytes[video.size] = Bytes.of(memory)
        # So that no viewer waits for the recording of a first chunk.
        if self._maker.engine.recorded:
            self._maker.make(video, Point())

    def _run(self) -> None:
        """The thread."""
        while True:
            with self.lock:
                self._busy = False
                while not self._closed and not any(session.wants() for session in self._sessions.values()):
                    self._work.wait()
                if self._closed:
                    return
                wanting = (session for session in self._sessions.values() if session.wants())
                session = min(wanting, key=Session.dry)
                task, self._busy = session.turn(), True
            self._turn(session, task)
            del session, task  # which hold memory of one that may be closed while the next waits

    def _give_way(self, session: Session, epoch: int) -> None:
        """Between passes of a chunk that no viewer waits for in media time, make those that others wait for.

        Raises:
            Dropped: the chunk is not wanted any more.
        """
        began = time.monotonic()
        while not self._closed:
            session.check(epoch)
            with self.lock:
                waiting = [one for one in self._sessions.values() if self.keeps_pace(one) and one.wants()]
                if not waiting:
                    break
                other = min(waiting, key=Session.dry)
                task = other.turn()
            self._turn(other, task)
            del other, task
        self._given += time.monotonic() - began
        session.check(epoch)

    def _turn(self, session: Session, task: Task) -> None:
        began = time.monotonic() - self._given
        epoch = task.epoch
        try:
            if task.point is None:
                session.open_on()
                return
            with self.lock:
                paced = self.keeps_pace(session)
            between = partial(session.check, epoch) if paced else partial(self._give_way, session, epoch)

            def on_step(step: int, x: Tensor) -> Tensor:
                between()
                return x

            made = self._maker.make(session.video, task.point, task.events, on_step, None if paced else between)
            seconds = time.monotonic() - self._given - began
            with self.lock:
                entry = session.made(task, made, seconds)
                if entry is None:
                    raise Dropped
                self._made += 1
                shown = entry.frames / session.fps
                self._code_next(session)  # its pictures are on their way before it is absorbed
            if session.video.length(made.point.chunk):
                session.check(task.epoch)
                assert made.point.after is not None
                memory = made.point.after()
                with self.lock:
                    self._bytes[session.video.size] = Bytes.of(memory)
            seconds = time.monotonic() - self._given - began
            key = _key(session.video.size, session.video.length(task.point.chunk))
            with self.lock:
                if key in self._seconds:
                    self._seconds[key].add(seconds)
                else:
                    self._seconds[key] = Times(seconds)
                self._recent.append((seconds, shown))
        except Dropped:
            with self.lock:
                self._dropped += 1
        except Exception as error:
            self._fail(session, error)

    def _code_next(self, session: Session) -> None:
        """Have a session's next chunk coded, if one is not being coded; called with the lock."""
        if not session.coding and not self._closed and session.uncoded is not None:
            session.coding = True
            self._coders.submit(partial(self._code, session))

    def _code(self, session: Session, by: Code) -> None:
        try:
            session.code(by)
        except Exception as error:
            self._fail(session, error)
        with self.lock:  # a chunk at a time: no coder waits for another one of the same session
            session.coding = False
            self._code_next(session)

    def _fail(self, session: Session, error: Exception) -> None:
        """End a session whose chunk failed; others go on."""
        if isinstance(error, torch.OutOfMemoryError):
            message = "out of memory on the GPU; begin another with a smaller size, or when others have ended"
        elif isinstance(error, InputError | FloatingPointError):
            message = str(error)
        else:
            message = "an error of the server ended this video"  # whose own words are the log's
            log.error("session %s failed", session.id, exc_info=error)
        traceback.clear_frames(error.__traceback__)  # which hold tensors
        with self.lock:
            self._failures += 1
            session.fail(message)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _save(self, session: Session, point: Point, rewinds: int) -> None:
        """Save a session's state of itself, in place of an older one; where a disk fails, the next is tried."""
        assert self._snapshots is not None
        try:
            id = self._snapshots.save(self._maker.state(session.video, point), session.id, asked=False)
        except Exception as error:
            log.warning("session %s: no snapshot was saved: %s", session.id, error)
            return
        finally:
            with self.lock:
                session.saving = False
        # A viewer may know no later one than the one before: at least two stay.
        with self.lock:
            gone = session.saved(id, point, rewinds)
        for old in gone:
            self._snapshots.remove(old)


def _key(size: tuple[int, int], latents: int) -> tuple[int, int, int]:
    return size[0], size[1], latents
