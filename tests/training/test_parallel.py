"""A network under FSDP is the network: what it computes in, what it keeps, and what it computes twice."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from longsana.chunks import ChunkPlan
from longsana.models.dit import LongSanaDiT
from longsana.models.embeddings import TextEmbedding
from longsana.runtime.distributed import World
from longsana.state import CausalState
from longsana.training.config import AdamWConfig
from longsana.training.learner import Learner
from longsana.training.parallel import Strategy, device_mesh, parallelise
from tests.training.conftest import CPU

pytestmark = pytest.mark.usefixtures("group")
BATCH = 2
WHOLE: dict[str, Any] = {}
LEARNED: dict[str, Any] = {"state_decay": "learned", "num_sink_blocks": 1, "num_cached_blocks": 2}


@pytest.fixture
def sharded(random_model, small_config) -> Callable[..., LongSanaDiT]:
    """`sharded(strategy="full", compute=torch.float32)`: always the same weights."""

    def build(
        strategy: Strategy = "full",
        compute: torch.dtype = torch.float32,
        depth: int = 2,
        past: Mapping[str, Any] = WHOLE,
        **options: Any,
    ) -> LongSanaDiT:
        model = random_model(small_config(depth=depth, **past), torch.float32)
        return parallelise(model, device_mesh(strategy, World(), CPU), compute=compute, strategy=strategy, **options)

    return build


@pytest.fixture
def inputs(random_latents, random_text) -> tuple[Tensor, TextEmbedding]:
    return random_latents(BATCH, 5).float(), random_text(BATCH)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor()  # type: ignore[attr-defined]


def two_chunks(
    model: LongSanaDiT, x: Tensor, text: TextEmbedding, lengths: tuple[int, int] = (3, 2)
) -> tuple[Tensor, list[CausalState]]:
    """As a rollout does: each chunk with a graph, then again, clean and without one, for the state after it."""
    state, velocities, states = None, [], []
    for part in ChunkPlan(lengths).slices():
        velocity, _ = model(x[:, :, part], torch.full((BATCH,), 889.0), text, state=state)
        velocities.append(velocity)
        with torch.no_grad():
            _, state = model(x[:, :, part] - velocity.detach(), torch.zeros(BATCH), text, state=state)
        states.append(state)
    return torch.cat(velocities, dim=2), states


def gradients(model: LongSanaDiT, x: Tensor, text: TextEmbedding) -> dict[str, Tensor]:
    velocity, _ = two_chunks(model, x, text)
    velocity.float().square().mean().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def test_mixed_precision_computes_as_a_bfloat16_network_does(sharded, random_model, small_config, inputs):
    """To the bit, over two chunks: neither timesteps nor the state's sums are rounded on their way in or out."""
    plain = random_model(small_config(), torch.float32).to(torch.bfloat16)
    model = sharded(compute=torch.bfloat16)
    expected, states = two_chunks(plain, *inputs)
    velocity, found = two_chunks(model, *inputs)
    assert velocity.dtype == torch.bfloat16
    assert torch.equal(velocity, expected)
    for state, other in zip(found, states, strict=True):
        assert (state.kv.dtype, state.k_sum.dtype, state.tail.dtype) == (torch.float32, torch.float32, torch.bfloat16)
        assert all(torch.equal(a, b) for a, b in zip(state[:3], other[:3], strict=True))
    # The comparison can fail: 888 is what 889 is in bfloat16, and sums that are rounded differ.
    x, text = inputs
    times = [model(x, torch.full((BATCH,), t), text)[0] for t in (888.0, 889.0)]
    assert not torch.equal(*times)
    assert not torch.equal(found[0].kv, found[0].kv.bfloat16().float())
    rounded = found[0]._replace(kv=found[0].kv.bfloat16().float())
    ends = [model(x[:, :, 3:], torch.full((BATCH,), 889.0), text, state=state)[0] for state in (found[0], rounded)]
    assert not torch.equal(*ends)


