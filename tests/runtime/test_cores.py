"""How threads wait for each other: read by libgomp as torch is loaded, in a process of its own each."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "inference_video_scripts" / "inference_sana_video.py"
RECIPE = ROOT / "train_video_scripts" / "shapes_recipe.py"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="torch has libgomp on Linux")


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "777"}, "777"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")],
)
def test_threads_sleep_soon_unless_told_how_to_wait(given: dict[str, str], spins: str) -> None:
    assert spins_of([str(SCRIPT), "--num_frames", "0"], given) == [spins]


@pytest.mark.parametrize(
    "program", [[str(RECIPE), "--steps", "none"], ["-m", "longsana.convert", "a", "b", "--to", "none"]]
)
def test_so_they_do_in_programs_that_are_no_command(program: list[str]) -> None:
    """The recipe runs commands in its own process, with a pool of threads for each that reads films."""
    assert spins_of(program, {}) == ["10000"]


def spins_of(program: list[str], given: dict[str, str]) -> list[str]:
    """Run a program to its first error, bad input, with these variables; returns what libgomp says it has read."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    ended = subprocess.run(
        [sys.executable, *program],
        env={**own, **given, "OMP_DISPLAY_ENV": "VERBOSE"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2, ended.stderr
    return re.findall(r"GOMP_SPINCOUNT = '(\w+)'", ended.stderr)
