"""Tensors that lie on all processes, to safetensors shards and back; each process writes and reads its own parts.

The number of processes may differ between the two sides. The files are those of torch.distributed.checkpoint's
hf_storage, which itself serialises a shard a second time in memory, and writes its header in an order that varies.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from longsana.runtime.distributed import World
from longsana.runtime.errors import InputError
from longsana.runtime.files import naming
from longsana.weights.checkpoint_folder import OFFSETS, SEPARATOR, Stored
from longsana.weights.fit import kind, misfit

SHARD_BYTES = 1 << 30  # of a file, unless one tensor is larger: the most that writing holds on the host beside a GPU


class Part(NamedTuple):
    """The box of a tensor that this process holds, and where in the tensor it begins."""

    tensor: Tensor
    offsets: tuple[int, ...]

    def on_host(self) -> Part:
        """A copy, also of what is on the host already."""
        return Part(host_copy(self.tensor), self.offsets)


def host_copy(tensor: Tensor) -> Tensor:
    """A contiguous copy of a tensor of any shape and dtype, on the host, in memory of its own."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def flatten(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Name tensors `group/name`, as a checkpoint does; shapes, dtypes and memory stay."""
    assert not [group for group in tensors if SEPARATOR in group], list(tensors)
    return {
        f"{group}{SEPARATOR}{name}": tensor.detach()
        for group, named in tensors.items()
        for name, tensor in named.items()
    }


def own_parts(flat: Mapping[str, Tensor], world: World) -> dict[str, Part]:
    """Choose what this process writes: of the processes that hold the same part one does, and they share the bytes.

    flat: DTensors of any shape, or plain tensors that all processes have.
    """
    parts = {}
    written: dict[int, list[int]] = {}  # bytes by copy, for each number of copies
    for name, tensor in flat.items():
        part = _local(tensor)
        copy, copies = _copy(tensor, world)
        shares = written.setdefault(copies, [0] * copies)
        turn = shares.index(min(shares))
        shares[turn] += part.tensor.nbytes
        if turn == copy and (part.tensor.numel() or not tensor.numel()):
            parts[name] = part
    return parts


def write_parts(parts: Mapping[str, Part], folder: Path, rank: int, *, copied: bool) -> list[str]:
    """Write the parts of process `rank`; gives the files' names, of which none is synced yet.

    copied: the parts are copies on the host already; else those of one file are copied at a time.

    Raises:
        OSError: the disk is full or broken.
    """
    shards: list[dict[str, Part]] = []
    room = 0
    for name, part in parts.items():
        if not shards or part.tensor.nbytes > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = part
        room -= part.tensor.nbytes
    names = []
    for number, shard in enumerate(shards, start=1):
        names.append(f"shard-{rank + 1:05d}-model-{number:05d}-of-{len(shards):05d}.safetensors")
        places = {name: {"saved_offsets": list(part.offsets)} for name, part in shard.items()}
        save_tensors(
            {name: (part if copied else part.on_host()).tensor for name, part in shard.items()},
            folder / names[-1],
            {OFFSETS: json.dumps(places)},
        )
    return names


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write contiguous tensors of any shape on the host, of which none shares memory, to a new safetensors file.

    Raises:
        OSError: the disk is full or broken.
    """
    with naming(path):
        path.write_bytes(b"")
        mode = path.stat().st_mode  # as other files come out here; safetensors writes files for oneself alone
        save_file(tensors, path, metadata)
        path.chmod(mode)


def check_match(path: Path, stored: Mapping[str, Stored], flat: Mapping[str, Tensor]) -> None:
    """Compare names, shapes and dtypes of live tensors with those of the checkpoint at `path`.

    Raises:
        InputError: they differ; all that differ are counted, and the first ones named.
    """
    saved = {name: _kind(value.shape, value.dtype) for name, value in stored.items()}
    if told := misfit(saved, {name: _kind(tensor.shape, tensor.dtype) for name, tensor in flat.items()}):
        raise InputError(f"{path}: does not fit this run: {told}; resume with the config it was written with")


@torch.no_grad()
def read_parts(flat: Mapping[str, Tensor], stored: dict[str, Stored]) -> None:
    """Fill the parts of live tensors that this process holds, in place; shapes are those of `stored`.

    stored: what `check_match` has found to fit; emptied on the way, so that files that have been read are unmapped.

    Raises:
        InputError: a file is damaged; some tensors may be filled.
    """
    for name, tensor in flat.items():
        part = _local(tensor)
        stored.pop(name).read_into(part.tensor, part.offsets)


def _local(tensor: Tensor) -> Part:
    if not isinstance(tensor, DTensor):
        return Part(tensor, (0,) * tensor.dim())
    (box,) = tensor.__create_chunk_list__()
    return Part(tensor.to_local(), tuple(box.offsets))


def _copy(tensor: Tensor, world: World) -> tuple[int, int]:
    """Number the copy of its part of a tensor that this process holds, and count the copies."""
    if not isinstance(tensor, DTensor):
        return world.rank, world.size
    copy, copies = 0, 1
    for placement, size, place in zip(
        tensor.placements, tensor.device_mesh.shape, tensor.device_mesh.get_coordinate() or (), strict=True
    ):
        if isinstance(placement, Replicate):
            copy, copies = copy * size + place, copies * size
    return copy, copies


def _kind(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return kind(shape, str(dtype).removeprefix("torch."))
