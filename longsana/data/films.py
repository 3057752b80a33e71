"""Films and pictures that a video goes on from, read as a stream and fitted to a video's size and frame rate.

Frame k is the picture that the film shows at k / fps seconds, upright and with square pixels, as the file says. Of
each, the largest part in the middle with the video's shape is scaled to its size. Films are read through PyAV, pictures
(by their suffix) through Pillow: a picture is a film of one frame.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import Colorspace
from av.video.stream import VideoStream
from PIL import Image

from longsana.data.pictures import rgb
from longsana.runtime.errors import InputError
from longsana.runtime.foreign import reason_of, refuse_stand_in

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
LATE = 1.0
"""Seconds that a film may end before the length that its file says; sound often goes on for a moment."""
HD, UNSPECIFIED = 720, 2
"""Lines from which on an untagged picture's colours are BT.709's; FFmpeg's number for a matrix that is not told."""
WIDEST_PIXEL = 4
"""Width of a pixel by its height, or the other way round, that is believed."""
BEFORE = 1
"""Seconds before a picture from which a film is decoded: some files' indices go by the order of decoding."""


def read_film(path: str | Path, fps: float) -> Iterator[np.ndarray]:
    """Pictures (H, W, 3), uint8, of a film, `fps` of them a second; its own size, upright.

    Raises:
        InputError: the file cannot be read, is no film or picture, is broken, or ends before its time.
    """
    path = Path(path)
    with told_of_film(path):
        if path.suffix.lower() not in PICTURES:
            yield from film_frames(path, fps)
            return
        with path.open("rb") as stream:
            refuse_stand_in(path, stream.read(24))
        yield from _pictures(path)


def film_frames(source: Path | BinaryIO, fps: float, first: int = 0) -> Iterator[np.ndarray]:
    """Frames `first`, `first` + 1, ... (H, W, 3), uint8, of a film, as `read_film` gives them from the beginning.

    source: a file, or one that is open. What is wrong with it is of any kind: see `told_of_film`.
    """
    if isinstance(source, Path):
        with source.open("rb") as stream:
            refuse_stand_in(source, stream.read(24))
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(source) if isinstance(source, Path) else source, "r") as film:
        video = film.streams.video[0]
        if video.codec_context is None:
            raise ValueError("this PyAV has no decoder for its codec; convert it, for example to H.264")
        frames = film.decode(video)
        opening = next(frames, None)
        if opening is None:
            return
        matrix, count = display_matrix(opening), first
        promised = promised_seconds(film, video, opening)
        for picture in _at_rate(film, video, chain([opening], frames), opening, rate, first):
            count += 1
            yield picture if matrix is None else upright(picture, matrix)
    if promised is not None and count / fps < promised - LATE:
        raise ValueError(f"cut short: {count / fps:.1f} of {promised:.1f} seconds can be read")


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


def _at_rate(
    film: InputContainer,
    video: VideoStream,
    frames: Iterator[av.VideoFrame],
    opening: av.VideoFrame,
    rate: Fraction,
    first: int,
) -> Iterator[np.ndarray]:
    """Pictures of a film whose frames are these: at each k / rate, from k = first on, the newest there is.

    Each is shown from its own time on. Times in a file are rounded to its tick, and so half a tick early is in time.
    """
    tick = video.time_base or Fraction(1, 90_000)
    step = 1 / (video.average_rate or rate)
    origin = Fraction(opening.pts or 0) * tick
    shown: av.VideoFrame | None = None
    picture: np.ndarray | None = None
    time = end = -step
    wanted = first
    for frame in _decoded(film, video, opening, origin + first / rate) if first else frames:
        time = time + step if frame.pts is None else frame.pts * tick - origin
        while shown is not None and wanted / rate < time - tick / 2:
            picture = _square(shown, video) if picture is None else picture
            yield picture
            wanted += 1
        shown, picture = frame, None
        end = time + (frame.duration * tick if frame.duration else step)
    while shown is not None and wanted / rate < end - tick:
        picture = _square(shown, video) if picture is None else picture
        yield picture
        wanted += 1


