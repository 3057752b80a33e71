"""The one opener of weights: PyTorch pickles, safetensors whole or in shards, folders of training; nothing is read yet.

What a file is, is seen from its first bytes, never from its suffix. Code in a file never runs.
"""

from __future__ import annotations

import functools
import json
import logging
import pickle
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longsana.runtime.errors import InputError
from longsana.runtime.files import atomic_write_text, whole_file
from longsana.runtime.foreign import AGAIN, reason_of
from longsana.runtime.hub import INDEX_SUFFIX, shards_of
from longsana.weights.checkpoint_folder import SEPARATOR, Stored, check_content, open_tensors
from longsana.weights.fit import kind
from longsana.weights.what_is import kind_of_file, what_is

log = logging.getLogger(__name__)

NETWORKS = ("generator", "generator_ema", "critic")
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module")
"""What DistributedDataParallel, torch.compile, FSDP and activation checkpointing put into the names of a network."""


class Entry(NamedTuple):
    """A tensor in a file. `dtype` is as the file writes it; `read` may return a view of a mapped file."""

    shape: tuple[int, ...]
    dtype: str
    floating: bool
    read: Callable[[], Tensor]

    @property
    def kind(self) -> str:
        """Name what `misfit` compares: floating-point numbers fit in any precision."""
        return kind(self.shape, "" if self.floating else self.dtype)


def open_weights(path: Path | Sequence[Path]) -> dict[str, Entry]:
    """The tensors of a file, by the names that the network gave them, without those of what wrapped it.

    path: a file, an index of shards, or the shards themselves.

    Raises:
        InputError: missing, damaged, or holding objects other than tensors. `read` raises it too.
    """
    return _opened(path, None)


def open_checkpoint(path: Path | Sequence[Path], key: str, *, digests: bool = True) -> dict[str, Entry]:
    """The tensors of one of our networks: see `open_weights`; and without `model.` in front of all.

    path: whatever `what_is` knows, or shards.
    key: the network to take from a training checkpoint; elsewhere there is one network to take.
    digests: compare a checkpoint folder's files with the SHA-256 that training wrote down; those of files that have
        not changed since are remembered.

    Raises:
        InputError: as there, or ambiguous, or without this network.
    """
    if isinstance(path, Path):
        found = what_is(path)
        if found.kind == "checkpoint":
            return _open_folder(path, key, digests)
        path = found.file
    entries = _opened(path, key)
    while entries and all(name.startswith("model.") for name in entries):
        entries = {name.removeprefix("model."): entry for name, entry in entries.items()}
    return entries


def check_digests(path: Path) -> None:
    """Compare a checkpoint folder of training with the SHA-256 that it was written with; other weights have none.

    Raises:
        InputError: a file has changed; or see `what_is`.
    """
    if what_is(path).kind == "checkpoint":
        log.info("%s: comparing its files with their digests; those that are new or changed are read", path)
        check_content(path, remembered=True)


@functools.cache
def say_once(message: str) -> None:
    """Log what is to be known of a file, however often it is opened."""
    log.info("%s", message)


def _opened(path: Path | Sequence[Path], key: str | None) -> dict[str, Entry]:
    """key: see `open_checkpoint`; None: the file is not looked through for networks of training."""
    index = path if isinstance(path, Path) and path.name.endswith(INDEX_SUFFIX) else None
    if index is not None:
        files = [index.parent / shard for shard in shards_of(index)]
    else:
        files = [path] if isinstance(path, Path) else list(path)
    entries: dict[str, Entry] = {}
    for file in files:
        if not file.is_file():
            listed = "" if index is None else f", but {index.name} lists it; {AGAIN}"
            raise InputError(f"{file}: no such file{listed}")
        fresh = _open_file(file, key, shard=index is not None)
        if twice := sorted(entries.keys() & fresh.keys()):
            raise InputError(f"{file}: {twice[0]} is in another shard too; {AGAIN}")
        entries.update(fresh)
    return _unwrapped(entries, index or files[0])


