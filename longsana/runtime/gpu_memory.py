"""The memory that a process has on a GPU, as nvidia-smi counts it, and its limit."""

from __future__ import annotations

import os
from contextlib import suppress

import torch

GIB = 2**30
CONTEXT = int(0.75 * GIB)
"""Bytes that a process has on a GPU beside PyTorch's tensors: CUDA's context, and the code of libraries and kernels."""
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def hold_memory(gib: float, device: torch.device) -> None:
    """Hold this process to so many GiB of a GPU, all in all: more raises `torch.OutOfMemoryError`.

    Memory is handed out in segments that grow, so that what is free is not in pieces, unless the environment says how
    (`PYTORCH_CUDA_ALLOC_CONF`). Before the first tensor is there.
    """
    if not any(os.environ.get(name) for name in ALLOCATOR):
        set_allocator = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
        (set_allocator or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")
    total, index = torch.cuda.get_device_properties(device).total_memory, _index(device)
    torch.cuda.set_per_process_memory_fraction(min(max(gib * GIB - CONTEXT, 0.0) / total, 1.0), index)


def free_memory(device: torch.device) -> int:
    """Bytes that tensors may still take on a GPU: what is free there, and no more than this process is held to."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    with suppress(AttributeError):  # a PyTorch that does not tell its limit
        limit = int(torch.cuda.get_per_process_memory_fraction(_index(device)) * total)
        free = min(free, limit - torch.cuda.memory_reserved(device))
    return max(free, 0)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
