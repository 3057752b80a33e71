"""An mp4 in fragments (ISO/IEC 14496-12), which can be read while it is written: each fragment is whole by itself.

FFmpeg's own muxer cannot do this through PyAV: it hands a fragment out only when the next one begins.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

REORDERED = 2
"""Pictures by which x264's order of coding runs ahead of the order of display, at most."""
_START_CODE = b"\0\0\1"
_SPS, _PPS = 7, 8
_KEY, _OTHER = 0x02000000, 0x01010000
"""A sample's flags: it depends on no other; it does."""
_UPRIGHT = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)


class Picture(NamedTuple):
    """One coded picture: its place in the order of display, and whether it is an IDR.

    data: H.264 as an mp4 holds it, each unit after its length; see `with_lengths`.
    """

    data: bytes
    place: int
    is_key: bool


class FragmentedMP4:
    """Writes one H.264 track by `write`, which gets the header at once and then whole fragments.

    The pictures may come from several encoders, one after the other, each beginning with an IDR; their parameter sets
    differ in their ids.

    headers: the encoders' parameter sets, with start codes; the first says the profile of all.
    """

    def __init__(
        self, write: Callable[[bytes], object], width: int, height: int, rate: Fraction, headers: Sequence[bytes]
    ) -> None:
        self._write = write
        self._rate = rate
        self._pictures = 0
        write(header(width, height, rate, headers))

    def add(self, picture: Picture) -> None:
        """Write a fragment: the next picture in the order of coding."""
        self._write(fragment([picture], self._rate, before=self._pictures, number=self._pictures + 1))
        self._pictures += 1


def fragment(
    pictures: Sequence[Picture], rate: Fraction, *, before: int, number: int, reordered: int = REORDERED
) -> bytes:
    """One fragment, moof and mdat, of pictures in the order of coding.

    rate: pictures a second. before: pictures of the track that are coded before these, by which they are timed.
    number: of the fragment in its track, from 1. reordered: see `header`.
    """
    ticks = rate.denominator  # of a picture; rate.numerator of them are a second
    samples, content = [], [picture.data for picture in pictures]
    for coded, (data, place, is_key) in enumerate(pictures, before):
        delay = place + reordered - coded
        samples.append(struct.pack(">3I", len(data), _KEY if is_key else _OTHER, delay * ticks))
    track = [
        _full(b"tfhd", 0, 0x020000, struct.pack(">I", 1)),  # offsets count from the moof
        _full(b"tfdt", 1, 0, struct.pack(">Q", before * ticks)),
    ]

    def moof(offset: int) -> bytes:
        # Each sample has a size, flags and a delay.
        run = _full(b"trun", 0, 0x000E01, struct.pack(">Ii", len(pictures), offset), *samples)
        return _box(b"moof", _full(b"mfhd", 0, 0, struct.pack(">I", number)), _box(b"traf", *track, run))

    # A chunk of noise at 720p has 40 MB: they are copied once.
    return b"".join([moof(len(moof(0)) + 8), struct.pack(">I", 8 + sum(map(len, content))), b"mdat", *content])


def codecs(parameter_sets: bytes) -> str:
    """The codec for a MIME type (RFC 6381), as in avc1.42c01e. parameter_sets: an encoder's, with start codes."""
    profile, compatible, level = _profile([parameter_sets])
    return f"avc1.{profile:02x}{compatible:02x}{level:02x}"


def with_lengths(data: bytes) -> bytes:
    """Put each unit's length, of four bytes, in place of its start code."""
    return b"".join(part for unit in nal_units(data) for part in (struct.pack(">I", len(unit)), unit))


def nal_units(data: bytes) -> list[bytes]:
    """Split H.264 with start codes (annex B) into its units."""
    # No unit ends with a zero: one that stands there belongs to the next start code.
    return [unit for piece in data.split(_START_CODE) if (unit := piece.rstrip(b"\0"))]


