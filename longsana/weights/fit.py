"""One report of tensors that are not those that are needed: names, shapes and dtypes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from longsana.runtime.errors import did_you_mean

LISTED = 10  # names of a kind that a message tells


def kind(shape: Sequence[int], dtype: str = "") -> str:
    """A tensor's kind as reports tell it: its shape, and its dtype where that matters."""
    return f"{list(shape)} {dtype}".rstrip()


def misfit(found: Mapping[str, str], needed: Mapping[str, str], optional: Collection[str] = ()) -> str:
    """Tell in one line what of a checkpoint does not fit; nothing ("") if all of it does.

    found, needed: the `kind` of each tensor by its name. optional: names that a checkpoint may lack.
    """
    missing = [name for name in needed if name not in found and name not in optional]
    unexpected = [name for name in found if name not in needed]
    hinted = [name + did_you_mean(name, missing or needed) for name in unexpected[:LISTED]] + unexpected[LISTED:]
    wrong = [
        f"{name} {found[name]} (needed: {right})" for name, right in needed.items() if found.get(name, right) != right
    ]
    lists = {"missing": missing, "unexpected": hinted, "wrong shape or dtype": wrong}
    return "; ".join(listed(title, names) for title, names in lists.items() if names)


def listed(title: str, names: Sequence[str]) -> str:
    """Tell how many names there are, and the first of them."""
    return f"{title} {len(names)}: {', '.join(names[:LISTED])}{', ...' if len(names) > LISTED else ''}"
