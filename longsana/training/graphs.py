"""CUDA graphs for training on one GPU: a small network's kernels take less time than it takes to launch them.

Each kind of pass (shapes, chunks, sinks so far, with or without gradients) is recorded and then replayed with one
launch: the same kernels in the same order. Passes of a kind that wait together for their backward passes are as many
recordings.
"""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longsana.chunks import ChunkPlan
from longsana.models.dit import LongSanaDiT
from longsana.models.embeddings import Text, TextEmbedding
from longsana.state import CausalState
from longsana.training.parallel import wrap_blocks

WARM_UP = 3
"""Passes before recording: what libraries set up on first use must not be part of a graph."""


def replay_passes(
    model: LongSanaDiT, compute: torch.dtype, *, checkpointing: bool = False, compile_blocks: bool = False
) -> LongSanaDiT:
    """Let a network on a GPU replay its passes, in place; the slow twin is the network itself.

    What is recorded is a copy that computes in `compute`; weights and their gradients stay the model's own, in their
    own dtype. Only weights get gradients, and only from the velocity: states carry none, and inputs that need one are
    refused (ValueError). checkpointing, compile_blocks: see `parallelise`.
    """
    working = copy.deepcopy(model).to(compute)
    wrap_blocks(working, checkpointing=checkpointing, compile_blocks=compile_blocks)
    # The method, not a module around the network: names stay as they are.
    model.forward = _Passes(model, working)  # type: ignore[method-assign]
    return model


class _Inputs(NamedTuple):
    """What a pass reads. frames: () int64, of the state; as a number, a graph would keep that of its first call."""

    x: Tensor
    t: Tensor
    tokens: Tensor
    mask: Tensor
    kv: Tensor
    k_sum: Tensor
    tail: Tensor
    frames: Tensor


class _Passes:
    """In place of a network's `forward`."""

    def __init__(self, model: LongSanaDiT, working: LongSanaDiT) -> None:
        self.working = working
        self.weights: list[Tensor] = [*model.parameters()]
        self.copies: list[Tensor] = [*working.parameters()]
        self.recorded: dict[Any, list[_Pass]] = defaultdict(list)
        # Passes without gradients are over when they return: their memory is shared.
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        text: Text,
        *,
        plan: ChunkPlan | None = None,
        state: CausalState | None = None,
    ) -> tuple[Tensor, CausalState]:
        assert isinstance(text, TextEmbedding), "what was read with other weights"
        plan = plan or ChunkPlan((x.shape[2],))
        state = state or self.working.empty_state(x.shape[0], x.shape[3], x.shape[4])
        frames = torch.full((), state.frames, dtype=torch.int64, device=x.device)
        inputs = _Inputs(x, t, text.tokens, text.mask, state.kv, state.k_sum, state.tail, frames)
        graph = torch.is_grad_enabled()
        learns = graph and any(weight.requires_grad for weight in self.weights)
        if graph and any(tensor.requires_grad for tensor in inputs):
            raise ValueError("a replayed pass gives gradients to weights alone, and an input needs one")
        one = self._pass(inputs, plan, state.sinks, learns)
        velocity, kv, k_sum, tail = _Replay.apply(one, inputs, *self.weights) if learns else one.replay(inputs)
        sinks = self.working.past.sunk(state.sinks, len(plan))
        return velocity, CausalState(kv, k_sum, tail, state.frames + plan.frames, sinks)

    def _pass(self, inputs: _Inputs, plan: ChunkPlan, sinks: int, learns: bool) -> _Pass:
        kind = (tuple((tensor.shape, tensor.dtype) for tensor in inputs), plan.lengths, sinks, learns)
        for one in self.recorded[kind]:
            if one.user() is None:
                return one
        # The activations of all others are still wanted by someone's backward pass.
        self.recorded[kind].append(_Pass(self, inputs, plan, sinks, learns))
        return self.recorded[kind][-1]


class _Pass:
    """A recorded forward pass, and with `learns` the backward pass after it.

    sinks: chunks that have joined the state's before.
    user: what holds the autograd graph of its last forward pass, until that is gone or its backward pass is over.
    """

    def __init__(self, passes: _Passes, inputs: _Inputs, plan: ChunkPlan, sinks: int, learns: bool) -> None:
        self.inputs = _Inputs(*(tensor.detach().clone() for tensor in inputs))
        self.user: Callable[[], Any] = _nobody
        self._passes, self._plan, self._sinks = passes, plan, sinks
        self._forward = torch.cuda.CUDAGraph()
        with torch.set_grad_enabled(learns):
            self._warm_up(learns)
            with torch.cuda.graph(self._forward, pool=None if learns else passes.pool):
                outputs = self._run()
        if learns:
            self._backward = torch.cuda.CUDAGraph()
            self._gradient = torch.empty_like(outputs[0])
            with torch.cuda.graph(self._backward, pool=self._forward.pool()):
                self._gradients = self._differentiate(outputs[0], self._gradient)
        self._outputs = [output.detach() for output in outputs]

    def replay(self, inputs: _Inputs) -> list[Tensor]:
        """Velocity and the parts of the next state, the caller's own."""
        torch._foreach_copy_(list(self.inputs), list(inputs))
        self._forward.replay()
        return [output.clone() for output in self._outputs]

    def replay_backward(self, gradient: Tensor) -> list[Tensor | None]:
        """The gradient of each weight, the caller's own; None of those that the pass does not use."""
        self._gradient.copy_(gradient)
        self._backward.replay()
        # In a few launches, where a clone of each would take one a weight.
        own = iter(torch._foreach_mul([value for value in self._gradients if value is not None], 1.0))
        return [None if value is None else next(own) for value in self._gradients]

    def _run(self) -> list[Tensor]:
        passes, inputs = self._passes, self.inputs
        with torch.no_grad():
            torch._foreach_copy_(passes.copies, passes.weights)
        state = CausalState(inputs.kv, inputs.k_sum, inputs.tail, cast(int, inputs.frames), self._sinks)
        text = TextEmbedding(inputs.tokens, inputs.mask)
        velocity, after = passes.working(inputs.x, inputs.t, text, plan=self._plan, state=state)
        return [velocity, after.kv, after.k_sum, after.tail]

    def _differentiate(self, velocity: Tensor, gradient: Tensor) -> list[Tensor | None]:
        given = torch.autograd.grad(velocity, self._passes.copies, gradient, allow_unused=True)
        return [
            None if value is None else value.to(weight.dtype)
            for value, weight in zip(given, self._passes.weights, strict=True)
        ]

    def _warm_up(self, learns: bool) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                velocity = self._run()[0]
                if learns:
                    self._differentiate(velocity, torch.zeros_like(velocity))
        torch.cuda.current_stream().wait_stream(stream)


def _nobody() -> None:
    return None


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, one: _Pass, inputs: _Inputs, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.one, one.user = one, weakref.ref(ctx)
        ctx.weights, ctx.versions = weights, [weight._version for weight in weights]
        velocity, *state = one.replay(inputs)
        ctx.mark_non_differentiable(*state)
        ctx.set_materialize_grads(False)
        return velocity, *state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *others: Any) -> tuple[Any, ...]:
        one: _Pass = ctx.one
        if one.user() is not ctx:
            raise RuntimeError("a replayed pass is differentiated a second time; its activations are gone")
        if ctx.versions != [weight._version for weight in ctx.weights]:
            raise RuntimeError("weights were changed between a replayed pass and its backward pass")
        one.user = _nobody
        return (None, None, *one.replay_backward(gradient))
