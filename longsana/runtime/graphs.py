"""The one recorder of CUDA graphs: of inference's passes, of training's, and of a small VAE's steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Recording:
    """A function of tensors on a GPU, recorded as a CUDA graph and then replayed with one launch.

    function: returns tensors; it may read others where they lie. inputs: of the shapes and dtypes of all later ones.
    warm_up: is called before, as often as `warm_ups` says, with the same inputs on a side stream: what libraries and
        kernels set up on first use must not be part of a graph.
    pool: of a graph that this one shares its memory with.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[Tensor]],
        inputs: Sequence[Tensor],
        *,
        warm_up: Callable[..., object] | None = None,
        warm_ups: int = 1,
        pool: Any = None,
    ) -> None:
        self._inputs = [tensor.detach().clone() for tensor in inputs]
        if warm_up is not None:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(warm_ups):
                    warm_up(*self._inputs)
            torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # Whatever other threads do meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            outputs = function(*self._inputs)
        self._outputs = [output.detach() for output in outputs]

    @property
    def pool(self) -> Any:
        """The graph's memory."""
        return self._graph.pool()

    def replay(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs for inputs of the recorded shapes, the caller's own."""
        torch._foreach_copy_(self._inputs, list(inputs))
        self._graph.replay()
        # In a few launches, where a clone of each would take one an output.
        return list(torch._foreach_mul(self._outputs, 1.0))
