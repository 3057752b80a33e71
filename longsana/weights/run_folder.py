"""Checkpoint folders of training: tensors as torch.distributed.checkpoint (DCP) writes them, and a manifest of files.

    checkpoint_model_000200/
        manifest.json       size and SHA-256 of every other file; written last
        .metadata           which tensor lies where (DCP; a pickle, which is opened with care here)
        __0_0.distcp ...    the tensors, by process
        *.safetensors, progress.json, config.yaml ...

Reading needs no process group, and holds one tensor at a time.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from longsana.runtime.errors import InputError
from longsana.runtime.hub import digests_of

if TYPE_CHECKING:  # a second of imports that most commands have no use for
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

CHECKPOINTS = "checkpoint_model_*"  # in a run's folder
MANIFEST = "manifest.json"
METADATA = ".metadata"
TENSOR_FILES = "*.distcp"
SEPARATOR = "/"  # between a group and a tensor's name in it
_AGAIN = "copy it again, hidden files too, or use another checkpoint"

# All that the metadata of plain tensors consists of.
_METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"} | {str(d).removeprefix("torch.") for d in vars(torch).values() if isinstance(d, torch.dtype)},
}


class FileRecord(NamedTuple):
    size: int
    sha256: str


class Stored(NamedTuple):
    """A tensor in a checkpoint folder; `read` makes it whole on the host, from however many parts."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def folder_name(step: int) -> str:
    return f"checkpoint_model_{step:06d}"


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first, whole or not."""
    steps = {path: path.name.rpartition("_")[2] for path in folder.glob(CHECKPOINTS) if path.is_dir()}
    found = [(int(step), path) for path, step in steps.items() if step.isdecimal()]
    return [path for _, path in sorted(found, reverse=True)]


def is_checkpoint(path: Path) -> bool:
    """Whether this is a folder of training's, whole or not."""
    return (path / METADATA).is_file() or any(path.glob(TENSOR_FILES))


def read_manifest(path: Path) -> dict[str, FileRecord]:
    """The files of a checkpoint folder, each there and of its size.

    Raises:
        InputError: there is no manifest, or a file is missing, longer or shorter.
    """
    try:
        written = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        files = {str(name): FileRecord(int(entry["size"]), str(entry["sha256"])) for name, entry in written.items()}
    except FileNotFoundError as error:
        raise InputError(f"{path}: no {MANIFEST}, so not a whole checkpoint; {_AGAIN}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path / MANIFEST}: cannot be read ({type(error).__name__}); {_AGAIN}") from error
    for name, record in files.items():
        if Path(name).name != name or name in ("", MANIFEST):
            raise InputError(f"{path / MANIFEST}: '{name}' is no plain file name; {_AGAIN}")
        try:
            size = (path / name).stat().st_size
        except OSError as error:
            raise InputError(f"{path}: {name} is missing ({error.strerror}); {_AGAIN}") from error
        if size != record.size:
            raise InputError(f"{path}: {name} has {size} bytes instead of {record.size}; {_AGAIN}")
    return files


def check_content(path: Path, *, remembered: bool = False) -> None:
    """Read every byte of a checkpoint folder.

    remembered: but not those of files that have not changed since they were last read (their size, time and inode).

    Raises:
        InputError: it is not what was written.
    """
    files = read_manifest(path)
    found = digests_of([path / name for name in files], remembered=remembered)
    for name, digest in zip(files, found, strict=True):
        if digest != files[name].sha256:
            raise InputError(f"{path / name}: has changed since it was written (SHA-256); {_AGAIN}")
    read_metadata(path)


def digests(folder: Path, names: list[str]) -> dict[str, str]:
    """SHA-256 in hex of files, several at a time."""

    def digest(name: str) -> str:
        state = hashlib.sha256()
        with (folder / name).open("rb") as stream:
            while block := stream.read(1 << 22):
                state.update(block)
        return state.hexdigest()

    with ThreadPoolExecutor(max_workers=8, thread_name_prefix="sha256") as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


class _Unpickler(pickle.Unpickler):
    """Unpickles DCP's metadata and nothing else: a pickle may name any function, to be called as it is opened."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise _ForbiddenError(f"{module}.{name}")


class _ForbiddenError(Exception):
    pass


def read_metadata(path: Path) -> Metadata:
    """What tensors a checkpoint folder holds, and where; unlike with DCP's own reader, no code in it can run.

    Raises:
        InputError: missing, damaged, or holding more than DCP's descriptions of tensors.
    """
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

    file = path / METADATA
    try:
        metadata = _Unpickler(io.BytesIO(file.read_bytes())).load()
    except _ForbiddenError as error:
        raise InputError(
            f"{file}: refused: it holds a Python object ({error}), which could run code when opened; "
            "use a checkpoint from a source you trust"
        ) from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); {_AGAIN}") from error
    except Exception as error:  # what a damaged pickle raises is anyone's guess
        raise InputError(f"{file}: damaged ({type(error).__name__}); {_AGAIN}") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise InputError(f"{file}: refused: not DCP's metadata, but a {type(metadata).__name__}; {_AGAIN}")
    for name, value in metadata.state_dict_metadata.items():
        if not isinstance(value, TensorStorageMetadata):
            raise InputError(f"{file}: refused: {name} is no tensor, but a {type(value).__name__}; {_AGAIN}")
    return metadata


def tensor_records(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """By `group/name`; `read_metadata` lets nothing else through."""
    return cast("dict[str, TensorStorageMetadata]", metadata.state_dict_metadata)


def open_tensors(path: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder by `group/name`, none read yet.

    Raises:
        InputError: the folder is not whole, or its metadata is damaged or refused. `read` raises it too.
    """
    files = read_manifest(path)
    metadata = read_metadata(path)
    try:
        places = {(index.fqn, tuple(index.offset)): info for index, info in metadata.storage_data.items()}
        found = {}
        for name, value in tensor_records(metadata).items():
            parts = [(chunk.offsets, chunk.sizes, places[name, tuple(chunk.offsets)]) for chunk in value.chunks]
            assert all(info.relative_path in files for *_, info in parts)
            assert sum(prod(sizes) for _, sizes, _ in parts) == prod(value.size)
            found[name] = Stored(tuple(value.size), value.properties.dtype, partial(_read, path, name, value, parts))
    except (AttributeError, KeyError, TypeError, AssertionError) as error:
        raise InputError(f"{path / METADATA}: damaged ({type(error).__name__}); {_AGAIN}") from error
    return found


def _read(path: Path, name: str, value: TensorStorageMetadata, parts: list[tuple[Any, Any, Any]]) -> Tensor:
    whole = torch.empty(value.size, dtype=value.properties.dtype)
    for offsets, sizes, info in parts:
        try:
            with (path / info.relative_path).open("rb") as stream:
                stream.seek(info.offset)
                part = torch.load(io.BytesIO(stream.read(info.length)), map_location="cpu", weights_only=True)
            assert part.shape == sizes and part.dtype == whole.dtype, f"{part.dtype} {list(part.shape)}"
        except Exception as error:  # as of any damaged PyTorch file
            detail = " ".join(str(error).split())[:100]
            raise InputError(f"{path / info.relative_path}: {name} is damaged ({detail}); {_AGAIN}") from error
        if len(parts) == 1:
            return part
        region = whole[tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))]
        region.copy_(part)
    return whole
