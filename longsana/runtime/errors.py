"""The one exception that means "the person who ran this can fix it"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: its message is one line that says what is wrong, where, and what to do.

    Commands print it without a traceback and exit with status 2. Anything else is a defect or a failure of the
    machine and keeps its traceback.
    """


def nearest(name: str, known: Iterable[str], count: int = 1) -> list[str]:
    """The `count` entries of `known` that look most like `name` (possibly none)."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing when no known name is close."""
    found = nearest(name, known)
    return f" (did you mean '{found[0]}'?)" if found else ""
