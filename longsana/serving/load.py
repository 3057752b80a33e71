"""Viewers that measure a live server: each shows chunks in media time, changes the prompt, and notes when what came.

They are WebSockets in one event loop, and need no torch: they may run on another machine than the server.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import re
import time
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from longsana.runtime.errors import InputError
from longsana.serving.client import Refused, socket_options, socket_url, why_closed
from longsana.serving.pace import IN_TIME, SLACK, Pace

PROMPTS = (
    "A big red circle moves slowly to the left on a black background.",
    "A small blue square stays still on a white background.",
)
OPEN_WITHIN = 10.0
"""Seconds in which a connection opens, and in which the server answers a request."""
FAREWELL = 5.0
"""Seconds that the server has to say goodbye to a viewer who leaves."""
TICK = 0.05
"""Seconds between two looks at the clock, by which the viewers' own machine is measured as well."""
MOST_ANSWER = 16 << 20
"""Bytes of /v1/models and of /metrics."""

NO_ANSWER = ("unreachable", "lost", "unreadable")
"""Codes of a viewer's own, where the server has said none."""

Outcome = Literal["watched", "waited", "refused", "failed"]


@dataclass(frozen=True)
class Load:
    """Viewers, and what they do. None: as the server has it.

    viewers: how many; each comes `spacing` seconds after the one before. seconds: for which all of them are there.
    changes_per_minute: of prompt, of each viewer, on average; the gaps between them are drawn (exponential), by `seed`.
    prompts: viewer i begins with number i; at a change one of the others is drawn. seed: viewer i's video has seed + i.
    size: "WIDTHxHEIGHT". chunk_frames: latent frames of a chunk. lead: seconds that chunks come ahead of their time.
    """

    url: str
    viewers: int = 4
    seconds: float = 120.0
    changes_per_minute: float = 2.0
    spacing: float = 1.0
    prompts: tuple[str, ...] = PROMPTS
    seed: int = 0
    size: str | None = None
    chunk_frames: int | None = None
    lead: float | None = None

    def __post_init__(self) -> None:
        if self.changes_per_minute and len(set(self.prompts)) < 2:
            raise InputError("changes of prompt need two prompts that differ; give more, or 0 changes a minute")

    def stay(self, viewer: int) -> float:
        """Seconds from the coming of a viewer to the end of the load."""
        return self.seconds + (self.viewers - 1 - viewer) * self.spacing


class Change(NamedTuple):
    """A change of prompt. at: seconds after the viewer's first chunk."""

    at: float
    prompt: str


def draw_changes(load: Load, viewer: int) -> list[Change]:
    """Draw the changes of a viewer; the same load draws the same ones."""
    draw, found = random.Random(f"{load.seed} {viewer}"), list[Change]()
    at, prompt = 0.0, load.prompts[viewer % len(load.prompts)]
    while load.changes_per_minute:
        at += draw.expovariate(load.changes_per_minute / 60)
        if at > load.stay(viewer):
            break
        prompt = draw.choice([other for other in load.prompts if other != prompt])
        found.append(Change(at, prompt))
    return found


@dataclass
class Shown:
    """A chunk that has come. at: when, in seconds of the load. late: seconds after its deadline, which the viewer has
    stood still; 0 if it was in time. ahead: seconds of video that the viewer then had to show. making, coding: seconds
    that the server says it took. coming: seconds from its announcement to the last byte."""

    at: float
    pts: float
    duration: float
    late: float
    ahead: float
    bytes: int
    making: float
    coding: float
    coming: float


@dataclass
class Asked:
    """A change that was sent. at: when, in seconds of the load. seconds: from then to the presentation of its first
    picture, if it was seen. outcome: "replaced" where a later change came before it, "unseen" where the end did."""

    at: float
    prompt: str
    outcome: Literal["seen", "replaced", "refused", "unseen"] = "unseen"
    seconds: float | None = None


