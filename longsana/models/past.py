"""The past that attention keeps: all chunks, a window, or sums that decay; and beside these, sinks.

Chunk c reads sum_i w_ic S_i, where S_i are the sums over the tokens of chunk i, of n_i latent frames, and

    w_cc = 1
    w_ic = 1                                   for the first chunks, i < num_sink_blocks
    w_ic = 0                                   for other chunks outside a window, c - i > num_cached_blocks > 0
    w_ic = g^(n_(i+1) + ... + n_c)             for the rest, with g = state_decay

so that with g = 1 and neither window nor sinks it reads the sum of the whole past, as published. g is a factor for a
latent frame: how a video is cut into chunks changes which frames see each other, not how fast it is forgotten. Half of
the past is left after ten frames with g = 0.933, after 24 seconds (Wan at 16 frames a second) with g = 0.993.

A window and a decay together are a decay that ends. Sinks never fade and take no place in the window; beside the sum of
the whole past, in which they are, they mean nothing. What is read never depends on how many chunks a call has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from longsana.config import ModelConfig
from longsana.runtime.errors import InputError, did_you_mean

LEARNED: Literal["learned"] = "learned"
START = 0.5 ** (1 / 10)
"""The factor that a learned one starts from: half of the past is left after a chunk of ten latent frames."""
START_LOGIT = math.log(START / (1 - START))


class Reach(NamedTuple):
    """A `Past` for the chunks of one call, as `ops.linear_attention` takes it.

    window: chunks, -1 for all. decay: (n, heads), a factor for each chunk and head, or None. sink: how many of the
    call's chunks, from the first, join the sinks; None without any.
    """

    window: int = -1
    decay: Tensor | None = None
    sink: int | None = None


MOST_CHUNKS = 1000
"""The longest window: a state has the sums of each of its chunks, 19 MiB at 2B."""


@dataclass(frozen=True)
class Past:
    """The past that attention keeps of the chunks before.

    window: chunks that a chunk sees besides its own and the sinks; -1 is all.
    decay: g; or of the first and the last head; or learned, one for each block and head; None is 1.
    sinks: first chunks that stay as they are.
    """

    window: int = -1
    decay: float | tuple[float, float] | Literal["learned"] | None = None
    sinks: int = 0

    @classmethod
    def of(cls, config: ModelConfig) -> Past:
        """Read a config's num_cached_blocks, state_decay and num_sink_blocks.

        Raises:
            InputError: one of them, by name, is out of its bounds or means nothing beside the others.
        """
        window, sinks = config.num_cached_blocks, config.num_sink_blocks
        if window == 0 or window < -1 or window > MOST_CHUNKS:
            raise InputError(
                f"num_cached_blocks={window}: must be -1 (all of the past) or 1 to {MOST_CHUNKS:,}, which a state holds"
            )
        if sinks < 0:
            raise InputError(f"num_sink_blocks={sinks}: must be 0 (no sinks) or more")
        decay = _checked(config.state_decay)
        if window > 0 and decay in (0, (0, 0)):
            raise InputError(
                f"num_cached_blocks={window}: has no meaning with state_decay=0, which leaves nothing of other chunks "
                "in the window; set one of them"
            )
        if sinks and window < 0 and decay is None:
            raise InputError(
                f"num_sink_blocks={sinks}: has no meaning beside the whole past, which holds the first chunks already; "
                "set num_cached_blocks, or state_decay below 1, or leave it out"
            )
        return cls(window, decay, sinks)

    @property
    def entries(self) -> int:
        """W of a state, the sums that it holds for a block and head."""
        return max(self.window, 1) + (self.sinks > 0)

    def factors(
        self, frames: Sequence[int], shape: tuple[int, int], logits: Tensor | None, *, dtype: torch.dtype, device: Any
    ) -> list[Tensor | None]:
        """Compute for each block (n, heads), in `dtype`: what each chunk multiplies what came before it by, g^frames.

        Args:
            frames: latent frames of each of the n chunks.
            shape: how many blocks there are, and heads in each.
            logits: (blocks, heads), of learned factors, counted from that of `START`.
            dtype: that of the sums.

        Returns:
            None for each block where nothing fades.
        """
        blocks, heads = shape
        if self.decay is None:
            return [None] * blocks
        if logits is not None:
            rates = (logits.to(dtype) + START_LOGIT).sigmoid()
        else:
            assert not isinstance(self.decay, str)
            # Made where it is used: a copy from the host could not be recorded into a CUDA graph.
            rates = _spread(self.decay, heads, device).expand(blocks, -1)
        return list(torch.stack([rates**count for count in frames], dim=1).to(dtype).unbind())

    def joins(self, sinks: int) -> int | None:
        """Count the chunks to come that join the sinks after `sinks` of them; None for a past without sinks."""
        return self.sinks - sinks if self.sinks else None

    def sunk(self, sinks: int, chunks: int) -> int:
        """Count the chunks in the sinks after `chunks` more."""
        return min(self.sinks, sinks + chunks)


def _checked(decay: Any) -> float | tuple[float, float] | Literal["learned"] | None:
    """Give g as it is used, None for 1; InputError for what is no factor."""
    if decay is None or decay == LEARNED:
        return None if decay is None else LEARNED
    ends = decay if isinstance(decay, tuple) else (decay,)
    shown = f"state_decay={list(decay) if isinstance(decay, tuple) else decay}"
    if len(ends) != (2 if isinstance(decay, tuple) else 1) or not all(isinstance(end, float) for end in ends):
        guess = did_you_mean(decay, [LEARNED]) if isinstance(decay, str) else ""
        raise InputError(f"{shown}: must be a number, [first, last] of the heads, or {LEARNED}{guess}")
    if not all(0 <= end <= 1 for end in ends):
        raise InputError(f"{shown}: must be from 0 (no past) to 1 (all of it), a factor for a latent frame")
    if not isinstance(decay, tuple):
        return None if decay == 1 else float(decay)
    if max(decay) == 1:
        raise InputError(
            f"{shown}: heads are spread geometrically in 1 - g, so both ends must be below 1; 0.9999 leaves 98 % of "
            "the past after 240 latent frames, a minute"
        )
    return (float(decay[0]), float(decay[1]))


def _spread(decay: float | tuple[float, float], heads: int, device: Any) -> Tensor:
    """Make (heads,) in float64: one factor for all, or spread geometrically in 1 - g; a single head takes the first."""
    if not isinstance(decay, tuple):
        return torch.full((heads,), decay, dtype=torch.float64, device=device)
    share = torch.arange(heads, dtype=torch.float64, device=device) / max(heads - 1, 1)
    return 1 - (1 - decay[0]) ** (1 - share) * (1 - decay[1]) ** share
