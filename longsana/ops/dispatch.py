"""The choice of the implementation of each operation."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Mapping
from functools import cache, wraps
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from longsana.runtime.errors import InputError
from longsana.runtime.gpu import shortcoming

P = ParamSpec("P")
R = TypeVar("R")
log = logging.getLogger(__name__)

VARIABLE = "LONGSANA_OPS"
MEMORY_VARIABLE = "LONGSANA_SHARED_MEMORY"
SHARED_MEMORY = (227, 163, 99)
"""KB of shared memory for a program that the kernels have tiles for: on H100, H200 and B200; on A100; on the smaller
GPUs of these generations (compute capability 8.6, 8.9, 12.0), and so on all from 8.0 on."""
WITHOUT_GRADIENTS = (
    *("add_norm_modulate_rows", "gated_residual_rows", "neighbour_rows", "norm_modulate_rows", "quantise_rows"),
    *("add_shortcut", "caption_attention", "copy_into", "norm_silu_into", "relu_into"),
)
"""Operations that are fused only where nothing is differentiated."""


COMPILED: dict[str, Callable[..., Any]] = {}
"""Fused operations that compiled code calls, by name; what is not here the compiler fuses on its own."""


def keep_in_compiled_code() -> None:
    """Have code that is compiled from now on call the fused operations that the compiler does worse.

    A depthwise convolution of its gate is cuDNN's, with copies around it.
    """
    if backend() == "triton":
        from longsana.ops.gated_conv import gated_conv_as_it_is

        COMPILED["gated_conv"] = gated_conv_as_it_is


@cache
def inductor_options() -> dict[str, str | int | bool | Callable[..., Any]]:
    """Options of torch.compile for this network: what is wrong in torch 2.11 is off."""
    from torch._inductor import config

    # Of the attention denominators' gradient, (B, N, heads), one kernel writes contiguous memory, and the next reads
    # it as if each sample had been padded to a multiple of 32 numbers.
    options: dict[str, str | int | bool | Callable[..., Any]] = {"comprehensive_padding": False}
    # A norm and sums over tokens in one kernel: some gradients of shift, scale and gate then come from memory that
    # nobody wrote. Older versions cannot.
    if hasattr(config.triton, "mix_order_reduction"):
        options["triton.mix_order_reduction"] = False
    return options


@cache
def backend() -> Literal["triton", "reference"]:
    """Fused operations where this machine can run them, unless LONGSANA_OPS asks for the plain ones.

    Settled at the first operation on a GPU.

    Raises:
        InputError: it asks for something else, or LONGSANA_SHARED_MEMORY does.
    """
    wanted = os.environ.get(VARIABLE, "triton")
    if wanted not in ("triton", "reference"):
        raise InputError(f"{VARIABLE}={wanted}: must be triton or reference")
    if wanted == "reference":
        return "reference"
    if missing := obstacle():
        log.warning("plain PyTorch operations: %s", missing)
        return "reference"
    shared_memory()  # what it is asked for is wrong now, and not when there is a network
    return "triton"


def obstacle() -> str | None:
    """Say why the fused operations do not run here, if they do not."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "the fused ones need an NVIDIA GPU"
    if short := shortcoming():
        return f"the fused ones need {short}"
    own, least = _own_shared_memory(), SHARED_MEMORY[-1]
    return f"the fused ones need {least} KB of shared memory, and a program has {own} here" if own < least else None


@cache
def shared_memory() -> int:
    """KB of shared memory that tiles are chosen for, one of SHARED_MEMORY: the most that this GPU has.

    LONGSANA_SHARED_MEMORY lowers it. Where kernels run without a GPU, in Triton's interpreter, any may be asked for.

    Raises:
        InputError: there are no tiles for what it asks for, or this GPU has less.
    """
    own = _own_shared_memory() if torch.cuda.is_available() else SHARED_MEMORY[0]
    wanted = os.environ.get(MEMORY_VARIABLE)
    if wanted is None:
        return next(size for size in SHARED_MEMORY if size <= own)
    if wanted not in map(str, SHARED_MEMORY):
        raise InputError(f"{MEMORY_VARIABLE}={wanted}: must be one of {', '.join(map(str, SHARED_MEMORY))} (KB)")
    if int(wanted) > own:
        raise InputError(f"{MEMORY_VARIABLE}={wanted}: a program has {own} KB on this GPU")
    return int(wanted)


def _own_shared_memory() -> int:
    bytes_: int = getattr(torch.cuda.get_device_properties(), "shared_memory_per_block_optin")  # noqa: B009 (no stub)
    return bytes_ >> 10


def operation(plain: Callable[P, R], modules: Mapping[str, str]) -> Callable[P, R]:
    """plain; or, on a GPU, the function of the same name in the package's module that `modules` says."""
    name = plain.__name__

    @wraps(plain)
    def either(*inputs: P.args, **settings: P.kwargs) -> R:
        first = inputs[0]
        assert isinstance(first, Tensor)
        if not first.is_cuda or first.dtype == torch.float64:
            return plain(*inputs, **settings)
        if torch.compiler.is_compiling():
            compiled: Callable[P, R] = COMPILED.get(name, plain)
            return compiled(*inputs, **settings)
        if backend() == "reference" or (name in WITHOUT_GRADIENTS and _wants_gradients(inputs)):
            return plain(*inputs, **settings)
        fused: Callable[P, R] = fused_twin(name, modules)
        return fused(*inputs, **settings)

    return either


def fused_twin(name: str, modules: Mapping[str, str]) -> Callable[..., Any]:
    twin: Callable[..., Any] = getattr(importlib.import_module(f"longsana.ops.{modules[name]}"), name)
    return twin


def _wants_gradients(inputs: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in inputs)


def shares(count: int, others: int, *, programs: int, step: int = 1) -> tuple[int, int]:
    """Divide `count` things, with `others` beside each, among programs: how many there are, and how many each takes.

    About `programs` in all; shares are multiples of step.
    """
    parts = max(min(programs // others, -(-count // step)), 1)
    share = -(-count // (parts * step)) * step
    return -(-count // share), share
