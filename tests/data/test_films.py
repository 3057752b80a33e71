"""Films as streams: frames by time, pictures fitted, and what is broken refused in one line."""

from __future__ import annotations

import itertools
import os
import struct
import tracemalloc
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import Colorspace
from PIL import Image

from longsana.data.films import count_frames, fitted, read_film, rgb_of
from longsana.data.pictures import rgb
from longsana.evaluation.videos import read_pieces
from longsana.runtime.errors import InputError
from longsana.runtime.video import VideoWriter


def shot(path: Path, times: list[Fraction], *, sound: bool = False) -> Path:
    """A film whose picture n, shown from times[n] on, is grey of 5 n, for n below 51."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=30, options={"crf": "0", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 600)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), 5 * (number % 51), np.uint8), format="rgb24")
            frame.pts, frame.time_base = int(time * 600), Fraction(1, 600)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def webm(path: Path, *, start: float = 0.0, seconds: float = 4.0, sound: float = 0.0) -> Path:
    """A film whose pictures begin at a second of the file, and whose sound, if it has some, ends at one."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libvpx", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        voice = file.add_stream("libopus", rate=48_000) if sound else None
        for number in range(int(10 * seconds)):
            frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), 5 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = int(10 * start) + number, Fraction(1, 10)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        for number in range(int(50 * sound)) if voice is not None else ():
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1920), np.int16), layout="stereo")
            silence.sample_rate, silence.pts = 48_000, 960 * number
            file.mux(voice.encode(silence))
        file.mux(voice.encode(None) if voice is not None else [])
    return path


@pytest.mark.parametrize("given", [{"start": 3.0}, {"sound": 7.0}], ids=str)
def test_a_webm_is_as_long_as_its_pictures(tmp_path: Path, given: dict[str, float]) -> None:
    """Whenever they begin, and however long its sound goes on; and not where it was cut."""
    path = webm(tmp_path / "film.webm", **given)
    assert len(numbers(path, 10.0)) == 40
    assert sum(piece.shape[1] for piece in read_pieces(path)) == 40
    with av.open(str(path)) as file:
        place = [packet.pos for packet in file.demux(video=0) if packet.pos][15]
    path.write_bytes(path.read_bytes()[:place])
    for read in (lambda: numbers(path, 10.0), lambda: list(read_pieces(path))):
        with pytest.raises(InputError, match=r"cut short: 1.* of 4.* seconds"):
            read()


@pytest.mark.parametrize("name", ["slides.mp4", "slides.webm"])
def test_a_last_picture_may_be_shown_for_long(tmp_path: Path, name: str) -> None:
    """Of slides, one each five seconds, evaluation finds none missing."""
    with av.open(str(tmp_path / name), "w") as file:
        stream = file.add_stream("libx264" if name.endswith("mp4") else "libvpx", rate=Fraction(1, 5))
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for number in range(4):
            frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), 40 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(5)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    assert sum(piece.shape[1] for piece in read_pieces(tmp_path / name)) == 4


