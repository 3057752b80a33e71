"""The memory of a process on a GPU: what it is held to."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

HELD = """
import torch
from torch import nn
from longsana.runtime.gpu_memory import CONTEXT, GIB, free_memory, hold_memory
from longsana.runtime.offload import Turns

device = torch.device("cuda")
hold_memory(3.0, device)
limit = 3 * GIB - CONTEXT
assert 0.95 * limit < free_memory(device) <= limit, free_memory(device) / GIB
held = []
try:
    while True:
        held.append(torch.empty(GIB // 8, dtype=torch.uint8, device=device))
except torch.OutOfMemoryError:
    pass
assert torch.cuda.memory_reserved() <= limit
assert len(held) >= int(8 * (limit / GIB - 0.3)), len(held)
held.clear()

# What takes turns is there once: three of these do not fit together.
turns, rows = Turns(device), torch.randn(4, 16384, device=device)
modules, expected, parts = [], [], []
for _ in range(3):
    module = nn.Linear(16384, 16384, device=device)
    expected.append(module(rows))
    modules.append(module)
    parts.append(turns.add(module))
assert all(module.weight.device.type == "cpu" and module.weight.is_pinned() for module in modules)
for number in (0, 1, 2, 1, 0):
    parts[number].bring()
    assert torch.equal(modules[number](rows), expected[number])
assert torch.cuda.max_memory_reserved() <= limit
"""


def test_a_process_has_no_more_than_it_is_held_to() -> None:
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
