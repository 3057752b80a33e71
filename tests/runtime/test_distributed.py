"""What a process makes of its machine."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longsana.runtime import distributed
from longsana.runtime.commandline import run_command
from longsana.runtime.distributed import OWN_WISHES, PeerLost, World, losing_peers
from longsana.runtime.errors import InputError
from tests.forks import Forks
from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]

FAULTS = """
import resource, torch
from longsana.runtime.distributed import PeerLost, losing_peers, keep_freed_memory
keep_freed_memory()
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    parts = [torch.full((7_500_000,), 1.0) for _ in range(4)]  # 120 MB
    del parts
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or torch.cuda.is_available(), reason="of glibc, without a GPU")
def test_freed_memory_is_used_again() -> None:
    """But not if the environment asks for something else, here for glibc's first thresholds, which it else moves."""
    plain = {name: value for name, value in os.environ.items() if name not in OWN_WISHES}
    asked = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
    kept, given_back = (
        int(subprocess.check_output([sys.executable, "-c", FAULTS], env=plain | more)) for more in ({}, asked)
    )
    assert kept < 1_000 < 10_000 < given_back, (kept, given_back)  # pages of the last round


# What a launcher says -------------------------------------------------------------------------------------------------

TWO = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577"}


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., World]:
    """The world of an environment that has these launch variables and no others."""

    def read(**variables: str) -> World:
        for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", *TWO):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return World.from_environment()

    return read


def test_what_launchers_say(launch: Callable[..., World]) -> None:
    assert launch() == World(0, 1, 0, 1)
    assert launch(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0") == World(0, 1, 0, 1)
    assert launch(**TWO | {"RANK": "1"}) == World(1, 2, 1, 2)
    assert launch(**TWO | {"RANK": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}) == World(1, 2, 0, 1)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"RANK": "1"}, "RANK=1, but WORLD_SIZE is not set"),
        ({"RANK": "3", "WORLD_SIZE": "1"}, "RANK=3, but WORLD_SIZE is 1"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE=: must be a whole number from 1"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: must be a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: must be a whole number from 1"),
        ({"WORLD_SIZE": "²"}, "WORLD_SIZE=²: must be a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2, but MASTER_ADDR is not set"),
        ({**TWO, "MASTER_PORT": ""}, "WORLD_SIZE=2, but MASTER_PORT is not set"),
        ({**TWO, "MASTER_PORT": "http"}, "MASTER_PORT=http: must be"),
        ({**TWO, "MASTER_PORT": "70000"}, "MASTER_PORT=70000: must be"),
        ({name: value for name, value in TWO.items() if name != "RANK"}, "WORLD_SIZE=2, but RANK is not set"),
        ({**TWO, "RANK": "-1"}, "RANK=-1: must be"),
        ({**TWO, "LOCAL_RANK": "5"}, "LOCAL_RANK=5, LOCAL_WORLD_SIZE=2"),
        ({**TWO, "LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE=4, WORLD_SIZE=2"),
    ],
)
def test_what_contradicts_itself_is_refused(variables: dict[str, str], says: str, launch: Callable[..., World]) -> None:
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        launch(**variables).connect()
    assert "\n" not in str(caught.value) and "torchrun" in str(caught.value)


COMMANDS = {
    "inference_video_scripts/inference_sana_video.py": [],
    "inference_video_scripts/evaluate.py": ["."],
    "inference_video_scripts/benchmark.py": [],
    "train_video_scripts/train_longsana.py": [
        "--config_path",
        "configs/sana_video_config/longsana/shapes/self_forcing.yaml",
    ],
    "train_video_scripts/generate_ode_pairs.py": [],
    "train_video_scripts/export.py": ["x", "--out", "y", "--layout", "upstream"],
    "train_video_scripts/shapes_recipe.py": [],
    "longsana/convert.py": ["x", "y", "--to", "upstream"],
}


@pytest.mark.parametrize("script", COMMANDS)
def test_every_command_refuses_a_broken_launch(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert load_script(ROOT / script).main(COMMANDS[script]) == 2
    assert capsys.readouterr().err == (
        "error: RANK=1, but WORLD_SIZE is not set: a rank is below it; unset them, or start with torchrun or "
        "accelerate launch\n"
    )


def main(arguments: list[str]) -> int:
    """A command of a process that waits for the others, and to whom time passes fifty times as fast."""
    tell = distributed._Waiting.tell
    distributed._Waiting.tell = lambda waiting, seconds, what: tell(waiting, 50 * seconds, what)  # type: ignore[method-assign]
    return run_command(lambda world: None, lambda request, world: 0)


@pytest.mark.parametrize(
    ("rank", "says"),
    [
        ("0", "waiting for 1 more process at 127.0.0.1:29577"),
        ("1", "process 1: waiting for the main process at 127.0.0.1:29577"),
    ],
)
def test_who_is_waited_for_is_said(rank: str, says: str, forks: Forks) -> None:
    process = forks.start("tests.runtime.test_distributed", [], **TWO | {"RANK": rank})
    assert process.output.readline() == f"{says}\n"
    process.terminate()
    told = process.finish()
    assert process.returncode == 143
    assert told == ("" if rank == "1" else "stopped by SIGTERM; the same command goes on from here\n")


def test_nobody_comes(monkeypatch: pytest.MonkeyPatch, launch: Callable[..., World]) -> None:
    monkeypatch.setattr(distributed, "PATIENCE", timedelta(seconds=0.2))
    world = launch(**TWO | {"MASTER_PORT": "29578"})
    with pytest.raises(InputError, match=r"waiting for 1 more process at 127\.0\.0\.1:29578: none came in"):
        world.connect()


def test_an_address_that_cannot_be_listened_at(launch: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore

    def impatient(*where: Any, **options: Any) -> dist.TCPStore:
        return store(*where[:-1], timedelta(seconds=0.5), **options)

    monkeypatch.setattr(dist, "TCPStore", impatient)
    world = launch(**TWO | {"MASTER_ADDR": "192.0.2.1"})
    with pytest.raises(InputError, match=r"MASTER_ADDR=192\.0\.2\.1, MASTER_PORT=29577: cannot be listened at"):
        world.connect()


def test_a_host_that_there_is_not(launch: Callable[..., World], capfd: pytest.CaptureFixture[str]) -> None:
    world = launch(**TWO | {"MASTER_ADDR": "nosuch.invalid"})
    with pytest.raises(InputError, match=r"^MASTER_ADDR=nosuch\.invalid: there is no such host"):
        world.connect()
    assert capfd.readouterr().err == ""


def test_only_a_lost_connection_is_a_lost_peer() -> None:
    """However deep it lies under the error of whoever noticed it."""

    def fail(message: str) -> None:
        try:
            raise RuntimeError(message)
        except RuntimeError as error:
            raise ValueError("no checkpoint") from error

    with pytest.raises(PeerLost, match="another process of this launch has ended"), losing_peers():
        fail("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:40216")
    with pytest.raises(ValueError, match="no checkpoint"), losing_peers():
        fail("shapes do not fit")
