"""The causal Mix-FFN: a gated convolution inside each frame, then one over three frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from longsana.ops import Float8Rows, gated_conv, temporal_conv
from longsana.runtime.peers import Peers


class TemporalConv(nn.Module):
    """The convolution over three frames of which none lies in a later chunk."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width, 3, 1))

    def forward(self, x: Tensor, tail: Tensor, lengths: Sequence[int], ahead: Tensor | None = None) -> Tensor:
        """x: (B, T, S, D); tail: (B, S, D), the frame before; lengths: frames of each chunk; ahead: see the operation.

        Returns x's like.
        """
        return temporal_conv(x, tail, self.weight, lengths=lengths, ahead=ahead)


class MixFeedForward(nn.Module):
    """Expand, 3x3 depthwise, gate, project; and, to be added to that, its temporal convolution.

    frames_per_call: latent frames that are expanded at a time, which is most of a pass's memory; 0: all.
    """

    def __init__(self, hidden_size: int, mlp_ratio: float, frames_per_call: int = 0) -> None:
        super().__init__()
        self.frames_per_call = frames_per_call
        inner = int(mlp_ratio * hidden_size)
        self.expand = nn.Linear(hidden_size, 2 * inner)
        # It holds weights; `gated_conv` is its forward.
        self.depthwise = nn.Conv2d(2 * inner, 2 * inner, 3, padding=1, groups=2 * inner)
        self.project = nn.Linear(inner, hidden_size, bias=False)
        self.temporal = TemporalConv(hidden_size)

    def optimize_layout(self) -> None:
        """Lay the taps out in memory as the fused operations read them, outermost; shapes and values stay."""
        for conv in (self.depthwise, self.temporal):
            if isinstance(conv, nn.Conv2d | TemporalConv):  # and not its replacement in float8
                conv.weight.data = conv.weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)

    def forward(
        self,
        x: Tensor | Float8Rows,
        size: tuple[int, int],
        tail: Tensor,
        lengths: Sequence[int],
        peers: Peers | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x: (B, T, S, D) with S = size[0] * size[1]; tail: (B, S, D); lengths: frames of each chunk; peers: see the
        network.

        Returns two terms of the output, which the residual adds in its own pass over memory, and the next tail.
        """
        # No frame looks at another before the temporal convolution.
        parts = [self._gated(part, size) for part in _pieces(x, self.frames_per_call)]
        h = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if peers is not None:
            before, ahead, last = peers.edges(h)
            return h, self.temporal(h, tail if before is None else before, lengths, ahead), last
        # A clone: a slice would keep the whole activation alive for as long as the state lives.
        return h, self.temporal(h, tail, lengths), h[:, -1].clone()

    def _gated(self, x: Tensor | Float8Rows, size: tuple[int, int]) -> Tensor:
        bias = self.depthwise.bias
        assert bias is not None
        h: Tensor = self.project(gated_conv(self.expand(x), self.depthwise.weight, bias, size))
        return h


def _pieces(x: Tensor | Float8Rows, frames: int) -> Iterator[Tensor | Float8Rows]:
    """Cut x (B, T, S, D) into pieces of so many frames; 0: none is cut."""
    if isinstance(x, Tensor):
        yield from x.split(frames or x.shape[1], dim=1)
    else:
        for rows, scale in zip(*(part.split(frames or part.shape[1], dim=1) for part in x), strict=True):
            yield Float8Rows(rows, scale.contiguous())
