"""Pictures that videos and parts of stories begin with, as diffusers' users have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from longsana.data.pictures import Fit, check_header, fit_picture, read_picture, told
from longsana.data.story import Outline, check_cut
from longsana.runtime.arguments import Whole
from longsana.runtime.errors import InputError

PictureLike: TypeAlias = str | Path | Image.Image | np.ndarray
PicturesLike: TypeAlias = PictureLike | Sequence[PictureLike] | Mapping[int, PictureLike | Sequence[PictureLike]]
"""One for all videos, or one for each; or either by the number of a story's part."""


def pictures_of(
    image: PicturesLike, count: int, size: tuple[int, int], fit: Fit, copies: int = 1
) -> dict[int, list[np.ndarray]]:
    """The pictures (height, width, 3), uint8, of `count` prompts, each `copies` times, by the number of the part.

    Raises:
        InputError: one is none, or they are another number, or a file cannot be read; the message begins with "image".
    """
    if isinstance(image, Mapping) and not image:
        raise InputError("image: a mapping without a picture; give one by the number of a story's part, from 0")
    by_part: dict[int, Any] = dict(image) if isinstance(image, Mapping) else {0: image}
    found = {}
    for part, one in by_part.items():
        given = list(one) if isinstance(one, list | tuple) else [one] * count
        if len(given) != count:
            raise InputError(f"image: {len(given)} for {count} prompts; give one for all, or one for each")
        number = Whole(0).settle("image: number of a part", part)
        found[number] = [picture for picture in (picture_of(own, size, fit) for own in given) for _ in range(copies)]
    return found


def is_first(image: PicturesLike) -> bool:
    """Tell whether a video begins with one of these."""
    return not isinstance(image, Mapping) or 0 in image


def picture_of(image: PictureLike, size: tuple[int, int], fit: Fit, name: str = "image") -> np.ndarray:
    """A picture (height, width, 3), uint8, of whatever a user gave; `name` is said first in errors.

    Raises:
        InputError: it is none, or a file that cannot be read.
    """
    if isinstance(image, str | Path):
        try:
            return read_picture(Path(image).expanduser(), *size, fit)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not all(image.shape):
            raise InputError(f"{name}: an array of {image.dtype} and shape {image.shape}; must be uint8 (H, W, 3)")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise InputError(
            f"{name}: a {type(image).__name__}; must be the path of a picture, one of PIL, or an array (H, W, 3) of "
            "uint8"
        )
    with told(name):
        check_header(image)
        return fit_picture(image, *size, fit)


def places_of(parts: Sequence[int], outlines: Sequence[Outline]) -> dict[int, int]:
    """The chunk that each of these parts begins, which have a picture, by number: the same one in every video.

    Raises:
        InputError: a video has no such part, or has it elsewhere, or it has begun already, or does not cut.
    """
    return {part: _place_of(part, outlines) for part in parts}


def _place_of(part: int, outlines: Sequence[Outline]) -> int:
    for outline in outlines:
        if part >= len(outline.parts):
            count = len(outline.parts)
            raise InputError(
                f"image: for part {part}, where a prompt has {count}, counted from 0; give it to one of them"
            )
        try:
            check_cut(outline.parts[part].change, part)
        except InputError as error:
            raise InputError(f"image: {error}") from error
    first, *others = (outline.parts[part].chunk for outline in outlines)
    if first < 0:
        raise InputError(f"image: for part {part}, which has begun before the state; give it to a later one")
    if any(other != first for other in others):
        raise InputError(
            f"image: for part {part}, which begins at another chunk in another prompt; give them one by one"
        )
    return first


def is_same(image: PictureLike, other: PictureLike | None) -> bool:
    """Tell whether two pictures that a user gave are one: one object, or one path."""
    return image is other or (isinstance(image, str | Path) and isinstance(other, str | Path) and image == other)
