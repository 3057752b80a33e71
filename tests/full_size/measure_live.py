"""Measures how soon a change of prompt is seen in a live session on this machine.

    python tests/full_size/measure_live.py --chunks 10 --changes 20

Config, settings and flags are those of `longsana serve`: the small default, or any other.

A simulated viewer takes pieces as they are due and shows them in media time: a piece begins where the one before it
ends, or when it arrives, if that is later. Changes come at random moments of the pace. Of each the time is taken from
the call of `Session.change` to the presentation of the first picture that was told it.

Prints the median, p95 and most of these times, stalls of the viewer, the pace of the studio, and memory; with --out
they are a line of JSON at the end of a file, too. With `--others` more viewers watch at the same time. States are saved
after each two chunks, as the server does.
"""

from __future__ import annotations

import json
import random
import resource
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

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

PROMPTS = (
    "A big red circle moves slowly to the left on a black background.",
    "A small blue square stays still on a white background.",
)


class Viewer(threading.Thread):
    """Shows pieces of a session; `shown` tells when the first picture of each event's was presented."""

    def __init__(self, session: Session) -> None:
        super().__init__(daemon=True)
        self.session, self.zero = session, 0.0
        self.shown: dict[str, float] = {}
        self.stalls: list[float] = []
        self.first: float | None = None
        self.new = threading.Condition()
        self.start()

    def run(self) -> None:
        while isinstance(piece := self.session.take(None), Chunk):
            now = time.monotonic()
            if self.first is None:
                self.first, self.zero = now - self.session.started, now - piece.pts_seconds
            if now > self.zero + piece.pts_seconds:
                self.stalls.append(now - self.zero - piece.pts_seconds)
                self.zero = now - piece.pts_seconds
            with self.new:
                self.shown |= dict.fromkeys(piece.started, self.zero + piece.pts_seconds)
                self.new.notify_all()

    def until(self, id: str) -> float:
        """Wait for an event's first picture, and return when it is presented."""
        with self.new:
            assert self.new.wait_for(lambda: id in self.shown, 60), "the change was never seen"
        return self.shown[id]


def main() -> None:
    """Measure."""
    parser = Parser(__doc__)
    parser.add_argument("--config", default=DEFAULT_CONFIG)
    parser.add_argument("--chunks", type=int, default=10, help="latent frames of a chunk")
    parser.add_argument("--changes", type=int, default=20)
    parser.add_argument("--others", type=int, default=0, help="more viewers")
    parser.add_argument("--lead", type=float, help="seconds ahead of the viewer; by measure otherwise")
    parser.add_argument(
        "--first", type=int, default=0, help="latent frames of the first chunk; 0: one more than others"
    )
    parser.add_argument("--out", type=Path, help="a file that gets a line of JSON")
    parser.add_threads()
    options, settings = parse_flags(parser, sys.argv[1:])
    if options.threads:
        torch.set_num_threads(options.threads)
    gpu = torch.cuda.is_available()
    busy, draw = psutil.cpu_percent(1.0), random.Random(0)
    config = load_config(options.config, settings)
    device = "cuda" if gpu else "cpu"
    with tempfile.TemporaryDirectory() as folder, Studio(config, device, snapshots=Path(folder)) as studio:
        order = Order(
            PROMPTS[0],
            chunk_frames=options.chunks,
            first_chunk_frames=options.first,
            lead=options.lead,
            snapshot_every=2,
        )
        viewers = [Viewer(studio.start(order)) for _ in range(1 + options.others)]
        viewer = viewers[0]
        time.sleep(3)
        took = []
        for number in range(options.changes):
            time.sleep(draw.uniform(1, 1 + 2 * options.chunks * viewer.session.seconds / viewer.session.latents))
            asked = time.monotonic()
            id = viewer.session.change(PROMPTS[(number + 1) % 2])
            took.append(viewer.until(id) - asked)
            time.sleep(max(0.0, viewer.until(id) - time.monotonic()))
        figures = studio.figures()
        took.sort()
        height, width, _ = max(figures.seconds_a_chunk)
        row = {
            "size": f"{width}x{height}",
            "device": torch.cuda.get_device_name() if gpu else "CPU",
            "chunk_frames": options.chunks,
            "viewers": len(viewers),
            "changes": len(took),
            "p50_seconds": statistics.median(took),
            "p95_seconds": took[min(len(took) - 1, round(0.95 * (len(took) - 1)))],
            "most_seconds": took[-1],
            "first_picture_seconds": viewer.first,
            "lead_seconds": studio.lead(viewer.session),
            "chunk_seconds": {str(key[2]): seconds for key, seconds in figures.seconds_a_chunk.items()},
            "real_time_factor": figures.real_time_factor,
            "stalls": sum(len(one.stalls) for one in viewers),
            "stalled_seconds": sum(sum(one.stalls) for one in viewers),
            "dropped": figures.chunks_dropped,
            "made": figures.chunks_made,
            "session_gib": [one.bytes / 2**30 for one in figures.sessions],
            "gpu_peak_gib": torch.cuda.max_memory_reserved() / 2**30 if gpu else None,
            "host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "cpu_busy_before_percent": busy,
            "threads": torch.get_num_threads(),
        }
    for name, value in row.items():
        print(f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}")
    if options.out is not None:
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
