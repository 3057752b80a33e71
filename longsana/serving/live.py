"""Viewers of live sessions: what passes over each WebSocket, and what becomes of its session when it is gone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import time
from typing import Any, Protocol

from longsana.runtime.errors import InputError
from longsana.runtime.files import disk_failure
from longsana.serving import protocol
from longsana.serving.fleet import AnySession, AnyStudio
from longsana.serving.metrics import Measurements, Viewing
from longsana.serving.protocol import Interaction, Plain, Rewind, Served, encode, failure
from longsana.serving.values import Chunk, End, Full

log = logging.getLogger(__name__)

LINGER = 20.0
"""Seconds for which a session waits, paused, for a viewer whose connection has gone."""
FAREWELL = 2.0
"""Seconds that a viewer is given to hear why his connection ends."""
FORKS = 2
"""Forks of one viewer that wait for a connection of their own, at most."""
ENDED = ("finished", "closed", "failed")


class Gone(Exception):
    """The client has gone."""


class Socket(Protocol):
    """A WebSocket, of whichever library."""

    async def receive(self) -> str | bytes | None:
        """Wait for the next message; None once the client has gone."""

    async def send(self, data: str | bytes) -> None:
        """Send a message, as soon as the client has read most of those before it.

        Raises:
            Gone: the client has.
        """

    async def close(self, code: int) -> None:
        """End the connection; of one that has ended nothing happens."""


class Connections:
    """Viewers of a studio, in one event loop. A session has at most one; a second one takes its place.

    linger, stall, start_within: seconds, see the constants. most: connections at a time.
    """

    def __init__(
        self,
        studio: AnyStudio,
        served: Served,
        measurements: Measurements,
        *,
        linger: float = LINGER,
        stall: float = protocol.STALL,
        start_within: float = protocol.START_WITHIN,
        most: int | None = None,
    ) -> None:
        self.studio, self.served, self.measurements = studio, served, measurements
        self.stall = stall
        self._linger, self._start_within = linger, start_within
        self._most = most or 2 * (served.limits.sessions + served.limits.queue) * served.replicas
        self._open = 0
        self._viewers: dict[str, Viewer] = {}
        self._lingering: dict[str, tuple[asyncio.TimerHandle, asyncio.Task[bool]]] = {}

    async def serve(self, socket: Socket) -> None:
        """Serve a connection until it ends."""
        self._open += 1
        try:
            await self._serve(socket)
        except Gone:
            pass
        finally:
            self._open -= 1

    def linger(self, session: AnySession, *, pause: bool) -> None:
        """Keep a session without a viewer for a while, and end it if none comes."""
        if session.state in ENDED:
            session.close()
            return

        async def rest() -> bool:
            """Pause, if that is to be; returns whether it was done."""
            if not pause or session.state == "paused":
                return False
            with contextlib.suppress(InputError):  # it has ended
                await asyncio.to_thread(session.pause)
            return True

        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._linger, self._give_up, session)
        self._lingering[session.id] = timer, loop.create_task(rest())

    def lingers(self, id: str) -> bool:
        """Tell whether a session waits for a viewer."""
        return id in self._lingering

    def close(self) -> None:
        """End the sessions that nobody watches."""
        for id, (timer, _) in list(self._lingering.items()):
            timer.cancel()
            if session := self.studio.session(id):
                session.close()
        self._lingering.clear()

    async def _serve(self, socket: Socket) -> None:
        code = protocol.INVALID
        try:
            if self._open > self._most:
                raise Full(f"{self._open} connections; at most {self._most} are served; try again later")
            text = await asyncio.wait_for(socket.receive(), self._start_within)
            if text is None:
                return
            start = await asyncio.to_thread(protocol.read_start, text, self.served)  # it may have a picture
            session, is_new = await self._session(start)
        except TimeoutError:
            said = failure(f"no session.start within {self._start_within:g} s", "timeout")
        except Full as error:
            code, said = protocol.NO_CAPACITY, failure(str(error), "no_capacity")
        except InputError as error:
            said = failure(str(error), "invalid_request")
        else:
            viewer = Viewer(self, socket, session, is_new)
            await self._move(viewer)
            await self._watch(viewer)
            return
        self.measurements.refused.labels(str(code)).inc()
        await _farewell(socket, said)
        await socket.close(code)

    async def _session(self, start: protocol.Start) -> tuple[AnySession, bool]:
        """The session that a client had before, if it is still there, or a new one; and which of them it is."""
        if start.session_id is not None:
            before = self.studio.session(start.session_id)
            if before is not None and before.state not in ENDED:
                return before, False
            if start.order.snapshot is None and start.order.prompt is None:
                raise InputError("extra_params.session_id: there is no such session any more; start a new one")
        with protocol.named(start.names):
            return await asyncio.to_thread(self.studio.start, start.order), True

    async def _move(self, viewer: Viewer) -> None:
        """Give a viewer the session's place, which another one may have."""
        id = viewer.session.id
        before, self._viewers[id] = self._viewers.get(id), viewer
        if before is not None:
            await before.leave()
        if id in self._lingering:
            timer, rests = self._lingering.pop(id)
            timer.cancel()
            if await rests:
                with contextlib.suppress(InputError):  # it has ended, as its viewer will hear
                    await asyncio.to_thread(viewer.session.resume)

    async def _watch(self, viewer: Viewer) -> None:
        session, code = viewer.session, None
        try:
            code = await viewer.run()
        except Gone:
            pass
        except Exception:  # a defect; others go on
            log.exception("session %s", session.id)
            await _farewell(viewer.socket, failure("an error of the server ended this video", "failed"))
            code = protocol.FAILED
        finally:
            if self._viewers.get(session.id) is viewer:
                del self._viewers[session.id]
                # He may come back; who never had a place begins again.
                if code in (None, protocol.INVALID) and not session.position:
                    self.linger(session, pause=True)
                else:
                    session.close()
        if code is not None:
            await viewer.socket.close(code)

    def _give_up(self, session: AnySession) -> None:
        self._lingering.pop(session.id, None)
        session.close()


