"""Media of a session: each chunk becomes one fragment of an mp4 that can be played from any of them on."""

from __future__ import annotations

import struct
from fractions import Fraction
from functools import cached_property

import numpy as np
from av.video.codeccontext import VideoCodecContext
from av.video.frame import PictureType

from longsana.runtime.fragments import Picture, codecs, fragment, header
from longsana.runtime.h264 import frame_of, picture_of, zerolatency_encoder


class ChunkEncoder:
    """Codes chunks of pictures as H.264, each beginning with an IDR, with one encoder that lives as long as its video.

    A chunk's pieces never wait for the next one. What was coded and is not sent leaves no trace: a fragment depends on
    nothing before its IDR, and gets its number and times when it is `packed`.

    width, height: even pixel counts. fps: pictures a second; of a fraction with a denominator up to 1001, that
    fraction. crf: 0 (lossless) to 51. threads: at most `SLICES` count.
    """

    def __init__(self, width: int, height: int, fps: float, crf: int, threads: int) -> None:
        self.rate = Fraction(fps).limit_denominator(1001)
        self._settings = width, height, self.rate, crf, threads
        self._coded = 0

    @cached_property
    def _encoder(self) -> VideoCodecContext:
        """The encoder, opened when something is asked of it: who waits in a queue needs none."""
        return zerolatency_encoder(*self._settings, x264="keyint=infinite")

    @property
    def _sets(self) -> bytes:
        return bytes(self._encoder.extradata or b"")

    @cached_property
    def init(self) -> bytes:
        """The init segment, ftyp and moov."""
        width, height, rate, *_ = self._settings
        return header(width, height, rate, [self._sets], reordered=0)

    @property
    def mime(self) -> str:
        """The media's type, with its codec."""
        return f'video/mp4; codecs="{codecs(self._sets)}"'

    def code(self, pixels: np.ndarray) -> list[Picture]:
        """Code the pictures (F, H, W, 3), uint8, of a chunk, at least one; their places count from 0."""
        coded, encoder = [], self._encoder
        for place, picture in enumerate(np.ascontiguousarray(pixels)):
            frame = frame_of(picture, self._coded)
            frame.pict_type = PictureType.I if place == 0 else PictureType.NONE
            self._coded += 1
            coded += [picture_of(packet)._replace(place=place) for packet in encoder.encode(frame)]
        assert len(coded) == len(pixels) and coded[0].is_key, "an encoder that keeps pictures back"
        return coded

    def pack(self, pictures: list[Picture], *, before: int, number: int) -> bytes:
        """Pack a chunk's pictures as one fragment, moof and mdat.

        before: pictures of the track before these. number: of the fragment, from 0.
        """
        timed = [picture._replace(place=before + picture.place) for picture in pictures]
        return fragment(timed, self.rate, before=before, number=number + 1, reordered=0)


def boxes(data: bytes) -> list[str]:
    """Names of the boxes at the top of an mp4, or of a piece of one."""
    found, place = [], 0
    while place < len(data):
        size, name = struct.unpack_from(">I4s", data, place)
        found.append(name.decode("latin-1"))
        place += max(size, 8)
    return found
