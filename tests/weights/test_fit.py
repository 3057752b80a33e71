from __future__ import annotations

from longsana.weights.fit import kind, misfit


def test_what_fits_gives_nothing() -> None:
    needed = {"a": kind((2, 3)), "b": kind((), "float32")}
    assert misfit(needed, needed) == ""
    assert misfit({"a": "[2, 3]"}, needed, optional={"b"}) == ""


def test_all_that_is_wrong_is_told_in_one_line() -> None:
    needed = {"block.weight": kind((2, 3)), "block.bias": kind((2,)), "step": kind((), "float32")}
    found = {"block.weigth": kind((2, 3)), "block.bias": kind((3,)), "step": kind((), "float64")}
    assert misfit(found, needed) == (
        "missing 1: block.weight; unexpected 1: block.weigth (did you mean 'block.weight'?); "
        "wrong shape or dtype 2: block.bias [3] (needed: [2]), step [] float64 (needed: [] float32)"
    )


def test_the_first_ten_are_named() -> None:
    assert misfit({}, {f"{number}": "[]" for number in range(12)}) == "missing 12: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ..."
