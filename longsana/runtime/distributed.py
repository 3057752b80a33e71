"""The processes of one launch, and what this one may use of the machine."""

from __future__ import annotations

import ctypes
import itertools
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from longsana.runtime.errors import InputError

T = TypeVar("T")
log = logging.getLogger(__name__)


FOR_HOURS = timedelta(days=7)
"""The time that one process waits for another, in inference for hours of a peer's last videos."""


class PeerError(InputError):
    """An InputError of the main process, which tells it."""


class PeerLost(Exception):
    """Another process of the launch has ended or cannot be reached any more."""


@dataclass(frozen=True)
class World:
    """This process among its peers, as torchrun and accelerate describe it in the environment."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls) -> World:
        """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; `connect` reads where processes meet.

        Raises:
            InputError: a variable is no number, or they contradict each other.
        """
        size = _launch_number("WORLD_SIZE", 1, least=1)
        rank = _launch_number("RANK", 0)
        if rank >= size:
            said = os.environ.get("WORLD_SIZE", "not set")
            raise InputError(f"RANK={rank}, but WORLD_SIZE is {said}: a rank is below it; {_LAUNCH}")
        local_size = _launch_number("LOCAL_WORLD_SIZE", size, least=1)
        local_rank = _launch_number("LOCAL_RANK", rank % local_size)
        if local_rank >= local_size or local_size > size:
            raise InputError(
                f"LOCAL_RANK={local_rank}, LOCAL_WORLD_SIZE={local_size}, WORLD_SIZE={size}: a local rank is below the "
                f"local size, and that at most the size; {_LAUNCH}"
            )
        return cls(rank, size, local_rank, local_size)

    def connect(self, backend: str = "gloo", *, timeout: timedelta = FOR_HOURS, alone: bool = False) -> None:
        """Meet the other processes, where there are any; `alone`: make a group of one where there are none.

        timeout: how long one waits for another; in inference, for hours of a peer's last videos.

        Raises:
            InputError: they do not come within `PATIENCE`, or it is not said where they meet, or nobody can meet there.
        """
        if self.size > 1:
            for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
                if not os.environ.get(name):
                    raise InputError(f"WORLD_SIZE={self.size}, but {name} is not set; {_LAUNCH}")
            dist.init_process_group(backend, store=_meet(self), rank=self.rank, world_size=self.size, timeout=timeout)
        elif alone:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def device(self) -> torch.device:
        """This process's GPU, or the CPU where there is none.

        Raises:
            InputError: more processes on this machine than GPUs.
        """
        if not torch.cuda.is_available():
            return torch.device("cpu")
        if self.local_rank >= torch.cuda.device_count():
            raise InputError(
                f"process {self.local_rank} of {self.local_size} on this machine has no GPU of its own "
                f"(found {torch.cuda.device_count()}); start at most that many"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def broadcast(self, value: T) -> T:
        """The main process's value, on every process."""
        if self.size == 1:
            return value
        box = [value]
        with among_peers():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_main(self, action: Callable[[], T]) -> T | None:
        """Run `action` on the main process, for which the others wait; they get None.

        Raises:
            InputError: it raised one; on the others as a `PeerError`, which is told once.
        """
        value: T | None = None
        failure: InputError | None = None
        if self.is_main:
            try:
                value = action()
            except InputError as error:
                failure = error
        told = self.broadcast(None if failure is None else str(failure))
        if failure is not None:
            raise failure
        if told is not None:
            raise PeerError(told)
        return value

    def gather(self, value: T) -> list[T]:
        """Everyone's values in order of rank, on every process."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        with among_peers():
            dist.all_gather_object(box, value)
        return box

    def disconnect(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


LOST = "another process of this launch has ended; start the same command again"
_CLOSED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
"""How gloo and NCCL say that a process has gone, which they have no class for."""
_LAUNCH = "unset them, or start with torchrun or accelerate launch"
PATIENCE = timedelta(minutes=30)
"""How long processes wait for each other at the start."""
_meetings = itertools.count()


def _launch_number(name: str, default: int, *, least: int = 0, most: int = 1 << 20) -> int:
    """A variable that launchers set; the default where it is not there."""
    text = os.environ.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise InputError(f"{name}={text}: must be a whole number from {least}; {_LAUNCH}")
    return int(text)


def _meet(world: World) -> dist.Store:
    """A store that all processes have come to, which says for whom it waits."""
    host, port = os.environ["MASTER_ADDR"], _launch_number("MASTER_PORT", 0, least=1, most=65535)
    try:
        socket.getaddrinfo(host, port)
    except OSError as error:
        raise InputError(f"MASTER_ADDR={host}: there is no such host ({error.strerror}); {_LAUNCH}") from error
    # torchrun's agent keeps the store already.
    is_host = world.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    started, patience = time.monotonic(), _Waiting(host, port)
    # Not by TCPStore, which prints a line of its own at each try.
    while not (is_host or _answers(host, port)):
        patience.tell(time.monotonic() - started, f"process {world.rank}: waiting for the main process")
        time.sleep(0.1)
    try:
        tcp = dist.TCPStore(host, port, None, is_host, timedelta(seconds=10), wait_for_workers=False)
    except (RuntimeError, ValueError) as error:
        detail = " ".join(str(error).split())[:120]
        used = "listened at" if is_host else "used"
        raise InputError(f"MASTER_ADDR={host}, MASTER_PORT={port}: cannot be {used} ({detail})") from error
    # A launch may restart its processes, and a process may meet the others more than once.
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"longsana/{restart}/{next(_meetings)}", tcp)
    here = store.add("here", 1)
    while here < world.size:
        missing = world.size - here
        if world.is_main:
            more = f"waiting for {missing} more process{'es' if missing > 1 else ''}"
            patience.tell(time.monotonic() - started, more)
        time.sleep(0.05)
        here = store.add("here", 0)
    tcp.set_timeout(PATIENCE)
    return store


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


class _Waiting:
    """Tells once a minute what is waited for at HOST:PORT, and gives up in the end."""

    def __init__(self, host: str, port: int) -> None:
        self._where, self._next = f"{host}:{port}", 5.0

    def tell(self, seconds: float, what: str) -> None:
        """
        Raises:
            InputError: the patience is at its end.
        """
        if seconds > PATIENCE.total_seconds():
            raise InputError(f"{what} at {self._where}: none came in {PATIENCE.total_seconds() / 60:.0f} minutes")
        if seconds >= self._next:
            log.error("%s at %s", what, self._where)
            self._next = seconds + 60


@contextmanager
def among_peers() -> Iterator[None]:
    """Inside, an error of the connection is a `PeerLost`."""
    try:
        yield
    except RuntimeError as error:  # torch.distributed has no narrower class for a connection that is closed
        raise PeerLost(LOST) from error


@contextmanager
def losing_peers() -> Iterator[None]:
    """Inside, where anything may meet the other processes, an error that says a connection has closed is a `PeerLost`.

    What any other error may be is left as it is.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, PeerLost) and _tells_of_loss(error):
            raise PeerLost(LOST) from error
        raise


