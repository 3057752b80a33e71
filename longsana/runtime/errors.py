"""The one exception that means "the person who ran this can fix it"."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: its message is one line that says what is wrong, where, and what to do.

    Commands print it without a traceback and exit with status 2. Anything else is a defect or a failure of the
    machine and keeps its traceback.
    """


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """The entry of `known` that looks most like `name`, or none."""
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing when no known name is close."""
    return _hint(nearest(name, known))


def mistyped_setting(key: str, known: Iterable[str]) -> list[str]:
    """The entry of `known` that a setting's dotted name is a typing error of; none if it may mean something else.

    Word by word, a word being what stands between dots and underscores: none is more than a slip away from the right
    one, and what is a word of another setting is meant. Settings share words that do not share a meaning.
    """
    known = list(known)
    words = {word for name in known for word in _words(name)}
    for name in known:
        if name.replace("_", "").replace("-", "") == key.replace("_", "").replace("-", ""):
            return [name]
        if len(_words(key)) != len(_words(name)) or key.count(".") != name.count("."):
            continue
        slips = [(own, right) for own, right in zip(_words(key), _words(name), strict=True) if own != right]
        if len(slips) <= 2 and all(own not in words and _is_a_slip(own, right) for own, right in slips):
            return [name]
    return []


def did_you_mistype(key: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for a setting, or nothing: see `mistyped_setting`; a name without its section has one."""
    known = list(known)
    return _hint([name for name in known if name.rpartition(".")[2] == key][:1] or mistyped_setting(key, known))


def _words(name: str) -> list[str]:
    return re.split(r"[._-]", name)


def _is_a_slip(own: str, right: str) -> bool:
    """One letter missing, one too many or wrong, or two that have changed places; two such of long words."""
    if len(right) < 3 or sorted(own) == sorted(right):
        return len(right) > 2
    same = sum(block.size for block in difflib.SequenceMatcher(None, own, right).get_matching_blocks())
    return max(len(own), len(right)) - same <= (2 if len(right) > 7 else 1)


def _hint(found: list[str]) -> str:
    return f" (did you mean '{found[0]}'?)" if found else ""