def _decoded(
    film: InputContainer, video: VideoStream, opening: av.VideoFrame, since: Fraction
) -> Iterator[av.VideoFrame]:
    """Frames in the order of display from one on that is shown at `since` (seconds of the file) or before."""
    tick = video.time_base or Fraction(1, 90_000)
    for start in (since - BEFORE, Fraction(opening.pts or 0) * tick - BEFORE):
        film.seek(int(start / tick), stream=video)
        frames = film.decode(video)
        newest = next(frames, None)
        if newest is not None and (newest.pts or 0) * tick <= since:
            yield newest
            yield from frames
            return
    raise ValueError(f"second {float(since):.1f} of it cannot be found; convert it, for example to H.264 in an mp4")


def _square(frame: av.VideoFrame, video: VideoStream) -> np.ndarray:
    """A frame as a picture (H, W, 3), uint8, whose pixels are as wide as they are high."""
    aspect = video.sample_aspect_ratio or 1
    if not 1 / WIDEST_PIXEL <= aspect <= WIDEST_PIXEL:
        raise ValueError(f"its pixels are {float(aspect):g} times as wide as high; convert it to square ones")
    return rgb_of(frame, round(frame.width * aspect))


def rgb_of(frame: av.VideoFrame, width: int | None = None) -> np.ndarray:
    """Convert a frame to RGB: (H, width, 3), uint8; None: its own width.

    Where a file does not say by which matrix its colours were made, pictures of 720 lines or more are taken for
    BT.709's and smaller ones for BT.601's, as players take them.
    """
    untold = frame.colorspace == UNSPECIFIED and frame.height >= HD and not frame.format.is_rgb
    colours = {"src_colorspace": Colorspace.ITU709} if untold else {}
    # Threads, by PyAV's default one a core, would be begun and ended for each picture: 16 take 2 ms for one of 160x96,
    # and for one of 720p 1.6 ms more than one does, on two cores.
    rgb_frame = frame.reformat(width or frame.width, frame.height, "rgb24", threads=1, **colours)
    return rgb_frame.to_ndarray()


def promised_seconds(film: InputContainer, video: VideoStream, opening: av.VideoFrame) -> float | None:
    """Seconds that a film lasts from its first picture, `opening`, on by its own words; None if it does not say.

    Matroska and webm note the second at which the video's last picture ends, and else that of the whole file, which is
    the video's own where it is alone.
    """
    tick = video.time_base or Fraction(1, 90_000)
    if video.duration is not None:
        return float(video.duration * tick)
    end: float | None = None
    if told := _CLOCK.fullmatch(video.metadata.get("DURATION", "")):
        hours, minutes, seconds = map(float, told.groups())
        end = 3600 * hours + 60 * minutes + seconds
    elif film.duration is not None and len(film.streams) == 1:
        end = film.duration / av.time_base
    return None if end is None else end - float((opening.pts or 0) * tick)


_CLOCK = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)")


def display_matrix(opening: av.VideoFrame) -> np.ndarray | None:
    """Read the note beside a film's first picture that says how it is turned or mirrored for display."""
    notes: Mapping[str, Any] = opening.side_data  # by a type's word, which every PyAV has; what it goes through differs
    note = notes.get("DISPLAYMATRIX")
    return None if note is None else np.frombuffer(bytes(note), np.int32).reshape(3, 3)


def upright(picture: np.ndarray, matrix: np.ndarray) -> np.ndarray:
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
def told_of_film(path: Path | str) -> Iterator[None]:
    """Say in one line, as an InputError that begins with a path, what is wrong with a film that is read inside."""
    try:
        yield
    except (OSError, av.FFmpegError, Image.DecompressionBombError, IndexError, ValueError, SyntaxError) as error:
        if isinstance(error, InputError):
            raise
        # The first video of a file that has sound alone.
        reason = "it shows no video" if isinstance(error, IndexError) else reason_of(error)
        raise InputError(f"{path}: cannot be read as a film or a picture ({reason}); give another") from error
