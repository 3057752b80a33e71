"""Processes that make one video together: what they give each other within a pass of the network or a decoder.

All of them make the same calls in the same order, each for its share, and have the same results: what is summed or
gathered is the same numbers on each. On GPUs the calls can be recorded into a CUDA graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Edges(NamedTuple):
    """Neighbours of a process's share of something, and the end of the last share; tensors of any shape.

    before, after: the last of the share before and the first of the one after; None where there is none.
    last: of the last share.
    """

    before: Tensor | None
    after: Tensor | None
    last: Tensor


class Peers:
    """This process among those of a video, in the order of their shares.

    group: of `torch.distributed`, NCCL's on GPUs; None is all processes. ranks: of its members, in the launch.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.ranks = dist.get_process_group_ranks(group or dist.group.WORLD)

    def shares(self, count: int) -> list[range]:
        """Divide `count` things that lie in a row: the first shares are longer by one where that does not come out."""
        least, more = divmod(count, self.size)
        edges = [rank * least + min(rank, more) for rank in range(self.size + 1)]
        return [range(start, stop) for start, stop in itertools.pairwise(edges)]

    def share(self, count: int) -> range:
        """This process's share of `count` things; an empty one if there are fewer than processes."""
        return self.shares(count)[self.rank]

    def total(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Sum tensors of any shapes, of one dtype, over the processes."""
        flat = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(flat, group=self.group)
        return [own.view(part.shape) for own, part in zip(flat.split([p.numel() for p in parts]), parts, strict=True)]

    def edges(self, x: Tensor) -> Edges:
        """Exchange the frames at the edges of the processes' shares x (B, T, ...); each is (B, ...)."""
        first, last, at_end = x[:, 0].contiguous(), x[:, -1].contiguous(), self.rank == self.size - 1
        before = None if self.rank == 0 else torch.empty_like(last)
        after = None if at_end else torch.empty_like(first)
        end = last if at_end else torch.empty_like(last)
        calls: list[dist.P2POp] = []
        if before is not None:
            calls += [self._send(first, self.rank - 1), self._receive(before, self.rank - 1)]
        if after is not None:
            calls += [self._send(last, self.rank + 1), self._receive(after, self.rank + 1)]
            calls.append(self._receive(end, self.size - 1))
        else:
            calls += [self._send(last, rank) for rank in range(self.size - 1)]
        self._exchange(calls)
        return Edges(before, after, end)

    def exchange_rows(self, x: Tensor, dim: int) -> None:
        """Fill the first and the last slice of x along `dim` with the neighbours' own outermost slices, in place.

        x: of any shape, of which slices 1 and -2 are this process's outermost. Slices at the ends of the whole stay as
        they are.
        """
        calls, filled = [], []
        for rank, own, border in ((self.rank - 1, 1, 0), (self.rank + 1, -2, -1)):
            if 0 <= rank < self.size:
                theirs = torch.empty_like(x.select(dim, border), memory_format=torch.contiguous_format)
                calls += [self._send(x.select(dim, own).contiguous(), rank), self._receive(theirs, rank)]
                filled.append((border, theirs))
        self._exchange(calls)
        for border, theirs in filled:
            x.select(dim, border).copy_(theirs)

    def whole(self, x: Tensor, dim: int, count: int) -> Tensor:
        """Join the processes' shares x, of any shape, of `count` things, each of as many slices along `dim`."""
        slices = x.shape[dim] // len(self.share(count))
        lengths = [slices * len(share) for share in self.shares(count)]
        padded = list(x.shape)
        padded[dim] = max(lengths)
        own = x.new_zeros(padded)
        own.narrow(dim, 0, x.shape[dim]).copy_(x)
        parts = [torch.empty_like(own) for _ in lengths]
        dist.all_gather(parts, own, group=self.group)
        return torch.cat([part.narrow(dim, 0, n) for part, n in zip(parts, lengths, strict=True)], dim)

    def _send(self, x: Tensor, rank: int) -> dist.P2POp:
        return dist.P2POp(dist.isend, x, self.ranks[rank], self.group)

    def _receive(self, x: Tensor, rank: int) -> dist.P2POp:
        return dist.P2POp(dist.irecv, x, self.ranks[rank], self.group)

    def _exchange(self, calls: list[dist.P2POp]) -> None:
        for work in dist.batch_isend_irecv(calls) if calls else ():
            work.wait()
