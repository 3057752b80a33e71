"""Time of every operation with the tiles of each size of shared memory, beside plain and compiled ones, at both sizes.

    python tests/full_size/measure_tiles.py --out tiles.json

One GPU runs all sets that fit it, in bfloat16, at the sizes of a chunk of the 2B networks. ms are the GPU's own: it is
given something else to do first, so that no launch is waited for. Results are in the file as soon as they are there. On
a machine without a GPU `--small` runs all but the compiled ones, in Triton's interpreter, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if __name__ == "__main__":
    from longsana.runtime.process import share_cores

    share_cores()  # before torch is imported

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from longsana.evaluation.report import table
from longsana.inference.benchmark import machine
from longsana.inference.microbenchmark import Case, cases
from longsana.ops import FUSED, reference
from longsana.ops.dispatch import SHARED_MEMORY, WITHOUT_GRADIENTS, fused_twin, inductor_options, shared_memory
from tests.ops.launches import GRIDS, published, recorded, select_tiles, small

REPEATS = 15
AHEAD = 3
"""ms that the GPU is busy, at least, while the operation is launched."""


class Stopwatch:
    """Takes the time of a GPU's work, without that of its launches; of a CPU's, as it is."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        if self._cuda:
            self._square = torch.randn(8192, 8192, device=device).bfloat16()
            taken = self._between(lambda: self._square @ self._square)
            self._products = int(AHEAD / taken) + 1

    def ms(self, call: Callable[[], Any]) -> float:
        """Return the median of some calls, after two that warm up."""
        if not self._cuda:
            started = time.perf_counter()
            call()
            return 1000 * (time.perf_counter() - started)
        for _ in range(2):
            call()
        return statistics.median(self._between(call, self._products) for _ in range(REPEATS))

    def _between(self, call: Callable[[], Any], products: int = 1) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(products):
            self._square @ self._square
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def measure(case: Case, call: Callable[..., Any], stopwatch: Stopwatch) -> dict[str, float]:
    taken = {"forward": stopwatch.ms(partial(call, *case.inputs, **case.settings))}
    if case.name not in WITHOUT_GRADIENTS:
        taken["with gradients"] = stopwatch.ms(case.learning(call))
    return taken


def measure_case(case: Case, sets: list[int], stopwatch: Stopwatch, compiled: bool) -> dict[str, Any]:
    """ms by way, and the most that each kernel takes: bytes of shared memory, and of a thread without a register."""
    plain = getattr(reference, case.name)
    row: dict[str, Any] = {"plain": measure(case, plain, stopwatch)}
    if compiled:
        torch.compiler.reset()
        row["compiled"] = measure(case, torch.compile(plain, options=inductor_options(), dynamic=False), stopwatch)
    kernels: dict[str, dict[str, tuple[int, int]]] = {}
    for memory in sets:
        select_tiles(memory)
        fused = fused_twin(case.name, FUSED)
        if compiled:  # there is a GPU
            with recorded() as launches:
                case.once(fused)
                if case.name not in WITHOUT_GRADIENTS:
                    case.learning(fused)()
            most: dict[str, tuple[int, int]] = {}
            for launch in launches:
                shared, spilled = most.get(launch.kernel, (0, 0))
                most[launch.kernel] = (max(shared, launch.shared), max(spilled, launch.spilled))
            kernels[f"{memory} KB"] = most
        row[f"{memory} KB"] = measure(case, fused, stopwatch)
    return row | {"kernels": kernels}


def render(title: str, rows: dict[str, Any], ways: list[str]) -> str:
    lines = []
    for name, row in rows.items():
        for what in row["plain"]:
            label = name if what == "forward" else f"{name}, {what}"
            lines.append({f"{title}, ms": label, **{way: f"{row[way][what]:.3f}" for way in ways}})
    return table(lines)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("output/tiles.json"), help="(default: %(default)s)")
    parser.add_argument("--only", choices=GRIDS, help="one size (default: both)")
    parser.add_argument("--small", action="store_true", help="a small network, to see that it works")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.small:
        parser.error("there is no GPU; --small sees that it works")
    sets = [memory for memory in SHARED_MEMORY if memory <= shared_memory()]
    stopwatch, on_gpu = Stopwatch(device), device.type == "cuda"
    ways = ["plain", *(["compiled"] if on_gpu else []), *(f"{memory} KB" for memory in sets)]
    report: dict[str, Any] = {"machine": machine(device), "torch": torch.__version__, "ms": {}}
    started = time.perf_counter()
    for title in [options.only] if options.only else GRIDS:
        sizes = small(torch.bfloat16, device) if options.small else published(title, torch.bfloat16, device)
        rows: dict[str, Any] = {}
        report["ms"][title] = rows
        for case in cases(sizes):
            if FUSED[case.name] == "temporal":  # PyTorch's products: there are no tiles
                continue
            rows[case.name] = measure_case(case, sets, stopwatch, on_gpu)
            report["seconds"] = time.perf_counter() - started
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(report, indent=2) + "\n")
            print(f"{title}: {case.name}, after {report['seconds']:.0f} s", file=sys.stderr, flush=True)
        print(render(title, rows, ways), flush=True)


if __name__ == "__main__":
    main()
