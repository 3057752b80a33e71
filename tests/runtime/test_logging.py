"""The log of a run: what survives a kill, what a terminal shows, and what wandb is told."""

from __future__ import annotations

import builtins
import contextlib
import fcntl
import io
import json
import logging
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longsana.runtime import logging as run_logging
from longsana.runtime.errors import InputError
from longsana.runtime.logging import RunLog, WandbRun
from longsana.runtime.video import VideoWriter
from tests.training.conftest import ROOT


def open_log(folder: Path, step: int = 0, *, total: int = 100, main: bool = True, wandb: Any = None) -> RunLog:
    return RunLog(folder, step=step, total=total, main=main, wandb=wandb)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def write(folder: Path, steps: range) -> None:
    with open_log(folder, steps.start) as run_log:
        for step in steps:
            run_log.metrics(step, {"loss": step / 3, "skipped": step})


def test_a_line_a_step_at_once(tmp_path: Path) -> None:
    with open_log(tmp_path) as run_log:
        run_log.metrics(0, {"loss": 0.1, "grad norm": 2})
        assert [line | {"time": 0} for line in lines(tmp_path)] == [{"step": 0, "time": 0, "loss": 0.1, "grad norm": 2}]
        run_log.metrics(1, {"loss": float("nan"), "low": float("-inf")})
    # Standard JSON: other readers than Python's know no NaN.
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text.splitlines()[1], parse_constant=lambda name: pytest.fail(name))["loss"] is None


def test_numbers_only_and_never_backwards(tmp_path: Path) -> None:
    with open_log(tmp_path, 5) as run_log:
        with pytest.raises(AssertionError):
            run_log.metrics(5, {"loss": "0.1234"})  # type: ignore[dict-item]
        with pytest.raises(AssertionError):
            run_log.metrics(3, {"loss": 0.1})
        with pytest.raises(AssertionError):
            run_log.metrics(5, {"step": 0.1})
        run_log.metrics(5, {"loss": 0.1})
        run_log.metrics(5, {"probe": 0.1})
    assert [line["step"] for line in lines(tmp_path)] == [5, 5]


@pytest.mark.parametrize("step", [0, 3, 6, 7, 9])
def test_a_resumed_run_has_the_lines_before_its_checkpoint_alone(tmp_path: Path, step: int) -> None:
    write(tmp_path, range(7))
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    open_log(tmp_path, step).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(before[:step])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_killed_anywhere_in_a_line(tmp_path: Path) -> None:
    """Cut after every byte of the last two lines: whole lines stay, the rest goes, and the run can go on."""
    write(tmp_path, range(4))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    first_two = b"".join(whole.splitlines(keepends=True)[:2])
    for length in range(len(first_two), len(whole)):
        path.write_bytes(whole[:length])
        with open_log(tmp_path, 4) as run_log:
            run_log.metrics(4, {"loss": 1.0})
        assert path.read_bytes().startswith(first_two)
        # A line that lacks nothing but its newline is whole.
        kept = whole[: length + 1].count(b"\n")
        assert [line["step"] for line in lines(tmp_path)] == [*range(kept), 4], length


def test_what_is_no_metric_is_dropped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, range(2))
    path = tmp_path / "metrics.jsonl"
    good = path.read_bytes()
    path.write_bytes(good + b'{"loss": 1}\n[1]\n{"step": "1"}\n\xff\n')
    open_log(tmp_path, 2).close()
    assert path.read_bytes() == good
    assert [int(record.args[1]) for record in caplog.records if "not a whole line" in record.msg] == [3, 4, 5, 6]


def test_a_failed_rewrite_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, range(4))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        open_log(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_other_processes_do_nothing(tmp_path: Path) -> None:
    wandb = WandbRun("p", None, None, tmp_path / "wandb", {})
    with open_log(tmp_path / "run", main=False, wandb=wandb) as run_log:
        run_log.metrics(0, {"loss": 1.0})
        run_log.video(0, "probe", tmp_path / "none.mp4")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="logdir"):
        open_log(tmp_path / "file" / "run")


class FakeTime:
    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


