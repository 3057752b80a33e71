"""The encoder of H.264 for who watches while pictures are made, and pictures on their way into encoders and out."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
from av.codec.context import Flags
from av.video.codeccontext import VideoCodecContext
from av.video.reformatter import ColorRange, Colorspace

from longsana.runtime.fragments import Picture, with_lengths

ZEROLATENCY = {"preset": "ultrafast", "tune": "zerolatency", "forced-idr": "1"}
SLICES = 4
"""Threads of this encoder, at most: each has a slice of the picture."""


def zerolatency_encoder(
    width: int, height: int, rate: Fraction, crf: int, threads: int, *, x264: str = ""
) -> VideoCodecContext:
    """Open an encoder that gives each picture back at once: no look-ahead, no B-frames, no threads of whole frames.

    Its parameter sets are its `extradata`. A frame of type I is an IDR. x264: more parameters, in x264's own notation.
    """
    encoder = av.CodecContext.create("libx264", "w")
    assert isinstance(encoder, VideoCodecContext)
    encoder.framerate, encoder.time_base = rate, 1 / rate
    encoder.options = {"crf": str(crf), **ZEROLATENCY, **({"x264-params": x264} if x264 else {})}
    encoder.thread_type, encoder.thread_count = "SLICE", min(threads, SLICES)
    encoder.flags |= Flags.global_header
    describe(encoder, width, height)
    encoder.open()
    return encoder


def describe(encoder: VideoCodecContext, width: int, height: int) -> None:
    """Tell an encoder that is not open yet which pictures will come."""
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
    # Say what the conversion from RGB uses; players guess by the picture's size otherwise.
    encoder.colorspace, encoder.color_range = Colorspace.SMPTE170M, ColorRange.MPEG


def frame_of(pixels: np.ndarray, place: int) -> av.VideoFrame:
    """A picture (H, W, 3), uint8, for an encoder, without a copy. place: in the order of display."""
    frame = av.VideoFrame.from_numpy_buffer(pixels, format="rgb24")
    frame.pts = place
    return frame


def picture_of(packet: av.Packet) -> Picture:
    """A coded picture of an encoder whose times are counted in pictures."""
    assert packet.pts is not None
    return Picture(with_lengths(bytes(packet)), packet.pts, packet.is_keyframe)
