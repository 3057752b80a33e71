"""Measures how soon a change of prompt is seen in a live session of the small default, on this machine.

    python tests/full_size/measure_live.py --chunks 10 --changes 20

A simulated viewer takes pieces as they are due and shows them in media time: a piece begins where the one before it
ends, or when it arrives, if that is later. Changes come at random moments of the pace. Of each the time is taken from
the call of `Session.change` to the presentation of the first picture that was told it.

Prints the median, p95 and most of these times, stalls of the viewer, and the pace of the studio. With `--others` more
viewers watch at the same time.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # it also runs from a checkout not installed

import psutil
import torch

from longsana.config import load_config
from longsana.serving.session import Session
from longsana.serving.studio import Studio
from longsana.serving.values import Chunk, Order

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs/sana_video_config/longsana/shapes/longsana.yaml"
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chunks", type=int, default=10, help="latent frames of a chunk")
    parser.add_argument("--changes", type=int, default=20)
    parser.add_argument("--others", type=int, default=0, help="more viewers")
    parser.add_argument("--lead", type=float, help="seconds ahead of the viewer; by measure otherwise")
    parser.add_argument(
        "--first", type=int, default=0, help="latent frames of the first chunk; 0: one more than others"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    busy = psutil.cpu_percent(1.0)
    draw = random.Random(0)
    with Studio(load_config(CONFIG)) as studio:
        order = Order(PROMPTS[0], chunk_frames=options.chunks, first_chunk_frames=options.first, lead=options.lead)
        viewers = [Viewer(studio.start(order)) for _ in range(1 + options.others)]
        viewer = viewers[0]
        time.sleep(3)
        took = []
        for number in range(options.changes):
            time.sleep(draw.uniform(1, 1 + 2 * options.chunks * 4 / 16))
            asked = time.monotonic()
            id = viewer.session.change(PROMPTS[(number + 1) % 2])
            took.append(viewer.until(id) - asked)
            time.sleep(max(0.0, viewer.until(id) - time.monotonic()))
        figures = studio.figures()
        took.sort()
        p95 = took[min(len(took) - 1, round(0.95 * (len(took) - 1)))]
        stalls, dropped = viewer.stalls, figures.chunks_dropped
        print(f"chunks of {options.chunks}, {options.changes} changes, {options.others} other viewers, ", end="")
        print(f"{options.threads} threads, CPU {busy:.0f} % busy before")
        print(
            f"change to its first picture: p50 {statistics.median(took):.2f} s, p95 {p95:.2f} s, most {took[-1]:.2f} s"
        )
        print(f"stalls {len(stalls)}, together {sum(stalls):.2f} s, most {max(stalls, default=0):.2f} s; ", end="")
        print(f"first picture after {viewer.first:.2f} s; lead {studio.lead(viewer.session):.2f} s")
        print(f"real-time factor {figures.real_time_factor:.2f}; dropped {dropped} of {figures.chunks_made} chunks")


if __name__ == "__main__":
    main()
