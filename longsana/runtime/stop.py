"""Signals that ask a command to stop, in any phase of it.

SIGINT, SIGTERM and SIGHUP are one request. In most of a command it unwinds as `Stopped`, so that what is whole stays
and what is partial goes; where work is saved first, `deferred` notes it; while a module is imported, it ends the
process at once. A request that is repeated within AGAIN seconds, as launchers and schedulers do, is the same one; a
later one ends the process at once. A signal that is ignored when the command starts (nohup) stays ignored.

Nothing heavy is imported here: scripts call `catch` before their own imports, which take seconds.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AGAIN = 10.0
"""Seconds within which a repeated signal is the same request."""
MOMENT = 0.02
"""Seconds until a request is made again that a destructor has swallowed."""


class Stopped(BaseException):
    """A request to stop, on its way out of whatever is going on; no `except Exception` holds it up."""

    def __init__(self, number: int) -> None:
        super().__init__(number)  # all that a copy needs: checkpoints' reader pickles exceptions
        self.number = number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}"

    @property
    def status(self) -> int:
        """The exit status of a process that was stopped so."""
        return 128 + self.number


@dataclass
class _Requests:
    """running: a command's `caught` block has been entered; before, there is nothing to unwind. first: the signal that
    asked first, and when. swallowed: its exception was. deferred: how many `deferred` blocks are open. on_exit: cleans
    up before the process ends at once."""

    running: bool = False
    first: tuple[int, float] | None = None
    swallowed: bool = False
    deferred: int = 0
    on_exit: Callable[[], None] = lambda: None


_requests = _Requests()


def catch() -> dict[int, Any]:
    """Take the signals from now on; returns the handlers that had them. Call it first of all in a script."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    before: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
    taken = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, _note)}
    for number in taken:
        signal.signal(number, _note)
    return taken


def catch_again() -> None:
    """Take the signals back from a library that has taken them since `catch`, perhaps behind Python's back."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _note)


@contextmanager
def caught(on_exit: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Inside the block a request raises `Stopped`; afterwards the signals are whose they were.

    on_exit: removes what is partial when the process has to end at once.
    """
    outer = _requests.running, _requests.on_exit
    if not outer[0]:
        _requests.first = None
    taken = catch()
    unraisable = sys.unraisablehook
    sys.unraisablehook = partial(_ask_again, unraisable)
    _requests.running, _requests.on_exit = True, on_exit
    try:
        yield
    finally:
        _requests.running, _requests.on_exit = outer
        _requests.swallowed = False
        sys.unraisablehook = unraisable
        for number, handler in taken.items():
            signal.signal(number, handler)


@contextmanager
def deferred() -> Iterator[Callable[[], int]]:
    """Inside the block requests are noted, not obeyed: gives a function that says which signal asked, or 0."""
    taken = catch()
    if not _requests.running:
        _requests.first = None
    _requests.deferred += 1
    try:
        yield lambda: 0 if _requests.first is None else _requests.first[0]
    finally:
        _requests.deferred -= 1
        for number, handler in taken.items():
            signal.signal(number, handler)


@contextmanager
def held() -> Iterator[None]:
    """Hold requests back inside the block, whose code cannot be unwound, and obey them after it.

    Raises:
        Stopped: there was one. Where no command runs, the signal is given to whoever has it.
    """
    with deferred() as asked:
        before = asked()
        yield
    if (number := asked()) and not before:
        check()
        signal.raise_signal(number)


def heed(number: int) -> None:
    """Say that this process obeys a request, of whichever process of the launch it was: those that come within AGAIN
    seconds from now, as of a launcher that sees another process end, are the same one."""
    _requests.first = number, time.monotonic()


def requested() -> int:
    """The exit status of a process that was asked to stop, whether it has heard of it or not; 0: it was not asked."""
    return 0 if _requests.first is None else 128 + _requests.first[0]


def check() -> None:
    """Raise a request whose exception was lost, as in a bare `except`; call it between one piece of work and the next.

    Raises:
        Stopped: there was one.
    """
    if _requests.running and _requests.first is not None and not _requests.deferred:
        raise Stopped(_requests.first[0])


def _note(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _requests.first is not None and not _requests.swallowed:
        if now - _requests.first[1] >= AGAIN:
            _end_at_once(_requests.first[0])
        return
    _requests.first, _requests.swallowed = (number, now), False
    if _requests.deferred:
        return
    # A module's initialisation may be C++ code that lets no exception through, and nothing of it is to be unwound.
    if not _requests.running or _imports(frame):
        _end_at_once(number)
    raise Stopped(number)


def _imports(frame: FrameType | None) -> bool:
    """Tell whether a module is being imported."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _ask_again(otherwise: Callable[[Any], object], unraisable: Any) -> None:
    """Python's hook for exceptions in destructors, which go no further: a request is made again when they are done."""
    if not isinstance(unraisable.exc_value, Stopped):
        otherwise(unraisable)
        return
    _requests.swallowed = True
    again = threading.Timer(MOMENT, _thread.interrupt_main, [unraisable.exc_value.number])
    again.daemon = True
    again.start()


def _end_at_once(number: int) -> None:
    _requests.on_exit()
    if os.environ.get("RANK", "0") == "0":  # else the main process of the launch says it
        # Not print: the signal may have come while something else is printed.
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{Stopped(number)}\n".encode())
    os._exit(128 + number)
