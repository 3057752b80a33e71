"""A run of two processes that is told to stop at any moment, and one at each of the moments that differ."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from torch import Tensor

from longsana import convert
from longsana.data.shards import ShardWriter
from longsana.runtime import files
from longsana.runtime.distributed import World
from longsana.runtime.files import LOCK
from longsana.runtime.logging import METRICS, RunLog
from longsana.runtime.stop import SIGNALS
from longsana.training import captions
from longsana.training import checkpoint as saving
from longsana.training import run as launch
from longsana.training.build import StageBuilder
from longsana.training.checkpoint import Checkpointer, checkpoints_of
from longsana.training.learner import Learner
from longsana.training.stages.ode import OdeInitialisation
from longsana.weights.checkpoint_folder import Stored, check_content
from tests.forks import Forks
from tests.scripts import load_script
from tests.training.conftest import ROOT, SCRIPT
from tests.training.test_ode_pairs import SMALL
from tests.training.test_resume import assert_equal, contents

pytestmark = pytest.mark.timeout(1800)

# Two processes under torchrun ----------------------------------------------------------------------------------------

ITERATIONS, LAST = 5, "checkpoint_model_000005"
RECIPIENTS = ("launcher", "worker", "all", "all twice")


class Moment(NamedTuple):
    """fraction: of the run. Its first half is the start, by the clock; its second half the iterations, as they come:
    others may be busy here. recipient: whom the signal is sent to. rank: of the worker."""

    fraction: float
    number: signal.Signals
    recipient: str
    rank: int


def moments(seed: int, count: int) -> list[Moment]:
    """Moments of all times, signals and recipients."""
    rng = random.Random(seed)
    return [Moment(rng.random(), rng.choice(SIGNALS), rng.choice(RECIPIENTS), rng.randrange(2)) for _ in range(count)]


def arguments(config: Path, run: Path) -> list[str]:
    return ["--config_path", str(config), "--logdir", str(run), "--disable-wandb", "--threads", "1"]


class Torchrun:
    """`torchrun` with the training command; what its processes tell is kept apart from what torchrun does."""

    def __init__(self, config: Path, folder: Path) -> None:
        self.run, self._logs = folder / "run", folder / "logs"
        folder.mkdir()
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        self.process = subprocess.Popen(
            [*launcher, "--redirects", "3", "--log-dir", str(self._logs), str(SCRIPT), *arguments(config, self.run)],
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def ended(self) -> bool:
        return self.process.poll() is not None

    def workers(self) -> list[psutil.Process]:
        """Those that are running, by their ranks."""
        try:
            return sorted(psutil.Process(self.process.pid).children(), key=lambda child: child.pid)
        except psutil.NoSuchProcess:
            return []

    def wait(self, timeout: float) -> int:
        return self.process.wait(timeout)

    def told(self) -> str:
        """All that the processes wrote to stderr."""
        return "\n".join(path.read_text() for path in sorted(self._logs.rglob("stderr.log")))

    def signal(self, number: int) -> None:
        """To the launcher."""
        psutil.Process(self.process.pid).send_signal(number)

    def kill(self) -> None:
        for process in [*self.workers(), self.process]:
            process.kill()


class Forked:
    """The training command in two processes; like torchrun it passes signals on, and ends all when one has ended."""

    def __init__(self, forks: Forks, config: Path, folder: Path) -> None:
        self.run = folder / "run"
        folder.mkdir()
        self._forks = forks.launch(2, "train", arguments(config, self.run))

    def ended(self) -> bool:
        return all(fork.returncode is not None for fork in self._forks)

    def workers(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            return [psutil.Process(fork.pid) for fork in self._forks if fork.returncode is None]
        return self.workers()

    def wait(self, timeout: float) -> int:
        """The worst status of the two."""
        until = time.monotonic() + timeout
        while not self.ended():
            if any(fork.returncode for fork in self._forks):
                self.signal(signal.SIGTERM)
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("two forks", timeout)
            time.sleep(0.02)
        return max((fork.wait() for fork in self._forks), key=abs)

    @cache  # noqa: B019, which is read once
    def told(self) -> str:
        return "".join(fork.finish() for fork in self._forks)

    def signal(self, number: int) -> None:
        for fork in self._forks:
            fork.send_signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)


Launch = Torchrun | Forked


def wait_for(launch: Launch, iterations: int) -> None:
    """Until so many are logged, or all has ended."""
    while not launch.ended() and logged(launch.run) < iterations:
        time.sleep(0.02)


def send(launch: Launch, moment: Moment) -> None:
    workers = launch.workers()
    for time_of in range(2 if moment.recipient == "all twice" else 1):
        if time_of:
            time.sleep(2)
        if moment.recipient != "worker" or not workers:
            launch.signal(moment.number)
        chosen = {"launcher": [], "worker": workers[min(moment.rank, len(workers) - 1) :][:1]}
        for process in chosen.get(moment.recipient, workers):
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
    """A run that nobody stopped. start: seconds to its first iteration's end; iteration: of one."""

    start: float
    iteration: float
    contents: dict[str, Tensor]


