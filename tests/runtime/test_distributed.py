"""What a process makes of its machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

FAULTS = """
import resource, sys, torch
from longsana.runtime.distributed import World, settle
if sys.argv[1] == "settled":
    settle(1, World())
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    parts = [torch.full((7_500_000,), 1.0) for _ in range(4)]  # 120 MB
    del parts
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or torch.cuda.is_available(), reason="of glibc, without a GPU")
def test_freed_memory_is_used_again() -> None:
    # By default glibc moves its thresholds as it goes, and may or may not keep the memory.
    fixed = os.environ | {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
    faults = {
        how: int(subprocess.check_output([sys.executable, "-c", FAULTS, how], env=fixed))
        for how in ("as it is", "settled")
    }
    assert faults["settled"] < 1_000 < 10_000 < faults["as it is"], faults  # pages of the last round
