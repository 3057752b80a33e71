"""The causal Mix-FFN: a gated convolution inside each frame, then one over three frames."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from longsana.ops import gated_conv, temporal_conv


class MixFeedForward(nn.Module):
    """Expand, 3x3 depthwise, gate, project; and, to be added to that, its temporal convolution."""

    def __init__(self, hidden_size: int, mlp_ratio: float) -> None:
        super().__init__()
        inner = int(mlp_ratio * hidden_size)
        self.expand = nn.Linear(hidden_size, 2 * inner)
        # The convolutions hold weights; operations are their forwards.
        self.depthwise = nn.Conv2d(2 * inner, 2 * inner, 3, padding=1, groups=2 * inner)
        self.project = nn.Linear(inner, hidden_size, bias=False)
        self.temporal = nn.Conv2d(hidden_size, hidden_size, (3, 1), bias=False)

    def optimize_layout(self) -> None:
        """Lay the taps out in memory as the fused operations read them, outermost; shapes and values stay."""
        for conv in (self.depthwise, self.temporal):
            conv.weight.data = conv.weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)

    def forward(
        self, x: Tensor, size: tuple[int, int], tail: Tensor, lengths: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x: (B, T, S, D) with S = size[0] * size[1]; tail: (B, S, D); lengths: frames of each chunk.

        Returns two terms of the output, which the residual adds in its own pass over memory, and the next tail.
        """
        bias = self.depthwise.bias
        assert bias is not None
        x = self.project(gated_conv(self.expand(x), self.depthwise.weight, bias, size))
        # A clone: a slice would keep the whole activation alive for as long as the state lives.
        return x, temporal_conv(x, tail, self.temporal.weight, lengths=lengths), x[:, -1].clone()