def undisturbed(launch: Launch, started: float) -> Whole:
    wait_for(launch, 1)
    trains = time.monotonic()
    assert launch.wait(300) == 0, launch.told()
    return Whole(trains - started, (time.monotonic() - trains) / ITERATIONS, contents(launch.run / LAST))


def stop_at(moment: Moment, whole: Whole, launch: Launch) -> None:
    """Stop a run that has just been started, and look at what is left."""
    try:
        if moment.fraction < 0.5:
            time.sleep(2 * moment.fraction * whole.start)
        else:
            part, iterations = math.modf((2 * moment.fraction - 1) * (ITERATIONS + 1))
            wait_for(launch, int(iterations))
            time.sleep(part * whole.iteration)
        workers = launch.workers()
        taken = [catches(worker) for worker in workers]
        if not launch.ended():
            send(launch, moment)
        status = launch.wait(60)
        psutil.wait_procs(workers, 60)
    finally:
        launch.kill()
    told, finished = launch.told(), (launch.run / LAST).is_dir()
    if taken == [True, True]:
        assert "Traceback" not in told and "Exception ignored" not in told, told
        ends = re.findall(r"^(?:stopped by SIG|failed: another process of this launch has ended)", told, re.MULTILINE)
        assert len(ends) == 1 or (finished and not ends), told
    assert status != 0 or finished
    if launch.run.is_dir():
        left = [path.name for path in launch.run.rglob(".*") if path.name != LOCK]
        assert not left, (left, told)
        check_saved(launch.run)


def logged(run: Path) -> int:
    """How many iterations a run has finished, as its log says."""
    log = run / METRICS
    lines = log.read_text().rpartition("\n")[0].splitlines() if log.exists() else []
    return max((json.loads(line)["step"] + 1 for line in lines), default=0)


def check_saved(run: Path) -> None:
    """Every checkpoint is whole, and the newest is of the last iteration that was finished."""
    found = checkpoints_of(run)
    for checkpoint in found:
        check_content(checkpoint)
    assert logged(run) == max((int(checkpoint.name[-6:]) for checkpoint in found), default=0)


@pytest.mark.parametrize(
    ("chosen", "launcher"),
    [
        pytest.param(moments(2000, 3), False, id="3", marks=pytest.mark.slow),
        pytest.param(moments(1, 20), True, id="20 of torchrun", marks=pytest.mark.slow),
    ],
)
def test_a_run_of_two_processes_stops_at_any_moment(
    chosen: list[Moment], launcher: bool, forks: Forks, small_training: Callable[..., Path], tmp_path: Path
) -> None:
    config = small_training(
        "longsana", f"train.max_iters={ITERATIONS}", "train.log_iters=2", "validation.vis_interval=3"
    )

    def launch(name: str) -> Launch:
        return Torchrun(config, tmp_path / name) if launcher else Forked(forks, config, tmp_path / name)

    started = time.monotonic()
    whole = undisturbed(launch("whole"), started)
    for number, moment in enumerate(chosen):
        stopped = launch(str(number))
        try:
            stop_at(moment, whole, stopped)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            raise AssertionError(f"{moment}, {whole.start:.1f} s and {whole.iteration:.2f} s an iteration") from error
        again = forks.launch(2, "train", arguments(config, stopped.run))
        told = [process.finish() for process in again]
        assert [process.returncode for process in again] == [0, 0], told
        assert_equal(whole.contents, contents(stopped.run / LAST))


# The moments that differ, in one process -----------------------------------------------------------------------------


class During(NamedTuple):
    """A signal comes in a call of `owner.name`, the count-th one. saved: the checkpoints that are there afterwards."""

    owner: Any
    name: str
    saved: tuple[int, ...] = ()
    status: int | None = None  # 128 + n
    count: int = 1


MOMENTS = {
    "the folder is locked": During(launch, "check_shared"),
    "networks are loaded": During(StageBuilder, "stage"),
    "the first pass, with its compilation": During(OdeInitialisation, "loss"),
    "the first update": During(Learner, "update", (1,)),
    "a later pass": During(OdeInitialisation, "loss", (2, 3), count=3),
    "a checkpoint is saved": During(saving, "write_parts", (2,)),
    "the last one is saved": During(saving, "write_parts", (2, 4), count=2, status=0),
    "the log is closed": During(RunLog, "close", (2, 4)),
    "processes part": During(World, "disconnect", (2, 4)),
}


@pytest.fixture
def config(small_training: Callable[..., Path], trajectories: Path) -> Path:
    return small_training("ode", f"data.data_path={trajectories}", "train.max_iters=4")


