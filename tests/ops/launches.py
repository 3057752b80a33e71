"""Triton's kernels as they are started: what each of them takes of a GPU, be there one or not.

    python -m tests.ops.launches 163:80:bfloat16 99:86:float32     # without TRITON_INTERPRET

compiles the kernels of every operation at the 2B network's sizes as a GPU of that compute capability would be given
them, with the tiles for so many KB of shared memory, and prints a line of JSON for each. It needs no GPU.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

if __name__ == "__main__":
    from longsana.runtime.process import share_cores

    share_cores()  # before torch is imported

import torch
from torch import Tensor

from longsana.config import ModelConfig
from longsana.inference.microbenchmark import Case, Sizes, cases
from longsana.ops import FUSED
from longsana.ops.dispatch import MEMORY_VARIABLE, WITHOUT_GRADIENTS, fused_twin, shared_memory

GRIDS = {"480p": (30, 52), "720p": (22, 40)}
"""Tokens of a frame, of which a chunk has ten."""
PICTURES = {"480p": (4, 480, 832, 96), "720p": (8, 176, 320, 128)}
"""The widest steps of the Wan and the LTX-2 decoder."""
FLOAT8 = 89
"""Compute capability from which on Triton has float8, ten times the number."""


@dataclass(frozen=True)
class Launch:
    """A kernel that was compiled and, on a GPU, started.

    shared: bytes of shared memory. spilled: bytes of a thread that have no register.
    """

    kernel: str
    shared: int
    spilled: int


def published(size: str, dtype: torch.dtype, device: torch.device | str) -> Sizes:
    return Sizes(torch.device(device), dtype, ModelConfig(), 10, GRIDS[size], PICTURES[size], dtype)


def small(dtype: torch.dtype, device: torch.device | str, **network: Any) -> Sizes:
    config = ModelConfig(**{"hidden_size": 224, "num_heads": 2, "mlp_ratio": 0.25, **network})
    return Sizes(torch.device(device), dtype, config, 2, (3, 14), (1, 3, 5, 12), dtype)


def select_tiles(memory: int) -> None:
    """Let the kernels have the tiles for so many KB from here on."""
    os.environ[MEMORY_VARIABLE] = str(memory)
    shared_memory.cache_clear()


def gradients(case: Case, operation: Any, cotangents: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Gradients of what training learns, given those of the outputs, or of their sum."""
    inputs = [part.detach() if isinstance(part, Tensor) else part for part in case.inputs]
    learned = [part for part in inputs if isinstance(part, Tensor)][: case.learned]
    for part in learned:
        part.requires_grad_()
    with torch.enable_grad():
        outputs = case.outputs(operation, inputs)
    given = [torch.ones_like(part) for part in outputs] if cotangents is None else cotangents
    return list(torch.autograd.grad(outputs, learned, [own.to(part) for own, part in zip(given, outputs, strict=True)]))


@contextmanager
def recorded(*, start: bool = True) -> Iterator[list[Launch]]:
    """List the kernels that are started meanwhile. start: else they are compiled alone."""
    from triton.runtime.jit import JITFunction

    run, found = JITFunction.run, []

    def noted(self: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, warmup=warmup or not start, **options)
        name = f"{self.fn.__module__.rpartition('.')[-1]}.{self.fn.__name__.lstrip('_')}"
        spilled = kernel.n_spills if start else _spilled(kernel.asm["cubin"])
        found.append(Launch(name, kernel.metadata.shared, spilled))
        return kernel

    JITFunction.run = noted
    try:
        yield found
    finally:
        JITFunction.run = run


def _spilled(binary: bytes) -> int:
    """Bytes of a thread's stack: these kernels have nothing else there."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    stack = re.search(r"STACK:(\d+)", told)
    assert stack, told
    return int(stack[1])


class Absent:
    """A driver, as far as compiling asks for one, of a GPU that is not here."""

    def __init__(self, number: int, capability: int) -> None:
        self._number, self._capability = number, capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._number

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(sizes: Sizes, capability: int, without: Sequence[str]) -> list[Launch]:
    """Compile the kernels of all operations but those of the modules `without`, forward and backward."""
    with recorded(start=False) as found, torch.no_grad():
        for case in cases(sizes):
            module = FUSED[case.name]
            if module in without or (case.in_float8 and capability < FLOAT8):
                continue
            operation = fused_twin(case.name, FUSED)
            case.outputs(operation, case.inputs)
            if case.name not in WITHOUT_GRADIENTS:
                gradients(case, operation)
    return found


def main(targets: Sequence[str], without: Sequence[str] = ()) -> None:
    from triton.runtime import driver

    assert not import_module("longsana.ops.activation").INTERPRETED.value, "interpreted, nothing is compiled"
    for number, target in enumerate(targets):
        memory, capability, dtype, *heads = target.split(":")
        # Kernels are kept by the number of their GPU.
        driver.set_active(Absent(number, int(capability)))
        select_tiles(int(memory))
        kind = getattr(torch, dtype)
        if heads:
            sizes = small(kind, "meta", linear_head_dim=int(heads[0]), hidden_size=2 * int(heads[0]))
        else:
            sizes = published("480p", kind, "meta")
        for launch in compile_all(sizes, int(capability), without):
            print(json.dumps({"target": target, **asdict(launch)}), flush=True)


if __name__ == "__main__":
    main(
        [word for word in sys.argv[1:] if not word.startswith("-")],
        [word.removeprefix("--without=") for word in sys.argv[1:] if word.startswith("-")],
    )