def test_lines_without_a_terminal(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = FakeTime()
    monkeypatch.setattr(run_logging, "time", clock)
    caplog.set_level(logging.INFO)
    with open_log(tmp_path, 10, total=20) as run_log:
        for step in range(10, 20):
            clock.now += 25.0
            run_log.metrics(step, {"loss": 0.5})
            run_log.metrics(step, {"probe": 0.5})
    # Every third step is the first after a minute; the last one always has its line.
    messages = [record.getMessage() for record in caplog.records]
    assert [message.split(" of 20:")[0] for message in messages] == ["step 13", "step 16", "step 19", "step 20"]
    assert "25.00 s an iteration, 0:02:55 left" in messages[0]
    assert "GiB" in messages[0] and "loss 0.5" in messages[0]
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with open_log(tmp_path, 3, total=5) as run_log:
            run_log.metrics(3, {"loss": 0.5})
            run_log.metrics(4, {"loss": 0.5})
        monkeypatch.undo()
    shown = bytearray()
    with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
        while piece := os.read(ours, 4096):
            shown += piece
    os.close(ours)
    text = shown.decode()
    assert " 60%|" in text and "| 5/5 [" in text
    # Seconds an iteration, also where they are many a second.
    assert "s/it, " in text and "it/s" not in text and "GiB host" in text
    assert [record for record in caplog.records if "an iteration" in record.getMessage()] == []


def test_wandb_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name == "wandb":
            raise ModuleNotFoundError("No module named 'wandb'", name="wandb")
        return real(name, *rest)

    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InputError, match=r"pip install -e '\.\[wandb\]'.*--disable-wandb"):
        open_log(tmp_path / "run", wandb=WandbRun("p", None, None, tmp_path / "wandb", {}))
    open_log(tmp_path / "without").close()


# --- with the real wandb ---------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., WandbRun]:
    pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")

    def run(name: str = "debug_480p", project: str = "longsana") -> WandbRun:
        return WandbRun(project, None, name, tmp_path / "saved", {"train": {"seed": 7}, "lr": 1e-5})

    return run


def records(folder: Path) -> list[Any]:
    """What wandb wrote, of all its runs in order; its own process writes on after a run has finished."""
    deadline = time.monotonic() + 20
    while True:
        runs = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
        found = [_records(path) for path in runs]
        if all(run and run[-1].HasField("exit") for run in found) or time.monotonic() > deadline:
            return [record for run in found for record in run]
        time.sleep(0.05)


def _records(path: Path) -> list[Any]:
    """The records of a file: a log in LevelDB's format, blocks of 32 kB with parts of records."""
    from wandb.proto import wandb_internal_pb2

    found: list[Any] = []
    stream, parts = io.BytesIO(path.read_bytes()), b""
    if stream.read(4) != b":W&B":
        return found
    stream.seek(7)
    while True:
        if (left := -stream.tell() % 32768) < 7:
            stream.seek(left, io.SEEK_CUR)
        if len(header := stream.read(7)) < 7:
            return found
        _, length, kind = struct.unpack("<IHB", header)
        if len(part := stream.read(length)) < length:
            return found
        parts += part
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""


