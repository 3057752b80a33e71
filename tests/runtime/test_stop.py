"""A stop is a stop: any of the signals, at any moment of any command, to one process or to all."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longsana.runtime import stop
from longsana.runtime.commandline import run_command
from longsana.runtime.distributed import World
from tests.forks import Forks
from tests.pipelines.repository import shallow

ROOT = Path(__file__).resolve().parents[2]
INFERENCE = ROOT / "inference_video_scripts/inference_sana_video.py"
SMALL = ["--height", "32", "--width", "48", "--num_frames", "41", "--sampling.chunk_frames", "2", "--threads", "1"]

PROGRAM = """
import os, signal, sys, time
from longsana.runtime import stop
stop.AGAIN = 0.6
def send(number):
    os.kill(os.getpid(), number)
{body}
"""


def program(body: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM.format(body=body)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("number", stop.SIGNALS)
def test_it_unwinds(number: signal.Signals) -> None:
    body = f"""
try:
    with stop.caught():
        try:
            send({number:d}); time.sleep(5)
        except Exception: print("swallowed")
        finally: print("cleaned")
except stop.Stopped as stopped:
    print(stopped, stopped.status)
assert signal.getsignal({number:d}) is not stop._note
"""
    assert program(body).stdout.split("\n")[:2] == ["cleaned", f"stopped by {number.name} {128 + number}"]


def test_before_a_command_runs_there_is_nothing_to_unwind() -> None:
    done = program("stop.catch(); send(signal.SIGTERM); time.sleep(5)")
    assert (done.returncode, done.stderr) == (143, "stopped by SIGTERM\n")


def test_an_import_is_not_unwound(tmp_path: Path) -> None:
    """Its C++ code may let no exception through; what is partial goes all the same."""
    (tmp_path / "slow.py").write_text(
        "import os, signal, time\ntry: os.kill(os.getpid(), signal.SIGTERM); time.sleep(5)\n"
        "finally: print('unwound', flush=True)\n"
    )
    body = f"""
sys.path.insert(0, {str(tmp_path)!r})
with stop.caught(lambda: print("removed", flush=True)):
    import slow
"""
    done = program(body)
    assert (done.returncode, done.stdout, done.stderr) == (143, "removed\n", "stopped by SIGTERM\n")


def test_a_repeated_signal_is_the_same_request_and_a_later_one_ends_at_once() -> None:
    body = """
with stop.caught(lambda: print("removed", flush=True)):
    try:
        send(signal.SIGINT); time.sleep(5)
    except stop.Stopped:
        send(signal.SIGTERM); send(signal.SIGHUP); send(signal.SIGINT)
        print("still here", flush=True)
        time.sleep(0.7)
        send(signal.SIGTERM)
        time.sleep(5)
        print("too late")
"""
    done = program(body)
    assert done.stdout.split("\n")[:2] == ["still here", "removed"]
    assert done.returncode == 130


def test_deferred_requests_are_noted() -> None:
    body = """
with stop.caught():
    with stop.deferred() as asked:
        assert asked() == 0
        send(signal.SIGTERM); send(signal.SIGTERM)
        assert asked() == signal.SIGTERM
        stop.check()
    try:
        stop.check()
    except stop.Stopped as stopped:
        print(stopped.status)
"""
    assert program(body).stdout == "143\n"


@pytest.mark.parametrize("found_by", ["stop.check()", "while True: time.sleep(0.001)"])
def test_a_request_that_a_destructor_swallowed_is_found_again(found_by: str) -> None:
    body = f"""
class Swallows:
    def __del__(self): send(signal.SIGTERM)
for _ in range(2):
    with stop.caught():
        thing = Swallows(); del thing
        try:
            {found_by}
        except stop.Stopped: print("found")
time.sleep(0.1)
"""
    done = program(body)
    assert (done.returncode, done.stdout, done.stderr) == (0, "found\nfound\n", "")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_what_is_ignored_at_the_start_stays_ignored(number: signal.Signals) -> None:
    body = f"""
signal.signal({number:d}, signal.SIG_IGN)
with stop.caught():
    send({number:d}); print("goes on")
"""
    assert program(body).stdout == "goes on\n"


def test_a_new_command_in_the_same_process_starts_without_a_request() -> None:
    body = """
for _ in range(2):
    try:
        with stop.caught():
            stop.check()
            send(signal.SIGTERM); time.sleep(5)
    except stop.Stopped: print("stopped")