def test_mixed_precision_keeps_float32_weights_moments_average_and_gradients(sharded, inputs):
    model = sharded(compute=torch.bfloat16, checkpointing=True)
    # Steps of 1e-6: most weights of bfloat16 would not move at all.
    learner = Learner("generator", model, AdamWConfig(lr=1e-6, beta1=0.9), ema_weight=0.5)
    before = {name: whole(weight.detach()).clone() for name, weight in learner.weights.items()}
    found = gradients(model, *inputs)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    learner.update(0)
    tensors = [tensor for held in learner.tensors().values() for tensor in held.values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    steps = torch.cat([(whole(w.detach()) != before[name]).flatten() for name, w in learner.weights.items()])
    rounded = [whole(w.detach()).bfloat16() != before[name].bfloat16() for name, w in learner.weights.items()]
    assert steps.float().mean() > 0.9
    assert torch.cat([change.flatten() for change in rounded]).float().mean() < 0.1


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("past", [WHOLE, {"state_decay": "learned"}], ids=str)
def test_what_is_computed_twice_gives_the_same_gradients(sharded, inputs, compute, past):
    """To the bit. The state has moved on twice by the time of the backward pass (docs/published.md)."""
    once, twice = (
        gradients(sharded(compute=compute, past=past, checkpointing=flag), *inputs) for flag in (False, True)
    )
    for name, gradient in once.items():
        assert torch.equal(whole(gradient), whole(twice[name])), name
        assert whole(gradient).any(), name


def test_recomputation_reads_the_state_that_it_was_given(sharded, inputs):
    """The test above can fail: a state that is overwritten before the backward pass, as published, is seen there."""
    x, text = inputs
    found = []
    for overwrite in (False, True):
        model = sharded(checkpointing=True)
        _, (state, _) = two_chunks(model, x, text)
        velocity, _ = model(x[:, :, 3:], torch.full((BATCH,), 889.0), text, state=state)
        if overwrite:
            state.kv.zero_()
        velocity.square().mean().backward()
        found.append(whole(model.blocks[0].attn.qkv.weight.grad))
    assert not torch.equal(*found)


def test_checkpointing_keeps_less_for_the_backward_pass(sharded, inputs):
    def kept(checkpointing: bool) -> int:
        """Bytes that a forward pass leaves allocated: what has been allocated less what has been freed."""
        model = sharded(checkpointing=checkpointing)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            velocity, _ = model(inputs[0], torch.full((BATCH,), 889.0), inputs[1])
        assert velocity.requires_grad
        return sum(event.self_cpu_memory_usage for event in profile.events())

    everything, inputs_alone = kept(False), kept(True)
    assert 0 < inputs_alone < everything / 2


@pytest.mark.parametrize("strategy", ["full", "hybrid_full", "hybrid_zero2", "no_shard"])
@pytest.mark.parametrize("past", [WHOLE, {"state_decay": "learned"}], ids=str)
def test_every_strategy_takes_the_step_of_a_network_that_is_not_sharded(
    sharded, random_model, small_config, inputs, strategy, past
):
    settings = AdamWConfig(lr=1e-3, beta1=0.9)
    plain = Learner("generator", random_model(small_config(**past), torch.float32), settings, ema_weight=0.5)
    learner = Learner("generator", sharded(strategy, past=past), settings, ema_weight=0.5)
    start = copy.deepcopy(plain.weights)
    for step in range(2):
        for each in (plain, learner):
            gradients(each.model, *inputs)
        norms = [each.update(step) for each in (plain, learner)]
        torch.testing.assert_close(*norms)
    for group, held in plain.tensors().items():
        for name, tensor in held.items():
            other = learner.tensors()[group][name]
            value = whole(other) if isinstance(other, torch.distributed.tensor.DTensor) else other
            torch.testing.assert_close(value, tensor, rtol=1e-5, atol=1e-7, msg=f"{group}/{name}")
    assert all(not torch.equal(weight, start[name]) for name, weight in plain.weights.items())


@pytest.mark.parametrize("strategy", ["full", "hybrid_full", "hybrid_zero2", "no_shard"])
def test_the_average_computes_whatever_was_computed_before(sharded, inputs, strategy):
    learner = Learner("generator", sharded(strategy), AdamWConfig(), ema_weight=0.5)
    for value in learner.average.values():
        value.mul_(0.5)
    x, text, t = *inputs, torch.full((BATCH,), 889.0)
    with torch.no_grad():
        own, _ = learner.model(x, t, text)
        with learner.averaged():
            averaged, _ = learner.model(x, t, text)
        again, _ = learner.model(x, t, text)
    assert torch.equal(again, own)
    assert (averaged - own).abs().max() > 0.1


class Compiled(NamedTuple):
    losses: list[float]
    graphs: int
    breaks: int


def train_compiled(
    model: LongSanaDiT, inputs: tuple[Tensor, TextEmbedding], lengths: tuple[int, int] = (3, 2)
) -> Compiled:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    learner, losses = Learner("generator", model, AdamWConfig(lr=1e-3, beta1=0.9)), []
    for step in range(2):
        velocity, _ = two_chunks(model, *inputs, lengths)
        loss = velocity.square().mean()
        loss.backward()
        learner.update(step)
        losses.append(loss.item())
    return Compiled(losses, counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_train_alike(sharded, inputs, checkpointing):
    """By the compiler that training uses, which takes a minute or two: chunks of one length and one block will do."""
    build = partial(sharded, depth=1, checkpointing=checkpointing)
    plain = train_compiled(build(), inputs, (2, 2))
    assert plain.graphs == 0
    compiled = train_compiled(build(compile_blocks=True), inputs, (2, 2))
    assert compiled.graphs > 0
    assert compiled.breaks == 0
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-4)
    assert plain.losses[1] != pytest.approx(plain.losses[0], rel=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("checkpointing", "past"), [(False, WHOLE), (True, WHOLE), (True, LEARNED)], ids=str)
def test_more_blocks_are_no_more_graphs(sharded, inputs, checkpointing, past, monkeypatch):
    """Many blocks, one after another through the same compiled code: no limit of recompilations is met.

    Chunks of two lengths: the compiler's graph for lengths that vary appears between a forward pass and its backward
    pass, which recomputes.
    """
    compile_block = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_block(function, backend="aot_eager"))
    options = {"checkpointing": checkpointing, "past": past, "compile_blocks": True}
    few, many = (train_compiled(sharded(depth=depth, **options), inputs) for depth in (2, 12))
    assert few.graphs == many.graphs > 0
    plain = train_compiled(sharded(depth=12, checkpointing=checkpointing, past=past), inputs)
    assert many.losses == pytest.approx(plain.losses, rel=1e-4)
    assert many.breaks == 0
