"""The command as processes: several of them, killed, with a full disk, under the published launchers."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from longsana.runtime.files import open_exclusive, partial_name
from tests.forks import Forks

from .conftest import ROOT, SCRIPT, SMALL, assert_whole, latents, launch, sidecars

Prompts = Callable[..., Path]
LINES = ["a red circle", "a blue square", "a red circle", "a green star", "a cyan ring"]


@pytest.mark.parametrize(
    ("processes", "launcher"), [(2, False), *(pytest.param(n, True, marks=pytest.mark.slow) for n in (2, 3))]
)
def test_any_number_of_processes_makes_the_same_latents(
    processes: int, launcher: bool, command: Callable[..., int], forks: Forks, prompts: Prompts, tmp_path: Path
) -> None:
    """Also under torchrun, which has its own store for them to meet at."""
    path = prompts(*LINES)
    assert command("--txt_file", path) == 0
    arguments = ("--txt_file", path, "--work_dir", tmp_path / "many")
    if launcher:
        torchrun = ("torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
        many = launch(*arguments, launcher=torchrun)
        assert many.returncode == 0, many.stderr
        said = many.stderr
    else:
        started = forks.launch(processes, "generate", [*SMALL, *arguments])
        said = "".join(process.finish() for process in started)
        assert [process.returncode for process in started] == [0] * processes, said
    folder = tmp_path / "many" / "prompts"
    assert_whole(folder, len(LINES))
    assert {record["machine"]["processes"] for record in sidecars(folder)} == {processes}
    assert latents(folder) == latents(tmp_path / "out" / "videos")
    # Only the first process speaks, and without bars where there is no terminal.
    assert said.count(f"{len(LINES)} videos written") == 1
    assert "\r" not in said


def test_kill_at_any_moment_and_go_on(
    command: Callable[..., int], forks: Forks, prompts: Prompts, tmp_path: Path
) -> None:
    lines = [f"{count} red circles" for count in range(8)]
    arguments = ["--txt_file", str(prompts(*lines)), "--work_dir", str(tmp_path), "--num_frames", "33"]
    folder = tmp_path / "prompts"
    process = forks.start("generate", [*SMALL, *arguments])
    deadline = time.monotonic() + 120
    while len(list(folder.glob("0*.mp4"))) < 3 and time.monotonic() < deadline:
        assert process.returncode is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = {record["name"]: (folder / f"{record['name']}.mp4").stat().st_mtime_ns for record in sidecars(folder)}
    assert 2 <= len(done) < len(lines)

    assert command(*arguments, "--dataset", "prompts") == 0
    assert_whole(folder, len(lines), frames=33)
    assert {name: (folder / f"{name}.mp4").stat().st_mtime_ns for name in done} == done
    assert command(*arguments, "--dataset", "unbroken") == 0
    assert latents(folder) == latents(tmp_path / "unbroken")


@pytest.mark.slow
def test_bars_on_a_terminal(prompts: Prompts, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    arguments = [*SMALL, "--txt_file", str(prompts("a red circle", "a blue square")), "--work_dir", str(tmp_path)]
    process = subprocess.Popen([sys.executable, str(SCRIPT), *arguments], cwd=ROOT, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = bytearray()
    with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
        while piece := os.read(ours, 4096):
            shown += piece
    os.close(ours)
    assert process.wait() == 0
    text = shown.decode()
    assert re.search(r"prompts: 100%\|.*\| 2/2 \[\d\d:\d\d<\d\d:\d\d", text)
    assert re.search(r"chunks: +\d+%\|.*\| \d/2 \[.*FPS", text)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_stops_it_at_once_with_one_line(
    processes: int, forks: Forks, prompts: Prompts, tmp_path: Path
) -> None:
    arguments = [*SMALL, "--txt_file", prompts(*LINES[:3]), "--work_dir", tmp_path]
    full = forks.launch(processes, "generate", arguments, file_size=1_000)
    said = "".join(process.finish() for process in full)
    assert [process.returncode for process in full] == [1] * processes, said
    (line,) = re.findall("^failed:.*", said, re.MULTILINE)
    folder = tmp_path / "prompts"
    where = rf"{folder}/0000\d-a-\w+-\w+\.mp4"
    assert re.fullmatch(rf"failed: {where}: File too large; [\d.e+]+ GB of .* are free; 3 videos are not made", line)
    assert ": a " not in said, "prompts that failed"
    assert "Traceback" not in said
    assert not list(folder.iterdir())


def test_two_commands_share_a_folder(forks: Forks, prompts: Prompts, tmp_path: Path) -> None:
    """All is made once; neither fails, whoever is ahead."""
    arguments = [*SMALL, "--txt_file", prompts(*LINES), "--work_dir", tmp_path, "--bs", "2"]
    both = [forks.start("generate", arguments) for _ in range(2)]
    said = [process.finish() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    counts = [list(map(int, *re.findall(r"(\d+) videos written, (\d+) there before, 0 failed", text))) for text in said]
    assert sum(written for written, _ in counts) == len(LINES)
    assert [sum(count) for count in counts] == [len(LINES)] * 2
    assert "Traceback" not in "".join(said)
    assert_whole(tmp_path / "prompts", len(LINES))


def test_what_another_command_is_making_is_waited_for(forks: Forks, prompts: Prompts, tmp_path: Path) -> None:
    """And made, if that command ends without it."""
    path = prompts(*LINES[:3])
    video = tmp_path / "prompts" / "00002-a-blue-square.mp4"
    video.parent.mkdir()
    with open_exclusive(partial_name(video)):
        process = forks.start("generate", [*SMALL, "--txt_file", path, "--work_dir", tmp_path, "--bs", "3"])
        said = ""
        while "waiting for" not in said:
            said = process.output.readline()
            assert said, process.wait()
        assert f"waiting for 1 videos that other commands are making, {video} first; if there is no such" in said
        assert len(sidecars(video.parent)) == 2, "the others of its batch are made meanwhile"
    rest = process.finish()
    assert process.returncode == 0, rest
    assert "3 videos written, 0 there before, 0 failed" in rest
    assert "waiting" not in rest, "said once"
    assert_whole(video.parent, 3)


def test_accelerate_launch(prompts: Prompts, tmp_path: Path) -> None:
    """Its mixed precision is not ours; its OMP_NUM_THREADS=1 neither. And the command works from anywhere."""
    arguments = [word for word in SMALL if word not in ("--threads", "1")]
    launcher = ("accelerate.commands.launch", "--mixed_precision=bf16", "--cpu", "--num_processes=1")
    where = ["--txt_file", prompts("a red circle"), "--work_dir", tmp_path]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, SCRIPT, *arguments, *where, "--num_frames", "1"],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (record,) = sidecars(tmp_path / "prompts")
    assert record["config"]["model"]["dtype"] == "float32"
    assert record["machine"]["threads"] == len(os.sched_getaffinity(0))
    assert done.stderr.count("the dtype comes from the config") == 1
