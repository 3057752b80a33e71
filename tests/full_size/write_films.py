"""Write films with captions to try `longsana encode` with: coloured bands that drift, 1280x720, 8 seconds each.

    python tests/full_size/write_films.py films 16

Film i has 24, 30, 25 or 60 frames a second in turn, and its caption in film_i.txt.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import av
import numpy as np

RATES, SECONDS, HEIGHT, WIDTH = (24, 30, 25, 60), 8, 720, 1280


def write(folder: Path, number: int) -> None:
    """Write a film and its caption."""
    rate, path = RATES[number % len(RATES)], folder / f"film_{number:03d}.mp4"
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    with av.open(str(path), "w") as film:
        stream = film.add_stream("libx264", rate=rate, options={"preset": "ultrafast", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for frame in range(rate * SECONDS):
            bands = np.stack([x + 4 * frame + 40 * number, y + 2 * frame, x + y + frame], axis=-1) % 256
            film.mux(stream.encode(av.VideoFrame.from_ndarray(bands.astype(np.uint8), format="rgb24")))
        film.mux(stream.encode(None))
    path.with_suffix(".txt").write_text(f"Coloured bands drift over the picture, number {number}.\n")


def main(arguments: Sequence[str]) -> None:
    """Write the films."""
    folder, count = Path(arguments[0]), int(arguments[1])
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        list(pool.map(partial(write, folder), range(count)))


if __name__ == "__main__":
    main(sys.argv[1:])
