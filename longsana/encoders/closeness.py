"""Closeness of pictures to others of the same size: PSNR over many pictures or picture by picture, and SSIM."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue: Rec. 601."""
BYTE = 255
WINDOW, SIGMA = 11, 1.5
"""Pixels of a side of SSIM's Gaussian window, and its standard deviation."""
C1, C2 = (0.01 * BYTE) ** 2, (0.03 * BYTE) ** 2
"""Stabilisers of SSIM's two quotients."""
GROUP = 64
"""Pictures compared together."""


def luma(pictures: Tensor) -> Tensor:
    """Luma (..., H, W) of uint8 pictures (..., H, W, 3): float32 in [0, 255]."""
    return pictures.float() @ torch.tensor(LUMA, dtype=torch.float32, device=pictures.device)


def decibels(error: Tensor, span: float) -> Tensor:
    """Peak signal-to-noise ratio in dB of a mean squared error of any shape; infinite where that is 0.

    span: of a pixel's values: 255 of bytes, 2 of pictures in [-1, 1].
    """
    return 10 * (span**2 / error).log10()


def psnr(pictures: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture to its other, in dB; infinite where they are equal.

    10 log10(255^2 / e), where e is the mean squared difference over the picture's pixels and colours.
    pictures, others: (..., H, W, 3), uint8. Returns (...), float32.
    """
    return decibels((pictures.float() - others.float()).square().flatten(-3).mean(-1), BYTE)


def ssim(pictures: Tensor, others: Tensor) -> Tensor:
    """Structural similarity of each picture to its other, in [-1, 1]: 1 where they are equal.

    With means m, variances v and the covariance c of the two lumas x and y within a window,

        (2 m_x m_y + C1) (2 c + C2) / ((m_x^2 + m_y^2 + C1) (v_x + v_y + C2)),

    averaged over all 11x11 windows within the picture, weighted by a Gaussian of sigma 1.5: equations 13 to 17 of Wang,
    Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to structural similarity", 2004,
    with their constants, and without reducing the pictures first.
    pictures, others: (..., H, W, 3), uint8, H and W of 11 or more. Returns (...), float32.

    Raises:
        ValueError: the pictures are smaller than a window, or of two shapes.
    """
    if pictures.shape != others.shape or min(pictures.shape[-3:-1]) < WINDOW:
        shapes = f"{tuple(pictures.shape)} and {tuple(others.shape)}"
        raise ValueError(
            f"pictures of shapes {shapes}: must be of one shape, and {WINDOW} pixels wide and high or more"
        )
    pairs = zip(pictures.flatten(0, -4).split(GROUP), others.flatten(0, -4).split(GROUP), strict=True)
    return torch.cat([_ssim(*pair) for pair in pairs]).view(pictures.shape[:-3])


def _ssim(pictures: Tensor, others: Tensor) -> Tensor:
    # Variances are small differences of large squares: of plain pictures float32 leaves only noise of them.
    x, y = luma(pictures).double(), luma(others).double()
    mean_x, mean_y, square_x, square_y, product = _windows(torch.stack([x, y, x * x, y * y, x * y]))
    variances, covariance = square_x - mean_x**2 + (square_y - mean_y**2), product - mean_x * mean_y
    alike = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1) * (2 * covariance + C2) / (variances + C2)
    return alike.flatten(1).mean(1).float()


def _windows(maps: Tensor) -> Tensor:
    """Gaussian means (..., H - 10, W - 10) of the windows within maps (..., H, W)."""
    weights = [math.exp(-((place - WINDOW // 2) ** 2) / (2 * SIGMA**2)) for place in range(WINDOW)]
    for side in (-2, -1):
        count = maps.shape[side] - WINDOW + 1
        means = torch.zeros_like(maps.narrow(side, 0, count))
        for place, weight in enumerate(weights):
            means.add_(maps.narrow(side, place, count), alpha=weight / sum(weights))
        maps = means
    return maps


class Closeness:
    """Peak signal-to-noise ratio of pictures to others, over all pixels."""

    def __init__(self) -> None:
        self._squares, self._count = 0.0, 0

    def add(self, pictures: Tensor, others: Tensor) -> None:
        """Compare pictures in [-1, 1] with others of the same shape."""
        self._squares += (pictures - others).square().sum(dtype=torch.float64).item()
        self._count += pictures.numel()

    @property
    def decibels(self) -> float:
        """The ratio; infinite of pictures that are equal."""
        return float(decibels(torch.tensor(self._squares / self._count, dtype=torch.float64, device="cpu"), 2))
