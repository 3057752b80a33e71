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
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="torch has libgomp on Linux")


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "777"}, "777"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")],
)
def test_threads_sleep_soon_unless_told_how_to_wait(given: dict[str, str], spins: str) -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    ended = subprocess.run(
        [sys.executable, SCRIPT, "--num_frames", "0"],
        env={**own, **given, "OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    assert re.findall(r"GOMP_SPINCOUNT = '(\w+)'", ended.stderr) == [spins], ended.stderr
