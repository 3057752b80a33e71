"""Measures whether a live server grows: many chunks of one session, then many sessions that come, steer and go.

    python tests/full_size/measure_flat.py --out flat.json               # the small default: ten minutes of a laptop
    python tests/full_size/measure_flat.py --out flat.json --config configs/... --model_path hf://...

Config, settings and flags are those of `longsana serve`. After each tenth of the chunks, and of the sessions, it notes
the process's memory, the GPU's (allocated, and reserved by torch), threads, and the median time of a chunk. Exits with
1 where the last tenth has more than the third: 64 MiB of memory, 1 % of the GPU's, two threads, or 10 % of time. Before
the third, a snapshot that is written while the next is taken may be the first of its kind, and takes a state's memory.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # it also runs from a checkout not installed

if __name__ == "__main__":
    from longsana.runtime.process import share_cores

    share_cores()  # before torch is imported

import psutil
import torch

from longsana.commands.generate import DEFAULT_CONFIG
from longsana.config import load_config
from longsana.inference.flags import parse_flags
from longsana.runtime.commandline import Parser
from longsana.serving.session import Session
from longsana.serving.studio import Studio
from longsana.serving.values import Chunk, Order

PROMPT, OTHER = "A big red circle stays still on a black background.", "A small blue square moves slowly to the left."


def taken(session: Session) -> float:
    """Take a chunk; returns the seconds that it took."""
    began = time.perf_counter()
    assert isinstance(session.take(300), Chunk)
    return time.perf_counter() - began


def noted(done: int, seconds: list[float]) -> dict[str, Any]:
    """Note what the process has now."""
    gpu = torch.cuda.is_available()
    return {
        "done": done,
        "memory_mib": round(psutil.Process().memory_info().rss / 2**20, 1),
        "gpu_allocated_mib": round(torch.cuda.memory_allocated() / 2**20, 1) if gpu else 0.0,
        "gpu_reserved_mib": round(torch.cuda.memory_reserved() / 2**20, 1) if gpu else 0.0,
        "threads": threading.active_count(),
        "median_seconds": round(statistics.median(seconds), 4),
    }


def grown(rows: list[dict[str, Any]]) -> list[str]:
    """Name what the last of the rows has more of than the third."""
    first, last = rows[2], rows[-1]
    most = {
        "memory_mib": first["memory_mib"] + 64,
        "gpu_allocated_mib": 1.01 * first["gpu_allocated_mib"],
        "gpu_reserved_mib": 1.01 * first["gpu_reserved_mib"],
        "threads": first["threads"] + 2,
        "median_seconds": 1.1 * first["median_seconds"],
    }
    return [name for name, bound in most.items() if last[name] > bound]


def main() -> int:
    """Measure."""
    parser = Parser(__doc__)
    parser.add_argument("--config", default=DEFAULT_CONFIG)
    parser.add_argument("--chunks", type=int, default=1000, help="of the one session, at least 20")
    parser.add_argument("--sessions", type=int, default=200, help="that come and go, two chunks each, at least 20")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_threads()
    options, settings = parse_flags(parser, sys.argv[1:])
    if options.threads:
        torch.set_num_threads(options.threads)
    began = time.monotonic()
    config = load_config(options.config, settings)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, list[dict[str, Any]]] = {"chunks": [], "sessions": []}

    def note(kind: str, done: int, took: list[float]) -> None:
        found[kind].append(noted(done, took))
        options.out.write_text(json.dumps(found, indent=1) + "\n")  # whoever is stopped leaves what there is

    with tempfile.TemporaryDirectory() as folder, Studio(config, device, snapshots=Path(folder)) as studio:
        session = studio.start(Order(PROMPT, pace=False, snapshot_every=2))
        for tenth in range(1, 11):
            took = [taken(session) for _ in range(options.chunks // 10)]
            note("chunks", tenth * (options.chunks // 10), took)
        session.pause()
        for tenth in range(1, 11):
            took = []
            for number in range(options.sessions // 10):
                viewer = studio.start(Order(PROMPT, seed=number, pace=False, snapshot_every=2))
                taken(viewer)
                viewer.change(OTHER)
                took.append(taken(viewer))
                viewer.close()
            note("sessions", tenth * (options.sessions // 10), took)
    worse = {name: grown(rows) for name, rows in found.items()}
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    found |= {"device": name, "seconds": round(time.monotonic() - began, 1), "grown": worse}  # type: ignore[dict-item]
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    for kind in ("chunks", "sessions"):
        for row in found[kind]:
            print(kind, *(f"{key} {value}" for key, value in row.items()))
    print("grown:", worse)
    return int(any(worse.values()))


if __name__ == "__main__":
    sys.exit(main())
