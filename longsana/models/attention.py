"""The two attentions of a block: linear over the video's past, softmax over the caption."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from longsana.models.past import Reach
from longsana.models.rope import Rotary
from longsana.ops import Float8Rows, caption_attention, linear_attention, qk_features
from longsana.runtime.peers import Peers

NORM_EPS = 1e-5


class LinearAttention(nn.Module):
    """ReLU linear attention with rotary positions; its past is two sums."""

    def __init__(self, hidden_size: int, head_dim: int, *, eps: float) -> None:
        super().__init__()
        self.head_dim, self.eps = head_dim, eps
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        # Over the full width, before the split into heads. These hold weights; `qk_features` is the forward of both.
        self.q_norm = nn.RMSNorm(hidden_size, eps=NORM_EPS)
        self.k_norm = nn.RMSNorm(hidden_size, eps=NORM_EPS)
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(
        self,
        x: Tensor | Float8Rows,
        rotary: Rotary,
        kv: Tensor,
        k_sum: Tensor,
        lengths: Sequence[int],
        reach: Reach,
        peers: Peers | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x: (B, ..., D), N tokens; kv, k_sum: as in `LayerState`; lengths: tokens of each chunk; peers: see the
        network.

        Returns (B, N, D) and the next sums.
        """
        window, decay, sink = reach
        qkv = self.qkv(x).flatten(1, -2)
        parts = qk_features(qkv, self.q_norm.weight, self.k_norm.weight, NORM_EPS)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        out, kv, k_sum = linear_attention(
            q, k, v, *rotary, kv, k_sum, lengths=lengths, window=window, eps=self.eps, decay=decay, sink=sink,
            total=None if peers is None else peers.total,
        )  # fmt: skip
        return self.out(out.flatten(-2)), kv, k_sum


class CrossAttention(nn.Module):
    """Softmax attention of video tokens over caption tokens."""

    def __init__(self, hidden_size: int, heads: int, *, norm_eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.q_norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.k_norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor | Float8Rows, text: Tensor | tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """x: (B, ..., D), N tokens; text: (B, L, D), or its cache; mask: see `TextMemory`.

        Returns (B, N, D).
        """
        k, v = self.cache_caption(text) if isinstance(text, Tensor) else text
        q = self.q_norm(self.q(x).flatten(1, -2)).unflatten(-1, (self.heads, -1))
        if mask is None or mask.dim() == 1:
            return self.out(caption_attention(q, k, v, mask).flatten(-2))
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask[:, None, None])
        return self.out(out.transpose(1, 2).flatten(-2))

    def cache_caption(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, heads, L, d) of a caption (B, L, D)."""
        k, v = self.kv(text).chunk(2, dim=-1)
        return self._heads(self.k_norm(k)), self._heads(v)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
