"""Checkpoint folders of training: tensors in safetensors shards by process, and a manifest of files.

    checkpoint_model_000200/
        manifest.json                                  size and SHA-256 of every other file; written last
        shard-00001-model-00001-of-00002.safetensors   tensors, or parts of them, that process 0 wrote
        *.safetensors, progress.json, config.yaml ...

A shard's header says where in its tensor each part begins, as in the files of torch.distributed.checkpoint.hf_storage.
Reading needs no process group, and holds one tensor at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from longsana.runtime.errors import InputError
from longsana.runtime.foreign import reason_of
from longsana.runtime.hub import digests_of, stream_sha256

CHECKPOINTS = "checkpoint_model_*"  # in a run's folder
MANIFEST = "manifest.json"
PROGRESS = "progress.json"
TENSOR_FILES = "shard-*-model-*-of-*.safetensors"
OFFSETS = "DCP_SHARDING_INFO"  # the key in a shard's header of {tensor: {"saved_offsets": [...]}}, in JSON
SEPARATOR = "/"  # between a group and a tensor's name in it
_OLD_FILES = (".metadata", "*.distcp")
_AGAIN = "copy it again, or use another checkpoint"


class FileRecord(NamedTuple):
    size: int
    sha256: str


class Piece(NamedTuple):
    """A box of a tensor that lies in one file: where it begins in the tensor, its sizes, and what reads it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    read: Callable[[], Tensor]


class Stored(NamedTuple):
    """A tensor in a checkpoint folder, from however many pieces."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    def read(self) -> Tensor:
        """The whole tensor, of its shape and dtype, on the host; it may be a view of a mapped file.

        Raises:
            InputError: a file is damaged.
        """
        if len(self.pieces) == 1:
            return self.pieces[0].read()
        whole = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        self.read_into(whole, (0,) * len(self.shape))
        return whole

    def read_into(self, target: Tensor, offsets: Sequence[int]) -> None:
        """Fill `target`, whose shape is the box of this tensor that begins at `offsets`, on any device.

        Raises:
            InputError: a file is damaged.
        """
        for piece in self.pieces:
            sides = list(zip(piece.offsets, piece.sizes, offsets, target.shape, strict=True))
            first = [max(there, here) for there, _, here, _ in sides]
            last = [min(there + size, here + length) for there, size, here, length in sides]
            if all(start < end for start, end in zip(first, last, strict=True)):
                source, box = (
                    tuple(slice(start - zero, end - zero) for start, end, zero in zip(first, last, zeros, strict=True))
                    for zeros in (piece.offsets, offsets)
                )
                target[box].copy_(piece.read()[source])


def folder_name(step: int) -> str:
    return f"checkpoint_model_{step:06d}"


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first, whole or not."""
    steps = {path: path.name.rpartition("_")[2] for path in folder.glob(CHECKPOINTS) if path.is_dir()}
    found = [(int(step), path) for path, step in steps.items() if step.isdecimal()]
    return [path for _, path in sorted(found, reverse=True)]


def is_checkpoint(path: Path) -> bool:
    """Tell whether this is a checkpoint folder of training, whole or not."""
    return any(path.glob(TENSOR_FILES)) or _is_old(path)


def _is_old(path: Path) -> bool:
    return any(file.is_file() for pattern in _OLD_FILES for file in path.glob(pattern))


def refuse_old(path: Path) -> None:
    """Refuse a checkpoint folder whose tensors are not in safetensors.

    Raises:
        InputError: it is one; the message names the commit that reads it.
    """
    if _is_old(path):
        raise InputError(
            f"{path}: a checkpoint with .distcp files, which this version does not read: training cannot go on from "
            "it, and its weights are exported by commit 3377696: `git worktree add ../longsana-3377696 3377696`, and "
            "there train_video_scripts/export.py"
        )


def read_manifest(path: Path) -> dict[str, FileRecord]:
    """The files of a checkpoint folder, each there and of its size.

    Raises:
        InputError: there is no manifest, or a file is missing, longer or shorter; or see `refuse_old`.
    """
    refuse_old(path)
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
    open_tensors(path)


def digests(folder: Path, names: list[str]) -> dict[str, str]:
    """SHA-256 in hex of files, several at a time."""

    def digest(name: str) -> str:
        with (folder / name).open("rb") as stream:
            return stream_sha256(stream)

    with ThreadPoolExecutor(max_workers=8, thread_name_prefix="sha256") as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def open_tensors(path: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder by `group/name`; headers are read, and no tensor.

    Raises:
        InputError: the folder is not whole, or a file is damaged.
    """
    pieces: dict[str, list[Piece]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for name in read_manifest(path):
        if fnmatchcase(name, TENSOR_FILES):
            for tensor, dtype, piece in _pieces(path / name):
                pieces.setdefault(tensor, []).append(piece)
                if dtypes.setdefault(tensor, dtype) != dtype:
                    raise InputError(f"{path / name}: {tensor} is of another dtype than its other parts; {_AGAIN}")
    found = {}
    for tensor, parts in pieces.items():
        ends = [[start + size for start, size in zip(part.offsets, part.sizes, strict=True)] for part in parts]
        shape = tuple(map(max, zip(*ends, strict=True)))
        if sum(prod(part.sizes) for part in parts) != prod(shape):
            raise InputError(f"{path}: parts of {tensor} are missing, or are there twice; {_AGAIN}")
        found[tensor] = Stored(shape, dtypes[tensor], tuple(parts))
    return found


def read_progress(path: Path) -> dict[str, Any]:
    """Read how far the run was that wrote a checkpoint: what is no tensor.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        progress = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path / PROGRESS}: cannot be read ({error}); use another checkpoint") from error
    if not isinstance(progress, dict):
        raise InputError(f"{path / PROGRESS}: expected a mapping, found a {type(progress).__name__}")
    return progress


def own_names(path: Path) -> list[str]:
    """Name, sorted, what the processes saved as their own.

    Raises:
        InputError: the checkpoint is not whole.
    """
    names = [name for name in read_manifest(path) if not fnmatchcase(name, TENSOR_FILES)]
    return sorted(name.removesuffix(".safetensors") for name in names if name.endswith(".safetensors"))


def read_own(path: Path, name: str) -> dict[str, Tensor]:
    """Read what a process saved as its own, with its shapes and dtypes, to the host. name: one of `own_names`.

    Raises:
        InputError: the file is damaged.
    """
    file = path / f"{name}.safetensors"
    try:
        return load_file(file)
    except SafetensorError as error:
        raise InputError(f"{file}: damaged ({error}); use another checkpoint") from error


def _pieces(file: Path) -> list[tuple[str, torch.dtype, Piece]]:
    """Names, dtypes and pieces of the tensors in a shard, which stays mapped as long as one of them is held."""
    try:
        handle = safe_open(file, "pt")
        places = json.loads(handle.metadata()[OFFSETS])
        found = []
        for name in handle.keys():  # noqa: SIM118 (not a dict)
            mapped: Tensor = handle.get_tensor(name)  # a view of the file, of which nothing is read
            offsets = tuple(map(int, places[name]["saved_offsets"]))
            assert len(offsets) == mapped.dim() and min(offsets, default=0) >= 0
            read = partial(handle.get_tensor, name)
            found.append((name, mapped.dtype, Piece(offsets, tuple(mapped.shape), read)))
        return found
    except Exception as error:  # what a damaged header leads to is anyone's guess
        raise InputError(f"{file}: damaged ({type(error).__name__}: {reason_of(error)}); {_AGAIN}") from error
