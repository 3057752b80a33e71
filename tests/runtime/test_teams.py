"""Members of a team end together, whatever they wait for."""

from __future__ import annotations

import signal
import time

import pytest

from tests.forks import Forks


@pytest.mark.parametrize("killed", [0, 1, 2])
def test_who_waits_for_ever_ends_with_the_others(forks: Forks, killed: int) -> None:
    peers = forks.launch(3, "tests.runtime.stuck", ["60"])
    for peer in peers:
        assert peer.output.readline() == "in\n"
    began = time.monotonic()
    peers[killed].send_signal(signal.SIGKILL)
    others = [peer for number, peer in enumerate(peers) if number != killed]
    said = "".join(peer.finish(20) for peer in others)
    assert time.monotonic() - began < 10
    assert [peer.returncode for peer in others] == [1, 1]
    assert said.count("another process of this launch has ended") == 1 and "out" not in said


def test_who_is_done_ends_nobody(forks: Forks) -> None:
    peers = forks.launch(2, "tests.runtime.stuck", ["0.2"])
    assert "".join(peer.finish(30) for peer in peers).count("out") == 2
    assert [peer.returncode for peer in peers] == [0, 0]
