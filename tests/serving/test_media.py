"""Pieces of an mp4, one a chunk: joined they are a whole one, and each can be the first that a viewer gets."""

from __future__ import annotations

import io
import tracemalloc
from fractions import Fraction

import av
import numpy as np
import pytest

from longsana.runtime.fragments import Picture, fragment
from longsana.serving.media import ChunkEncoder, boxes

HEIGHT, WIDTH = 48, 64


def pictures(count: int, seed: int = 0) -> np.ndarray:
    """Smooth moving ramps (count, H, W, 3), each picture told from the others by its brightness."""
    t, y, x = np.mgrid[seed : seed + count, 0:HEIGHT, 0:WIDTH]
    return np.stack([(t * 9) % 200 + x // 2, (t * 9) % 200 + y // 2, (t * 9) % 200], axis=-1).astype(np.uint8)


def decoded(data: bytes) -> tuple[list[Fraction], np.ndarray]:
    with av.open(io.BytesIO(data), format="mp4") as film:
        frames = list(film.decode(video=0))
    times = [frame.pts * frame.time_base for frame in frames if frame.pts is not None]
    return times, np.stack([frame.to_ndarray(format="rgb24") for frame in frames])


def close(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and bool(np.abs(one.astype(int) - other).mean(axis=(1, 2, 3)).max() < 6)


@pytest.mark.parametrize("fps", [16, 24000 / 1001])
def test_pieces_are_an_mp4_from_any_of_them_on(fps: float) -> None:
    encoder, lengths = ChunkEncoder(WIDTH, HEIGHT, fps, crf=10, threads=2), [5, 1, 8, 4]
    chunks = [pictures(length, sum(lengths[:number])) for number, length in enumerate(lengths)]
    pieces: list[bytes] = []
    for number, chunk in enumerate(chunks):
        pieces.append(encoder.pack(encoder.code(chunk), before=sum(lengths[:number]), number=number))
        # A piece is whole before the next one is made.
        assert len(decoded(encoder.init + b"".join(pieces))[1]) == sum(lengths[: number + 1])
        assert boxes(pieces[-1]) == ["moof", "mdat"]
    assert boxes(encoder.init) == ["ftyp", "moov"]
    for first in range(len(chunks)):
        times, shown = decoded(encoder.init + b"".join(pieces[first:]))
        before = sum(lengths[:first])
        assert times == [k / encoder.rate for k in range(before, sum(lengths))]
        assert close(shown, np.concatenate(chunks[first:]))


def test_a_fragment_is_made_in_one_copy() -> None:
    # Whoever packs holds Python's lock, and a chunk at 720p has up to 40 MB.
    coded = [Picture(bytes(100_000), place, is_key=place == 0) for place in range(80)]
    tracemalloc.start()
    packed = fragment(coded, Fraction(16), before=0, number=1)
    copied = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 80 * 100_000 < len(packed) < copied < 1.01 * len(packed)


def test_what_was_coded_and_not_sent_leaves_no_trace() -> None:
    encoder, sent, other = ChunkEncoder(WIDTH, HEIGHT, 16, crf=10, threads=1), pictures(6), pictures(6, 11)
    first = encoder.pack(encoder.code(sent[:3]), before=0, number=0)
    encoder.code(other)  # dropped
    second = encoder.pack(encoder.code(sent[3:]), before=3, number=1)
    times, shown = decoded(encoder.init + first + second)
    assert times == [Fraction(k, 16) for k in range(6)] and close(shown, sent)


def test_the_type_is_that_of_the_init_segment() -> None:
    encoder = ChunkEncoder(WIDTH, HEIGHT, 16, crf=20, threads=1)
    record = encoder.init[encoder.init.index(b"avcC") + 5 :][:3].hex()
    assert encoder.mime == f'video/mp4; codecs="avc1.{record}"' and record.startswith("42c0")
