"""Which implementation of an operation runs, and how gradients flow through a fused one."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
log = logging.getLogger(__name__)

VARIABLE = "LONGSANA_OPS"
CAPABILITY = (8, 0)
"""Of the oldest GPUs with bfloat16 and TF32 matrix units."""


def _pick() -> str:
    wanted = os.environ.get(VARIABLE, "reference")
    if wanted not in ("triton", "reference"):
        raise ValueError(f"{VARIABLE}={wanted}: must be triton or reference")
    if wanted == "reference" or not torch.cuda.is_available():
        return "reference"
    found = torch.cuda.get_device_capability()
    if found < CAPABILITY:
        log.warning("%s is of compute capability %d.%d, fused operations need 8.0: plain PyTorch instead",
                    torch.cuda.get_device_name(), *found)  # fmt: skip
        return "reference"
    return "triton"


OWN_GRADIENTS = ("linear_attention",)
"""Fused operations whose gradients are fused too."""
BACKEND = _pick()
"""triton or reference."""


def operation(plain: Callable[P, R], modules: Mapping[str, str]) -> Callable[P, R]:
    """plain, or on a GPU the function of the same name in the package's module that `modules` says."""
    if BACKEND == "reference":
        return plain
    fused: Callable[P, R] = fused_twin(plain.__name__, modules)

    @wraps(plain)
    def either(*inputs: P.args, **settings: P.kwargs) -> R:
        first = inputs[0]
        assert isinstance(first, Tensor)
        if not first.is_cuda or first.dtype == torch.float64 or torch.compiler.is_compiling():
            return plain(*inputs, **settings)
        if plain.__name__ in OWN_GRADIENTS:
            return fused(*inputs, **settings)
        return differentiable(partial(fused, **settings), partial(plain, **settings), *inputs)

    return either


def fused_twin(name: str, modules: Mapping[str, str]) -> Callable[..., Any]:
    """Needs triton."""
    twin: Callable[..., Any] = getattr(importlib.import_module(f"longsana.ops.{modules[name]}"), name)
    return twin


def differentiable(fused: Callable[..., Any], plain: Callable[..., Any], *inputs: Any) -> Any:
    """fused(*inputs). Its gradients are those of `plain`, which is computed when they are asked for."""
    if not (torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in inputs)):
        return fused(*inputs)
    return _Fused.apply(fused, plain, *inputs)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fused: Callable[..., Any], plain: Callable[..., Any], *inputs: Any) -> Any:
        ctx.plain, ctx.others = plain, [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in inputs))
        return fused(*inputs)

    @staticmethod
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
