"""Figures of any video, from its pictures alone: how it looks, how it moves, and whether that changes over time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from longsana.chunks import ChunkPlan
from longsana.encoders.closeness import luma
from longsana.runtime.gpu import pictures_together

STRETCH = 5
"""Seconds at the start and at the end that `drift` compares."""
END = 0.15
"""Share of a video at its start and at its end that `end_drift` compares."""
STILL = 0.05 / 255
"""Change of a picture that does not move: a twentieth of a byte a pixel; the smallest, slowest shape causes six."""


class Measures(NamedTuple):
    """One number a frame, each (B, F) and a share of the range of a pixel.

    saturation: largest channel minus smallest, mean over the picture.
    contrast: standard deviation of the luma.
    sharpness: root mean square of the luma's Laplacian (four neighbours).
    change: mean difference to the frame before; nan for the first frame of a video.
    """

    saturation: Tensor
    contrast: Tensor
    sharpness: Tensor
    change: Tensor

    @classmethod
    def join(cls, pieces: Sequence[Measures]) -> Measures:
        """Consecutive pieces of the same videos."""
        return cls(*(torch.cat(values, dim=1) for values in zip(*pieces, strict=True)))


def measure_pieces(
    pieces: Iterable[Tensor], device: torch.device, visit: Callable[[Tensor], object] = lambda pictures: None
) -> Measures:
    """Figures of consecutive uint8 pieces (B, F, H, W, 3) of the same videos; `visit` is shown each, on the device."""
    measured: list[Measures] = []
    before = None
    for piece in pieces:
        pictures = piece.to(device)
        measured.append(measure(pictures, before))
        before = pictures[:, -1]
        visit(pictures)
    return Measures.join(measured)


def measure(pictures: Tensor, before: Tensor | None = None) -> Measures:
    """Figures of uint8 pictures (B, F, H, W, 3).

    before: (B, H, W, 3), the frame before the first one, when this is a later piece of the videos.
    """
    pieces = []
    for piece in pictures.split(max(pictures_together(pictures) // len(pictures), 1), dim=1):
        pieces.append(_measure(piece, before))
        before = piece[:, -1]
    return Measures.join(pieces)


def _measure(pictures: Tensor, before: Tensor | None) -> Measures:
    red, green, blue = pictures.unbind(-1)
    largest, smallest = torch.maximum(red, green).maximum(blue), torch.minimum(red, green).minimum(blue)
    bright = luma(pictures)
    inner = bright[..., 1:-1, 1:-1]
    ring = bright[..., :-2, 1:-1] + bright[..., 2:, 1:-1] + bright[..., 1:-1, :-2] + bright[..., 1:-1, 2:]
    previous = torch.cat([pictures[:, :1] if before is None else before[:, None], pictures[:, :-1]], dim=1)
    change = (torch.maximum(pictures, previous) - torch.minimum(pictures, previous)).flatten(2).float().mean(2)
    if before is None:
        change[:, 0] = torch.nan
    return Measures(
        (largest - smallest).flatten(2).float().mean(2) / 255,
        bright.flatten(2).std(2, correction=0) / 255,
        (ring - 4 * inner).flatten(2).square().mean(2).sqrt() / 255,
        change / 255,
    )


def boundaries(plan: ChunkPlan, time_stride: int) -> list[int]:
    """First pixel frame of each chunk but the first, of a video sampled in these chunks."""
    return [time_stride * start - (time_stride - 1) for start in plan.starts[1:]]


def seam_index(change: Tensor, boundaries: Sequence[int], time_stride: int) -> Tensor:
    """Mean change onto the first frame of a chunk over mean change within chunks, (B,); 1 is seamless.

    Within chunks only frames of the same phase count, the first pixel frame of each latent after the first: a VAE has
    a rhythm of its own, which is not a seam. `STILL` is added above and below, so that what does not move scores 1.
    change: (B, F) from the first frame of the video. nan: no chunk has a boundary, or none has anything within.
    """
    first = torch.zeros(change.shape[1], dtype=torch.bool, device=change.device)
    seam = first.clone()
    # 1, or of a video that goes on from another, without an opening picture, `time_stride`.
    first[1 + (boundaries[0] - 1) % time_stride if boundaries else 1 :: time_stride] = True
    seam[[frame for frame in boundaries if frame < len(seam)]] = True
    across, within = change[:, seam].mean(1), change[:, first & ~seam].mean(1)
    return (across + STILL) / (within + STILL)


def drift(values: Tensor, fps: float) -> Tensor:
    """Relative change of the mean over the last five seconds against the first five, (B,), of figures (B, F).

    nan for a video of five seconds or less. Below ten seconds the two stretches share frames.
    """
    stretch = round(STRETCH * fps)
    if values.shape[1] - 1 <= stretch:
        return values.new_full((len(values),), torch.nan)
    return _relative(values[:, -stretch:].nanmean(1), values[:, :stretch].nanmean(1))


def end_drift(values: Tensor) -> Tensor:
    """Relative change of the mean over the last 15 % of the frames against the first 15 %, (B,), of figures (B, F).

    nan for a video of which a share of 15 % is not one frame.
    """
    stretch = round(END * values.shape[1])
    if not stretch:
        return values.new_full((len(values),), torch.nan)
    return _relative(values[:, -stretch:].nanmean(1), values[:, :stretch].nanmean(1))


def drift_curve(values: Tensor, fps: float) -> Tensor:
    """Relative change of each second (B, S) against the first five seconds, of figures (B, F)."""
    return _relative(per_second(values, fps), values[:, : round(STRETCH * fps)].nanmean(1, keepdim=True))


def motion(change: Tensor, fps: float) -> Tensor:
    """Mean change a second, (B,), of the change (B, F) a frame."""
    return fps * change.nanmean(1)


def per_second(values: Tensor, fps: float) -> Tensor:
    """Mean of each second, (B, S); what is left over at the end counts with the last whole second."""
    frames = values.shape[1]
    seconds = max(int(frames / fps), 1)
    edges = [round(second * fps) for second in range(seconds)] + [frames]
    return torch.stack([values[:, a:b].nanmean(1) for a, b in pairwise(edges)], dim=1)


def _relative(value: Tensor, reference: Tensor) -> Tensor:
    # A picture without any colour has no saturation to lose: less than a thousandth of the range is none.
    return (value - reference) / reference.clamp(min=1e-3)
