"""Modules that take turns: one is there at a time, and what each computes is the same to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from longsana.runtime.offload import Part, Turns

CPU = torch.device("cpu")


class Layers(nn.Module):
    """Weights in layouts and dtypes that networks have, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 7)
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.again = self.linear.weight
        self.register_buffer("scale", torch.rand((), dtype=torch.float64))
        self.register_buffer("turned", torch.rand(4, 6).t())
        self.register_buffer("none", torch.empty(0, 3))

    def tensors(self) -> dict[str, Tensor]:
        return {name: part.detach() for name, part in self.state_dict(keep_vars=True).items()}


@pytest.fixture
def turns() -> Turns:
    return Turns(CPU)


def test_weights_keep_values_layouts_and_identity(turns: Turns) -> None:
    module = Layers()
    before = {name: (part.clone(), part.stride(), part.dtype) for name, part in module.tensors().items()}
    parameters = list(module.parameters())
    part = turns.add(module)
    for there in (False, True, False):
        if there:
            part.bring()
        assert part.is_there == there
        for name, tensor in module.tensors().items():
            value, stride, dtype = before[name]
            assert torch.equal(tensor, value) and tensor.stride() == stride and tensor.dtype == dtype, name
        assert list(map(id, parameters)) == list(map(id, module.parameters()))
        assert module.again is module.linear.weight
        part.leave()


def test_at_most_one_is_there(turns: Turns) -> None:
    parts: list[Part] = [turns.add(nn.Linear(2, 2)) for _ in range(3)]
    assert not any(part.is_there for part in parts)
    for first in (0, 2, 2, 1):
        parts[first].bring()
        assert [part.is_there for part in parts] == [number == first for number in range(3)]
    with parts[0].there():
        assert [part.is_there for part in parts] == [True, False, False]
    assert not any(part.is_there for part in parts)


def test_nothing_of_it_stays_where_it_worked(turns: Turns) -> None:
    """What waits lies in one stretch of memory, and what was brought is another copy, which goes."""
    module = nn.Linear(64, 64)
    part = turns.add(module)
    waiting = module.weight.data_ptr()
    assert module.weight.untyped_storage().data_ptr() == module.bias.untyped_storage().data_ptr()
    part.bring()
    assert module.weight.data_ptr() != waiting
    part.leave()
    assert module.weight.data_ptr() == waiting
