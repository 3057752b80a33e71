"""The processes that tests start are like those of `subprocess`."""

from __future__ import annotations

import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.forks import LEAST_PORT, Forks, free_port, handed_out

HERE = "tests.test_forks"


def main(arguments: list[str]) -> int:
    """What the processes do."""
    import os
    import time

    what, *rest = arguments
    if what == "write":
        Path(rest[0]).write_bytes(b"x" * 2000)
    if what == "sleep":
        print("asleep", flush=True)
        time.sleep(100)
    if what == "tell":
        print(os.environ["WORLD_SIZE"], os.environ["RANK"], os.environ["OWN"])
    return int(what) if what.isdigit() else 0


def test_status_output_and_environment(forks: Forks) -> None:
    both = forks.launch(2, HERE, ["tell"], OWN="word")
    assert [fork.finish() for fork in both] == ["2 0 word\n", "2 1 word\n"]
    assert [fork.returncode for fork in both] == [0, 0]
    assert forks.start(HERE, ["7"]).wait() == 7


def test_an_error_is_shown(forks: Forks, tmp_path: Path) -> None:
    fork = forks.start(HERE, ["write", tmp_path / "file"], file_size=1000)
    assert "File too large" in fork.finish().splitlines()[-1] and fork.returncode == 1
    assert "No module named 'nothing'" in forks.start("nothing", []).finish()


def test_signals_and_waiting(forks: Forks) -> None:
    one, other = (forks.start(HERE, ["sleep"]) for _ in range(2))
    assert one.output.readline() == other.output.readline() == "asleep\n"
    with pytest.raises(subprocess.TimeoutExpired):
        one.wait(0.01)
    one.send_signal(signal.SIGKILL)
    assert (one.wait(), other.returncode) == (-signal.SIGKILL, None)
    other.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in other.finish() and other.returncode == 1


def test_a_command(forks: Forks) -> None:
    fork = forks.start("generate", ["--nonsense"])
    assert fork.finish() == "error: unknown option --nonsense; see --help\n" and fork.returncode == 2


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
    assert 0 < free_port() < 1 << 16
    if handed_out() > LEAST_PORT:
        assert LEAST_PORT <= free_port() < handed_out()
