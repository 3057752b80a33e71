"""A studio without a network: its chunks are plain pictures whose colour is the prompt's, in real pieces of an mp4."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from longsana.runtime.errors import InputError
from longsana.serving.media import ChunkEncoder
from longsana.serving.protocol import Served
from longsana.serving.values import Chunk, End, Figures, Full, Limits, Order, SessionFigures

HEIGHT, WIDTH, FPS, FRAMES = 32, 48, 16.0, 8
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "gray": (128, 128, 128)}


def served(limits: Limits | None = None) -> Served:
    return Served("fake", HEIGHT, WIDTH, FPS, 16, 4, {"num_inference_steps": 4}, limits or Limits(), True, 2)


def colour(prompt: str) -> tuple[int, int, int]:
    return next((rgb for name, rgb in COLOURS.items() if name in prompt), COLOURS["gray"])


@dataclass(frozen=True)
class Point:
    """What a session could go on from."""

    prompt: str
    number: int


class FakeSession:
    """A session that makes its chunk when it is taken."""

    def __init__(self, studio: FakeStudio, order: Order, point: Point, id: str = "") -> None:
        self.id = id or secrets.token_hex(16)
        self.order, self.point, self.studio = order, point, studio
        self.height, self.width, self.fps = order.height or HEIGHT, order.width or WIDTH, order.fps or FPS
        self.started = time.monotonic()
        self.callback: Callable[[], object] | None = None
        self.events: list[tuple[str, str]] = []
        self.history: list[Point] = []
        self.state, self.sent, self.frames, self.snapshots = "waiting", 0, 0, ""
        self.reason = ""
        self.zero: float | None = None
        self.encoder = ChunkEncoder(self.width, self.height, self.fps, crf=20, threads=1)
        self.init, self.mime = self.encoder.init, self.encoder.mime

    @property
    def position(self) -> int:
        waiting = [one for one in self.studio.sessions.values() if one.state == "waiting"]
        return waiting.index(self) + 1 if self in waiting else 0

    def ready(self) -> None:
        if self.callback is not None:
            self.callback()

    def on_ready(self, callback: Callable[[], object] | None) -> None:
        self.callback = callback
        self.ready()

    @property
    def due(self) -> float | None:
        if self.state != "running":
            return None
        if not self.order.pace or self.zero is None:
            return 0.0
        lead = 1.0 if self.order.lead is None else self.order.lead
        return max(0.0, self.zero + self.frames / self.fps - lead - time.monotonic())

    def take(self, timeout: float | None = 0.0) -> Chunk | End | None:
        if self.reason:
            return End(self.reason, "made to fail" if self.reason == "failed" else "", self.sent)  # type: ignore[arg-type]
        if self.order.num_frames is not None and self.frames >= self.order.num_frames:
            self.end("finished")
            return self.take()
        if self.due is None or self.due > 0:
            time.sleep(min(timeout or 0.0, 0.01))
            return None
        if "break" in self.point.prompt:
            raise ZeroDivisionError
        if "fail" in self.point.prompt:
            self.end("failed")
            return self.take()
        self.history.append(self.point)
        started = tuple(id for id, _ in self.events)
        if self.events:
            self.point = replace(self.point, prompt=self.events[-1][1])
            self.events.clear()
        if self.zero is None:
            self.zero = time.monotonic()
        saved = self.order.snapshot_every
        if saved and self.sent and self.sent % saved == 0 and self.studio.disk is None:
            self.snapshots = self.studio.save(replace(self.point), self)
        pixels = np.full((FRAMES, self.height, self.width, 3), colour(self.point.prompt), np.uint8)
        pixels[:, : self.point.number % self.height] //= 2  # chunks differ
        data = self.encoder.pack(self.encoder.code(pixels), before=self.frames, number=self.sent)
        chunk = Chunk(
            data + b"\0\0\0\x08free" * self.studio.padding,
            self.init if self.sent == 0 else None,
            self.sent,
            self.point.number,
            FRAMES,
            self.frames / self.fps,
            FRAMES / self.fps,
            started,
            (),
            started,
            1.0,
            1.0,
            self.snapshots,
        )
        self.sent, self.frames = self.sent + 1, self.frames + FRAMES
        self.point = replace(self.point, number=self.point.number + 1)
        return chunk

    def change(
        self, prompt: str, event_id: str = "", policy: str | None = None, transition_chunks: int | None = None
    ) -> str:
        if len(self.events) >= self.studio.limits.most_events:
            raise InputError("prompt: too many changes wait")
        self.events.append((event_id or secrets.token_hex(8), prompt))
        self.ready()
        return self.events[-1][0]

    def pause(self) -> None:
        if self.state in ("waiting", "running"):
            self.state = "paused"

    def resume(self) -> None:
        if self.state == "paused":
            self.state, self.zero = "running", None
            self.ready()

    def snapshot(self) -> str:
        if not self.sent:
            raise InputError("snapshot: nothing was taken yet")
        return self.studio.save(self.point, self)

    def fork(self) -> FakeSession:
        return self.studio.add(FakeSession(self.studio, self.order, self.point))

    def rewind(self, chunks: int) -> None:
        if chunks > len(self.history):
            raise InputError(f"rewind={chunks}: {len(self.history)} are kept")
        self.point = self.history[-chunks]
        del self.history[-chunks:]

    def close(self) -> None:
        self.end("closed")
        self.studio.sessions.pop(self.id, None)
        self.studio.admit()

    def end(self, reason: str) -> None:
        if not self.reason:
            self.reason = self.state = reason
            self.ready()


class FakeStudio:
    """`padding`: empty boxes of 8 bytes after each chunk. `disk`: an error of saving."""

    def __init__(self, limits: Limits | None = None, padding: int = 0) -> None:
        self.limits, self.padding = limits or Limits(), padding
        self.sessions: dict[str, FakeSession] = {}
        self.saved: dict[str, tuple[Point, str]] = {}
        self.disk: OSError | None = None
        self.most = 0

    def add(self, session: FakeSession) -> FakeSession:
        waiting = sum(one.state == "waiting" for one in self.sessions.values())
        if waiting >= self.limits.queue:
            raise Full(f"{waiting} sessions wait; at most {self.limits.queue}; try again later")
        self.sessions[session.id] = session
        self.most = max(self.most, len(self.sessions))
        self.admit()
        return session

    def admit(self) -> None:
        for session in list(self.sessions.values()):
            running = sum(one.state in ("running", "paused") for one in self.sessions.values())
            if session.state == "waiting" and running < self.limits.sessions:
                session.state = "running"
            if session.state in ("waiting", "running"):
                session.ready()

    def save(self, point: Point, session: FakeSession) -> str:
        if self.disk is not None:
            raise self.disk
        id = secrets.token_hex(16)
        self.saved[id] = point, session.id
        return id

    def check(self, order: Order) -> None:
        if (order.height or HEIGHT) % 16 or (order.width or WIDTH) % 16:
            raise InputError(f"height={order.height}: must be a multiple of 16")

    def start(self, order: Order) -> FakeSession:
        self.check(order)
        if order.snapshot is None:
            return self.add(FakeSession(self, order, Point(order.prompt or "", 0)))
        if order.snapshot not in self.saved:
            raise InputError(f"snapshot={order.snapshot}: there is no such one")
        point, id = self.saved[order.snapshot]
        return self.add(FakeSession(self, order, point, "" if id in self.sessions else id))

    is_alive = True

    def session(self, id: str) -> FakeSession | None:
        return self.sessions.get(id)

    def figures(self) -> Figures:
        sessions = tuple(
            SessionFigures(one.id, one.state, one.position, one.height, one.width, one.sent, 0, 0.0, 0, 0.0, None)
            for one in list(self.sessions.values())
        )
        states = [one.state for one in sessions]
        running, waiting = states.count("running"), states.count("waiting")
        return Figures(sessions, running, waiting, 0.1, 5, 10, {(32, 48, 2): 0.01}, 0.5, 3, 1, 0, len(self.saved), 7)

    def close(self) -> None:
        for session in list(self.sessions.values()):
            session.close()


def folder_of(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())
