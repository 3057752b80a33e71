"""A clock of where the time goes, part by part, that does not make the GPU wait."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds spent in named parts: CUDA events on a GPU, where launching is not doing; wall time on a CPU."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._pending: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if not self._cuda:
            started = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - started
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._pending.append((name, begin, end))
        # Events are resolved as they finish, so that a long video does not pile them up.
        while self._pending and self._pending[0][2].query():
            self._resolve()

    def seconds(self) -> dict[str, float]:
        """Seconds of each part so far; waits for the GPU to finish what was timed."""
        while self._pending:
            self._pending[0][2].synchronize()
            self._resolve()
        return dict(self._seconds)

    def _resolve(self) -> None:
        name, begin, end = self._pending.popleft()
        self._seconds[name] += begin.elapsed_time(end) / 1000
