"""Standard output, which may be a pipe whose reader goes when it has seen enough, as `head` does."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable

UNREAD = 128 + signal.SIGPIPE
"""The exit status of a command that nobody reads any more, 141: a shell's word for a process that SIGPIPE ended."""


def until_unread(command: Callable[[], int]) -> int:
    """Run a command that prints; returns its exit status, or UNREAD without a word when its reader has gone.

    Other programs end there by SIGPIPE, which Python ignores. Another pipe that breaks, such as an encoder's, is an
    error as ever.
    """
    try:
        try:
            status = command()
        except SystemExit:  # of --help, which is not printed yet
            _flush()
            raise
        _flush()
        return status
    except BrokenPipeError:
        if not _is_unread():
            raise
        # What is still to be printed goes nowhere, or Python would complain of it at its exit.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return UNREAD


def _flush() -> None:
    if sys.stdout is not None:  # closed before the start (>&-)
        sys.stdout.flush()


def _is_unread() -> bool:
    """Tell whether standard output is a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no file at all
        return False
