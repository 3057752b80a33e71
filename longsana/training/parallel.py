"""Sharding, mixed precision, activation checkpointing and compilation, on one process or on hundreds (torch FSDP2)."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from longsana.models.dit import LongSanaDiT
from longsana.ops.dispatch import inductor_options, keep_in_compiled_code
from longsana.runtime.distributed import World

Strategy = Literal["full", "hybrid_full", "hybrid_zero2", "no_shard"]
# The longest that others wait for one: the main process reading a checkpoint's every byte, or encoding its captions.
PATIENCE = timedelta(hours=2)


def connect(world: World, device: torch.device) -> None:
    """Meet the other processes; alone, a group of one, so that the same code runs."""
    world.connect("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE, alone=True)


def device_mesh(strategy: Strategy, world: World, device: torch.device) -> DeviceMesh:
    """The layout of weights on the processes.

    full: sharded over all of them. hybrid: sharded within a host and copied across hosts. no_shard: copied.
    """
    if strategy == "full":
        return init_device_mesh(device.type, (world.size,), mesh_dim_names=("shard",))
    shard = world.local_size if strategy.startswith("hybrid") else 1
    return init_device_mesh(device.type, (world.size // shard, shard), mesh_dim_names=("replicate", "shard"))


def parallelise(
    model: LongSanaDiT,
    mesh: DeviceMesh,
    *,
    compute: torch.dtype,
    strategy: Strategy = "full",
    checkpointing: bool = False,
    compile_blocks: bool = False,
) -> LongSanaDiT:
    """Shard a network in place, block by block. Its weights keep their dtype; it computes in `compute`.

    Where some weights learn and others are frozen, as under a LoRA, the frozen ones are left alone, whole on each
    process and in the dtype that they have: networks may share them.
    checkpointing: blocks keep their inputs alone and compute again in the backward pass. The state is one of those
        inputs, a value that nobody changes: recomputation sees what the forward pass saw.
    """
    wrap_blocks(model, checkpointing=checkpointing, compile_blocks=compile_blocks)
    # Inputs keep their dtype: bfloat16 would round the timestep 889 to 888, and the state's float32 sums.
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    reshard = strategy != "hybrid_zero2"
    frozen = {weight for weight in model.parameters() if not weight.requires_grad}
    whole = frozen if any(weight.requires_grad for weight in model.parameters()) else set()
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard, ignored_params=whole)
    return model


def wrap_blocks(model: LongSanaDiT, *, checkpointing: bool, compile_blocks: bool) -> None:
    if compile_blocks and next(model.parameters()).is_cuda:
        keep_in_compiled_code()
    for block in model.blocks:
        # The method, not a module around the block: names stay as they are, and FSDP's hooks outside.
        if checkpointing:
            block.forward = _checkpointed(block.forward)
        if compile_blocks:
            # Checkpointing inside: around a compiled block, recomputation may meet another graph than the forward pass
            # did, one for shapes that have varied since, and fails.
            block.forward = torch.compile(block.forward, options=inductor_options())


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    # A function of its own: torch.compile passes over a bare partial(checkpoint, ...) and compiles nothing.
    def twice(*inputs: Any) -> Any:
        # Nothing in a block is random.
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)

    return twice
