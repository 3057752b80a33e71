"""A chunk whose frames are divided among processes is the chunk of one process, to rounding."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from tests.forks import ROOT, Forks


@pytest.mark.parametrize("processes", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 5))])
def test_a_video_of_several_processes_is_that_of_one(forks: Forks, processes: int) -> None:
    """Within 1e-10 in float64; what each process has is the same to the bit. See tests/models/together.py."""
    peers = forks.launch(processes, "tests.models.together", ["passes", "videos", "decoders"])
    said = [peer.finish() for peer in peers]
    assert [peer.returncode for peer in peers] == [0] * processes, said


def together(*checks: str) -> subprocess.CompletedProcess[str]:
    """Run checks on two GPUs."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, "-m", "tests.models.together", *checks]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.gpu
def test_replayed_passes_and_decoders_of_two_gpus() -> None:
    done = together("graphs", "fused decoders")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
def test_who_waits_on_a_gpu_ends_with_the_others() -> None:
    started = time.monotonic()
    done = together("stuck")
    assert done.returncode != 0 and "nobody was waited for" not in done.stderr, done.stderr[-3000:]
    assert time.monotonic() - started < 45  # with the imports
