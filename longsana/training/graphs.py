"""CUDA graphs for training on one GPU: a small network's kernels take less time than it takes to launch them.

Each kind of pass (shapes, chunks, sinks so far, with or without gradients) is recorded and then replayed with one
launch: the same kernels in the same order. Passes of a kind that wait together for their backward passes are as many
recordings.
"""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longsana.chunks import ChunkPlan
from longsana.models.dit import LongSanaDiT
from longsana.models.embeddings import Text, TextEmbedding
from longsana.runtime.graphs import Recording
from longsana.sampling.graphs import state_of, tensors_of
from longsana.state import CausalState
from longsana.training.parallel import wrap_blocks

WARM_UP = 3
"""Passes before one is recorded."""


def replay_passes(
    model: LongSanaDiT, compute: torch.dtype, *, checkpointing: bool = False, compile_blocks: bool = False
) -> LongSanaDiT:
    """Let a network on a GPU replay its passes, in place; the slow twin is the network itself.

    What is recorded is a copy that computes in `compute`; weights and their gradients stay the model's own, in their
    own dtype, and frozen weights that have `compute` already are not copied. Only weights get gradients, and only from
    the velocity: states carry none, and inputs that need one are refused (ValueError). checkpointing, compile_blocks:
    see `parallelise`.
    """
    frozen = [weight for weight in model.parameters() if not weight.requires_grad]
    shared = {id(weight): weight for weight in frozen if weight.dtype == compute}
    working = copy.deepcopy(model, shared).to(compute)
    wrap_blocks(working, checkpointing=checkpointing, compile_blocks=compile_blocks)
    # The method, not a module around the network: names stay as they are.
    model.forward = _Passes(model, working)  # type: ignore[method-assign, assignment]
    return model


class _Passes:
    """Run in place of a network's `forward`."""

    def __init__(self, model: LongSanaDiT, working: LongSanaDiT) -> None:
        self.working = working
        pairs = [pair for pair in zip(model.parameters(), working.parameters(), strict=True) if pair[0] is not pair[1]]
        self.weights: list[Tensor] = [weight for weight, _ in pairs]
        self.copies: list[Tensor] = [own for _, own in pairs]
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
        assert isinstance(text, TextEmbedding), "captions cached with other weights"
        plan = plan or ChunkPlan((x.shape[2],))
        state = state or self.working.empty_state(x.shape[0], x.shape[3], x.shape[4])
        inputs = [x, t, *text, *tensors_of(state)]
        graph = torch.is_grad_enabled()
        learns = graph and any(weight.requires_grad for weight in self.weights)
        if graph and any(tensor.requires_grad for tensor in inputs):
            raise ValueError("a replayed pass gives gradients to weights alone, and an input needs one")
        one = self._pass(inputs, plan, state.sinks, learns)
        velocity, kv, k_sum, tail = _Replay.apply(one, inputs, *self.weights) if learns else one.replay(inputs)
        sinks = self.working.past.sunk(state.sinks, len(plan))
        return velocity, CausalState(kv, k_sum, tail, state.frames + plan.frames, sinks)

    def _pass(self, inputs: Sequence[Tensor], plan: ChunkPlan, sinks: int, learns: bool) -> _Pass:
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

    def __init__(self, passes: _Passes, inputs: Sequence[Tensor], plan: ChunkPlan, sinks: int, learns: bool) -> None:
        self.user: Callable[[], Any] = _nobody
        velocity: Tensor
        used: list[bool] = []

        def forward(x: Tensor, t: Tensor, tokens: Tensor, mask: Tensor, *past: Tensor) -> list[Tensor]:
            nonlocal velocity
            if passes.copies:
                with torch.no_grad():
                    torch._foreach_copy_(passes.copies, passes.weights)
            text = TextEmbedding(tokens, mask)
            velocity, after = passes.working(x, t, text, plan=plan, state=state_of(past, sinks))
            return [velocity, *after[:3]]

        def backward(gradient: Tensor) -> list[Tensor]:
            learning = [own for own in passes.copies if own.requires_grad]
            values = iter(torch.autograd.grad(velocity, learning, gradient, allow_unused=True))
            given = [next(values) if own.requires_grad else None for own in passes.copies]
            used[:] = [value is not None for value in given]
            pairs = zip(given, passes.weights, strict=True)
            gradients = [torch.empty_like(weight) for value, weight in pairs if value is not None]
            # In a few launches, where a conversion of each would take one a weight.
            torch._foreach_copy_(gradients, [value for value in given if value is not None])
            return gradients

        def warm_up(*tensors: Tensor) -> None:
            nonlocal velocity
            forward(*tensors)
            if learns:
                backward(torch.zeros_like(velocity))
            del velocity  # now, and not while the next is recorded

        with torch.set_grad_enabled(learns):
            pool = None if learns else passes.pool
            self._forward = Recording(forward, inputs, warm_up=warm_up, warm_ups=WARM_UP, pool=pool)
        if learns:
            self._backward = Recording(backward, [velocity], pool=self._forward.pool)
        self._used = used

    def replay(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Velocity and the parts of the next state, the caller's own."""
        return self._forward.replay(inputs)

    def replay_backward(self, gradient: Tensor) -> list[Tensor | None]:
        """The gradient of each weight, the caller's own; None of those that the pass does not use."""
        own = iter(self._backward.replay([gradient]))
        return [next(own) if used else None for used in self._used]


def _nobody() -> None:
    return None


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, one: _Pass, inputs: Sequence[Tensor], *weights: Tensor) -> tuple[Tensor, ...]:
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
