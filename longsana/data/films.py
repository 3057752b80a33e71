"""Films and pictures that a video goes on from, read as a stream and fitted to a video's size and frame rate.

Frame k is the picture that the film shows at k / fps seconds, upright as the file says. Of each, the largest part in
the middle with the video's shape is scaled to its size. Films are read through imageio's PyAV plugin, pictures (by
their suffix) through Pillow: a picture is a film of one frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import imageio.v3 as iio
import numpy as np
from PIL import Image

from longsana.data.pictures import rgb
from longsana.runtime.errors import InputError
from longsana.runtime.foreign import reason_of, refuse_stand_in

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
LATE = 1.0
"""Seconds that a film may end before the length that its file says; sound often goes on for a moment."""


def read_film(path: str | Path, fps: float) -> Iterator[np.ndarray]:
    """Pictures (H, W, 3), uint8, of a film, `fps` of them a second; its own size, upright.

    Raises:
        InputError: the file cannot be read, is no film or picture, is broken, or ends before its time.
    """
    path = Path(path)
    with _told(path):
        with path.open("rb") as stream:
            refuse_stand_in(path, stream.read(24))
        yield from _pictures(path) if path.suffix.lower() in PICTURES else _frames(path, fps)


def count_frames(path: str | Path, fps: float) -> int:
    """Read all of a film, and count the frames that `read_film` gives. Raises: see there."""
    count = sum(1 for _ in read_film(path, fps))
    if not count:
        raise InputError(f"{path}: there is no picture in it; give a film or a picture")
    return count


def frames_used(count: int, time_stride: int) -> int:
    """Count the frames that fill latents of so many pixel frames, after a first one: all but the last few."""
    return count - (count - 1) % time_stride


def fitted(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Fit a picture (H, W, 3), uint8, to a size: (height, width, 3), the largest middle part of that shape, scaled."""
    scale = max(height / picture.shape[0], width / picture.shape[1])
    high, wide = height / scale, width / scale
    top, left = (picture.shape[0] - high) / 2, (picture.shape[1] - wide) / 2
    box = (left, top, left + wide, top + high)
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC, box=box))


def _frames(path: Path, fps: float) -> Iterator[np.ndarray]:
    # FFmpeg's filter goes by the frames' times, which need not be evenly spaced. Each is shown from its own time on.
    rate = Fraction(fps).limit_denominator(1001)
    by_time: list[Any] = [("fps", {"fps": f"{rate.numerator}/{rate.denominator}", "round": "up"})]
    count, matrix = 0, _display_matrix(path)
    with iio.imopen(path, "r", plugin="pyav") as film:
        promised = film.metadata().get("duration")
        for picture in film.iter(format="rgb24", filter_sequence=by_time):
            count += 1
            yield picture if matrix is None else _upright(picture, matrix)
    if promised is not None and count / fps < promised - LATE:
        raise InputError(
            f"{path}: cut short: {count / fps:.1f} of {promised:.1f} seconds can be read; repair it or give another"
        )


def _display_matrix(path: Path) -> np.ndarray | None:
    """Read the note beside a film, of its first picture, that says how it is turned or mirrored for display."""
    with av.open(str(path)) as film:
        frame = next(film.decode(film.streams.video[0]), None)
        for note in () if frame is None else frame.side_data:
            if note.type.name == "DISPLAYMATRIX":
                return np.frombuffer(bytes(note), np.int32).reshape(3, 3)
    return None


def _upright(picture: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Turn a picture (H, W, 3) for display: (column, row) goes to (column, row) @ matrix[:2, :2], by quarter turns.

    A turn that is no quarter goes to the nearest one.
    """
    (a, b), (c, d) = matrix[:2, :2].tolist()
    if abs(b) > abs(a):
        picture, a, d = picture.swapaxes(0, 1), c, b
    return np.ascontiguousarray(picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def _pictures(path: Path) -> Iterator[np.ndarray]:
    with Image.open(path) as picture:
        if (count := getattr(picture, "n_frames", 1)) > 1:
            raise InputError(f"{path}: {count} pictures in one file, without a frame rate; give a film, such as an mp4")
        yield rgb(picture)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, av.FFmpegError, Image.DecompressionBombError, IndexError, ValueError, SyntaxError) as error:
        if isinstance(error, InputError):
            raise
        # imageio looks for the first video of a file that has sound alone.
        without = isinstance(error.__cause__ or error, IndexError)
        reason = "it shows no video" if without else reason_of(error)
        raise InputError(f"{path}: cannot be read as a film or a picture ({reason}); give another") from error
