"""A run of two processes that is told to stop at any moment, and one at each of the moments that differ."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from torch import Tensor

from longsana.models.dcp_files import METADATA, check_content
from longsana.runtime.files import LOCK
from longsana.runtime.logging import METRICS
from longsana.runtime.stop import SIGNALS
from longsana.training.checkpoint import checkpoints_of
from tests.runtime.test_stop import as_usual
from tests.training.conftest import ROOT, SCRIPT
from tests.training.test_resume import assert_equal, contents

pytestmark = pytest.mark.timeout(1800)

# Two processes under torchrun ----------------------------------------------------------------------------------------

LAST = "checkpoint_model_000010"
RECIPIENTS = ("launcher", "worker", "all", "all twice")


class Moment(NamedTuple):
    """fraction: of the whole run's time. recipient: whom the signal is sent to. rank: of the worker."""

    fraction: float
    number: signal.Signals
    recipient: str
    rank: int


def moments(seed: int, count: int) -> list[Moment]:
    """One in each part of the run, of as many parts; the recipients in turn."""
    rng = random.Random(seed)
    return [
        Moment((part + rng.random()) / count, rng.choice(SIGNALS), RECIPIENTS[(part + seed) % 4], rng.randrange(2))
        for part in range(count)
    ]


class Launch:
    """`torchrun` with the training command; what its processes tell is kept apart from what torchrun does."""

    def __init__(self, config: Path, folder: Path) -> None:
        self.run, self._logs = folder / "run", folder / "logs"
        folder.mkdir()
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        arguments = ["--config_path", config, "--logdir", self.run, "--disable-wandb", "--threads", "1"]
        self.process = subprocess.Popen(
            [*launcher, "--redirects", "3", "--log-dir", str(self._logs), str(SCRIPT), *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=as_usual,
        )

    def workers(self) -> list[psutil.Process]:
        """Those that are running, by their ranks."""
        try:
            return sorted(psutil.Process(self.process.pid).children(), key=lambda child: child.pid)
        except psutil.NoSuchProcess:
            return []

    def told(self) -> str:
        """All that the processes wrote to stderr."""
        return "\n".join(path.read_text() for path in sorted(self._logs.rglob("stderr.log")))

    def send(self, moment: Moment) -> None:
        workers = self.workers()
        launcher = psutil.Process(self.process.pid)
        to = {
            "launcher": [launcher],
            "worker": [workers[min(moment.rank, len(workers) - 1)]] if workers else [launcher],
        }.get(moment.recipient, [launcher, *workers])
        for time_of in range(2 if moment.recipient == "all twice" else 1):
            if time_of:
                time.sleep(2)
            for process in to:
                with suppress(psutil.NoSuchProcess):  # ended by a signal before
                    process.send_signal(moment.number)


def catches(process: psutil.Process) -> bool:
    """Whether a process has taken SIGTERM; before, it is an interpreter that starts, of which the system disposes."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return False
    found = re.search(r"^SigCgt:\s*([0-9a-f]+)", status, re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> (signal.SIGTERM - 1) & 1)


class Whole(NamedTuple):
    """A run that nobody stopped. seconds: from the launcher's start to its end."""

    config: Path
    seconds: float
    contents: dict[str, Tensor]


@pytest.fixture(scope="module")
def whole(small_training: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Whole:
    config = small_training("longsana", "train.max_iters=10", "train.log_iters=3", "validation.vis_interval=4")
    started = time.monotonic()
    launched = Launch(config, tmp_path_factory.mktemp("launch") / "whole")
    assert launched.process.wait(300) == 0, launched.told()
    return Whole(config, time.monotonic() - started, contents(launched.run / LAST))


def stop_at(moment: Moment, whole: Whole, folder: Path) -> Path:
    """Start a run, stop it, and look at what is left; returns its folder."""
    launched = Launch(whole.config, folder)
    try:
        time.sleep(moment.fraction * whole.seconds)
        workers = launched.workers()
        taken = [catches(worker) for worker in workers]
        if launched.process.poll() is None:
            launched.send(moment)
        launched.process.wait(60)
        psutil.wait_procs(workers, 60)
    finally:
        for process in [*launched.workers(), launched.process]:
            process.kill()
    told = launched.told()
    finished = (launched.run / LAST).is_dir()
    if taken == [True, True]:
        assert "Traceback" not in told and "Exception ignored" not in told, told
        ends = re.findall(r"^(?:stopped by SIG|failed: another process of this launch has ended)", told, re.MULTILINE)
        assert len(ends) == 1 or (finished and not ends), told
    assert launched.process.returncode != 0 or finished
    if launched.run.is_dir():
        left = [path.name for path in launched.run.rglob(".*") if path.name not in (LOCK, METADATA)]
        assert not left, (left, told)
        check_saved(launched.run)
    return launched.run


def check_saved(run: Path) -> None:
    """Every checkpoint is whole, and the newest is of the last iteration that was finished."""
    found = checkpoints_of(run)
    for checkpoint in found:
        check_content(checkpoint)
    log = run / METRICS
    logged = log.read_text().splitlines() if log.exists() else []
    iterations = max((json.loads(line)["step"] + 1 for line in logged), default=0)
    assert iterations == max((int(checkpoint.name[-6:]) for checkpoint in found), default=0)


@pytest.mark.parametrize(
    "chosen", [pytest.param(moments(0, 3), id="3"), pytest.param(moments(1, 20), id="20", marks=pytest.mark.slow)]
)
def test_a_run_of_two_processes_stops_at_any_moment(chosen: list[Moment], whole: Whole, tmp_path: Path) -> None:
    runs = []
    for number, moment in enumerate(chosen):
        try:
            runs.append(stop_at(moment, whole, tmp_path / str(number)))
        except (AssertionError, subprocess.TimeoutExpired) as error:
            raise AssertionError(f"{moment} of {whole.seconds:.1f} s") from error
    again = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("twice.py")), str(whole.config), *map(str, runs)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert again.stdout.splitlines() == ["0 0"] * len(runs), again.stderr
    for run in runs:
        assert_equal(whole.contents, contents(run / LAST))