def send_during(monkeypatch: pytest.MonkeyPatch, during: During, number: int) -> None:
    """In the call and not before: what it has to do is done afterwards."""
    original, calls = getattr(during.owner, during.name), itertools.count(1)

    def called(*arguments: Any, **options: Any) -> Any:
        if next(calls) == during.count:
            signal.raise_signal(number)
            signal.raise_signal(signal.SIGTERM)  # as schedulers do
        return original(*arguments, **options)

    monkeypatch.setattr(during.owner, during.name, called)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stop_while(
    moment: str,
    command: Callable[..., Any],
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    during, number = MOMENTS[moment], SIGNALS[len(moment) % 3]
    with monkeypatch.context() as patch:
        send_during(patch, during, number)
        result = command("--config_path", config, "--logdir", tmp_path, "--threads", "1")
    assert result.status == (128 + number if during.status is None else during.status), result.err
    told = [line for line in result.err.splitlines() if line.startswith("stopped by")]
    assert len(told) == (0 if result.status == 0 else 1) and all(number.name in line for line in told)
    assert tuple(sorted(int(path.name[-6:]) for path in checkpoints_of(tmp_path))) == during.saved
    assert not list(tmp_path.rglob(".*"))
    check_saved(tmp_path)
    assert command("--config_path", config, "--logdir", tmp_path, "--threads", "1").status == 0
    check_saved(tmp_path)


def test_a_stop_while_a_checkpoint_is_read(
    command: Callable[..., Any], config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not taken for a damage of the checkpoint."""
    arguments = ("--config_path", config, "--logdir", tmp_path, "--threads", "1")
    assert command(*arguments, "--max_iters", "2").status == 0
    for during in (During(saving, "read_parts"), During(Stored, "read_into"), During(Checkpointer, "load")):
        with monkeypatch.context() as patch:
            send_during(patch, during, signal.SIGHUP)
            result = command(*arguments)
        assert (result.status, result.err) == (129, "stopped by SIGHUP; the same command goes on from here\n")
    assert command(*arguments).status == 0
    check_saved(tmp_path)


# Commands beside it --------------------------------------------------------------------------------------------------


def test_a_stop_while_captions_are_encoded_keeps_their_finished_files(
    command: Callable[..., Any], config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--config_path", config, "--logdir", tmp_path, "--threads", "1", "train.text_encoder=free")
    with monkeypatch.context() as patch:
        send_during(patch, During(captions, "_write", count=2), signal.SIGINT)
        result = command(*arguments)
    assert (result.status, result.err.count("stopped by SIGINT")) == (130, 1)
    (kept,) = (tmp_path / "captions").iterdir()
    time_of = kept.stat().st_mtime_ns
    assert command(*arguments).status == 0
    assert kept.stat().st_mtime_ns == time_of and len(list((tmp_path / "captions").iterdir())) == 2


def test_a_stop_of_trajectories_keeps_their_finished_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("".join(f"a red circle number {i}\n" for i in range(3)))
    script = load_script(ROOT / "train_video_scripts/generate_ode_pairs.py")
    out = tmp_path / "out"
    arguments = [*SMALL, "--txt_file", str(tmp_path / "prompts.txt"), "--out", str(out), "--pairs.shard_size=1"]
    with monkeypatch.context() as patch:
        send_during(patch, During(ShardWriter, "write", count=2), signal.SIGHUP)
        assert script.main(arguments) == 129
    told = capsys.readouterr().err.splitlines()
    assert told[-1] == "stopped by SIGHUP; the same command goes on from here"
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "shard-00000.safetensors"]
    time_of = (out / "shard-00000.safetensors").stat().st_mtime_ns
    assert script.main(arguments) == 0
    assert len(list(out.glob("shard-*"))) == 3 and (out / "shard-00000.safetensors").stat().st_mtime_ns == time_of


@pytest.mark.parametrize("layout", ["safetensors", "trainer", "diffusers"])
def test_a_stop_of_an_export_leaves_nothing(
    layout: str,
    command: Callable[..., Any],
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the moment in which all is written but its name, of an export as of a conversion."""
    run, out = tmp_path / "run", tmp_path / "out"
    assert command("--config_path", config, "--logdir", run, "--threads", "1", "--max_iters", "1").status == 0
    export = load_script(ROOT / "train_video_scripts/export.py")
    checkpoint, target = str(run / "checkpoint_model_000001"), str(out / "weights.pth")
    for main, arguments in (
        (export.main, [checkpoint, "--out", target, "--layout", layout]),
        (convert.main, [checkpoint, target, "--to", layout]),
    ):
        for count in (1, 3) if layout == "diffusers" else (1,):  # the weights, the folder or its card
            with monkeypatch.context() as patch:
                send_during(patch, During(files, "move_into_place", count=count), signal.SIGTERM)
                assert main(arguments) == 143
            told = capsys.readouterr().err.splitlines()
            assert told[-1] == "stopped by SIGTERM; nothing was written; give the same command again"
            assert not list(out.iterdir())
