"""Pictures that videos begin with: any kind of file is fitted by the rule, or refused in one line."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longsana.data.films import read_film
from longsana.data.pictures import MOST_PIXELS, fit_picture, read_picture, rgb
from longsana.runtime.errors import InputError

NOISE = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
HALF = (128, 128, 128)


def refusal(path: Path, height: int = 32, width: int = 48) -> str:
    with pytest.raises(InputError) as caught:
        read_picture(path, height, width)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 250 + len(str(path))
    return message


@pytest.mark.parametrize("size", [(32, 48), (48, 32), (60, 90), (96, 160), (31, 17), (200, 40)])
def test_cover_scales_and_cuts_the_middle(size: tuple[int, int]) -> None:
    picture, (height, width) = Image.fromarray(NOISE), size
    fitted = fit_picture(picture, height, width)
    assert fitted.shape == (height, width, 3) and fitted.dtype == np.uint8
    scale = max(height / 60, width / 90)
    whole = np.asarray(picture.resize((round(90 * scale), round(60 * scale)), Image.Resampling.BICUBIC))
    top, left = (whole.shape[0] - height) // 2, (whole.shape[1] - width) // 2
    assert (fitted == whole[top : top + height, left : left + width]).all()


def test_stretch_shows_all_of_it() -> None:
    picture = Image.fromarray(NOISE)
    expected = np.asarray(picture.resize((32, 64), Image.Resampling.LANCZOS))
    assert (fit_picture(picture, 64, 32, "stretch") == expected).all()
    assert (fit_picture(picture, 60, 90, "stretch") == NOISE).all()
    with pytest.raises(InputError, match="image_fit=crop: must be one of cover, stretch"):
        fit_picture(picture, 64, 32, "crop")  # type: ignore[arg-type]


def test_every_mode_shows_its_colours(tmp_path: Path) -> None:
    """A file of it is read as the picture in memory is, here and as a film of one frame."""
    red = Image.new("RGB", (48, 32), (255, 0, 0))
    grey16 = Image.fromarray(np.full((32, 48), 128 * 257, np.uint16))
    shown = {
        "rgb.png": (red, (255, 0, 0)),
        "grey.png": (Image.new("L", (48, 32), 128), HALF),
        "bit.png": (Image.new("1", (48, 32), 1), (255, 255, 255)),
        "palette.png": (red.convert("P"), (255, 0, 0)),
        "still.gif": (red.convert("P"), (255, 0, 0)),
        "grey16.png": (grey16, HALF),
        "grey16.tif": (grey16, HALF),
        "cmyk.tif": (Image.new("CMYK", (48, 32), (0, 255, 255, 0)), (255, 0, 0)),
        "cmyk.jpg": (Image.new("CMYK", (48, 32), (0, 0, 0, 127)), HALF),
        "ycbcr.tif": (red.convert("YCbCr"), (254, 0, 0)),
        "lab.tif": (Image.new("LAB", (48, 32), (255, 128, 128)), (255, 255, 255)),
        "clear.png": (Image.new("RGBA", (48, 32), (255, 0, 0, 0)), (255, 255, 255)),
        "half.png": (Image.new("RGBA", (48, 32), (0, 0, 0, 127)), HALF),
        "la.png": (Image.new("LA", (48, 32), (0, 127)), HALF),
        "clear.webp": (Image.new("RGBA", (48, 32), (0, 0, 0, 0)), (255, 255, 255)),
        "red.bmp": (red, (255, 0, 0)),
        "red.ppm": (red, (255, 0, 0)),
        "red.jp2": (red, (255, 0, 0)),
        "no_suffix": (red, (255, 0, 0)),
    }
    for name, (picture, colour) in shown.items():
        picture.save(tmp_path / name, **({} if "." in name else {"format": "PNG"}))
        read = read_picture(tmp_path / name, 32, 48)
        assert (np.abs(read.astype(int) - colour) <= 1).all(), name
        assert (np.abs(read.astype(int) - rgb(picture)) <= 1).all(), name
        if name.endswith((".png", ".tif", ".jpg", ".webp", ".bmp")):
            assert (next(read_film(tmp_path / name, 16.0)) == read).all(), name
    palette = red.convert("P")
    palette.save(tmp_path / "clear_palette.png", transparency=palette.getpixel((0, 0)))
    assert (read_picture(tmp_path / "clear_palette.png", 32, 48) == 255).all()
    red.save(tmp_path / "clear_colour.png", transparency=(255, 0, 0))
    assert (read_picture(tmp_path / "clear_colour.png", 32, 48) == 255).all()
    for mode in ("La", "RGBa"):
        assert (rgb(Image.new(mode.replace("a", "A"), (4, 4)).convert(mode)) == 255).all()


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_turned_picture_is_upright(tmp_path: Path, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(NOISE).save(tmp_path / "a.png", exif=exif)
    undo: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, -1),
        7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],
        8: lambda x: np.rot90(x),
    }
    upright = undo[turn](NOISE)
    assert (read_picture(tmp_path / "a.png", *upright.shape[:2]) == upright).all()


def png_of_size(width: int, height: int) -> bytes:
    """The head of a PNG of this size, without its pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"")


