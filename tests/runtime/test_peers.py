"""Processes that exchange what lies at the edges of their shares."""

from __future__ import annotations

import pytest
import torch

from longsana.runtime.peers import Peers


@pytest.mark.parametrize(("count", "size"), [(10, 2), (10, 3), (7, 5), (3, 5), (5, 5)])
def test_shares_cover_all_without_overlap(count: int, size: int) -> None:
    peers = object.__new__(Peers)
    peers.size, peers.rank = size, 1
    shares = peers.shares(count)
    assert [number for share in shares for number in share] == list(range(count))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1 and lengths == sorted(lengths, reverse=True)
    assert peers.share(count) == shares[1]
    assert torch.tensor(lengths).sum() == count
