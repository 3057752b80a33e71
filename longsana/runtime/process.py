"""The beginning of a command's process, before anything heavy is imported."""

from __future__ import annotations

import os

from longsana.runtime import stop

SPINS = 10_000
"""Turns that a thread of OpenMP spins while it waits for the others, before it sleeps."""


def begin() -> None:
    """Catch signals from here on, and have threads share their cores; call it before torch is imported."""
    stop.catch()
    share_cores()


def share_cores() -> None:
    """Have threads that wait for each other soon sleep, unless the environment says how they are to wait.

    Programs that are no commands call it in place of `begin`: a signal unwinds them as any Python program.

    libgomp, which reads it as torch is loaded, lets them spin for 300,000 turns. Where another process wants their
    core, that is what keeps the thread they wait for from running: beside two busy processes on two cores the default
    command took 154 s, and 24 so; alone it took as long either way.
    """
    if not os.environ.get("OMP_WAIT_POLICY"):
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