class Viewer:
    """One viewer. began: when the load did, by `time.monotonic`; all that is noted is in seconds from then on."""

    def __init__(self, load: Load, number: int, began: float, key: str | None = None) -> None:
        self.load, self.number = load, number
        self.shown: list[Shown] = []
        self.asked: dict[str, Asked] = {}
        self.positions: list[tuple[float, int]] = []
        self.came: float | None = None
        self.ended: float | None = None
        self.error, self.code = "", ""
        self.session_id = ""
        self.config: dict[str, Any] = {}
        self.open_stall = 0.0
        self._began, self._key = began, key
        self._pace, self._next = Pace(), 0.0
        self._is_seen = asyncio.Event()

    async def watch(self, leave: asyncio.Event) -> None:
        """Come when it is time, and watch until `leave` is set or the server ends it, which is noted and no error."""
        leaving = asyncio.create_task(leave.wait())
        try:
            await asyncio.wait({leaving}, timeout=self.number * self.load.spacing - self._now())
            if not leave.is_set():
                self.came = self._now()
                await self._connect(leaving)
        except Refused as error:
            self.error, self.code = str(error), error.code
        except (TimeoutError, OSError, WebSocketException) as error:
            self.error, self.code = str(error) or f"no answer within {OPEN_WITHIN:g} s", "unreachable"
        except (KeyError, ValueError, TypeError) as error:
            self.error, self.code = f"a message that is none of a live server's ({error!r})", "unreadable"
        finally:
            leaving.cancel()
            self._end()

    @property
    def outcome(self) -> Outcome:
        """Sum up how it went: "waited" had no chunk by the end, "refused" was told no before there was a place."""
        if self.error:
            return "failed" if self.session_id or self.code in NO_ANSWER else "refused"
        return "watched" if self.shown else "waited"

    async def _connect(self, leaving: asyncio.Task[bool]) -> None:
        options = {"open_timeout": OPEN_WITHIN, "close_timeout": FAREWELL, **socket_options(self._key)}
        async with connect(socket_url(self.load.url), **options) as socket:
            tasks = [asyncio.create_task(self._receive(socket)), asyncio.create_task(self._change(socket))]
            try:
                await asyncio.wait({tasks[0], leaving}, return_when=asyncio.FIRST_COMPLETED)
                if not tasks[0].done():
                    self._end()
                    with suppress(ConnectionClosed):  # at this moment; who has left does not mind
                        await socket.send(json.dumps({"type": "session.stop"}))  # else the server keeps the session
                    await asyncio.wait({tasks[0]}, timeout=FAREWELL)
                if tasks[0].done():
                    tasks[0].result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def _end(self) -> None:
        """Note that the viewer is there no more; who has run dry has stalled until now."""
        if self.ended is not None:
            return
        self.ended = self._now()
        dry = self._pace.dry(self._next)
        if dry is not None and self.ended > dry + SLACK:
            self.open_stall = self.ended - dry

    def _now(self) -> float:
        return time.monotonic() - self._began

    def _start(self) -> dict[str, Any]:
        load = self.load
        extra = {"chunk_frames": load.chunk_frames, "pacing_lead_seconds": load.lead}
        return {
            "type": "session.start",
            "format": "m4s",
            "prompt": load.prompts[self.number % len(load.prompts)],
            "num_frames": None,
            "seed": load.seed + self.number,
            "size": load.size,
            "extra_params": {name: value for name, value in extra.items() if value is not None},
        }

    async def _receive(self, socket: ClientConnection) -> None:
        """Receive until the session ends.

        Raises:
            Refused: the server has ended it.
        """
        try:
            with suppress(ConnectionClosed):  # its reason is still to be read
                await socket.send(json.dumps(self._start()))
            while True:
                message = json.loads(await socket.recv())
                if message["type"] == "video.chunk_metadata":
                    announced, data = self._now(), await socket.recv()
                    self._show(message, len(data), self._now() - announced)
                elif message["type"] == "session.done":
                    if self.ended is None:
                        raise Refused("the video ended before the load did")
                    return
                elif self.ended is None:
                    self._hear(message)
        except ConnectionClosed as error:
            if self.ended is None:
                raise Refused(str(why_closed(error)), str(error.rcvd.code) if error.rcvd else "lost") from error

    def _hear(self, message: dict[str, Any]) -> None:
        kind = message["type"]
        if kind == "session.queued":
            self.positions.append((self._now(), int(message["position"])))
        elif kind == "video.start":
            self.session_id, self.config = str(message["session_id"]), message["config"]
        elif kind == "session.moved":
            raise Refused("another connection goes on with this session", "moved")
        elif kind == "error" and message.get("event_id") in self.asked:
            self.asked[message["event_id"]].outcome = "refused"
        elif kind == "error":  # the server closes the connection next
            raise Refused(str(message["message"]), str(message.get("code", "")))

    def _show(self, said: dict[str, Any], length: int, coming: float) -> None:
        now = self._now()
        if self.ended is not None:  # was under way when the viewer left
            return
        pts, duration = float(said["pts_seconds"]), float(said["duration_seconds"])
        dry = self._pace.dry(pts)
        late = 0.0 if dry is None else max(0.0, now - dry)
        self._pace.took(pts, now, now)
        self._next = pts + duration
        zero = self._pace.zero
        assert zero is not None
        making, coding = float(said["generation_ms"]) / 1000, float(said["encode_ms"]) / 1000
        ahead = zero + self._next - now
        self.shown.append(Shown(now, pts, duration, late, ahead, length, making, coding, coming))
        for id in said["started_event_ids"]:
            if id in self.asked and self.asked[id].outcome == "unseen":
                asked = self.asked[id]
                asked.outcome, asked.seconds = "seen", zero + pts - asked.at
        for id in said["completed_event_ids"]:
            if id in self.asked and self.asked[id].outcome == "unseen":
                self.asked[id].outcome = "replaced"
        self._is_seen.set()

    async def _change(self, socket: ClientConnection) -> None:
        await self._is_seen.wait()
        first = self.shown[0].at
        for number, change in enumerate(draw_changes(self.load, self.number)):
            await asyncio.sleep(first + change.at - self._now())
            id = f"change-{number}"
            self.asked[id] = Asked(self._now(), change.prompt)
            interaction = {"event_id": id, "event": {"prompt": change.prompt}}
            await socket.send(json.dumps({"type": "session.interaction", "interaction": interaction}))

    def figures(self) -> dict[str, Any]:
        """Give all that was noted, and `summary` of it."""
        return {
            "viewer": self.number,
            "outcome": self.outcome,
            "error": self.error,
            "code": self.code,
            "session_id": self.session_id,
            "config": self.config,
            "came_at": self.came,
            "ended_at": self.ended,
            "open_stall_seconds": self.open_stall,
            **summary([self]),
            "queue_positions": [{"at": at, "position": position} for at, position in self.positions],
            "shown": [asdict(one) for one in self.shown],
            "asked": [asdict(one) for one in self.asked.values()],
        }