def saved(kind: str, **options: object) -> bytes:
    stream = BytesIO()
    Image.fromarray(NOISE).save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("size", [(2**14, 2**13 + 1), (2**20, 2**20), (2**31 - 1, 1)])
def test_a_huge_picture_is_refused_by_its_header(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "a.png").write_bytes(png_of_size(*size))
    assert f"more than {MOST_PIXELS:,}; scale it down" in refusal(tmp_path / "a.png")


@pytest.mark.filterwarnings("error")
def test_a_large_picture_is_no_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow warns of one between its limit, 89 million pixels, and twice that."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    Image.new("1", (80, 60)).save(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_picture(tmp_path / "a.png", 32, 48).shape == (32, 48, 3)


def test_a_picture_that_is_a_line_is_stretched_alone(tmp_path: Path) -> None:
    Image.new("RGB", (60_000, 1), (255, 0, 0)).save(tmp_path / "a.png")
    assert "only at 480x28800000, which is too large; crop it, or use --image_fit=stretch" in refusal(
        tmp_path / "a.png", 480, 832
    )
    assert (read_picture(tmp_path / "a.png", 32, 48, "stretch") == (255, 0, 0)).all()


BROKEN = {
    "a.png": (b"", "an empty file"),
    "a.jpg": (b"hello", "no picture of a kind that is read"),
    "b.png": (b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer"),
    "c.png": (b"\n<!DOCTYPE html><html>", "a web page"),
    "d.png": (png_of_size(48, 32), "cannot be read as a picture"),
    "half.png": (saved("PNG")[:5000], "cannot be read as a picture"),
    "half.jpg": (saved("JPEG")[:2000], "cannot be read as a picture"),
    "half.webp": (saved("WEBP", lossless=True)[:5000], "cannot be read as a picture"),
    "half.bmp": (saved("BMP")[:5000], "cannot be read as a picture"),
    "half.tif": (saved("TIFF")[:5000], "picture"),
    "half.gif": (saved("GIF")[:2000], "cannot be read as a picture"),
    "page.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "no picture of a kind"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_or_something_else_is_one_line(tmp_path: Path, name: str) -> None:
    content, says = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    assert says in refusal(tmp_path / name)


def test_no_file_is_one_line(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no.png").endswith("no such picture")
    assert refusal(tmp_path).endswith("a folder; give a picture, such as a PNG")
    assert "no such picture" in refusal(tmp_path / ("x" * 5000))
    os.mkfifo(tmp_path / "pipe.png")  # to read it would wait for ever
    assert refusal(tmp_path / "pipe.png").endswith("no file; give a picture, such as a PNG")


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_a_film_is_refused(tmp_path: Path, name: str) -> None:
    first, second = Image.fromarray(NOISE), Image.fromarray(NOISE[::-1])
    first.save(tmp_path / name, save_all=True, append_images=[second])
    assert "a film or a file of 2 pictures; save the one to begin with" in refusal(tmp_path / name)


def test_a_phones_picture_with_another_behind_it_is_its_first(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (48, 32), (255, 0, 0)), Image.new("RGB", (24, 16))
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    assert (np.abs(read_picture(tmp_path / "a.jpg", 32, 48).astype(int) - (255, 0, 0)) <= 1).all()


def test_colours_that_nobody_knows_are_refused(tmp_path: Path) -> None:
    Image.new("F", (48, 32), 0.5).save(tmp_path / "a.tif")
    assert "a picture of floats" in refusal(tmp_path / "a.tif")
    with pytest.raises(InputError, match="which shows nothing"):
        fit_picture(Image.new("RGB", (0, 32)), 32, 48)
