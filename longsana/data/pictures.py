"""Pictures that videos begin with: read from files of any kind and fitted to a video's size.

A picture is turned upright as its EXIF note says; greys of 16 bits are rounded to 8; what is transparent lies on white.
Then it is fitted by one of two rules:

    cover    scaled to cover the size (bicubic, both sides rounded), and cut to its middle; as published
    stretch  scaled to the size, whatever its shape (Lanczos); as diffusers does it
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from longsana.runtime.errors import InputError
from longsana.runtime.foreign import reason_of, refuse_stand_in

Fit = Literal["cover", "stretch"]
MOST_PIXELS = 2**27
"""Width times height of the largest picture that is decoded, and of the largest that one is scaled to."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM")
"""The kinds of files that are read, by Pillow's names."""
_TOO_LARGE = f"more than {MOST_PIXELS:,}; scale it down"
WHITE = (255, 255, 255, 255)


def read_picture(path: str | Path, height: int, width: int, fit: Fit = "cover") -> np.ndarray:
    """Read a picture from a file, all of it, and fit it to a size: (height, width, 3), uint8.

    Raises:
        InputError: there is no such file, or it is no picture, broken, too large, a film, or of floats; the message is
            one line that begins with the path.
    """
    with _opened(Path(path)) as picture:
        picture.load()
        return fit_picture(picture, height, width, fit)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open a picture of which only the head has been read; all that goes wrong with it is told, see `told`."""
    if not os.path.exists(path):  # not of the path, which fails where a name is too long
        raise InputError(f"{path}: no such picture")
    if not path.is_file():
        raise InputError(f"{path}: {'a folder' if path.is_dir() else 'no file'}; give a picture, such as a PNG")
    with told(path), path.open("rb") as stream:
        head = stream.read(24)
        refuse_stand_in(path, head)
        if not head:
            raise InputError(f"{path}: an empty file; give a picture, such as a PNG")
        stream.seek(0)
        with Image.open(stream, formats=FORMATS) as picture:
            check_header(picture)
            yield picture


def fit_picture(
    picture: Image.Image,
    height: int,
    width: int,
    fit: Fit = "cover",
    remedy: str = "crop it, or use --image_fit=stretch",
) -> np.ndarray:
    """Fit a picture of Pillow, in any mode, to a size: (height, width, 3), uint8.

    remedy: what to do where its shape is too far from the video's, for the message.

    Raises:
        InputError: there is no such fit, the picture has no pixel or is one of floats, or its shape is so far from the
            video's that it would be scaled to more than `MOST_PIXELS`.
    """
    if fit not in get_args(Fit):
        raise InputError(f"image_fit={fit}: must be one of {', '.join(get_args(Fit))}")
    if not picture.width or not picture.height:
        raise InputError(f"a picture of {picture.height}x{picture.width}, which shows nothing; give another")
    colours = Image.fromarray(rgb(picture))
    if fit == "stretch":
        return np.array(colours.resize((width, height), Image.Resampling.LANCZOS))
    scale = max(height / colours.height, width / colours.width)
    high, wide = max(round(colours.height * scale), height), max(round(colours.width * scale), width)
    if high * wide > MOST_PIXELS:
        raise InputError(
            f"a picture of {colours.height}x{colours.width} covers {height}x{width} only at {high}x{wide}, which is "
            f"too large; {remedy}"
        )
    top, left = (high - height) // 2, (wide - width) // 2
    scaled = colours.resize((wide, high), Image.Resampling.BICUBIC)
    return np.array(scaled.crop((left, top, left + width, top + height)))


def rgb(picture: Image.Image) -> np.ndarray:
    """Show a picture of Pillow in any mode as (H, W, 3), uint8: upright as its EXIF note says, and on white.

    Raises:
        InputError: it is one of floats, whose white nobody says.
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F":
        raise InputError("a picture of floats, whose white nobody says; save it with 8 or 16 bits")
    if picture.mode.startswith("I"):
        return eight_bits(np.asarray(picture))
    if picture.has_transparency_data:
        whole = picture.convert("LA") if picture.mode == "La" else picture
        whole = whole.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", whole.size, WHITE), whole)
    return np.asarray(picture.convert("RGB"))


def eight_bits(values: np.ndarray) -> np.ndarray:
    """Round greys (H, W) from 0 to 65535, which Pillow would clip at 255, to (H, W, 3), uint8."""
    grey = (values.astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def check_header(picture: Image.Image) -> None:
    """Refuse (InputError) a picture for what its head says of its size and of a number of pictures."""
    if picture.width * picture.height > MOST_PIXELS:
        raise InputError(f"{picture.height}x{picture.width} pixels, {_TOO_LARGE}")
    count = getattr(picture, "n_frames", 1)
    if count > 1 and picture.format != "MPO":  # a phone's JPEG, with more pictures behind the one that is shown
        raise InputError(f"a film or a file of {count} pictures; save the one to begin with as a PNG")


@contextmanager
def told(name: str | Path) -> Iterator[None]:
    """Say in one line, as an InputError that begins with a name, what is wrong with a picture."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what may be wrong with a file: it is read, or refused
            yield
    except InputError as error:
        raise error if str(error).startswith(f"{name}:") else InputError(f"{name}: {error}") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{name}: its pixels are {_TOO_LARGE}") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{name}: no picture of a kind that is read ({', '.join(FORMATS)}); save it as PNG") from error
    except Exception as error:  # what Pillow's readers raise of broken files is of any kind
        raise InputError(f"{name}: cannot be read as a picture ({reason_of(error)}); give another") from error
