"""Named tensors, opened without reading them: PyTorch pickles, safetensors whole or in shards, folders of training.

What a file is, is seen from its first bytes, never from its suffix.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longsana.models.dcp_files import SEPARATOR, checkpoints_in, is_checkpoint, open_tensors, read_manifest
from longsana.runtime.errors import InputError
from longsana.runtime.files import move_into_place, partial_name
from longsana.runtime.hub import INDEX_SUFFIX, shards_of

log = logging.getLogger(__name__)

NETWORKS = ("generator", "generator_ema", "critic")
PIPELINE_PART = "transformer"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
AGAIN = "download or copy it again"


class Entry(NamedTuple):
    """A tensor in a file. `dtype` is as the file writes it; `read` may return a view of a mapped file."""

    shape: tuple[int, ...]
    dtype: str
    floating: bool
    read: Callable[[], Tensor]


def open_checkpoint(path: Path | Sequence[Path], key: str) -> dict[str, Entry]:
    """The tensors of one network, by the names the file gives them, without `model.` in front of all.

    path: a file, an index of shards, a checkpoint folder of training, or the shards themselves.
    key: the network to take from a training checkpoint; elsewhere there is one network to take.

    Raises:
        InputError: missing, damaged, ambiguous, holding objects other than tensors, or without this network.
    """
    if isinstance(path, Path) and path.is_dir():
        return _open_folder(path, key)
    if not isinstance(path, Path):
        files = list(path)
    elif path.name.endswith(INDEX_SUFFIX):
        files = [path.parent / shard for shard in shards_of(path)]
    else:
        files = [path]
    entries: dict[str, Entry] = {}
    for file in files:
        if not file.is_file():
            listed = f", but {path.name} lists it; {AGAIN}" if isinstance(path, Path) and file != path else ""
            raise InputError(f"{file}: no such file{listed}")
        fresh = _open_file(file, key)
        if twice := sorted(entries.keys() & fresh.keys()):
            raise InputError(f"{file}: {twice[0]} is in another shard too; {AGAIN}")
        entries.update(fresh)
    if entries and all(name.startswith("model.") for name in entries):
        return {name.removeprefix("model."): entry for name, entry in entries.items()}
    return entries


def weights_file(path: Path) -> Path:
    """The file or the index of shards that a folder means; a file, and a checkpoint folder of training, is itself.

    Raises:
        InputError: the folder holds none, or several and none with a usual name, or is a run with its checkpoints.
    """
    if not path.is_dir() or is_checkpoint(path):
        return path
    if checkpoints := checkpoints_in(path):
        newest = next((folder for folder in checkpoints if not _damage(folder)), checkpoints[0])
        raise InputError(f"{path}: a run, with {len(checkpoints)} checkpoints: name one, such as {newest}, the newest")
    if (path / PIPELINE_PART).is_dir():
        return weights_file(path / PIPELINE_PART)
    for name in (DIFFUSERS_WEIGHTS, "model.safetensors"):
        single, index = path / name, path / name.replace(".safetensors", INDEX_SUFFIX)
        if single.is_file() or index.is_file():
            return index if index.is_file() else single
    files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    found = [file for file in files if file.name.endswith(INDEX_SUFFIX)]
    found = found or [file for file in files if file.suffix in (".safetensors", ".pth", ".pt", ".bin")]
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:5])
        raise InputError(f"{path}: {f'several weights files ({names})' if found else 'no weights'} here; name the file")
    return found[0]


def _damage(folder: Path) -> str:
    """What is wrong with a checkpoint folder at first sight; nothing with other folders."""
    try:
        if is_checkpoint(folder):
            read_manifest(folder)
    except InputError as error:
        return str(error)
    return ""


def _open_folder(path: Path, key: str) -> dict[str, Entry]:
    groups: dict[str, dict[str, Entry]] = {}
    for full_name, (shape, dtype, read) in open_tensors(path).items():
        group, _, name = full_name.partition(SEPARATOR)
        entry = Entry(shape, str(dtype).removeprefix("torch."), dtype.is_floating_point, read)
        groups.setdefault(group, {})[name] = entry
    _check_key(path, key, [name for name in NETWORKS if name in groups])
    return groups[key]


def _check_key(path: Path, key: str, networks: list[str]) -> None:
    if key in networks:
        return
    remedy = f"set checkpoint_key to {' or '.join(networks)}" if networks else "there is none at all"
    raise InputError(f"{path}: no network '{key}' in this training checkpoint; {remedy}")


def _open_file(path: Path, key: str) -> dict[str, Entry]:
    with path.open("rb") as stream:
        head = stream.read(24)
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: a git-lfs pointer, not the weights; run `git lfs pull`, or download the file itself")
    # First: a header's length, in the eight bytes before it, may begin as a pickle does.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return _open_safetensors(path)
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return _open_pickle(path, key, mapped=head.startswith(b"PK"))
    raise InputError(f"{path}: neither a PyTorch nor a safetensors file, or damaged; {AGAIN}")


def _open_safetensors(path: Path) -> dict[str, Entry]:
    from safetensors import SafetensorError, safe_open

    try:
        handle = safe_open(path, "pt")
        headers = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise InputError(f"{path}: damaged or cut short ({error}); {AGAIN}") from error
    return {
        name: Entry(
            tuple(header.get_shape()),
            header.get_dtype(),
            header.get_dtype().startswith(("F", "BF")),
            partial(handle.get_tensor, name),
        )
        for name, header in headers.items()
    }


def _open_pickle(path: Path, key: str, *, mapped: bool) -> dict[str, Entry]:
    try:
        # PyTorch's format before 1.6 cannot be mapped into memory.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise InputError(
                f"{path}: refused: it holds a Python object ({found[1]}), which could run code when opened; "
                "get the weights as safetensors"
            ) from error
        raise InputError(
            f"{path}: refused: damaged, or holding more than plain weights (such files can run code); {AGAIN}"
        ) from error
    except Exception as error:  # what a damaged pickle raises is anyone's guess: KeyError, EOFError, OSError...
        detail = " ".join(str(error).split())[:100]
        raise InputError(f"{path}: damaged or cut short ({type(error).__name__}: {detail}); {AGAIN}") from error
    return {str(name): _entry(value) for name, value in _network(loaded, key, path).items()}


def _network(loaded: object, key: str, path: Path) -> Mapping[Any, object]:
    if isinstance(loaded, Mapping):
        networks = [name for name in NETWORKS if isinstance(loaded.get(name), Mapping)]
        if networks:
            _check_key(path, key, networks)
            loaded = loaded[key]
        elif key != NETWORKS[0]:
            log.info("%s holds one network, which is taken for '%s'", path, key)
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not any(isinstance(value, Tensor) for value in loaded.values()):
        raise InputError(f"{path}: no network in this file: expected names and tensors, found a {_kind(loaded)}")
    return loaded


def _kind(loaded: object) -> str:
    kind = type(loaded).__name__
    return f"{kind} of {', '.join(map(str, list(loaded)[:5])) or 'nothing'}" if isinstance(loaded, Mapping) else kind


def _entry(value: object) -> Entry:
    if isinstance(value, Tensor):
        tensor = value.detach()
        dtype = str(tensor.dtype).removeprefix("torch.")
        return Entry(tuple(tensor.shape), dtype, tensor.is_floating_point(), lambda: tensor)
    return Entry((), type(value).__name__, False, partial(torch.empty, 0))


def write_pickle(content: dict[str, Any], path: Path) -> None:
    """A PyTorch file, whole or not at all."""
    _write(path, lambda partial_path: torch.save(content, partial_path))


def write_safetensors(tensors: dict[str, Tensor], path: Path, shard_bytes: int) -> None:
    """One file, or shards of up to `shard_bytes` and their index; no reader sees part of it."""
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = []
    room = 0
    for name, tensor in tensors.items():
        if not shards or tensor.nbytes > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes

    stem = path.name.removesuffix(".safetensors")
    index = path.with_name(stem + INDEX_SUFFIX)
    if len(shards) == 1:
        _write(path, lambda partial_path: save_file(tensors, partial_path, metadata={"format": "pt"}))
        index.unlink(missing_ok=True)  # of an earlier save, which would be read instead
        return
    # Without an index a save that is cut short cannot be read as half old and half new.
    index.unlink(missing_ok=True)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        _write(path.with_name(name), partial(save_file, shard, metadata={"format": "pt"}))
        weight_map |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    _write(index, lambda partial_path: partial_path.write_text(text, encoding="utf-8"))
    path.unlink(missing_ok=True)


def _write(path: Path, write: Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = partial_name(path)
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode  # as other files come out here; safetensors writes files for oneself alone
        write(unfinished)
        unfinished.chmod(mode)
        with unfinished.open("rb") as stream:
            os.fsync(stream.fileno())
        move_into_place(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
