"""The temporal convolution as matrix products: nothing is padded or joined, each tap adds itself to the output.

The sum is rounded after each tap, which the twin does once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def add_temporal_conv(x: Tensor, tail: Tensor, weight: Tensor, *, lengths: Sequence[int]) -> Tensor:
    # (3, D in, D out), copied once: a product would copy a tap of any other layout each time.
    before, here, after = weight[..., 0].permute(2, 1, 0).contiguous()
    x = x.contiguous()
    (batch, frames), width = x.shape[:2], x.shape[-1]
    flat = x.view(-1, width)
    out = torch.addmm(flat, flat, here).view(x.shape)

    def add(to: Tensor, source: Tensor, tap: Tensor) -> None:
        """Frames of one clip: they lie one behind the other, and are one matrix."""
        to.view(-1, width).addmm_(source.reshape(-1, width), tap)

    for clip in range(batch):
        add(out[clip, :1], tail[clip], before)
        if frames > 1:
            add(out[clip, 1:], x[clip, :-1], before)
        start = 0
        for length in lengths:
            if length > 1:  # the last frame of a chunk does not see the next chunk's first
                add(out[clip, start : start + length - 1], x[clip, start + 1 : start + length], after)
            start += length
    return out