"""
    assert program(body).stdout == "stopped\nstopped\n"


# The inference command -----------------------------------------------------------------------------------------------


def arguments(folder: Path, prompts: int = 6) -> list[str]:
    """Of the command that makes so many videos in folder/v, with two blocks."""
    file = folder / "prompts.txt"
    file.write_text("".join(f"a red circle number {i}\n" for i in range(prompts)))
    return [*SMALL, *shallow(), "--txt_file", str(file), "--work_dir", str(folder), "--dataset", "v"]


def finished(folder: Path) -> list[Path]:
    return list((folder / "v").glob("[!.]*.json"))


def assert_stopped(returncode: int | None, err: str, folder: Path, *numbers: int) -> None:
    """numbers: signals that were sent in the same moment; Python may give any of them to the handler first."""
    assert returncode in [128 + number for number in numbers], err
    assert "Traceback" not in err and "Exception ignored" not in err, err
    assert len(re.findall(r"^stopped by SIG\w+", err, flags=re.MULTILINE)) == 1, err
    left = {path.name for path in (folder / "v").glob("*")} | {path.name for path in (folder / "v").glob(".*")}
    assert not any("partial" in name for name in left), (left, err)
    assert {Path(name).suffix for name in left} <= {".mp4", ".json"}
    # A video without its sidecar may be there: it is made again.
    assert {Path(name).stem for name in left if name.endswith(".json")} <= {
        Path(name).stem for name in left if name.endswith(".mp4")
    }


MOMENTS = random.Random(4).sample(range(20, 900), 23)
"""Hundredths of a second: the command takes about nine seconds here."""


@pytest.mark.parametrize(
    "moment", [*MOMENTS[:3], *(pytest.param(moment, marks=pytest.mark.slow) for moment in MOMENTS[3:])]
)
def test_the_inference_command_stops_at_any_moment(moment: int, tmp_path: Path) -> None:
    number = stop.SIGNALS[moment % 3]
    process = subprocess.Popen(
        [sys.executable, str(INFERENCE), *arguments(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    time.sleep(moment / 100)
    if process.poll() is not None:
        assert process.returncode == 0
        return
    process.send_signal(number)
    process.send_signal(signal.SIGTERM)  # as schedulers do
    _, err = process.communicate(timeout=60)
    try:
        assert_stopped(process.returncode, err, tmp_path, number, signal.SIGTERM)
    except AssertionError:
        if process.returncode != 0:  # it was as good as done
            raise


def test_it_goes_on_where_it_was_stopped(forks: Forks, tmp_path: Path) -> None:
    process = forks.start("generate", arguments(tmp_path, prompts=40))
    while not finished(tmp_path):
        assert process.returncode is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    err = process.finish()
    assert_stopped(process.returncode, err, tmp_path, signal.SIGINT)
    made = {path: path.stat().st_mtime_ns for path in finished(tmp_path)}
    assert 0 < len(made) < 40
    again = forks.start("generate", arguments(tmp_path, prompts=len(made) + 1))
    assert again.wait() == 0
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert len(finished(tmp_path)) == len(made) + 1


def test_one_of_two_processes_is_stopped(forks: Forks, tmp_path: Path) -> None:
    """By itself, without a launcher: the other one ends too, and says why."""
    both = forks.launch(2, "generate", arguments(tmp_path, prompts=24))
    while not finished(tmp_path):
        assert all(process.returncode is None for process in both)
        time.sleep(0.02)
    both[1].send_signal(signal.SIGTERM)
    err = both[1].finish()
    assert both[1].returncode == 143 and "Traceback" not in err, err
    err = both[0].finish()
    assert both[0].returncode == 1, err
    assert "failed: another process of this launch has ended" in err and "Traceback" not in err, err


def test_a_second_signal_in_the_middle_of_the_first_is_no_fault(capsys: pytest.CaptureFixture[str]) -> None:
    """C code that meets it while the first one's exception is set makes a SystemError of both."""

    def run(asked: None, world: World) -> int:
        raise SystemError("returned a result with an exception set") from stop.Stopped(signal.SIGINT)

    assert run_command(lambda world: None, run, after_stop="again") == 130
    assert capsys.readouterr().err == "stopped by SIGINT; again\n"

    def fault(asked: None, world: World) -> int:
        raise SystemError("a real one")

    with pytest.raises(SystemError, match="a real one"):
        run_command(lambda world: None, fault)
