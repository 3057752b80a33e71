"""Stages as the loop sees them: their learners, and the loss of one of them on one micro-batch's samples.

A micro-batch is a process and an accumulation step. What it draws is a function of (seed, step, role, micro-batch) and
of nothing before it: a run that was stopped goes on as if it had not been, and two processes do what one does in two
accumulation steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from longsana.chunks import ChunkPlan
from longsana.flow.noise import keyed_generator, to_device
from longsana.models.embeddings import TextEmbedding
from longsana.runtime.distributed import World
from longsana.training.learner import Learner

T = TypeVar("T")
Embed: TypeAlias = Callable[[Sequence[str]], TextEmbedding]
"""Prompts to a batch of their embeddings, on the device."""


class Loss(NamedTuple):
    """value: a scalar with a graph. metrics: detached scalars for the log, the same names on every process.

    learns: False if value is 0 on purpose; an update in which no micro-batch learns is not made.
    """

    value: Tensor
    metrics: dict[str, Tensor]
    learns: bool = True


@dataclass(frozen=True)
class MicroBatches:
    """The micro-batches of a run: number i * processes + rank is accumulation step i of the process `rank`."""

    rank: int
    processes: int
    accumulation: int

    @classmethod
    def of(cls, world: World, accumulation: int) -> MicroBatches:
        return cls(world.rank, world.size, accumulation)

    @property
    def count(self) -> int:
        return self.processes * self.accumulation

    @property
    def mine(self) -> list[int]:
        return list(range(self.rank, self.count, self.processes))


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch's share of one update of one learner.

    samples: numbers of the samples it takes, counted for this role from the start of the run.
    """

    seed: int
    step: int
    role: str
    index: int
    samples: range
    device: torch.device
    device_noise: bool = False

    def rng(self, name: str) -> torch.Generator:
        """Randomness of this micro-batch for one purpose."""
        return keyed_generator(self.seed, self.step, self.role, self.index, name)

    def shared_rng(self, name: str) -> torch.Generator:
        """Randomness that all micro-batches of this update share: all must run a network as often as the others."""
        return keyed_generator(self.seed, self.step, self.role, name)

    def happens(self, name: str, probability: float) -> bool:
        """Draw whether something happens in this update: in all of its micro-batches, or in none; see `shared_rng`."""
        drawn = torch.rand((), generator=self.shared_rng(name), dtype=torch.float64, device="cpu")
        return float(drawn) < probability

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """Gaussian noise of this shape on the device, float32.

        It is drawn on the CPU, so the same on every device, or with `device_noise` there, which is faster.
        """
        where = self.device if self.device_noise else torch.device("cpu")
        rng = keyed_generator(self.seed, self.step, self.role, self.index, name, device=where)
        return to_device(torch.randn(*shape, generator=rng, dtype=torch.float32, device=where), self.device)


def each_frame(values: Tensor, plan: ChunkPlan) -> Tensor:
    """Give each frame its chunk's value: (B, chunks) on the CPU to (B, T)."""
    return values.repeat_interleave(torch.tensor(plan.lengths, dtype=torch.int64, device="cpu"), dim=1)


def repeated(text: TextEmbedding, batch: int) -> TextEmbedding:
    """Expand an embedding of one caption, (1, L, C), to a batch."""
    return TextEmbedding(*(part.expand(batch, *part.shape[1:]) for part in text))


class Ahead(Generic[T]):
    """Inputs of a micro-batch, made while a GPU computes on the one before.

    make: a function of the micro-batch and of nothing else, which does not wait for the GPU.
    """

    def __init__(self, make: Callable[[MicroBatch], T]) -> None:
        self._make = make
        self._kept: tuple[MicroBatch, T] | None = None

    def begin(self, micro_batch: MicroBatch) -> None:
        """Make what this micro-batch needs, in place of what was made before and not taken."""
        self._kept = micro_batch, self._make(micro_batch)

    def take(self, micro_batch: MicroBatch) -> T:
        """Take what this micro-batch needs; it is made now if it was not."""
        kept, self._kept = self._kept, None
        return kept[1] if kept is not None and kept[0] == micro_batch else self._make(micro_batch)


class Shuffled:
    """An endless order over `length` items: every epoch is another permutation, a function of (seed, name, epoch)."""

    def __init__(self, length: int, seed: int, name: str) -> None:
        assert length > 0
        self.length, self._seed, self._name = length, seed, name
        self._epoch = -1
        self._order: list[int] = []

    def __getitem__(self, number: int) -> int:
        """The item that is sample `number`, counted from the start of the run."""
        epoch, position = divmod(number, self.length)
        if epoch != self._epoch:
            rng = keyed_generator(self._seed, "order", self._name, epoch)
            order = torch.randperm(self.length, generator=rng, dtype=torch.int64, device="cpu")
            self._epoch, self._order = epoch, order.tolist()
        return self._order[position]


class Stage(ABC):
    """A way to train. `loss` returns numbers; the loop accumulates, steps, saves and logs."""

    learners: Sequence[Learner]
    inputs: Ahead[Any] | None = None
    """What `loss` takes for a micro-batch, if that can be made ahead."""

    @abstractmethod
    def loss(self, micro_batch: MicroBatch) -> Loss:
        """The loss of the learner `micro_batch.role` on these samples, with a graph to that learner's weights alone."""

    def state_tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Gather what lives across iterations beside the learners: groups of tensors, each of one process alone."""
        return {}

    def restore(self, names: Sequence[str], read: Callable[[str], Mapping[str, Tensor]], *, anew: bool = False) -> None:
        """Go on from what `state_tensors` gave, on any number of processes.

        names: of all groups. read: a group's tensors.
        anew: begin all that lives anew, and keep alone how far along the data it was.
        """
        assert not names, f"a stage without live tensors is given {names}"
