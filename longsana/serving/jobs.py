"""Videos of `/v1/videos`: made in the background, kept for a while in a folder of bounded size."""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longsana.runtime.errors import InputError
from longsana.runtime.files import check_writable, disk_failure, partial_name, unfinished
from longsana.serving.fleet import AnySession, AnyStudio
from longsana.serving.protocol import Served
from longsana.serving.values import End, Full, Order

log = logging.getLogger(__name__)

PREFIX = "video_"
LOOK = 0.5
"""Seconds after which a job that waits for a chunk looks whether it is still wanted."""


@dataclass
class Job:
    """One video that was asked for. The fields after `session` change while it is made.

    id: random, and with `.mp4` the name of its file. created, completed, expires: seconds since 1970.
    """

    id: str
    order: Order
    size: str
    seconds: float
    created: int = field(default_factory=lambda: int(time.time()))
    session: AnySession | None = None
    status: str = "queued"
    frames: int = 0
    bytes: int = 0
    completed: int | None = None
    expires: int | None = None
    error: str = ""
    dropped: bool = False
    ended: Future[None] = field(default_factory=Future)

    def value(self, model: str) -> dict[str, Any]:
        """The object that clients are shown."""
        total = self.order.num_frames or 1
        return {
            "id": self.id,
            "object": "video",
            "model": model,
            "status": self.status,
            "progress": 100 if self.status == "completed" else min(99, 100 * self.frames // total),
            "created_at": self.created,
            "completed_at": self.completed,
            "expires_at": self.expires,
            "size": self.size,
            "seconds": f"{self.seconds:g}",
            "prompt": self.order.prompt,
            "remixed_from_video_id": None,
            "error": {"code": "failed", "message": self.error} if self.error else None,
        }


class Jobs:
    """Makes videos, `at_a_time` at once; any thread may call any method.

    folder: for the files, which is this object's alone: what else of its own kind lies there is removed.
    most: jobs that are known, finished ones included, which go when a new one needs their place. most_bytes: of all
    files. lifetime: seconds for which a finished video can be had.

    Raises:
        InputError: the folder cannot be written to.
    """

    def __init__(
        self,
        studio: AnyStudio,
        served: Served,
        folder: Path,
        *,
        most: int = 64,
        most_bytes: int = 4 << 30,
        lifetime: int = 3600,
        at_a_time: int = 2,
    ) -> None:
        check_writable(folder)
        for path in folder.glob(f"*{PREFIX}*.mp4"):  # of a server that was killed
            path.unlink(missing_ok=True)
        self._studio, self._served, self._folder = studio, served, folder
        self._most, self._most_bytes, self._lifetime, self._at_a_time = most, most_bytes, lifetime, at_a_time
        self._jobs: dict[str, Job] = {}  # the oldest first
        self._lock = threading.Lock()
        self._workers = ThreadPoolExecutor(at_a_time, thread_name_prefix="videos")

    def create(self, order: Order) -> Job:
        """Take in a job; it may wait for the studio.

        Raises:
            InputError: no such video can be made; one line, which begins with the field of the order.
            Full: as many wait as may.
        """
        self._studio.check(order)  # at once, before it waits, or takes the place of a video that is finished
        self.expire()
        height, width = order.height or self._served.height, order.width or self._served.width
        seconds = (order.num_frames or 0) / (order.fps or self._served.fps)
        job = Job(PREFIX + secrets.token_hex(16), order, f"{width}x{height}", round(seconds, 3))
        with self._lock:
            if len(self._jobs) >= self._most:
                old = next((one for one in self._jobs.values() if one.ended.done()), None)
                if old is None:
                    raise Full(
                        f"{len(self._jobs)} videos are being made or wait; at most {self._most}; try again later"
                    )
                self._drop(old)
            begins = sum(not one.ended.done() for one in self._jobs.values()) < self._at_a_time
            self._jobs[job.id] = job
        if begins:  # then the studio may be full
            try:
                job.session = self._studio.start(order)
            except BaseException:
                self.delete(job.id)
                raise
        self._workers.submit(self._make, job)
        return job

    def get(self, id: str) -> Job | None:
        """The job of this id, if it is still known."""
        self.expire()
        with self._lock:
            return self._jobs.get(id)

    def list(self, after: str | None, limit: int, *, newest_first: bool) -> tuple[list[Job], bool]:
        """Up to `limit` jobs that follow the one of the id `after`, and whether there are more."""
        self.expire()
        with self._lock:
            jobs = list(self._jobs.values())[:: -1 if newest_first else 1]
        ids = [job.id for job in jobs]
        place = ids.index(after) + 1 if after in ids else 0
        return jobs[place : place + limit], place + limit < len(jobs)

    def file(self, job: Job) -> Path:
        """The place of a job's mp4, which is there once its status is "completed"."""
        return self._folder / f"{job.id}.mp4"

    def delete(self, id: str) -> bool:
        """Forget a job and its file; one that is being made is given up. Returns whether there was one."""
        with self._lock:
            job = self._jobs.get(id)
            if job is not None:
                self._drop(job)
        return job is not None

    def expire(self) -> None:
        """Forget what is too old."""
        now = time.time()
        with self._lock:
            for job in list(self._jobs.values()):
                if job.expires is not None and job.expires <= now:
                    self._drop(job)

    def close(self) -> None:
        """Give up what is being made, and remove all files."""
        with self._lock:
            for job in list(self._jobs.values()):
                self._drop(job)
        self._workers.shutdown(cancel_futures=True)

    def _drop(self, job: Job) -> None:
        job.dropped = True
        del self._jobs[job.id]
        if job.session is not None:
            job.session.close()
        self.file(job).unlink(missing_ok=True)

    def _make(self, job: Job) -> None:
        path = self.file(job)
        partial = partial_name(path)
        try:
            if job.dropped:
                return
            job.session = job.session or self._studio.start(job.order)
            with unfinished(partial), partial.open("wb") as stream:
                job.status = "in_progress"
                reason = self._write(job, stream)
            with self._lock:
                if reason or job.dropped:
                    self._tell(job, "failed", reason)
                else:
                    partial.replace(path)
                    self._tell(job, "completed")
        except InputError as error:
            self._tell(job, "failed", str(error))
        except OSError as error:
            log.warning("%s: %s", job.id, disk_failure(error) or error)
            self._tell(job, "failed", "the server's disk is full or broken")
        except Exception:
            log.exception("%s failed", job.id)
            self._tell(job, "failed", "an error of the server")
        finally:
            if job.session is not None:
                job.session.close()
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            job.expires = job.expires or int(time.time()) + self._lifetime
            job.ended.set_result(None)

    def _tell(self, job: Job, status: str, error: str = "") -> None:
        """Say how a job has ended; who sees the status, which comes last, sees all else too."""
        now = int(time.time())
        job.error, job.expires = error, now + self._lifetime
        job.completed = now if status == "completed" else None
        job.status = status

    def _write(self, job: Job, stream: Any) -> str:
        """Write a session's pieces; returns why it failed, or "" if it did not."""
        assert job.session is not None
        while not job.dropped:
            piece = job.session.take(LOOK)
            if isinstance(piece, End):
                return "" if piece.reason == "finished" else piece.message or "the video was given up"
            if piece is None:
                continue
            data = (piece.init or b"") + piece.data
            if not self._room(job, len(data)):
                return f"a video of more than {self._most_bytes} bytes, which this server does not keep"
            stream.write(data)
            job.bytes += len(data)
            job.frames += piece.frames
        return "the video was given up"

    def _room(self, job: Job, more: int) -> bool:
        """Make room for so many bytes; the oldest finished videos go."""
        with self._lock:
            while sum(one.bytes for one in self._jobs.values()) + more > self._most_bytes:
                old = next((one for one in self._jobs.values() if one.status == "completed"), None)
                if old is None:
                    return False
                self._drop(old)
        return True
