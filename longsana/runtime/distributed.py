"""The processes of one launch, and what this one may use of the machine."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from longsana.runtime.errors import InputError

T = TypeVar("T")


class PeerError(InputError):
    """An InputError of the main process, which tells it."""


@dataclass(frozen=True)
class World:
    """This process among its peers, as torchrun and accelerate describe it in the environment."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls) -> World:
        return cls(
            rank=int(os.environ.get("RANK", 0)),
            size=int(os.environ.get("WORLD_SIZE", 1)),
            local_rank=int(os.environ.get("LOCAL_RANK", 0)),
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1))),
        )

    def connect(self, backend: str = "gloo", *, timeout: timedelta = timedelta(days=7), alone: bool = False) -> None:
        """Meet the other processes, where there are any; `alone`: make a group of one where there are none.

        timeout: how long one waits for another; in inference, for hours of a peer's last videos.
        """
        if self.size > 1:
            dist.init_process_group(backend, timeout=timeout)
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
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_main(self, action: Callable[[], T]) -> T | None:
        """What `action` gives on the main process, None elsewhere; the others wait for it.

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
        dist.all_gather_object(box, value)
        return box

    def disconnect(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def set_threads(requested: int | None, world: World) -> int:
    """Set torch's threads: as requested, or this process's share of the usable cores; returns the number.

    Launchers export OMP_NUM_THREADS=1, which would leave all cores but one idle.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = requested or max(usable // world.local_size, 1)
    torch.set_num_threads(threads)
    return threads


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT, LARGEST = 256 << 20, 32 << 20
OWN_WISHES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> None:
    """Where there is no GPU, let glibc keep up to KEPT bytes that are free, and take tensors up to LARGEST from them.

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