def _tells_of_loss(error: BaseException | None) -> bool:
    """Tell whether this error, or one that led to it, is of a connection between processes."""
    if error is None:
        return False
    is_ours = isinstance(error, dist.DistNetworkError | dist.DistStoreError)
    closed = isinstance(error, RuntimeError) and any(words in str(error) for words in _CLOSED)
    return is_ours or closed or _tells_of_loss(error.__cause__ or error.__context__)


def set_threads(requested: int | None, world: World) -> int:
    """Set torch's threads: as requested, or this process's share of the usable cores; returns the number.

    Launchers export OMP_NUM_THREADS=1, which would leave all cores but one idle.
    """
    threads = requested or max(usable_cores() // world.local_size, 1)
    torch.set_num_threads(threads)
    return threads


def usable_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT, LARGEST = 256 << 20, 32 << 20
OWN_WISHES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> None:
    """Let glibc, where there is no GPU, keep up to KEPT bytes that are free, and take tensors up to LARGEST from them.

    By default it may give them back to the system, which zeroes them page by page when they are next wanted: 961 frames
    of the small default took two cores 17 to 22 s, and 15 to 16 in the same hour (seconds of system time: 1 for 1 to
    7). What the environment asks for, and other C libraries, stay as they are.
    """
    if torch.cuda.is_available() or any(name in os.environ for name in OWN_WISHES):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, KEPT)
        mallopt(M_MMAP_THRESHOLD, LARGEST)
