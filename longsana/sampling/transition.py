"""The caption that each chunk of a video shows: a part of its prompt, or what leads from one part to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from longsana.data.story import Outline
from longsana.encoders.text import CompactEmbedding

Way = Literal["linear", "spherical"]


class Shown(NamedTuple):
    """The caption of a chunk: the part `before` becoming `part`, whose share is above 0; 1 is the part alone."""

    part: int
    before: int
    share: float


def shown_in(outline: Outline, chunks: int, transition_chunks: int) -> list[Shown]:
    """List what each of so many chunks of a video shows.

    After a change of prompt the share of the new part rises evenly over n chunks, 1 / (n + 1), ..., n / (n + 1). The
    last chunk of each part shows it alone, for which a short part's transition is shortened. After a cut there is none.
    """
    parts = outline.parts
    ends = [part.chunk for part in parts[1:]] + [outline.chunks]
    shown = []
    for index, (part, end) in enumerate(zip(parts, ends, strict=True)):
        length = end - part.chunk
        steps = 0 if index == 0 or part.change.kind == "cut" else min(transition_chunks, length - 1)
        shares = [(step + 1) / (steps + 1) for step in range(steps)]
        shown += [Shown(index, index - 1, share) for share in shares]
        shown += [Shown(index, index, 1.0)] * (length - steps)
    last = len(parts) - 1
    return [*shown[-parts[0].chunk :], *[Shown(last, last, 1.0)] * chunks][:chunks]


def embedding_of(parts: Sequence[CompactEmbedding], shown: Shown, way: Way) -> CompactEmbedding:
    """The embedding of what a chunk shows, of those of its prompt's parts. way: see `blend`."""
    own = parts[shown.part]
    return own if shown.share == 1 else blend(parts[shown.before], own, shown.share, way)


def blend(before: CompactEmbedding, after: CompactEmbedding, share: float, way: Way) -> CompactEmbedding:
    """Blend the embeddings of two captions, token by token: `share` 0 is the first, 1 the second, both to the bit.

    Tokens are those that the nearer caption has, the second at 1/2: where the other has none its own stands.

    way: along the straight line between two tokens, or along the arc between their directions, with lengths in between.
    """
    near, far, part = (after, before, 1 - share) if share >= 0.5 else (before, after, share)
    positions, others = near.mask.flatten(), far.mask.flatten()
    both_near, both_far = others[positions], positions[others]
    tokens = near.tokens.clone()
    if part > 0:
        mix = _linear if way == "linear" else _spherical
        mixed = mix(near.tokens[both_near].double(), far.tokens[both_far].double(), part)
        tokens[both_near] = mixed.to(tokens.dtype)
    return CompactEmbedding(tokens, near.mask)


def _linear(near: Tensor, far: Tensor, share: float) -> Tensor:
    return near + share * (far - near)


def _spherical(near: Tensor, far: Tensor, share: float) -> Tensor:
    """(n, C): sin((1 - s) a) / sin(a) u + sin(s a) / sin(a) v for directions u and v with the angle a between them."""
    lengths = [tokens.norm(dim=1, keepdim=True) for tokens in (near, far)]
    u, v = (tokens / length.clamp(min=1e-12) for tokens, length in zip((near, far), lengths, strict=True))
    angle = torch.atan2((u - v).norm(dim=1, keepdim=True), (u + v).norm(dim=1, keepdim=True)) * 2
    sine = angle.sin()
    turned = (((1 - share) * angle).sin() * u + (share * angle).sin() * v) / sine
    # Nearly parallel, or nearly opposite, where no arc is the shortest.
    direction = torch.where(sine.abs() < 1e-6, _linear(u, v, share), turned)
    return direction * _linear(lengths[0], lengths[1], share)