def summary(viewers: Sequence[Viewer]) -> dict[str, Any]:
    """Sum viewers up; see docs/live.md for what each figure means."""
    later = [one for viewer in viewers for one in viewer.shown[1:]]
    opened = [viewer.open_stall for viewer in viewers if viewer.open_stall]
    stalls = [one.late for one in later if one.late > SLACK] + opened
    asked = [one for viewer in viewers for one in viewer.asked.values()]
    firsts = [viewer.shown[0].at - viewer.came for viewer in viewers if viewer.shown and viewer.came is not None]
    gaps = [after.at - one.at for viewer in viewers for one, after in pairwise(viewer.shown)]
    return {
        "chunks": sum(len(viewer.shown) for viewer in viewers),
        "bytes": sum(one.bytes for viewer in viewers for one in viewer.shown),
        "first_chunk_seconds": spread(firsts),
        "inter_arrival_seconds": spread(gaps),
        **{
            f"{name}_seconds": spread(getattr(one, name) for viewer in viewers for one in viewer.shown)
            for name in ("making", "coding", "coming")
        },
        "in_time_share": sum(one.late <= IN_TIME for one in later) / len(later) if later else None,
        "underruns": len(stalls),
        "stall_seconds": sum(stalls),
        "changes": {
            "asked": len(asked),
            **{name: sum(one.outcome == name for one in asked) for name in ("seen", "replaced", "refused", "unseen")},
        },
        "change_seconds": spread(one.seconds for one in asked if one.seconds is not None),
        "most_queue_position": max((place for viewer in viewers for _, place in viewer.positions), default=0),
    }