def history(folder: Path) -> list[dict[str, Any]]:
    rows = [record.history for record in records(folder) if record.HasField("history")]
    return [{(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in row.item} for row in rows]


def test_wandb_gets_numbers_config_and_videos(offline: Callable[..., WandbRun], tmp_path: Path) -> None:
    video = tmp_path / "probe.mp4"
    with VideoWriter(video, fps=8, height=16, width=16, crf=18, preset="veryfast") as writer:
        writer.append(np.zeros((3, 16, 16, 3), np.uint8))
    with open_log(tmp_path / "run", wandb=offline()) as run_log:
        run_log.metrics(0, {"generator_loss": 0.25, "per iteration time": 2.0})
        run_log.video(0, "probe", video)
    (run,) = [record.run for record in records(tmp_path / "saved") if record.HasField("run")]
    assert (run.project, run.display_name) == ("longsana", "debug_480p")
    assert run.run_id == (tmp_path / "run" / "wandb_id").read_text().strip()
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["train"] == {"seed": 7} and config["lr"] == 1e-5
    numbers, shown = history(tmp_path / "saved")
    assert {name: numbers[name] for name in ("step", "generator_loss", "per iteration time")} == {
        "step": 0,
        "generator_loss": 0.25,
        "per iteration time": 2.0,
    }
    assert shown["step"] == 0 and shown["probe/_type"] == "video-file"
    (copy,) = (tmp_path / "saved").rglob(Path(shown["probe/path"]).name)
    assert copy.read_bytes() == video.read_bytes()


def test_a_resumed_run_is_the_same_wandb_run_and_loses_no_step(
    offline: Callable[..., WandbRun], tmp_path: Path
) -> None:
    """Killed at step 5 with a checkpoint of step 3: steps 3 and 4 come again, and wandb must not drop them."""
    folder = tmp_path / "run"
    for steps in (range(5), range(3, 7)):
        time.sleep(1.1)  # wandb names a run's files by the second
        with open_log(folder, steps.start, wandb=offline()) as run_log:
            for step in steps:
                run_log.metrics(step, {"loss": float(step)})
    runs = [record.run.run_id for record in records(tmp_path / "saved") if record.HasField("run")]
    assert len(runs) == 2 and len(set(runs)) == 1
    rows = history(tmp_path / "saved")
    assert [row["step"] for row in rows] == [*range(5), *range(3, 7)] == [row["loss"] for row in rows]
    assert [line["step"] for line in lines(folder)] == [*range(7)]
    # Charts are over our step, not over wandb's.
    metrics = [record.metric for record in records(tmp_path / "saved") if record.HasField("metric")]
    assert {metric.step_metric for metric in metrics if metric.glob_name == "*"} == {"step"}

    open_log(folder, 0, wandb=offline()).close()  # a new run
    assert (folder / "wandb_id").read_text().strip() != runs[0]


def test_wandb_that_will_not_start(
    offline: Callable[..., WandbRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"wandb did not start.*project.*--disable-wandb"):
        open_log(tmp_path / "run", wandb=offline(project="no/such/name"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--wandb-save-dir"):
        open_log(tmp_path / "run", wandb=WandbRun("p", None, None, tmp_path / "file" / "wandb", {}))


def test_wandb_that_will_not_start_ends_no_run_that_has_begun(
    offline: Callable[..., WandbRun], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "run", range(2))
    with open_log(tmp_path / "run", 2, wandb=offline(project="no/such/name")) as run_log:
        run_log.metrics(2, {"loss": 0.5})
        run_log.video(2, "probe", tmp_path / "none.mp4")
    assert [line["step"] for line in lines(tmp_path / "run")] == [0, 1, 2]
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "wandb did not start" in message and message.endswith("goes on without wandb") and "\n" not in message


KILLED = """
import logging, os, sys, time
from pathlib import Path
import psutil
from longsana.runtime.logging import RunLog, WandbRun
logging.basicConfig(level=logging.INFO, format="%(message)s")
folder = Path(sys.argv[1])
with RunLog(folder, step=0, total=9, main=True, wandb=WandbRun("p", None, None, folder / "wandb", {})) as run_log:
    run_log.metrics(0, {"loss": 0.0})
    for child in psutil.Process().children(recursive=True):
        child.kill()
        child.wait(10)
    for step in range(1, 9):
        run_log.metrics(step, {"loss": 0.0})
        run_log.video(step, "probe", folder / "metrics.jsonl")
"""


@pytest.mark.parametrize(("mode", "words"), [("offline", "wandb fails ("), ("nonsense", "'nonsense'")])
def test_wandb_that_is_killed_or_not_understood_is_one_warning(
    mode: str, words: str, offline: Callable[..., WandbRun], tmp_path: Path
) -> None:
    """No traceback either when Python ends."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"WANDB_MODE": mode},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in lines(tmp_path)] == list(range(9))
    (message,) = [line for line in done.stderr.splitlines() if not line.startswith("step ")]
    assert message.startswith("wandb ") and words in message


def test_of_a_line_that_a_full_disk_cuts_nothing_stays(tmp_path: Path, limited: Callable[..., Any]) -> None:
    with open_log(tmp_path) as run_log:
        run_log.metrics(0, {"loss": 0.5})
        size = (tmp_path / "metrics.jsonl").stat().st_size
        with limited(size + 10), pytest.raises(OSError, match="File too large") as caught:
            run_log.metrics(1, {"loss": 0.5})
        assert caught.value.filename == str(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines(tmp_path)] == [0]


def test_metrics_that_are_a_folder(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(InputError, match=r"metrics\.jsonl: cannot be written \(Is a directory\).*--logdir"):
        open_log(tmp_path)


def test_memory_is_told_of_this_device() -> None:
    assert ("GPU peak" in run_logging._memory()) == torch.cuda.is_initialized()
