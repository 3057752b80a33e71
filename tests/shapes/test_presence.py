"""When one who travels may be out of view: on rows of what was seen, written by hand."""

from __future__ import annotations

import pytest
import torch

from longsana.shapes.presence import LEAST_AWAY, RIMS, Presence, find_presence
from longsana.shapes.remembered import AWAY
from longsana.shapes.scenes import FPS, Actor

TRAVELLER = Actor("small", "red", "circle", "right", "quickly", travels=True)
SLOW = Actor("small", "red", "circle", "right", "slowly", travels=True)
WALKER = Actor("small", "red", "circle", "right", "quickly")


def presence(row: str, actor: Actor = TRAVELLER) -> Presence:
    """A letter a frame: w wholly in view, o at the rim where it goes out, i where it comes in, b at both, a unseen."""
    out = RIMS.index(actor.motion)
    rims = torch.zeros(1, len(row), 4, dtype=torch.bool)
    rims[0, :, out] = torch.tensor([letter in "ob" for letter in row])
    rims[0, :, (out + 2) % 4] = torch.tensor([letter in "ib" for letter in row])
    return find_presence(torch.tensor([[letter != "a" for letter in row]]), rims, [actor])


def letters(values: torch.Tensor) -> str:
    return "".join("x" if value else "." for value in values[0])


@pytest.mark.parametrize(
    ("row", "excused", "missing"),
    [
        ("wwwoooaaaaaiiiww", "...xxxxxxxxxxx..", "................"),
        ("wwwoooaaaaa", "...xxxxxxxx", "..........."),  # not back yet
        ("wwwooo", "...xxx", "......"),
        ("wwwowwwiww", "...x...x..", ".........."),  # only touched the rim
        ("wwwaaaaaaaiiiww", "...............", "...xxxxxxxxxx.."),  # vanished before it reached the rim
        ("wwwoooaaaaaaaww", "...............", "...xxxxxxxxxx.."),  # came back in the middle
        ("wwwoooaaaaaaaooww", ".................", "...xxxxxxxxxxxx.."),  # came back where it had gone
        ("wwwiiiaaaaaaaoooww", "..................", "...xxxxxxxxxxxxx.."),  # went the wrong way
        ("wwwawww", ".......", "......."),  # a flicker is not excused, nor has anyone left
        ("wwwobbiiwww", "...x..xx...", "..........."),  # as on the torus: on both sides at once
        ("aaaaaaiiiww", "...........", "..........."),  # nobody was there to leave
    ],
)
def test_who_is_excused(row: str, excused: str, missing: str) -> None:
    found = presence(row)
    assert letters(found.whole) == "".join("x" if letter == "w" else "." for letter in row)
    assert letters(found.torn) == "".join("x" if letter == "b" else "." for letter in row)
    assert letters(found.excused) == excused
    assert letters(found.missing) == missing


@pytest.mark.parametrize("direction", RIMS)
def test_each_direction_has_its_rims(direction: str) -> None:
    actor = Actor("small", "red", "circle", direction, "quickly", travels=True)
    assert letters(presence("wwooaaaaaiiw", actor).excused) == "..xxxxxxxxx."
    rims = torch.zeros(1, 12, 4, dtype=torch.bool)
    rims[0, 2:4, RIMS.index(direction)] = True
    rims[0, 9:11, {"left": 2, "right": 0, "up": 3, "down": 1}[direction]] = True
    there = torch.tensor([[letter != "a" for letter in "wwooaaaaaiiw"]])
    assert letters(find_presence(there, rims, [actor]).excused) == "..xxxxxxxxx."
    others = rims.roll(1, dims=2)
    assert not find_presence(there, others, [actor]).excused.any()


def test_one_who_does_not_travel_is_never_excused() -> None:
    found = presence("wwwoooaaaaaiiiww", WALKER)
    assert letters(found.whole) == "xxxxxx.....xxxxx"
    assert not found.excused.any() and not found.missing.any() and not found.torn.any()
    assert (found.before == -1).all()


@pytest.mark.parametrize(("actor", "limit"), [(TRAVELLER, 160), (SLOW, 258)])
def test_one_who_never_comes_back_is_missing_at_last(actor: Actor, limit: int) -> None:
    """After the longest absence of the world, the way out and in, and a second."""
    found = presence("w" * 20 + "o" * 10 + "a" * 400, actor)
    assert limit > AWAY[1] + FPS
    assert letters(found.excused) == "." * 20 + "x" * limit + "." * (410 - limit)
    assert letters(found.missing) == "." * (20 + limit) + "x" * (410 - limit)
    late = presence("w" * 20 + "o" * 10 + "a" * 300 + "i" * 5 + "w" * 5, actor)
    assert letters(late.missing) == "." * (20 + limit) + "x" * (315 - limit) + "." * 5


def test_what_it_was_before_it_left() -> None:
    row = "wwww" + "oaaaaaai" + "wwawww" + "o" + "a" * (LEAST_AWAY - 1) + "i" + "ww" + "oaaaaaai" + "ww"
    before = presence(row).before[0].tolist()
    second, third = row.index("iww") + 1, row.rindex("iww") + 1
    assert before[:second] == [-1] * second
    assert before[second:third] == [3] * (third - second), "neither a flicker nor a short dip is an absence"
    assert before[third:] == [row.rindex("wwoaaaaaai") + 1] * 2


def test_actors_do_not_mix() -> None:
    one, other = "wwwoooaaaaaiiiww", "wwwaaaaaaaiiiwww"
    rims = torch.zeros(2, 16, 4, dtype=torch.bool)
    for number, row in enumerate((one, other)):
        rims[number, :, 2] = torch.tensor([letter == "o" for letter in row])
        rims[number, :, 0] = torch.tensor([letter == "i" for letter in row])
    there = torch.tensor([[letter != "a" for letter in row] for row in (one, other)])
    both = find_presence(there, rims, [TRAVELLER, TRAVELLER])
    for number, row in enumerate((one, other)):
        for field, alone in zip(both, presence(row), strict=True):
            assert torch.equal(field[number : number + 1], alone)
    assert all(field.shape == (0, 16) for field in find_presence(there[:0], rims[:0], []))
