"""Members of a team end together, whatever they wait for."""

from __future__ import annotations

import signal
import socket
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from longsana.runtime import teams
from longsana.runtime.distributed import LOST, PeerLost, World
from longsana.runtime.teams import Team
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


def test_a_leader_that_two_members_leave_says_so_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second one ends because the first has gone, as the leader told it."""
    ended = threading.Semaphore(0)
    monkeypatch.setattr(teams, "GRACE", 0.05)
    monkeypatch.setattr(teams, "_end", lambda status: ended.release())
    peers: Any = SimpleNamespace(rank=0, size=3)
    team, pairs = Team(peers=peers, world=World(rank=0, size=3)), [socket.socketpair() for _ in range(2)]
    monkeypatch.setattr(team, "_connected", lambda: [own for own, _ in pairs])
    with team.watched():
        for _, member in pairs:
            member.close()
        assert all(ended.acquire(timeout=10) for _ in pairs)
    for own, _ in pairs:
        own.close()
    assert capsys.readouterr().err == f"failed: {LOST}\n"


def test_who_is_done_ends_nobody(forks: Forks) -> None:
    peers = forks.launch(2, "tests.runtime.stuck", ["0.2"])
    assert "".join(peer.finish(30) for peer in peers).count("out") == 2
    assert [peer.returncode for peer in peers] == [0, 0]


@pytest.mark.parametrize(("word", "said"), [(b"", f"failed: {LOST}\n"), (teams.GONE, "")])
def test_who_finds_out_in_a_pass_says_so_if_nobody_else_does(
    word: bytes, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first of those that a leader left, whose pass fails before the leader's connection is seen to end."""
    monkeypatch.setattr(teams, "_end", lambda status: None)
    peers: Any = SimpleNamespace(rank=1, size=2)
    team, (own, leader) = Team(peers=peers, world=World(rank=1, size=2)), socket.socketpair()
    monkeypatch.setattr(team, "_connected", lambda: [own])

    def leave() -> None:
        leader.sendall(word)
        leader.close()

    def fail() -> None:
        with team.watched():
            threading.Timer(0.1, leave).start()
            raise PeerLost(LOST)

    with own, pytest.raises(PeerLost):
        fail()
    assert capsys.readouterr().err == said
