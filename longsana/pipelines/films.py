"""Films for the pipeline: a file, or pictures as diffusers' users have them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image

from longsana.data.films import count_frames, fitted, read_film
from longsana.data.pictures import rgb
from longsana.runtime.errors import InputError

FilmLike: TypeAlias = str | Path | Image.Image | Sequence[Image.Image] | np.ndarray


@dataclass(frozen=True)
class Film:
    """A film that can be read as often as it is needed.

    source: a file; or pictures, at the video's frame rate. fps: frames a second that are taken of a file. count: of
    all frames. size: height and width that they are fitted to.
    """

    source: Path | Sequence[Image.Image] | np.ndarray
    fps: float
    count: int
    size: tuple[int, int]

    @classmethod
    def of(cls, video: FilmLike, fps: float, size: tuple[int, int]) -> Film:
        """Look at all of what a user gave.

        Raises:
            InputError: it is none of these, without a picture, or a file that is broken; the message begins with
                "video".
        """
        if isinstance(video, str | Path):
            path = Path(video).expanduser()
            try:
                return cls(path, fps, count_frames(path, fps), size)
            except InputError as error:
                raise InputError(f"video: {error}") from error
        if isinstance(video, Image.Image):
            video = [video]
        if isinstance(video, np.ndarray):
            if video.ndim != 4 or video.shape[3] != 3 or video.dtype != np.uint8 or not all(video.shape):
                raise InputError(
                    f"video: an array of {video.dtype} and shape {video.shape}; must be uint8 (F, H, W, 3)"
                )
            return cls(video, fps, len(video), size)
        known = isinstance(video, list | tuple) and bool(video)
        if not known or not all(isinstance(picture, Image.Image) for picture in video):
            raise InputError(
                f"video: a {type(video).__name__}; must be the path of a film or picture, pictures of PIL, or an array "
                "(F, H, W, 3) of uint8"
            )
        for number, picture in enumerate(video):
            if not picture.width or not picture.height:
                raise InputError(f"video: picture {number} has {picture.width}x{picture.height} pixels")
            if (count := getattr(picture, "n_frames", 1)) > 1:
                raise InputError(f"video: picture {number} holds {count} pictures; give them one by one, or its path")
        return cls(video, fps, len(video), size)

    def pictures(self) -> Iterator[np.ndarray]:
        """Pictures (height, width, 3), uint8, one after another."""
        found: Iterator[np.ndarray]
        if isinstance(self.source, Path):
            found = read_film(self.source, self.fps)
        elif isinstance(self.source, np.ndarray):
            found = iter(self.source)
        else:
            found = map(rgb, self.source)
        return (fitted(picture, *self.size) for picture in found)
