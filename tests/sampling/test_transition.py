"""Captions between two parts of a prompt."""

from __future__ import annotations

import math

import pytest
import torch

from longsana.data.story import Change, Outline, Placed
from longsana.encoders.text import CompactEmbedding, expand
from longsana.sampling.transition import Shown, Way, blend, embedding_of, shown_in

WAYS: tuple[Way, ...] = ("linear", "spherical")


def caption(tokens: int, seed: int, length: int = 8) -> CompactEmbedding:
    mask = torch.arange(length)[None] < tokens
    return CompactEmbedding(torch.randn(tokens, 16, generator=torch.Generator().manual_seed(seed)), mask)


def shares(*chunks: int, over: int, transition: int, change: str = "keep") -> list[tuple[int, int, float]]:
    parts = tuple(Placed(chunk, Change.parse(change) if index else Change()) for index, chunk in enumerate(chunks))
    return [(one.part, one.before, round(one.share, 6)) for one in shown_in(Outline(parts, over), over, transition)]


def test_without_a_transition_each_chunk_shows_its_part() -> None:
    assert shares(0, 2, 3, over=5, transition=0) == [(0, 0, 1), (0, 0, 1), (1, 1, 1), (2, 2, 1), (2, 2, 1)]


def test_the_share_rises_evenly_after_a_change() -> None:
    shown = shares(0, 2, over=7, transition=3)
    assert shown == [(0, 0, 1)] * 2 + [(1, 0, 0.25), (1, 0, 0.5), (1, 0, 0.75)] + [(1, 1, 1)] * 2


def test_the_last_chunk_of_a_part_shows_it_alone() -> None:
    shown = shares(0, 1, 2, 4, over=5, transition=3)
    assert shown == [(0, 0, 1), (1, 1, 1), (2, 1, 0.5), (2, 2, 1), (3, 3, 1)]


def test_there_is_none_after_a_cut() -> None:
    assert shares(0, 1, over=3, transition=2, change="cut") == [(0, 0, 1), (1, 1, 1), (1, 1, 1)]
    assert shares(0, 1, over=3, transition=1, change="recache=1")[1] == (1, 0, 0.5)


def test_every_chunk_shows_something_in_order() -> None:
    for chunks in range(1, 9):
        for transition in range(4):
            for second in range(1, chunks):
                shown = shown_in(Outline((Placed(0), Placed(second)), chunks), chunks, transition)
                assert [one.part for one in shown] == [int(chunk >= second) for chunk in range(chunks)]
                assert [one.share for one in shown[second:]] == sorted(one.share for one in shown[second:])
                assert shown[-1] == Shown(1, 1, 1.0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tokens", [(3, 6), (6, 3), (5, 5)])
def test_the_ends_are_the_captions_to_the_bit(way: Way, tokens: tuple[int, int]) -> None:
    first, second = caption(tokens[0], 0), caption(tokens[1], 1)
    for share, end in ((0.0, first), (1.0, second)):
        found = blend(first, second, share, way)
        assert torch.equal(found.tokens, end.tokens) and torch.equal(found.mask, end.mask)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("share", [0.25, 0.5, 0.8])
def test_it_is_the_formula_token_by_token(way: Way, share: float) -> None:
    """By hand, in Python's own numbers; tokens that only the nearer caption has are its own."""
    first, second = caption(3, 0), caption(6, 1)
    found = blend(first, second, share, way)
    near = second if share >= 0.5 else first
    assert torch.equal(found.mask, near.mask)
    assert torch.equal(found.tokens[3:], near.tokens[3:])
    for token in range(3):
        a, b = first.tokens[token].double().tolist(), second.tokens[token].double().tolist()
        if way == "linear":
            expected = [(1 - share) * x + share * y for x, y in zip(a, b, strict=True)]
        else:
            lengths = [math.hypot(*a), math.hypot(*b)]
            u, v = [x / lengths[0] for x in a], [y / lengths[1] for y in b]
            angle = math.acos(sum(x * y for x, y in zip(u, v, strict=True)))
            length = (1 - share) * lengths[0] + share * lengths[1]
            weights = [math.sin((1 - share) * angle) / math.sin(angle), math.sin(share * angle) / math.sin(angle)]
            expected = [length * (weights[0] * x + weights[1] * y) for x, y in zip(u, v, strict=True)]
        torch.testing.assert_close(found.tokens[token].double(), torch.tensor(expected).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_a_caption_blended_with_itself_is_itself(way: Way) -> None:
    own = caption(4, 2)
    torch.testing.assert_close(blend(own, own, 0.3, way).tokens, own.tokens, rtol=1e-6, atol=1e-6)


def test_opposite_and_empty_tokens_are_finite() -> None:
    own = caption(4, 2)
    for other in (own._replace(tokens=-own.tokens), own._replace(tokens=torch.zeros_like(own.tokens))):
        assert blend(own, other, 0.5, "spherical").tokens.isfinite().all()


def test_positions_count_and_not_the_order_of_what_is_kept() -> None:
    """A mask may begin with a token and have the others at its end."""
    mask = torch.tensor([[True, False, True, True]])
    first = CompactEmbedding(torch.arange(6.0).reshape(3, 2), mask)
    second = CompactEmbedding(torch.ones(2, 2), torch.tensor([[True, True, False, False]]))
    found = expand(blend(first, second, 0.25, "linear"), "cpu")
    assert torch.equal(found.tokens[0], torch.tensor([[0.25, 1.0], [0, 0], [2, 3], [4, 5]]))


def test_a_chunk_that_shows_one_part_gives_it_as_it_is() -> None:
    parts = [caption(3, 0), caption(5, 1)]
    assert embedding_of(parts, Shown(1, 1, 1.0), "linear") is parts[1]
    blended = embedding_of(parts, Shown(1, 0, 0.5), "linear")
    assert torch.equal(blended.tokens, blend(parts[0], parts[1], 0.5, "linear").tokens)