def spread(values: Iterable[float]) -> dict[str, float | int | None]:
    """Count values, and give their percentiles, between neighbours linearly, and the largest; None of no value."""
    ordered = sorted(values)

    def percentile(share: float) -> float | None:
        if not ordered:
            return None
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "most": 1.0}
    return {"count": len(ordered), **{name: percentile(share) for name, share in shares.items()}}


def measure(load: Load, key: str | None = None, stopped: Callable[[], object] = lambda: False) -> dict[str, Any]:
    """Put a load on a server, and return what came of it, as JSON has it.

    key: the server's API key. stopped: asked again and again; once it is true, everybody leaves.
    """
    return asyncio.run(_measure(load, key, stopped))


async def _measure(load: Load, key: str | None, stopped: Callable[[], object]) -> dict[str, Any]:
    at, began, leave, lags = time.time(), time.monotonic(), asyncio.Event(), list[float]()
    viewers = [Viewer(load, number, began, key) for number in range(load.viewers)]
    watching = [asyncio.create_task(viewer.watch(leave)) for viewer in viewers]
    end = began + load.stay(0)
    while (now := time.monotonic()) < end and not stopped() and not all(task.done() for task in watching):
        wait = min(TICK, end - now)
        await asyncio.sleep(wait)
        lags.append(time.monotonic() - now - wait)
    server = None if stopped() else await asyncio.to_thread(_ask_server, load.url, key)
    leave.set()
    await asyncio.gather(*watching)
    outcomes = [viewer.outcome for viewer in viewers]
    return {
        "settings": asdict(load),
        "began": at,
        "seconds": time.monotonic() - began,
        "own_lag_seconds": spread(lags),
        "server": server,
        "all": {
            "viewers": len(viewers),
            **{name: outcomes.count(name) for name in ("watched", "waited", "refused", "failed")},
            **summary(viewers),
        },
        "viewers": [viewer.figures() for viewer in viewers],
    }


def _ask_server(url: str, key: str | None) -> dict[str, Any]:
    """Ask a server for its models and metrics; `error` says why there are none."""
    try:
        models = json.loads(_get(f"{url.rstrip('/')}/v1/models", key))
        return {"models": models, "metrics": read_metrics(_get(f"{url.rstrip('/')}/metrics", key)), "error": ""}
    except (OSError, http.client.HTTPException, ValueError) as error:
        return {"models": None, "metrics": None, "error": str(error) or repr(error)}


def _get(url: str, key: str | None) -> str:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=OPEN_WITHIN) as answer:
        text: bytes = answer.read(MOST_ANSWER)
        return text.decode()


def read_metrics(text: str) -> dict[str, float]:
    """Read the numbers of Prometheus' text format, by name and labels as they are written."""
    lines = [line.rpartition(" ") for line in text.splitlines() if re.match(r"[a-z]", line)]
    return {name: float(value) for name, _, value in lines}


def table(report: dict[str, Any]) -> str:
    """A line for each viewer, and one for all."""
    head = ["viewer", "", "first", "chunks", "in time", "underruns", "stalled", "gap p50", "p95", "p99"]
    rows = [[*head, "change p50", "p95", "p99", "MB"]]
    for one in [*report["viewers"], report["all"]]:
        is_one = "outcome" in one
        name = str(one["viewer"]) if is_one else "all"
        outcome = one["outcome"] if is_one else f"{one['watched']} of {one['viewers']} watched"
        gaps, changes, share = one["inter_arrival_seconds"], one["change_seconds"], one["in_time_share"]
        rows.append(
            [
                *(name, outcome, _cell(one["first_chunk_seconds"]["p50"]), str(one["chunks"])),
                "-" if share is None else f"{100 * share:.1f} %",
                *(str(one["underruns"]), _cell(one["stall_seconds"])),
                *(_cell(group[name]) for group in (gaps, changes) for name in ("p50", "p95", "p99")),
                f"{one['bytes'] / 1e6:.1f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) if place < 2 else cell.rjust(width) for place, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    )


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
