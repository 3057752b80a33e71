"""Tensors that lie on all processes, to a folder and back, through torch.distributed.checkpoint (DCP).

DCP lets each process write and read its own shards, whatever number of processes the other side has.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import WriteResult

from longsana.runtime.errors import InputError
from longsana.weights.run_folder import SEPARATOR, tensor_records

LISTED = 10


def flatten(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """By `group/name`, as a checkpoint names them."""
    assert not [group for group in tensors if SEPARATOR in group], list(tensors)
    return {
        f"{group}{SEPARATOR}{name}": tensor.detach()
        for group, named in tensors.items()
        for name, tensor in named.items()
    }


def on_host(flat: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies, also of what is on the host already; of DTensors, their local shards."""
    stager = DefaultStager(
        StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
    )
    staged = cast("dict[str, Tensor]", stager.stage(flat))
    stager.close()
    return staged


def write_tensors(flat: dict[str, Tensor], folder: Path, group: dist.ProcessGroup, *, staged: bool) -> None:
    """Write and sync the files of DCP; called by all processes.

    staged: the tensors are copies on the host.

    Raises:
        OSError, RuntimeError: a process could not write its part; on all of them.
    """
    # One thread: an error in one of DCP's further threads would be lost.
    options: dict[str, Any] = {"per_thread_copy_ahead": 0} if staged else {}
    writer = _Writer(folder, thread_count=1, sync_files=True, **options)
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.save(flat, storage_writer=writer, planner=planner, process_group=group)
    except CheckpointException as failure:
        raise _cause(failure) from failure


def check_match(path: Path, metadata: Metadata, flat: Mapping[str, Tensor]) -> None:
    """Names, shapes and dtypes are those of the checkpoint at `path`.

    Raises:
        InputError: they are not; all of them are listed.
    """
    saved = {name: _kind(value.size, value.properties.dtype) for name, value in tensor_records(metadata).items()}
    live = {name: _kind(tensor.shape, tensor.dtype) for name, tensor in flat.items()}
    problems = {
        "missing": [name for name in live if name not in saved],
        "unexpected": [name for name in saved if name not in live],
        "different": [
            f"{name} {saved[name]} (here: {live[name]})" for name in live if saved.get(name, live[name]) != live[name]
        ],
    }
    if any(problems.values()):
        told = "; ".join(
            f"{title} {len(names)}: {', '.join(names[:LISTED])}{', ...' if len(names) > LISTED else ''}"
            for title, names in problems.items()
            if names
        )
        raise InputError(f"{path}: does not fit this run: {told}; resume with the config it was written with")


def read_tensors(flat: dict[str, Tensor], path: Path, metadata: Metadata, group: dist.ProcessGroup) -> None:
    """Fill live tensors in place; called by all processes.

    metadata: the folder's, which `check_match` has found to fit.

    Raises:
        InputError: a file is damaged; some tensors may be filled.
    """
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.load(flat, storage_reader=_Reader(path, metadata), planner=planner, process_group=group)
    except CheckpointException as failure:
        error = _cause(failure)
        if not isinstance(error, Exception):  # a request to stop
            raise error from failure
        detail = " ".join(str(error).split())[:100]
        raise InputError(
            f"{path}: damaged ({type(error).__name__}: {detail}); copy it again or use another checkpoint"
        ) from failure


class _Writer(dcp.FileSystemWriter):
    """DCP's writer, of files that depend on the tensors alone, and with the disk's own errors."""

    def storage_meta(self) -> None:
        return None  # instead of a path and a random number

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:  # of PyTorch's file format, with what the disk said hidden behind it
            seen: BaseException | None = error
            while seen is not None and not isinstance(seen, OSError):
                seen = seen.__cause__ or seen.__context__
            if seen is None:
                raise
            raise OSError(seen.errno, seen.strerror, str(self.path)) from error


class _Reader(dcp.FileSystemReader):
    """DCP's reader, given the metadata instead of opening the pickle itself."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self.metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata


def _cause(failure: CheckpointException) -> BaseException:
    """What happened, without DCP's wrapping, which `except Exception` would not catch."""
    return failure.failures[min(failure.failures)][0]


def _kind(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"
