"""What a process makes of its machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from longsana.runtime.distributed import OWN_WISHES

FAULTS = """
import resource, torch
from longsana.runtime.distributed import keep_freed_memory
keep_freed_memory()
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    parts = [torch.full((7_500_000,), 1.0) for _ in range(4)]  # 120 MB
    del parts
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or torch.cuda.is_available(), reason="of glibc, without a GPU")
def test_freed_memory_is_used_again() -> None:
    """But not if the environment asks for something else, here for glibc's first thresholds, which it else moves."""
    plain = {name: value for name, value in os.environ.items() if name not in OWN_WISHES}
    asked = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
    kept, given_back = (
        int(subprocess.check_output([sys.executable, "-c", FAULTS], env=plain | more)) for more in ({}, asked)
    )
    assert kept < 1_000 < 10_000 < given_back, (kept, given_back)  # pages of the last round