class Viewer:
    """One client of one session. Two tasks: one sends what is made, one does what the client asks."""

    def __init__(self, connections: Connections, socket: Socket, session: AnySession, is_new: bool) -> None:
        self.socket, self.session = socket, session
        self._connections, self._is_new = connections, is_new
        self._served = connections.served
        self._request_id = secrets.token_hex(16)
        self._viewing = Viewing(connections.measurements, session.started if is_new else None)
        self._wake = asyncio.Event()
        self._speaking = asyncio.Lock()  # a chunk's two messages follow each other
        self._steering = asyncio.Lock()  # a chunk that shows what was asked for comes after the answer
        self._heard = time.monotonic()
        self._tasks: list[asyncio.Task[int | None]] = []
        self._forks: list[str] = []  # that nobody may have taken yet
        self._moved = asyncio.Event()
        self._snapshot: tuple[int, str] = (0, "")
        self._taken = 0

    async def run(self) -> int | None:
        """Serve until the video or the connection ends; returns the code to close it with, or None if it has gone."""
        if self._moved.is_set():
            return await self._say_moved()
        self._tasks = [asyncio.create_task(self._send_all()), asyncio.create_task(self._do_all())]
        try:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended = [task for task in self._tasks if task.done()]
            await self._cancel()
        if self._moved.is_set():
            return await self._say_moved()
        for task in ended:  # the sender's word counts first
            error = task.exception()
            if error is None:
                return task.result()
            if not isinstance(error, Gone):
                raise error
        return None

    async def leave(self) -> None:
        """Let go of the session, which another connection goes on with."""
        self._moved.set()
        await self._cancel()

    async def _say_moved(self) -> int:
        await _farewell(self.socket, self._message("session.moved"))
        return protocol.DONE

    async def _cancel(self) -> None:
        tasks, self._tasks = self._tasks, []  # an ended one's exception would hold this viewer, and all of its session
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _send_all(self) -> int:
        loop, session = asyncio.get_running_loop(), self.session

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._wake.set)

        session.on_ready(wake)
        try:
            await self._wait_in_queue()
            await self._say(self._message("video.start", **self._start()))
            first = True
            while True:
                async with self._steering:
                    self._wake.clear()
                    piece = session.take(0.0)
                if piece is None:
                    await self._wait(session.due)
                elif isinstance(piece, Chunk):
                    await self._send_chunk(piece, first)
                    first = False
                else:
                    return await self._send_end(piece)
        except _Stalled as error:
            await _farewell(self.socket, failure(str(error), "stalled", request_id=self._request_id))
            return protocol.INVALID
        finally:
            session.on_ready(None)

    async def _wait_in_queue(self) -> None:
        said = 0
        while position := self.session.position:
            if position != said:
                depth = (await asyncio.to_thread(self._connections.studio.figures)).waiting
                await self._say(self._message("session.queued", position=position, queue_depth=max(depth, position)))
                said = position
            self._wake.clear()
            if self.session.position == position:
                await self._wake.wait()
        self._heard = time.monotonic()

    async def _wait(self, due: float | None) -> None:
        """Wait until something may have changed, or the next piece is due.

        Only who has paused can be silent too long: a viewer who waits for a chunk owes nothing, however long it takes.
        """
        is_paused = self.session.state == "paused"
        left = self._heard + self._connections.stall - time.monotonic() if is_paused else math.inf
        if left <= 0:
            raise _Stalled(f"nothing was sent or heard for {self._connections.stall:g} s; send session.ping to wait")
        with contextlib.suppress(asyncio.TimeoutError):
            most = min(left, math.inf if due is None else max(due, 0.001))
            await asyncio.wait_for(self._wake.wait(), None if most == math.inf else most)

    def _start(self) -> dict[str, Any]:
        session = self.session
        return {
            "format": "m4s",
            "config": {"width": session.width, "height": session.height, "fps": session.fps},
            "mime": session.mime,
            "session_id": session.id,
            "resumed": not self._is_new,
            "paused": session.state == "paused",
            "model": self._served.name,
        }

    async def _send_chunk(self, chunk: Chunk, first: bool) -> None:
        self._taken += 1
        init = self.session.init if first else chunk.init
        data = chunk.data if init is None else init + chunk.data
        said = protocol.chunk_metadata(self._request_id, chunk, len(data), init=init is not None)
        try:
            await asyncio.wait_for(self._pair(said, data), self._connections.stall)
        except TimeoutError:
            raise _Stalled(f"a chunk was not read for {self._connections.stall:g} s") from None
        self._heard = time.monotonic()
        self._viewing.sent(chunk, len(data))

    async def _pair(self, said: str, data: bytes) -> None:
        async with self._speaking:
            await self.socket.send(said)
            await self.socket.send(data)

    async def _send_end(self, end: End) -> int:
        if end.reason == "failed":
            await self._say(failure(end.message or "the video failed", "failed", request_id=self._request_id))
            return protocol.FAILED
        await self._say(protocol.done(self._request_id, end))
        return protocol.DONE

    async def _do_all(self) -> None:
        while True:
            text = await self.socket.receive()
            if text is None:
                return
            self._heard = time.monotonic()
            async with self._steering:
                if said := await self._answer(text):
                    await self._say(said)

    async def _answer(self, text: str | bytes) -> str:
        """Do what a message asks for; returns what to say of it, or "" where the end is the answer."""
        try:
            asked = protocol.read_later(text, self._served)
            with protocol.named(protocol.LATER):
                return await self._do(asked)
        except Full as error:
            return self._error(str(error), "no_capacity")
        except InputError as error:
            return self._error(str(error), "invalid_request", protocol.event_id_of(text))
        except OSError as error:
            log.warning("a snapshot failed: %s", disk_failure(error) or error)
            return self._error("the snapshot was not saved: the server's disk is full or broken", "disk")

    async def _do(self, asked: protocol.Later) -> str:
        """Do what a client asks; returns the answer, or "" where the end is one."""
        session = self.session
        if isinstance(asked, Interaction):
            told = asked.prompt, asked.event_id, asked.policy, asked.transition_chunks
            event_id = await asyncio.to_thread(session.change, *told)
            self._viewing.changed(event_id, self._served.limits.most_events)
            return self._message("session.interaction.queued", event_id=event_id)
        if isinstance(asked, Rewind):
            await asyncio.to_thread(session.rewind, asked.chunks)
            return self._message("session.rewound", chunks=asked.chunks)
        assert isinstance(asked, Plain)
        if asked.name == "stop":
            session.close()
            return ""
        if asked.name == "snapshot":
            return self._message("session.snapshot.created", state=protocol.state_value(await self._save()))
        if asked.name == "fork":
            self._forks = [id for id in self._forks if self._connections.lingers(id)]
            if len(self._forks) >= FORKS:
                raise InputError(f"session.fork: {FORKS} forks wait for a connection of their own; take one first")
            other = await _forked(session)
            self._forks.append(other.id)
            self._connections.linger(other, pause=False)
            return self._message("session.forked", session_id=other.id)
        if asked.name == "pause":
            await asyncio.to_thread(session.pause)
            return self._message("session.paused")
        if asked.name == "resume":
            await asyncio.to_thread(session.resume)
            self._viewing.interrupted()
            return self._message("session.resumed")
        return self._message("session.pong")

    async def _save(self) -> str:
        """Save a snapshot; one that is asked for again before another chunk was taken is the same."""
        taken = self._taken
        if not taken or self._snapshot[0] != taken:
            self._snapshot = taken, await asyncio.to_thread(self.session.snapshot)
        return self._snapshot[1]

    def _message(self, kind: str, **fields: Any) -> str:
        return encode({"type": kind, "request_id": self._request_id, **fields})

    def _error(self, message: str, code: str, event_id: str = "") -> str:
        return failure(message, code, request_id=self._request_id, event_id=event_id)

    async def _say(self, text: str) -> None:
        async with self._speaking:
            await self.socket.send(text)


async def _forked(session: AnySession) -> AnySession:
    """Fork a session; a viewer who leaves meanwhile leaves no fork behind."""
    forking: asyncio.Future[AnySession] = asyncio.ensure_future(asyncio.to_thread(session.fork))
    try:
        return await asyncio.shield(forking)
    except asyncio.CancelledError:
        forking.add_done_callback(lambda done: done.exception() or done.result().close())
        raise


class _Stalled(Exception):
    """Nothing goes on, or the client does not read."""


async def _farewell(socket: Socket, text: str) -> None:
    """Say a last word to a client who may not listen."""
    with contextlib.suppress(Gone, asyncio.TimeoutError):
        await asyncio.wait_for(socket.send(text), FAREWELL)
