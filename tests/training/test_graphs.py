"""A replayed pass is the pass itself. Without a GPU, operations are noted and done again on the same memory.

What that cannot show (memory that graphs share, streams, what may not be captured) is for test_gpu.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longsana.models.dit import LongSanaDiT
from longsana.models.embeddings import TextEmbedding
from longsana.training.config import AdamWConfig
from longsana.training.graphs import replay_passes
from longsana.training.learner import Learner

PASTS: list[dict[str, Any]] = [
    {"state_decay": 0.9},
    {"state_decay": "learned"},
    {"state_decay": [0.8, 0.99], "num_cached_blocks": 2, "num_sink_blocks": 1},
    {"state_decay": "learned", "num_sink_blocks": 3},
]


class Graph:
    """In place of torch.cuda.CUDAGraph: the operations, and the tensors that they left their results in."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def pool(self) -> tuple[int, int]:
        return (0, 0)

    def replay(self) -> None:
        with torch.no_grad():
            for operation, inputs, options, results in self.calls:
                again = operation(*inputs, **options)
                if results is not None:
                    for kept, new in zip(tensors(results), tensors(again), strict=True):
                        kept.copy_(new)


class Recorder(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, operation: Any, types: Any, inputs: Any = (), options: Any = None) -> Any:
        results = operation(*inputs, **(options or {}))
        memory = {tensor.untyped_storage()._cdata for tensor in tensors((inputs, options))}
        if operation._schema.is_mutable:
            self.graph.calls.append((operation, inputs, options or {}, None))
        elif not all(tensor.untyped_storage()._cdata in memory for tensor in tensors(results)):  # else a view
            self.graph.calls.append((operation, inputs, options or {}, results))
        return results


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextmanager
def recording(graph: Graph, pool: Any = None, **options: Any) -> Iterator[None]:
    with Recorder(graph):
        yield


class Stream:
    def wait_stream(self, other: Stream) -> None: ...


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs as they are here."""
    for name, substitute in {
        "graph_pool_handle": lambda: (0, 0),
        "CUDAGraph": Graph,
        "graph": recording,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, substitute)


@pytest.fixture
def replayed(graphs: None, random_model: Any, small_config: Any) -> LongSanaDiT:
    return replay_passes(random_model(small_config(), torch.float32), torch.float32)


@pytest.fixture
def plain(random_model: Any, small_config: Any) -> LongSanaDiT:
    model: LongSanaDiT = random_model(small_config(), torch.float32)
    return model


def pass_inputs(model: LongSanaDiT, seed: int = 0, frames: int = 3) -> tuple[Tensor, Tensor, TextEmbedding]:
    config, device = model.config, model.patch_embed.weight.device
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, config.caption_length, config.caption_channels, generator=rng)
    text = TextEmbedding(tokens.to(device), torch.ones(tokens.shape[:2], dtype=torch.bool, device=device))
    x = torch.randn(2, config.in_channels, frames, 4, 4, generator=rng)
    return x.to(device), torch.tensor([300.0, 800.0], device=device), text


def two_chunks(model: LongSanaDiT) -> list[Tensor]:
    """Three updates, each through two chunks of one kind, before either's backward pass; all that comes of it."""
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(3):
        state, velocities = None, []
        for seed in (0, 1):
            x, t, text = pass_inputs(model, seed)
            velocity, _ = model(x, t, text, state=state)
            velocities.append(velocity)
            with torch.no_grad():
                _, state = model(x, torch.zeros_like(t), text, state=state)
        torch.cat(velocities, dim=2).square().mean().backward()
        seen += [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        assert state is not None
        seen += [velocity.detach() for velocity in velocities] + [state.kv, state.k_sum, state.tail]
    return seen


def recorded(model: LongSanaDiT) -> list[int]:
    """How many passes of each kind."""
    return sorted(len(passes) for passes in model.forward.recorded.values())  # type: ignore[attr-defined]


def test_replayed_passes_are_the_passes_themselves(plain, replayed):
    for expected, given in zip(two_chunks(plain), two_chunks(replayed), strict=True):
        assert torch.equal(expected, given)
    assert recorded(replayed) == [1, 2]  # one kind without gradients; two passes at a time of the one with


@pytest.mark.parametrize("settings", PASTS)
def test_replayed_passes_of_every_past(graphs, random_model, small_config, settings):
    """The gradients of learned factors are among what is compared; chunks that join the sinks are passes of a kind."""
    plain, replayed = (random_model(small_config(**settings), torch.float32) for _ in range(2))
    replay_passes(replayed, torch.float32)
    for expected, given in zip(two_chunks(plain), two_chunks(replayed), strict=True):
        assert torch.equal(expected, given)
    with torch.no_grad():
        states: list[Any] = [None, None]
        for seed in range(4):
            inputs = pass_inputs(plain, seed)
            states = [model(*inputs, state=state)[1] for model, state in zip((plain, replayed), states, strict=True)]
            assert states[0][3:] == states[1][3:]
            assert all(torch.equal(a, b) for a, b in zip(states[0][:3], states[1][:3], strict=True))
    sinks = settings.get("num_sink_blocks", 0)
    kinds = [kind for kind in replayed.forward.recorded if not kind[-1]]
    assert len(kinds) == 1 + sinks


@torch.no_grad()
def test_a_later_place_in_the_video_is_no_new_kind(plain, replayed):
    x, t, text = pass_inputs(plain)
    for frames in (0, 3, 300):
        given, expected = (
            model(x, t, text, state=model.empty_state(2, 4, 4, frames=frames)) for model in (replayed, plain)
        )
        assert torch.equal(given[0], expected[0])
        assert given[1].frames == frames + 3
    assert recorded(replayed) == [1]


def test_a_chunk_of_another_length_is_another_recording(plain, replayed):
    """As a short first chunk is, among others: each is the pass itself, whichever came before."""
    for frames in (3, 1, 3, 1):
        gradients = []
        for model in (plain, replayed):
            velocity, _ = model(*pass_inputs(model, frames=frames))
            gradients.append(torch.autograd.grad(velocity.square().mean(), list(model.parameters()), allow_unused=True))
        for expected, given in zip(*gradients, strict=True):
            assert (expected is None) == (given is None) and (expected is None or torch.equal(expected, given))
    assert recorded(replayed) == [1, 1]


def test_the_average_is_sampled(replayed):
    learner = Learner("generator", replayed, AdamWConfig(lr=0.1), ema_weight=0.5)
    x, t, text = pass_inputs(replayed)
    replayed(x, t, text)[0].square().mean().backward()
    learner.update(0)
    with torch.no_grad():
        before, _ = replayed(x, t, text)
        with learner.averaged():
            averaged, _ = replayed(x, t, text)
        after, _ = replayed(x, t, text)
    assert torch.equal(before, after)
    assert not torch.equal(before, averaged)


def test_a_pass_that_nobody_differentiates_is_used_again(replayed):
    for seed in range(4):
        replayed(*pass_inputs(replayed, seed))
    assert recorded(replayed) == [1]


def test_what_would_be_silently_wrong_is_refused(replayed):
    x, t, text = pass_inputs(replayed)
    velocity, _ = replayed(x, t, text)
    velocity.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        velocity.sum().backward()

    velocity, _ = replayed(x, t, text)
    with torch.no_grad():
        for weight in replayed.parameters():
            weight.mul_(2)
    with pytest.raises(RuntimeError, match="weights were changed"):
        velocity.sum().backward()

    for frozen in (False, True):
        replayed.requires_grad_(not frozen)
        with pytest.raises(ValueError, match="an input needs one"):
            replayed(x.clone().requires_grad_(), t, text)
