"""The server: the page, the WebSocket of live sessions, and videos by HTTP. FastAPI is known here alone."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

from fastapi import FastAPI, Request, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.background import BackgroundTask
from starlette.datastructures import UploadFile
from starlette.middleware.cors import CORSMiddleware
from starlette.websockets import WebSocketDisconnect, WebSocketState

from longsana.runtime.errors import InputError
from longsana.runtime.foreign import parse_json
from longsana.serving import protocol
from longsana.serving.fleet import AnyStudio
from longsana.serving.guard import Guard, TooLong, error_value, spoken
from longsana.serving.jobs import Job, Jobs
from longsana.serving.live import LINGER, Connections, Gone
from longsana.serving.metrics import CONTENT_TYPE, Measurements
from longsana.serving.protocol import Served
from longsana.serving.values import Full

PAGE = Path(__file__).with_name("page.html")
EXPIRE = 60.0
"""Seconds between two looks for videos that are too old."""
THREADS = 128
"""Requests and changes that may wait for sessions or a disk at a time."""
MOST_FIELDS = 64
Reader = TypeVar("Reader", bound=Callable[..., Awaitable[Any]])


class _Socket:
    """A WebSocket of Starlette's, as `longsana.serving.live` wants one."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket

    async def receive(self) -> str | bytes | None:
        try:
            message = await self._socket.receive()
        except (RuntimeError, WebSocketDisconnect):
            return None
        if message["type"] == "websocket.disconnect":
            return None
        text: str | bytes | None = message.get("text")
        return message.get("bytes") or b"" if text is None else text

    async def send(self, data: str | bytes) -> None:
        try:
            if isinstance(data, str):
                await self._socket.send_text(data)
            else:
                await self._socket.send_bytes(data)
        except (RuntimeError, WebSocketDisconnect, OSError) as error:
            raise Gone from error

    async def close(self, code: int) -> None:
        if self._socket.client_state is not WebSocketState.DISCONNECTED:
            with contextlib.suppress(RuntimeError, WebSocketDisconnect, OSError):
                await self._socket.close(code)


def create_app(
    studio: AnyStudio,
    served: Served,
    jobs: Jobs,
    *,
    key: str | None = None,
    origins: tuple[str, ...] = (),
    local: bool = True,
    linger: float = LINGER,
    stall: float = protocol.STALL,
    start_within: float = protocol.START_WITHIN,
) -> FastAPI:
    """Build the app of a studio; whoever runs it closes studio and jobs afterwards.

    key, origins, local: see `longsana.serving.guard.Guard`. linger, stall, start_within: see `Connections`.
    """
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # what is wrong with a form its client hears
    measurements = Measurements(studio)
    connections = Connections(studio, served, measurements, linger=linger, stall=stall, start_within=start_within)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async def expire() -> None:
            while True:
                await asyncio.sleep(EXPIRE)
                await asyncio.to_thread(jobs.expire)

        # What waits for a session, perhaps for another machine, must not keep others waiting.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS, "requests"))
        task = asyncio.create_task(expire())
        yield
        task.cancel()
        connections.close()

    app = FastAPI(title="LongSANA", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Guard, key=key, origins=origins, local=local)
    if origins:  # outside of the door, since what a browser asks first has no key
        methods, names = ["GET", "HEAD", "POST", "DELETE"], ["Authorization", "Content-Type"]
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=methods, allow_headers=names)
    _add_errors(app, measurements)
    _add_page(app)
    _add_videos(app, served, jobs)

    @app.websocket("/v1/realtime/video")
    async def realtime(socket: WebSocket) -> None:
        await socket.accept(subprotocol=spoken(socket.scope))
        await connections.serve(_Socket(socket))

    @app.websocket("/{path:path}")
    async def elsewhere(socket: WebSocket) -> None:  # refused before it is accepted, it would look like a wrong key
        await socket.accept(subprotocol=spoken(socket.scope))
        await socket.close(protocol.INVALID, "there is no WebSocket at this path; the one is /v1/realtime/video")

    @_reads(app, "/v1/models")
    async def models() -> dict[str, Any]:
        model = {
            "id": served.name,
            "object": "model",
            "created": int(started),
            "owned_by": "longsana",
            "width": served.width,
            "height": served.height,
            "fps": served.fps,
            "num_frames": served.num_frames,
            "snapshots": served.snapshots,
            "kept_chunks": served.limits.kept,
        }
        return {"object": "list", "data": [model]}

    @_reads(app, "/health")
    async def health() -> Response:
        well = await asyncio.to_thread(lambda: studio.is_alive)
        if well:
            return JSONResponse({"status": "ok"})
        return JSONResponse(error_value(503, "nobody is there to make videos"), 503)

    @_reads(app, "/metrics")
    async def metrics() -> Response:
        return Response(await asyncio.to_thread(measurements.text), media_type=CONTENT_TYPE)

    started = time.time()
    return app


def _reads(app: FastAPI, path: str, **more: Any) -> Callable[[Reader], Reader]:
    """Decorate what answers GET at a path, and HEAD, of whose answer uvicorn sends the headers alone."""

    def add(function: Reader) -> Reader:
        app.head(path, include_in_schema=False)(function)
        return app.get(path, **more)(function)

    return add


