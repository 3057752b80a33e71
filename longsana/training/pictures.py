"""The pictures that videos of distillation begin with, as latents."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from longsana.data.pictures import Fit, read_picture
from longsana.encoders.vae import VideoVAE

KEPT = 2**28
"""Bytes of latents that are kept on the host; what does not fit is read and encoded again."""


class Pictures:
    """Reads and encodes the picture of each prompt when it is asked for, and keeps those that were asked for last.

    One by one: a batch may round otherwise, and what is kept differs where a run has been resumed.

    paths: of each prompt's picture. height, width: of the videos, in pixels. fit: see `longsana.data.pictures`.
    """

    def __init__(self, paths: Sequence[Path], vae: VideoVAE, height: int, width: int, fit: Fit) -> None:
        self._paths, self._vae, self._size, self._fit = paths, vae, (height, width), fit
        geometry = vae.geometry
        rows, columns = geometry.latent_size(height, width)
        self._encoded = lru_cache(max(KEPT // (4 * geometry.channels * rows * columns), 1))(self._encode)

    def __call__(self, numbers: Sequence[int]) -> Tensor:
        """Latents (B, C, 1, h, w), float32, on the host, of the pictures of these prompts, counted from 0.

        Raises:
            InputError: a picture cannot be read any more.
        """
        return torch.cat([self._encoded(number) for number in numbers])

    def _encode(self, number: int) -> Tensor:
        return self._vae.encode_pictures([read_picture(self._paths[number], *self._size, self._fit)]).cpu()
