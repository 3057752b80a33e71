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
    return _hint(nearest(name, known))


def mistyped_setting(key: str, known: Iterable[str]) -> list[str]:
    """The entry of `known` that the dotted `key` is a typing error of; none if it may mean something else.

    Both the section and the name must be alike: settings share words that do not share a meaning.
    """

    def alike(name: str) -> float:
        return min(map(_likeness, key.rpartition(".")[::2], name.rpartition(".")[::2]))

    found = max(known, key=alike, default="")
    return [found] if found and alike(found) >= 0.75 else []


def did_you_mistype(key: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for a setting, or nothing: see `mistyped_setting`; a name without its section has one."""
    known = list(known)
    return _hint([name for name in known if name.rpartition(".")[2] == key][:1] or mistyped_setting(key, known))


def _likeness(one: str, other: str) -> float:
    """In [0, 1]; 1 too where letters have only changed places."""
    return 1.0 if sorted(one) == sorted(other) else difflib.SequenceMatcher(None, one, other).ratio()


def _hint(found: list[str]) -> str:
    return f" (did you mean '{found[0]}'?)" if found else ""
