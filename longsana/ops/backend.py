"""Which implementation of an operation runs, and how gradients flow through a fused one."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Mapping
from functools import cache, partial, wraps
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

P = ParamSpec("P")
R = TypeVar("R")
log = logging.getLogger(__name__)

VARIABLE = "LONGSANA_OPS"
CAPABILITY = (9, 0)
"""Of the oldest GPUs whose shared memory holds the kernels' tiles."""
OWN_GRADIENTS = (
    "add_norm_modulate", "gated_conv", "gated_residual", "linear_attention", "norm_modulate", "qk_features",
)  # fmt: skip
"""Fused operations whose gradients are fused too."""
IN_PLACE = ("norm_silu_into",)
"""Operations that write into an argument, and are fused only where nothing is differentiated."""
# Padded strides go wrong in torch 2.11: of the attention denominators' gradient, (B, N, heads), one kernel writes
# contiguous memory, and the next reads it as if each sample had been padded to a multiple of 32 numbers.
INDUCTOR: dict[str, str | int | bool | Callable[..., Any]] = {"comprehensive_padding": False}
"""Options of torch.compile for this network."""


@cache
def backend() -> Literal["triton", "reference"]:
    """Fused operations where this machine can run them, unless LONGSANA_OPS asks for the plain ones.

    Settled at the first operation on a GPU.

    Raises:
        ValueError: it asks for something else.
    """
    wanted = os.environ.get(VARIABLE, "triton")
    if wanted not in ("triton", "reference"):
        raise ValueError(f"{VARIABLE}={wanted}: must be triton or reference")
    if wanted == "reference":
        return "reference"
    if not can_fuse():
        log.warning("plain PyTorch operations: the fused ones need an NVIDIA GPU of compute capability 9.0")
        return "reference"
    return "triton"


def can_fuse() -> bool:
    """Whether the fused operations run here."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= CAPABILITY


def operation(plain: Callable[P, R], modules: Mapping[str, str]) -> Callable[P, R]:
    """plain; or, on a GPU, the function of the same name in the package's module that `modules` says."""
    name = plain.__name__

    @wraps(plain)
    def either(*inputs: P.args, **settings: P.kwargs) -> R:
        first = inputs[0]
        assert isinstance(first, Tensor)
        if not first.is_cuda or first.dtype == torch.float64 or torch.compiler.is_compiling():
            return plain(*inputs, **settings)
        if backend() == "reference" or (name in IN_PLACE and _wants_gradients(inputs)):
            return plain(*inputs, **settings)
        fused: Callable[P, R] = fused_twin(name, modules)
        if name in OWN_GRADIENTS:
            return fused(*inputs, **settings)
        return differentiable(partial(fused, **settings), partial(plain, **settings), *inputs)

    return either


def fused_twin(name: str, modules: Mapping[str, str]) -> Callable[..., Any]:
    twin: Callable[..., Any] = getattr(importlib.import_module(f"longsana.ops.{modules[name]}"), name)
    return twin


def differentiable(fused: Callable[..., Any], plain: Callable[..., Any], *inputs: Any) -> Any:
    """fused(*inputs). Its gradients are those of `plain`, which is computed when they are asked for."""
    return _Fused.apply(fused, plain, *inputs) if _wants_gradients(inputs) else fused(*inputs)


def _wants_gradients(inputs: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in inputs)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fused: Callable[..., Any], plain: Callable[..., Any], *inputs: Any) -> Any:
        ctx.plain, ctx.others = plain, [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in inputs))
        return fused(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        tensors = [
            None if value is None else value.detach().requires_grad_(wanted)
            for value, wanted in zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)
        ]
        inputs = [other if tensor is None else tensor for tensor, other in zip(tensors, ctx.others, strict=True)]
        with torch.enable_grad():
            outputs = ctx.plain(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
        used = [number for number, output in enumerate(outputs) if output.requires_grad]
        found = iter(
            torch.autograd.grad([outputs[number] for number in used], wanted, [gradients[number] for number in used])
        )
        return None, None, *(next(found) if tensor is not None and tensor.requires_grad else None for tensor in tensors)
