"""Timesteps of training.

All are whole numbers, in float32: the network truncates its timestep and `FlowSchedule.sigma` does not, so that with
fractions, as in the published code, a network is told another noise level than its input has (method.md 7.3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from longsana.flow.schedule import TIMESTEPS, shift_sigma


def logit_normal(count: int, *, mean: float, std: float, shift: float, rng: torch.Generator) -> Tensor:
    """(count,) in [1, 1000]: u = sigmoid(mean + std n) for normal n, shifted (method.md 7.1)."""
    u = torch.sigmoid(mean + std * torch.randn(count, generator=rng, dtype=torch.float64, device="cpu"))
    return _whole(u, shift, 1, TIMESTEPS)


def monotone(
    batch: int, chunks: int, *, mean: float, std: float, shift: float, same_prob: float, rng: torch.Generator
) -> Tensor:
    """(batch, chunks) in [1, 1000], never falling: the monotonically increasing SNR sampler (method.md 7.2).

    Before the shift, on the 1,000 levels u = 0.001, ..., 1: a uniformly drawn chunk, the anchor, takes a `logit_normal`
    level, and given that, each way to continue to its left (no noisier) and to its right (no less noisy) is equally
    likely. With probability same_prob all chunks of a clip take the anchor's level.
    """
    anchors = logit_normal(batch, mean=mean, std=std, shift=1, rng=rng)
    positions = torch.randint(chunks, (batch,), generator=rng, dtype=torch.int64, device="cpu")
    same = _same(batch, same_prob, rng)
    levels = anchors[:, None].repeat(1, chunks)
    for row, position in enumerate(positions.tolist()):
        if not same[row]:
            anchor = int(anchors[row])
            levels[row, :position] = monotone_path(1, anchor, position, rng)
            levels[row, position + 1 :] = monotone_path(anchor, TIMESTEPS, chunks - 1 - position, rng)
    return _whole(levels.double() / TIMESTEPS, shift, 1, TIMESTEPS)


def independent(
    batch: int, chunks: int, *, mean: float, std: float, shift: float, same_prob: float, rng: torch.Generator
) -> Tensor:
    """(batch, chunks) in [1, 1000]: a `logit_normal` timestep for each chunk, of its own (method.md 7.2).

    With probability same_prob all chunks of a clip take the first one's.
    """
    timesteps = logit_normal(batch * chunks, mean=mean, std=std, shift=shift, rng=rng).view(batch, chunks)
    return torch.where(_same(batch, same_prob, rng)[:, None], timesteps[:, :1], timesteps)


def _same(batch: int, probability: float, rng: torch.Generator) -> Tensor:
    return torch.rand(batch, generator=rng, dtype=torch.float32, device="cpu") < probability


def monotone_path(low: int, high: int, length: int, rng: torch.Generator) -> Tensor:
    """(length,): one of the paths low <= t_1 <= ... <= t_length <= high of whole numbers, each equally likely."""
    # "Stars and bars": t_i -> t_i + i maps these paths, one to one, to the sets of `length` different numbers out of
    # high - low + length, and a random set is the head of a random permutation. Sorted independent draws would not
    # do: they favour paths without repeats.
    shuffled = torch.randperm(high - low + length, generator=rng, dtype=torch.int64, device="cpu")
    distinct = shuffled[:length].sort().values
    return (low + distinct - torch.arange(length, dtype=torch.int64, device="cpu")).float()


def score_timesteps(
    count: int, *, shift: float, low: int, high: int, rng: torch.Generator, first: int = 0, last: int = TIMESTEPS
) -> Tensor:
    """(count,) in [low, high]: where the scores of distribution matching are compared (method.md 7.3).

    1000 s u / (1 + (s - 1) u) for u = n / 1000, n a whole number drawn from [first, last), clamped to [low, high].
    An exit step's bounds are first and last: they bound the draw itself, before the shift.
    """
    assert 0 <= first < last <= TIMESTEPS and 1 <= low <= high <= TIMESTEPS, (first, last, low, high)
    n = torch.randint(first, last, (count,), generator=rng, dtype=torch.int64, device="cpu")
    return _whole(n.double() / TIMESTEPS, shift, low, high)


def _whole(u: Tensor, shift: float, low: int, high: int) -> Tensor:
    return (TIMESTEPS * shift_sigma(u, shift)).round().clamp(low, high).float()
