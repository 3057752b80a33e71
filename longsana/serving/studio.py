"""A studio: one network that makes the chunks of many sessions, whose viewers would run dry first."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch

from longsana.config import InferenceConfig
from longsana.serving.session import Session
from longsana.serving.values import Figures, Limits, Order


class Studio:
    """Loads what a config names, and makes the chunks of all sessions on one thread, until it is closed.

        with Studio(config, device="cuda", snapshots=Path("snapshots")) as studio:
            session = studio.start(Order("a harbour at dawn"))
            while not isinstance(piece := session.take(None), End):
                ...

    snapshots: the folder that has them, made if it is missing, for this process alone; None: none can be saved.

    Raises:
        InputError: the config is not of the distilled model, files are missing or do not fit, or another process has
            the folder.
    """

    def __init__(
        self,
        config: InferenceConfig,
        device: torch.device | str = "cpu",
        limits: Limits | None = None,
        snapshots: Path | None = None,
    ) -> None:
        raise NotImplementedError

    def start(self, order: Order) -> Session:
        """Begin a session; it waits in the queue where there is no place (`Session.position`).

        One session at a time goes on from the last snapshot of another that is still running: a second one becomes a
        fork, with an id of its own, since a snapshot is a value that nobody changes.

        Raises:
            InputError: no such video can be made; one line, which begins with the field of the order.
            Full: as many wait as may.
        """
        raise NotImplementedError

    def session(self, id: str) -> Session | None:
        """The session of this id, until it is closed, or has ended and all of it was taken."""
        raise NotImplementedError

    def figures(self) -> Figures:
        """Measure. It takes no part in the work, and waits for none."""
        raise NotImplementedError

    def close(self) -> None:
        """End all sessions and the thread. Snapshots that are being written are finished."""
        raise NotImplementedError

    def __enter__(self) -> Studio:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
