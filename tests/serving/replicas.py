"""Replicas in the test's own process, which can be lost at any moment."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from longsana.config import InferenceConfig
from longsana.serving.fleet import Lost
from longsana.serving.replica import Elsewhere, Replica
from longsana.serving.studio import Studio
from longsana.serving.values import Figures, Limits


class Local:
    """Replicas a, b, ... of one config. before, after: are called with each call's name and method, and may `lose`.

    Those that are lost can be had again by `reset`, without what they knew.
    """

    def __init__(self, config: InferenceConfig, folder: Path, names: str = "ab", limits: Limits | None = None) -> None:
        self._config, self._folder, self._limits = config, folder, limits or Limits(own_snapshots=4)
        self._open = ExitStack()
        self._lock = threading.Lock()
        self.all: dict[str, Replica] = {}
        for name in names:
            self.add(name)
        self.reset()

    def reset(self) -> None:
        """Have all replicas as they were at first, but for their snapshots."""
        for replica in self.all.values():
            for session in list(replica.studio._sessions.values()):
                session.close()
        self.there = dict(self.all)
        self.draining: set[str] = set()
        self.calls: list[tuple[str, str]] = []
        self.before: Callable[[str, str], object] = lambda name, method: None
        self.after: Callable[[str, str], object] = lambda name, method: None

    def add(self, name: str) -> Replica:
        """Begin another replica."""
        studio = Studio(self._config, limits=self._limits, snapshots=self._folder / name, fleet=True)
        self._open.callback(studio.close)
        self.all[name] = self._open.enter_context(Replica(studio))
        return self.all[name]

    def lose(self, name: str) -> None:
        """Have a replica gone, with all that it knows; what it is doing nobody hears of."""
        del self.there[name]

    def drain(self, name: str) -> None:
        """Have a replica gone for new calls, and answer those that are under way, as one that is replaced."""
        self.draining.add(name)
        del self.there[name]

    def end(self, name: str) -> None:
        """End a replica for good."""
        self.there.pop(name, None)
        self.all.pop(name).studio.close()

    def call(self, name: str, method: str, *arguments: Any) -> Any:
        with self._lock:
            self.calls.append((name, method))
        self.before(name, method)
        if (replica := self.there.get(name)) is None:
            raise Lost
        try:
            answer = getattr(replica, method)(*arguments)
        except Elsewhere as error:
            raise Lost from error
        except Exception as error:
            if name not in self.there:
                raise Lost from error
            raise
        self.after(name, method)
        if name not in self.there and name not in self.draining:
            raise Lost
        return answer

    def figures(self) -> dict[str, Figures]:
        return {name: replica.figures() for name, replica in list(self.there.items())}

    def close(self) -> None:
        self._open.close()
