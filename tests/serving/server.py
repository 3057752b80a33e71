"""Servers on loopback, in a thread of the test's process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI

from longsana.commands.serve import uvicorn_settings
from longsana.serving.app import create_app
from longsana.serving.jobs import Jobs
from longsana.serving.protocol import Served
from tests.serving.fake import FakeStudio, served


@dataclass
class Running:
    """A server that listens. studio: a `FakeStudio` unless another one was given."""

    port: int
    app: FastAPI
    studio: Any
    jobs: Jobs
    folder: Path
    server: uvicorn.Server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def socket(self) -> str:
        return f"ws://127.0.0.1:{self.port}/v1/realtime/video"


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """`running(studio)`: a server of it, until the test ends."""
    started: list[tuple[uvicorn.Server, threading.Thread, Running]] = []

    def run(studio: Any = None, what: Served | None = None, jobs: dict[str, Any] | None = None, **more: Any) -> Running:
        studio = studio or FakeStudio()
        what = what or served(studio.limits)
        folder = tmp_path / f"videos{len(started)}"
        made = Jobs(studio, what, folder, **(jobs or {}))
        app = create_app(studio, what, made, **more)
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, **uvicorn_settings()))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        until = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive() and time.monotonic() < until
            time.sleep(0.005)
        found = Running(server.servers[0].sockets[0].getsockname()[1], app, studio, made, folder, server)
        started.append((server, thread, found))
        return found

    yield run
    for server, thread, found in started:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
        found.jobs.close()
        found.studio.close()