def _add_errors(app: FastAPI, measurements: Measurements) -> None:
    def refuse(status: int, message: str, param: str | None = None) -> Response:
        measurements.refused.labels(str(status)).inc()
        return JSONResponse(error_value(status, message, param), status)

    @app.exception_handler(InputError)
    async def invalid(request: Request, error: InputError) -> Response:
        if isinstance(error, Full):
            return refuse(503, str(error))
        field = re.match(r"[\w.]+(?=[:=])", str(error))
        return refuse(400, str(error), field[0] if field else None)

    @app.exception_handler(RequestValidationError)
    async def misfit(request: Request, error: RequestValidationError) -> Response:  # of the query
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return refuse(400, f"{name}: {first['msg']}", name)

    @app.exception_handler(TooLong)
    async def too_long(request: Request, error: TooLong) -> Response:
        return refuse(413, "the body is too long")

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def nothing(request: Request, error: Any) -> Response:
        return JSONResponse(error_value(error.status_code, str(error.detail)), error.status_code)

    @app.exception_handler(400)
    async def unreadable(request: Request, error: Any) -> Response:  # a form that is none
        return refuse(400, str(error.detail)[:200])


def _add_page(app: FastAPI) -> None:
    text = PAGE.read_text(encoding="utf-8")

    def sources(tag: str) -> str:
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts]
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    headers = {
        "Content-Security-Policy": f"default-src 'none'; script-src {sources('script')}; style-src {sources('style')}; "
        "connect-src 'self'; media-src blob:; img-src data: blob:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    @_reads(app, "/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(text, headers=headers)


def _add_videos(app: FastAPI, served: Served, jobs: Jobs) -> None:
    def known(id: str) -> Job:
        job = jobs.get(id)
        if job is None:
            raise _NoVideo
        return job

    @app.exception_handler(_NoVideo)
    async def no_video(request: Request, error: Exception) -> Response:
        return JSONResponse(error_value(404, "there is no such video, or no longer"), 404)

    async def create(request: Request) -> Job:
        start = await asyncio.to_thread(protocol.read_video, await _body(request), served)
        with protocol.named(start.names):
            return await asyncio.to_thread(jobs.create, start.order)

    @app.post("/v1/videos")
    async def create_video(request: Request) -> dict[str, Any]:
        return (await create(request)).value(served.name)

    @app.post("/v1/videos/sync")
    async def create_and_wait(request: Request) -> Response:
        job = await create(request)
        ended = asyncio.wrap_future(job.ended)
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait([ended, gone], return_when=asyncio.FIRST_COMPLETED)
            if job.status != "completed":
                jobs.delete(job.id)
                return JSONResponse(error_value(500, job.error or "the client has gone"), 500)
        except asyncio.CancelledError:
            jobs.delete(job.id)
            raise
        finally:
            gone.cancel()
        return FileResponse(jobs.file(job), media_type="video/mp4", background=BackgroundTask(jobs.delete, job.id))

    @_reads(app, "/v1/videos")
    async def list_videos(
        after: str | None = None, limit: int = 20, order: Literal["asc", "desc"] = "desc"
    ) -> dict[str, Any]:
        found, more = jobs.list(after, min(max(limit, 1), 100), newest_first=order == "desc")
        ids = [job.id for job in found]
        return {
            "object": "list",
            "data": [job.value(served.name) for job in found],
            "first_id": ids[0] if ids else None,
            "last_id": ids[-1] if ids else None,
            "has_more": more,
        }

    @_reads(app, "/v1/videos/{id}")
    async def get_video(id: str) -> dict[str, Any]:
        return known(id).value(served.name)

    @_reads(app, "/v1/videos/{id}/content")
    async def content(id: str) -> Response:
        job = known(id)
        if job.status != "completed":
            return JSONResponse(error_value(409, f"the video is {job.status}; wait until it is completed"), 409)
        return FileResponse(jobs.file(job), media_type="video/mp4", filename=f"{job.id}.mp4")

    @app.delete("/v1/videos/{id}")
    async def delete_video(id: str) -> dict[str, Any]:
        known(id)
        await asyncio.to_thread(jobs.delete, id)
        return {"id": id, "object": "video.deleted", "deleted": True}


class _NoVideo(Exception):
    pass


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> dict[str, Any]:
    """Read the fields of a form, of which a file is its bytes, or of JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        try:
            fields = parse_json(await request.body())
        except ValueError as error:
            raise InputError(f"a body that is not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise InputError("the body must be a JSON object")
        return fields
    if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        raise InputError("the body must be application/json or multipart/form-data")
    form: dict[str, Any] = {}
    async with request.form(max_files=1, max_fields=MOST_FIELDS, max_part_size=protocol.MOST_START) as parts:
        for name, value in parts.multi_items():
            if isinstance(value, UploadFile):
                form[name] = await value.read() or None
            elif found := re.fullmatch(r"(\w+)\[(\w+)\]", name):  # an object's field, as clients write them in forms
                inner = form.setdefault(found[1], {})
                if isinstance(inner, dict):
                    inner[found[2]] = value
            else:
                form[name] = value
    return form
