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
    """Codes chunks of pictures as H.264, each by itself: its bytes depend on no other chunk, and begin with an IDR.

    So a chunk is coded wherever there is room, what was coded and is not sent leaves no trace, and a fragment gets its
    number and times when it is `packed`. Opening x264 for each takes 2.5 ms.

    width, height: even pixel counts. fps: pictures a second; of a fraction with a denominator up to 1001, that
    fraction. crf: 0 (lossless) to 51. threads: at most `SLICES` count.
    """

    def __init__(self, width: int, height: int, fps: float, crf: int, threads: int) -> None:
        self.rate = Fraction(fps).limit_denominator(1001)
        self._settings = width, height, self.rate, crf, threads

    def _open(self) -> VideoCodecContext:
        return zerolatency_encoder(*self._settings, x264="keyint=infinite")

    @cached_property
    def _sets(self) -> bytes:
        return bytes(self._open().extradata or b"")

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
        coded, encoder = [], self._open()
        for place, picture in enumerate(np.ascontiguousarray(pixels)):
            frame = frame_of(picture, place)
            frame.pict_type = PictureType.I if place == 0 else PictureType.NONE
            coded += [picture_of(packet) for packet in encoder.encode(frame)]
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
