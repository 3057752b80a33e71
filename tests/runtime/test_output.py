"""A command whose output goes to a pipe ends without a word when nobody reads it any more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from longsana.runtime.output import until_unread

ROOT = Path(__file__).parents[2]
LONGSANA = ("-c", "import sys; from longsana.commands import main; sys.exit(main())")


@pytest.mark.parametrize(
    ("words", "unbuffered"),
    [
        ((*LONGSANA, "--help"), ""),
        ((*LONGSANA, "load", "--help"), ""),
        ((*LONGSANA, "load", "--help"), "1"),  # argparse itself then writes to the pipe
        (("train_video_scripts/shapes_recipe.py", "--lora", "--show"), ""),
    ],
)
def test_a_reader_that_has_gone_is_no_fault(words: tuple[str, ...], unbuffered: str) -> None:
    command, environment = [sys.executable, *words], os.environ | {"PYTHONUNBUFFERED": unbuffered}
    read, write = os.pipe()
    os.close(read)
    try:
        unread = subprocess.run(
            command, cwd=ROOT, env=environment, check=False, stdout=write, stderr=subprocess.PIPE, timeout=60
        )
    finally:
        os.close(write)
    assert (unread.returncode, unread.stderr) == (141, b"")


def test_more_than_a_pipe_holds_is_no_fault() -> None:
    """The reader goes while something is being printed, after what it has read."""
    program = "from longsana.runtime.commandline import run_alone\n"
    program += "def show():\n    for line in range(10**6):\n        print(line)\n    return 0\n"
    with subprocess.Popen(
        [sys.executable, "-c", program + "raise SystemExit(run_alone(show, after_stop=''))"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"0\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_another_pipe_that_breaks_is_an_error() -> None:
    def command() -> int:
        raise BrokenPipeError("an encoder's")

    with pytest.raises(BrokenPipeError, match="an encoder's"):
        until_unread(command)
