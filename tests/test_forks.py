"""The process that forks for other tests."""

from __future__ import annotations

import socket

from tests.forks import Forks, free_port


def test_a_process_that_has_the_id_of_an_earlier_one_has_not_ended() -> None:
    """The system gives ids again, after some 32,000 processes and threads."""
    forks = object.__new__(Forks)
    forks._ended = {}
    forks._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with forks._socket, theirs:
        for said in ("0 500", "0 500 1", "1 500"):
            theirs.send(said.encode())
        assert [forks._hear(1), forks._hear(1), forks._hear(1)] == [(0, 500), None, (1, 500)]
        assert (forks.status(0, 0), forks.status(1, 0)) == (1, None)


def test_a_free_port_is_none_that_a_connection_gets() -> None:
    """A process that looks for another one at a port of its own range may find itself there."""
    with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
        assert 1024 <= free_port() < int(file.read().split()[0])
