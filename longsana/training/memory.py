"""Memory of a GPU without one: what operations on tensors without memory ("meta") would allocate is added up."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make inside the block, for as long as they live.

    On the meta device these are a GPU's, as far as an operation allocates what it returns and nothing else. Tensors
    there have no values: one that is asked for is 1, as if all numbers were finite.

    count: tensors that are there from the start. ignore: tensors that are never counted.
    now, peak: bytes. gradients: of these, what `hold` was told of; gradients_at_peak.
    """

    def __init__(self, *, count: Iterable[Tensor] = (), ignore: Iterable[Tensor] = (), device: str = "meta") -> None:
        super().__init__()
        self.now = self.peak = self.gradients = self.gradients_at_peak = 0
        self._device = device
        self._known = {tensor.untyped_storage()._cdata for tensor in ignore}
        for tensor in count:
            self._meet(tensor)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._meet(tensor)
        return result

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak, self.gradients_at_peak = self.now, self.gradients

    def hold(self, size: int) -> None:
        """Count a gradient that stays."""
        self.gradients += size
        self._add(size)

    def _meet(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if tensor.device.type == self._device and key not in self._known:
            self._known.add(key)
            self._add(size)
            weakref.finalize(storage, self._lose, key, size)

    def _add(self, size: int) -> None:
        self.now += size
        if self.now > self.peak:
            self.restart()

    def _lose(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def as_on_gpu(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let what is one kernel on a GPU and several operations elsewhere allocate as that kernel does."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with _Kernels():
            return forward(*args, **kwargs)

    return run


class _Kernels(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        if func is F.rms_norm:
            return _rms_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
    bias = attn_mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])
    learns = torch.is_grad_enabled()
    out: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, learns, 0.0, False)[0]
    return out


def _rms_norm(x: Tensor, normalized_shape: Any, weight: Tensor, eps: float) -> Tensor:
    out: Tensor = _RMSNorm.apply(x, weight)
    return out


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and a float32 number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)