@pytest.mark.parametrize(("height", "told"), [(720, False), (720, True), (96, False)])
def test_colours_of_a_file_that_does_not_say_are_those_of_its_size(tmp_path: Path, height: int, told: bool) -> None:
    """BT.709's from 720 lines on, BT.601's below, for films and for evaluation alike."""
    matrix = Colorspace.ITU709 if height >= 720 else Colorspace.ITU601
    colour = (30, 200, 60)
    with av.open(str(tmp_path / "film.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=10, options={"crf": "1", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 160, height, "yuv420p"
        if told:
            stream.codec_context.colorspace = matrix
        frame = av.VideoFrame.from_ndarray(np.full((height, 160, 3), colour, np.uint8), format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace=matrix)
        frame.colorspace, frame.pts = matrix if told else 2, 0
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    (picture,) = read_film(tmp_path / "film.mp4", 10.0)
    (piece,) = read_pieces(tmp_path / "film.mp4")
    for found in (picture, piece[0, 0].numpy()):
        assert np.abs(found[8, 8].astype(int) - colour).max() <= 4


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="a system that does not list threads")
def test_pictures_have_no_threads_of_their_own(tmp_path: Path) -> None:
    """Where many films are read at a time, each conversion would otherwise begin and end a thread for each core."""
    with av.open(str(webm(tmp_path / "film.webm"))) as file:
        frames = list(file.decode(video=0))
        before = len(os.listdir("/proc/self/task"))
        assert [rgb_of(frame).shape for frame in frames] == [(16, 32, 3)] * 40
        assert len(os.listdir("/proc/self/task")) == before


def numbers(path: Path, fps: float) -> list[int]:
    return [round(float(picture.mean()) / 5) for picture in read_film(path, fps)]


def shown(times: list[Fraction], fps: float, count: int) -> list[int]:
    """The naive rule: the last picture whose time has come at k / fps."""
    return [max(n for n, time in enumerate(times) if time <= Fraction(k) / Fraction(fps)) for k in range(count)]


@pytest.mark.parametrize("fps", [8.0, 16.0, 25.0, 30.0, 60.0])
@pytest.mark.parametrize("rate", [10, 24, 30])
def test_frames_are_chosen_by_time(tmp_path: Path, fps: float, rate: int) -> None:
    times = [Fraction(n, rate) for n in range(40)]
    found = numbers(shot(tmp_path / "film.mp4", times), fps)
    assert found == shown(times, fps, len(found))
    assert abs(len(found) / fps - 40 / rate) < 1 / rate + 1 / fps


def test_uneven_times(tmp_path: Path) -> None:
    """As phones film: pictures are as long as they are."""
    rng = np.random.default_rng(0)
    times = [Fraction(int(t), 100) for t in itertools.accumulate([0, *rng.integers(2, 12, 39).tolist()])]
    found = numbers(shot(tmp_path / "film.mp4", times), 16.0)
    assert found == shown(times, 16.0, len(found)) and len(found) >= times[-1] * 16


def test_a_stream_holds_few_pictures(tmp_path: Path) -> None:
    path = shot(tmp_path / "film.mp4", [Fraction(n, 30) for n in range(50)])
    film = read_film(path, 30.0)
    first = next(film)
    assert first.shape == (16, 32, 3) and first.dtype == np.uint8
    film.close()  # type: ignore[attr-defined]
    assert count_frames(path, 30.0) == 50 and count_frames(path, 15.0) == 25


@pytest.mark.parametrize(("height", "width"), [(32, 48), (48, 32), (96, 160), (7, 100)])
@pytest.mark.parametrize("shape", [(60, 80), (80, 60), (32, 48), (33, 1000)])
def test_pictures_are_covered_and_cropped_in_the_middle(shape: tuple[int, int], height: int, width: int) -> None:
    """A picture of its own coordinates shows which part of it is seen."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    picture = np.stack([255 * rows / (shape[0] - 1), 255 * columns / (shape[1] - 1), 0 * rows], axis=-1)
    found = fitted(picture.round().astype(np.uint8), height, width).astype(float)
    assert found.shape == (height, width, 3)
    scale = max(height / shape[0], width / shape[1])
    for axis, side in ((0, height), (1, width)):
        # Centres of the new pixels in the old picture, around its middle.
        place = (np.arange(side) - (side - 1) / 2) / scale + (shape[axis] - 1) / 2
        expected = 255 * np.clip(place, 0, shape[axis] - 1) / (shape[axis] - 1)
        seen = found[..., axis].mean(1 - axis)
        step = 255 / (shape[axis] - 1)
        assert np.abs(seen - expected).max() < 1.5 + step


def test_a_picture_of_the_size_stays_as_it_is() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    assert np.array_equal(fitted(picture, 32, 48), picture)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.TIFF"])
def test_a_picture_is_a_film_of_one_frame(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / name)
    (picture,) = read_film(tmp_path / name, 16.0)
    assert picture.shape == (30, 40, 3) and np.abs(picture.astype(int) - (200, 30, 30)).max() < 4


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "I;16", "CMYK"])
def test_pictures_of_other_colours(tmp_path: Path, mode: str) -> None:
    name = "a.jpg" if mode == "CMYK" else "a.png"
    Image.new(mode, (40, 30)).save(tmp_path / name)
    (picture,) = read_film(tmp_path / name, 16.0)
    assert picture.shape == (30, 40, 3) and picture.dtype == np.uint8


CORNERS = np.array([[0, 80], [160, 240]], np.uint8)
TURNS: dict[str, tuple[int, tuple[int, int, int, int], Any]] = {
    "none": (1, (1, 0, 0, 1), lambda picture: picture),
    "mirrored": (2, (-1, 0, 0, 1), np.fliplr),
    "half": (3, (-1, 0, 0, -1), lambda picture: np.rot90(picture, 2)),
    "upside down": (4, (1, 0, 0, -1), np.flipud),
    "transposed": (5, (0, 1, 1, 0), lambda picture: picture.swapaxes(0, 1)),
    "clockwise": (6, (0, 1, -1, 0), lambda picture: np.rot90(picture, -1)),
    "transposed the other way": (7, (0, -1, -1, 0), lambda picture: picture.swapaxes(0, 1)[::-1, ::-1]),
    "anticlockwise": (8, (0, -1, 1, 0), lambda picture: np.rot90(picture, 1)),
}
"""For each turn its EXIF orientation, its display matrix a, b, c, d and the naive rule."""


def note_turn(path: Path, turn: tuple[int, int, int, int]) -> Path:
    """Write a turn into an mp4 as phones do: the display matrix in the header of its track."""
    content = bytearray(path.read_bytes())
    header = content.index(b"tkhd") + 4
    a, b, c, d = turn
    struct.pack_into(">9i", content, header + 40, a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


def corners(picture: np.ndarray) -> list[int]:
    """Grey of the corners, to the nearest 80."""
    return [80 * round(float(picture[row, column].mean()) / 80) for row in (0, -1) for column in (0, -1)]


@pytest.mark.parametrize("turn", TURNS)
def test_a_picture_lies_as_its_camera_was_held(tmp_path: Path, turn: str) -> None:
    orientation, _, upright = TURNS[turn]
    noted = Image.Exif()
    noted[0x0112] = orientation
    wide = CORNERS.repeat(16, 0).repeat(32, 1)
    Image.fromarray(wide).convert("RGB").save(tmp_path / "a.jpg", exif=noted)
    (picture,) = read_film(tmp_path / "a.jpg", 16.0)
    assert picture.shape == (*upright(wide).shape, 3)
    assert corners(picture) == upright(CORNERS).ravel().tolist()


@pytest.mark.parametrize("turn", TURNS)
def test_a_film_lies_as_its_camera_was_held(tmp_path: Path, turn: str) -> None:
    _, matrix, upright = TURNS[turn]
    wide = np.repeat(CORNERS.repeat(16, 0).repeat(32, 1)[:, :, None], 3, 2)
    with VideoWriter(tmp_path / "a.mp4", 16.0, 32, 64, crf=1, preset="ultrafast", threads=1) as video:
        video.append(np.stack(20 * [wide]))
    film = read_film(note_turn(tmp_path / "a.mp4", matrix), 16.0)
    picture = next(film)
    assert picture.shape == upright(wide).shape and picture.flags["C_CONTIGUOUS"]
    assert corners(picture) == upright(CORNERS).ravel().tolist()
    assert sum(1 for _ in film) == 19
    assert np.array_equal(next(read_pieces(tmp_path / "a.mp4"))[0, 0], picture), "evaluate sees it so, too"


@pytest.mark.parametrize(("pixel", "width"), [(Fraction(16, 9), 114), (Fraction(1, 2), 32), (Fraction(1), 64)])
def test_pixels_that_are_not_square(tmp_path: Path, pixel: Fraction, width: int) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.codec_context.sample_aspect_ratio = pixel
        file.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 64, 3), np.uint8), format="rgb24")))
        file.mux(stream.encode(None))
    (picture,) = read_film(tmp_path / "a.mp4", 16.0)
    assert picture.shape == (32, width, 3)


def test_a_film_of_many_pictures_is_turned_in_constant_memory(tmp_path: Path) -> None:
    path = note_turn(shot(tmp_path / "film.mp4", [Fraction(n, 30) for n in range(300)]), TURNS["clockwise"][1])
    tracemalloc.start()
    assert count_frames(path, 30.0) == 300
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 150 * 16 * 32 * 3


def spoil_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = b"\xff" * (len(content) - len(content) // 2)
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Any, str]] = {
    "missing": (lambda path: path.unlink(), "No such file or directory"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read as a film or a picture"),
    "text": (lambda path: path.write_bytes(b"no film" * 20), "cannot be read as a film or a picture"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), ""),
    "spoilt": (spoil_middle, ""),
    "pointer": (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "a git-lfs pointer"),
}


@pytest.mark.parametrize("name", ["film.mp4", "picture.png"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_broken_is_one_line(tmp_path: Path, name: str, damage: str) -> None:
    path = tmp_path / name
    noise = np.random.default_rng(0).integers(0, 256, (60, 64, 96, 3), dtype=np.uint8)
    if name == "film.mp4":
        with VideoWriter(path, 16.0, 64, 96, crf=10, preset="ultrafast", threads=1) as video:
            video.append(noise)
    else:
        Image.fromarray(noise[0]).save(path)
    spoil, message = DAMAGES[damage]
    spoil(path)
    with pytest.raises(InputError, match=f"^{path}: .*{message}") as caught:
        count_frames(path, 16.0)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 + len(str(path))


def test_sound_alone_and_several_pictures(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4410), np.float32), format="flt", layout="mono")
        frame.rate = 44100
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    with pytest.raises(InputError, match="it shows no video"):
        count_frames(tmp_path / "sound.mp4", 16.0)
    still = Image.new("RGB", (40, 30))
    still.save(tmp_path / "a.tiff", save_all=True, append_images=[Image.new("RGB", (40, 30), 9)])
    with pytest.raises(InputError, match="2 pictures in one file, without a frame rate"):
        count_frames(tmp_path / "a.tiff", 16.0)


@pytest.mark.parametrize("value", [0, 1000, 65535])
def test_sixteen_bits_are_rounded_to_eight(tmp_path: Path, value: int) -> None:
    """Of a file and of a picture in memory."""
    picture = Image.fromarray(np.full((30, 40), value, np.uint16))
    picture.save(tmp_path / "grey.png")
    (read,) = read_film(tmp_path / "grey.png", 16)
    expected = np.full((30, 40, 3), round(value / 257), np.uint8)
    assert (read == expected).all() and (rgb(picture) == expected).all()
    with Image.open(tmp_path / "grey.png") as opened:
        assert (rgb(opened) == expected).all()