def _unwrapped(entries: dict[str, Entry], path: Path) -> dict[str, Entry]:
    """Drop WRAPPERS from names, wherever they stand: blocks are wrapped one by one, too."""
    found: dict[str, Entry] = {}
    taken: dict[str, None] = {}
    for name, entry in entries.items():
        pieces = name.split(".")
        short = ".".join(piece for piece in pieces if piece not in WRAPPERS)
        if short in found:
            raise InputError(f"{path}: several tensors are {short} without what wrapped the network ({name}); {AGAIN}")
        found[short] = entry
        taken |= dict.fromkeys(piece for piece in pieces if piece in WRAPPERS)
    if taken:
        say_once(f"{path}: {', '.join(f'{piece}.' for piece in taken)} is taken off its names")
    return found


def _open_folder(path: Path, key: str, digests: bool) -> dict[str, Entry]:
    if digests:
        check_content(path, remembered=True)
    stored = open_tensors(path)
    _check_key(path, key, _networks(stored))
    if holds_factors(stored):
        raise InputError(
            f"{path}: a checkpoint of a LoRA, which holds its factors alone; put them into the weights that it was "
            f"trained on: longsana convert BASE DST --to safetensors --fuse {path}"
        )
    start = f"{key}{SEPARATOR}"
    return {
        name.removeprefix(start): Entry(
            it.shape, str(it.dtype).removeprefix("torch."), it.dtype.is_floating_point, it.read
        )
        for name, it in stored.items()
        if name.startswith(start)
    }


def open_factors(path: Path, key: str) -> dict[str, Stored]:
    """The factors of a network in a LoRA's checkpoint folder, `{layer of ours}.lora_A.weight` and `.lora_B.weight`.

    Raises:
        InputError: it is not whole, without this network, or no LoRA's.
    """
    stored = open_tensors(path)
    if key not in (there := _networks(stored)):
        raise InputError(f"--key {key}: {path} holds no such network; it has {', '.join(there)}")
    if not holds_factors(stored):
        raise InputError(f"{path}: a checkpoint of whole weights, not of a LoRA (train.lora.rank)")
    start = f"{key}{SEPARATOR}"
    named = {name.removeprefix(start): it for name, it in stored.items() if name.startswith(start)}
    # peft has the name of its adapter before the leaf.
    return {re.sub(r"\.\w+\.weight$", ".weight", name): it for name, it in named.items()}


def holds_factors(names: Iterable[str]) -> bool:
    """Tell whether these are the tensors of a LoRA's checkpoint."""
    return any(".lora_A." in name for name in names)


def networks_in(folder: Path) -> list[str]:
    """Those of NETWORKS that a checkpoint folder of training holds.

    Raises:
        InputError: it is not whole.
    """
    return _networks(open_tensors(folder))


def _networks(names: Iterable[str]) -> list[str]:
    groups = {name.partition(SEPARATOR)[0] for name in names}
    return [name for name in NETWORKS if name in groups]


def _check_key(path: Path, key: str, networks: list[str]) -> None:
    if key in networks:
        return
    choice = f"set checkpoint_key, or --key of longsana convert, to {' or '.join(networks)}"
    remedy = choice if networks else "there is none at all"
    raise InputError(f"{path}: no network '{key}' in this training checkpoint; {remedy}")


def _open_file(path: Path, key: str | None, *, shard: bool) -> dict[str, Entry]:
    """shard: an index of safetensors lists it, so it must be one."""
    is_a = kind_of_file(path)
    if is_a == "safetensors":
        return _open_safetensors(path)
    if shard:
        raise InputError(f"{path}: cannot be read as safetensors, which its index says it is; {AGAIN}")
    if is_a == "damaged":
        raise InputError(f"{path}: neither a PyTorch nor a safetensors file, or damaged; {AGAIN}")
    return _open_pickle(path, key, mapped=is_a == "pytorch")


