"""Three-dimensional rotary position embedding: time, height and width each rotate their own share of a head.

Angles are computed for the absolute frames asked for, in float64, so that no table ever ends.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

THETA = 10000.0


class Rotary(NamedTuple):
    """cos and sin for every token, (N, d / 2) each; pair i of a head is its channels 2i and 2i + 1."""

    cos: Tensor
    sin: Tensor


def rotary(
    head_dim: int,
    start: int | Tensor,
    grid: tuple[int, int, int],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Rotary:
    """Rotation of the tokens of frames [start, start + T) on a grid of (T, h, w) tokens, width fastest.

    Height and width take 2 (d // 6) channels each and time the rest: 36, 36 and 40 of 112. The angle of pair i of a
    share of p channels at position n is n theta^(-2 i / p). start may be a tensor (), for a recorded pass to read.
    """
    frames, height, width = grid
    space = 2 * (head_dim // 6)
    axes = (
        (start, frames, head_dim - 2 * space, (frames, 1, 1, -1)),
        (0, height, space, (1, height, 1, -1)),
        (0, width, space, (1, 1, width, -1)),
    )
    angles = []
    for first, count, channels, shape in axes:
        exponents = torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels
        positions = first + torch.arange(count, dtype=torch.float64, device=device)
        angles.append(torch.outer(positions, THETA**-exponents).view(shape).expand(*grid, -1))
    angle = torch.cat(angles, dim=-1).flatten(0, 2)
    return Rotary(angle.cos().to(dtype), angle.sin().to(dtype))
