"""Optical flow of any video: how far its picture moves, whatever its colours do. Needs OpenCV, the extra `flow`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from longsana.runtime.errors import InputError

SIDE = 128
"""Pixels of the shorter side at which flow is computed."""
PYRAMID, LEVELS, WINDOW, ITERATIONS, NEIGHBOURS, SMOOTHING = 0.5, 3, 15, 3, 5, 1.2
"""Farneback's parameters, those of OpenCV's own example."""


class FlowMeter:
    """Measures the flow of a video that comes in pieces, of which it keeps one grey picture.

    Raises:
        InputError: OpenCV is not installed.
    """

    def __init__(self) -> None:
        try:
            import cv2
        except ImportError as error:
            raise InputError("--flow needs OpenCV; pip install -e '.[flow]', or leave it out") from error
        self._cv2: Any = cv2  # its type hints know no output that it makes itself
        self._before: np.ndarray | None = None
        self._lengths: list[float] = []

    def add(self, pictures: Tensor) -> None:
        """Measure the next frames, (1, F, H, W, 3), uint8."""
        for picture in pictures[0].cpu().numpy():
            grey = self._cv2.cvtColor(picture, self._cv2.COLOR_RGB2GRAY)
            scale = min(SIDE / min(grey.shape), 1)
            grey = self._cv2.resize(grey, None, fx=scale, fy=scale, interpolation=self._cv2.INTER_AREA)
            self._lengths.append(np.nan if self._before is None else self._length(self._before, grey))
            self._before = grey

    def _length(self, before: np.ndarray, after: np.ndarray) -> float:
        flow = self._cv2.calcOpticalFlowFarneback(
            before, after, None, PYRAMID, LEVELS, WINDOW, ITERATIONS, NEIGHBOURS, SMOOTHING, 0
        )
        return float(np.hypot(flow[..., 0], flow[..., 1]).mean()) / min(before.shape)

    def result(self) -> Tensor:
        """Mean length of the flow onto each frame, (1, F), a share of the picture's shorter side; nan for the first."""
        return torch.tensor([self._lengths])
