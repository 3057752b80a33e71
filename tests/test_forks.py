"""The processes that tests start are like those of `subprocess`."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from tests.forks import Forks

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