def _open_safetensors(path: Path) -> dict[str, Entry]:
    from safetensors import SafetensorError, safe_open

    try:
        handle = safe_open(path, "pt")
        headers = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged or cut short ({reason_of(error)}); {AGAIN}") from error

    def read(name: str) -> Tensor:
        try:
            tensor: Tensor = handle.get_tensor(name)
            return tensor
        except Exception as error:  # a dtype that this torch lacks, a disk that fails
            raise InputError(f"{path}: {name} cannot be read ({reason_of(error)})") from error

    return {
        name: Entry(
            tuple(header.get_shape()),
            header.get_dtype(),
            header.get_dtype().startswith(("F", "BF")),
            partial(read, name),
        )
        for name, header in headers.items()
    }


def _open_pickle(path: Path, key: str | None, *, mapped: bool) -> dict[str, Entry]:
    try:
        if mapped:
            _check_archive(path)
        with ExitStack() as stack:
            name = path
            if path.suffix == ".safetensors":  # PyTorch goes by this suffix, whatever the content is
                name = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "misnamed.pth"
                name.symlink_to(path.absolute())
            # PyTorch's format before 1.6 cannot be mapped into memory.
            loaded = torch.load(name, map_location="cpu", weights_only=True, mmap=mapped)
    except InputError:
        raise
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
        # Nor may PyTorch's advice be passed on: without weights_only code in the file would run.
        detail = "" if "weights_only" in str(error) else f": {reason_of(error)}"
        raise InputError(f"{path}: damaged or cut short ({type(error).__name__}{detail}); {AGAIN}") from error
    return {str(name): _entry(value) for name, value in _network(loaded, key, path).items()}


def _check_archive(path: Path) -> None:
    """Refuse zip archives that PyTorch has not written, or that hold a program."""
    with zipfile.ZipFile(path) as archive:
        names = {name.rpartition("/")[2] for name in archive.namelist()}
    if "constants.pkl" in names:
        raise InputError(f"{path}: refused: a TorchScript archive, which is a program; get the weights as safetensors")
    if "data.pkl" not in names:
        raise InputError(f"{path}: a zip archive, and none of PyTorch's; unpack it first, or download the weights")


def _network(loaded: object, key: str | None, path: Path) -> Mapping[Any, object]:
    if isinstance(loaded, Mapping) and key is not None:
        networks = [name for name in NETWORKS if isinstance(loaded.get(name), Mapping)]
        if networks:
            _check_key(path, key, networks)
            loaded = loaded[key]
        elif key != NETWORKS[0]:
            say_once(f"{path} holds one network, which is taken for '{key}'")
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
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as unfinished, unfinished.open("wb") as stream:
        # Not by its name: PyTorch would tell a full disk as an "unexpected pos".
        torch.save(content, stream)


def _order_words(path: Path) -> None:
    """Put the words of a safetensors header in their order: the library hashes them, in another one each time."""
    with path.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        assert len(ordered) == length
        stream.seek(8)
        stream.write(ordered)


def write_safetensors(
    tensors: dict[str, Tensor], path: Path, shard_bytes: int, metadata: Mapping[str, str] | None = None
) -> None:
    """One file, or shards of up to `shard_bytes` and their index; no reader sees part of it.

    metadata: words that a single file's header has, too.
    """
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = []
    room = 0
    for name, tensor in tensors.items():
        if not shards or tensor.nbytes > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes

    path.parent.mkdir(parents=True, exist_ok=True)
    stem = path.name.removesuffix(".safetensors")
    index = path.with_name(stem + INDEX_SUFFIX)
    if len(shards) == 1:
        with whole_file(path) as unfinished:
            save_file(tensors, unfinished, metadata={"format": "pt", **(metadata or {})})
            if metadata:
                _order_words(unfinished)
        index.unlink(missing_ok=True)  # of an earlier save, which would be read instead
        return
    # Without an index a save that is cut short cannot be read as half old and half new.
    index.unlink(missing_ok=True)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        with whole_file(path.with_name(name)) as unfinished:
            save_file(shard, unfinished, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    atomic_write_text(index, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))
    path.unlink(missing_ok=True)