def header(width: int, height: int, rate: Fraction, headers: Sequence[bytes], *, reordered: int = REORDERED) -> bytes:
    """The boxes before the first fragment, ftyp and moov.

    headers: see `FragmentedMP4`. reordered: pictures by which coding runs ahead of display, at most; 0 of an encoder
    that codes them in the order of display.
    """
    size = struct.pack(">2I", width << 16, height << 16)
    description = _box(
        b"avc1",
        bytes(6) + struct.pack(">H", 1) + bytes(16) + struct.pack(">2H", width, height),
        struct.pack(">3IH", 72 << 16, 72 << 16, 0, 1) + bytes(32) + struct.pack(">Hh", 24, -1),
        _box(b"avcC", _decoder_record(headers)),
    )
    table = _box(
        b"stbl",
        _full(b"stsd", 0, 0, struct.pack(">I", 1), description),
        *(
            _full(kind, 0, 0, bytes(length))
            for kind, length in ((b"stts", 4), (b"stsc", 4), (b"stsz", 8), (b"stco", 4))
        ),
    )
    media = _box(
        b"mdia",
        _full(b"mdhd", 0, 0, struct.pack(">4I2H", 0, 0, rate.numerator, 0, 0x55C4, 0)),  # of no language
        _full(b"hdlr", 0, 0, bytes(4) + b"vide" + bytes(12) + b"VideoHandler\0"),
        _box(
            b"minf",
            _full(b"vmhd", 0, 1, bytes(8)),
            _box(b"dinf", _full(b"dref", 0, 0, struct.pack(">I", 1), _full(b"url ", 0, 1))),
            table,
        ),
    )
    # The first picture is shown at 0, although it is decoded earlier.
    edit = _full(b"elst", 0, 0, struct.pack(">2Ii2h", 1, 0, reordered * rate.denominator, 1, 0))
    track = _box(
        b"trak",
        _full(b"tkhd", 0, 3, struct.pack(">5I", 0, 0, 1, 0, 0) + bytes(16) + _UPRIGHT + size),
        *([_box(b"edts", edit)] if reordered else []),
        media,
    )
    movie = struct.pack(">4IiH", 0, 0, 1000, 0, 1 << 16, 1 << 8) + bytes(10) + _UPRIGHT + bytes(24)
    defaults = _full(b"trex", 0, 0, struct.pack(">5I", 1, 1, rate.denominator, 0, 0))
    return _box(b"ftyp", b"iso6" + struct.pack(">I", 512) + b"iso6mp41avc1") + _box(
        b"moov", _full(b"mvhd", 0, 0, movie + struct.pack(">I", 2)), track, _box(b"mvex", defaults)
    )


def _profile(headers: Sequence[bytes]) -> tuple[int, int, int]:
    """Profile, compatibility flags and level of a track; the level is the highest of its encoders'."""
    sets = [unit for header in headers for unit in nal_units(header) if unit[0] & 31 == _SPS]
    profile, compatible, _ = sets[0][1:4]
    return profile, compatible, max(unit[3] for unit in sets)


def _decoder_record(headers: Sequence[bytes]) -> bytes:
    """The parameter sets of all encoders (ISO/IEC 14496-15, 5.3.3.1), so that none need stand among the pictures."""
    units = [unit for header in headers for unit in nal_units(header)]
    sets = [[unit for unit in units if unit[0] & 31 == kind] for kind in (_SPS, _PPS)]
    profile, compatible, level = _profile(headers)
    packed = [b"".join(struct.pack(">H", len(unit)) + unit for unit in some) for some in sets]
    record = bytes([1, profile, compatible, level, 0xFF, 0xE0 | len(sets[0])]) + packed[0]
    record += bytes([len(sets[1])]) + packed[1]
    # High profiles say 4:2:0 and eight bits again.
    return record + (bytes([0xFD, 0xF8, 0xF8, 0]) if profile not in (66, 77, 88) else b"")


def _box(kind: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return struct.pack(">I", 8 + len(content)) + kind + content


def _full(kind: bytes, version: int, flags: int, *parts: bytes) -> bytes:
    return _box(kind, struct.pack(">I", version << 24 | flags), *parts)
