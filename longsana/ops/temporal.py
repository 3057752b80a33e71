"""The temporal convolution as matrix products: nothing is padded or joined, each tap adds itself to the first's.

The sum is rounded after each tap, which the twin does once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def temporal_conv(
    x: Tensor, tail: Tensor, weight: Tensor, *, lengths: Sequence[int], ahead: Tensor | None = None
) -> Tensor:
    """Fuse `reference.temporal_conv`: x (B, T, S, D), tail, ahead (B, S, D), weight (D, D, 3, 1), to a tensor like x.

    ahead has no gradient.
    """
    out: Tensor = _TemporalConv.apply(x, tail, weight, lengths)
    if ahead is not None:
        _add(out[:, -1:], ahead[:, None], weight[:, :, 2, 0].t())
    return out


class _TemporalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tail: Tensor, weight: Tensor, lengths: Sequence[int]) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, tail, weight)
        ctx.lengths = lengths
        # (3, D in, D out), copied once: a product would copy a tap of any other layout each time.
        before, here, after = weight[..., 0].permute(2, 1, 0).contiguous()
        out = x @ here
        _add(out[:, :1], tail[:, None], before)
        for seen, seeing, tap in _neighbours(lengths, before, after):
            _add(out[:, seeing], x[:, seen], tap)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, tail, weight = ctx.saved_tensors
        grad = grad.contiguous()
        before, here, after = weight[..., 0].permute(2, 0, 1).contiguous()  # transposed
        of_x, of_tail = grad @ here, grad[:, 0] @ before
        of_before, of_here, of_after = of_taps = grad.new_zeros(3, *weight.shape[:2], dtype=torch.float32)
        of_here += _over_tokens(grad, x)
        of_before += _over_tokens(grad[:, :1], tail[:, None])
        for seen, seeing, tap in _neighbours(ctx.lengths, before, after):
            _add(of_x[:, seen], grad[:, seeing], tap)
            (of_before if tap is before else of_after).add_(_over_tokens(grad[:, seeing], x[:, seen]))
        return of_x, of_tail, of_taps.permute(1, 2, 0)[..., None].to(weight.dtype), None


def _neighbours(lengths: Sequence[int], before: Tensor, after: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Frames that are seen, as many frames that see them, and the tap that they are seen through."""
    frames = sum(lengths)
    if frames > 1:
        yield slice(0, frames - 1), slice(1, frames), before
    for start, end in itertools.pairwise([0, *itertools.accumulate(lengths)]):
        if end - start > 1:  # the last frame of a chunk does not see the next chunk's first
            yield slice(start + 1, end), slice(start, end - 1), after


def _add(to: Tensor, source: Tensor, tap: Tensor) -> None:
    """to += source @ tap, of frames (B, T, S, D) that lie one behind the other: of each clip they are one matrix."""
    to.flatten(1, 2).baddbmm_(source.flatten(1, 2), tap.expand(len(to), *tap.shape))


def _over_tokens(a: Tensor, b: Tensor) -> Tensor:
    """a^T b, summed over all tokens of frames (B, T, S, D)."""
    return (a.flatten(1, 2).transpose(1, 2) @ b.flatten(1, 2)).sum(0, dtype=torch.float32)
