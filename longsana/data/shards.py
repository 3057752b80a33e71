"""Folders of tensors with their prompts: safetensors shards, and a manifest.json that says what made them.

The manifest is written first without shards, and again, with the size and SHA-256 of each, when all are there: a folder
is whole if its manifest says so and its files agree. Shards appear whole under their names or not at all, so that a
folder whose making was stopped goes on from the shards it has.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from longsana.runtime.distributed import World
from longsana.runtime.errors import InputError
from longsana.runtime.files import atomic_write_text, check_writable, write_exclusive
from longsana.runtime.hub import file_sha256

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
VALUES = "values"  # the tensor of a shard: (n, *shape)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Contents:
    """The description of what a folder is to hold.

    kind: what an item is, such as "trajectories".
    made_by: all that decides the values, name to value, as JSON has it.
    shape, dtype: of one item's tensor.
    """

    kind: str
    made_by: Mapping[str, Any]
    shape: tuple[int, ...]
    dtype: str
    count: int
    shard_size: int

    @property
    def shards(self) -> int:
        return -(-self.count // self.shard_size)

    def rows(self, shard: int) -> range:
        """The items of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.count))

    @property
    def identity(self) -> str:
        return hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        parsed: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return parsed

    def differences(self, other: Contents) -> list[str]:
        """List where `other` has another value, as `name=own (there: other)`."""
        own, there = ({**c.as_json(), **c.as_json()["made_by"]} for c in (self, other))
        names = [name for name in {**own, **there} if name != "made_by"]
        return [
            f"{name}={_short(own.get(name))} (there: {_short(there.get(name))})"
            for name in names
            if own.get(name) != there.get(name)
        ]

    def refuse_other(self, there: Contents, folder: Path, remedy: str) -> None:
        """Refuse a folder that holds something else, `there`. remedy: what to do.

        Raises:
            InputError: it does; the message lists the differences.
        """
        if differences := self.differences(there):
            raise InputError(f"{folder}: was made with other settings: {', '.join(differences)}; {remedy}")


class Shard(NamedTuple):
    name: str
    items: int
    bytes: int
    sha256: str


class ShardWriter:
    """Makes a folder of shards, with any number of processes, however often it is stopped.

    mine: numbers of the shards that this process has to write; then each process calls `finish`.
    """

    def __init__(self, folder: Path, contents: Contents, world: World, option: str) -> None:
        """Every process calls this. option: what names the folder, in messages.

        Raises:
            InputError: the folder cannot be written to, or holds something else.
        """
        self.folder, self.contents, self.world = folder, contents, world
        missing: list[int] | InputError = []
        if world.is_main:
            try:
                missing = self._begin(option)
            except InputError as error:
                missing = error
        missing = world.broadcast(missing)
        if isinstance(missing, InputError):
            raise missing
        self.mine = missing[world.rank :: world.size]

    def write(self, shard: int, values: Tensor, prompts: Sequence[str]) -> None:
        """Write a shard, in the order of `mine`. values: (n, *shape), of the contents' dtype, its items."""
        rows, shape = self.contents.rows(shard), (*self.contents.shape,)
        assert values.shape == (len(rows), *shape) and len(prompts) == len(rows), (values.shape, len(prompts), rows)
        assert values.dtype == DTYPES[self.contents.dtype]
        # One key: safetensors writes several in any order, and equal settings are to give equal bytes.
        header = {"shard": json.dumps({"made_by": self.contents.identity, "prompts": list(prompts)})}
        path = self.folder / shard_name(shard)
        try:
            write_exclusive(path, save({VALUES: values.contiguous()}, header))
        except BlockingIOError as error:
            raise InputError(f"{self.folder}: another command is writing here; wait for it to end") from error
        done, mine = self.mine.index(shard) + 1, len(self.mine)
        log.info(
            "%s: shard %d, %d %s (%d of this process's %d shards)",
            *(self.folder, shard, len(rows), self.contents.kind, done, mine),
        )

    def finish(self) -> None:
        """Write the manifest, once all processes have written their shards. Every process calls this."""
        self.world.gather(None)
        numbers = range(self.contents.shards)
        own = [self._entry(number) for number in numbers[self.world.rank :: self.world.size]]
        shards = sorted(shard for part in self.world.gather(own) for shard in part)
        if self.world.is_main:
            _write_manifest(self.folder, self.contents, shards)
            log.info("%s: %d %s in %d shards", self.folder, self.contents.count, self.contents.kind, len(shards))

    def _entry(self, number: int) -> Shard:
        path = self.folder / shard_name(number)
        return Shard(path.name, len(self.contents.rows(number)), path.stat().st_size, file_sha256(path))

    def _begin(self, option: str) -> list[int]:
        check_writable(self.folder, option)
        shards: list[Shard] | None = None
        if (self.folder / MANIFEST).exists():
            try:
                there, shards = read_manifest(self.folder)
            except InputError as error:
                raise InputError(f"{error}; remove it, or choose another {option}") from error
            self.contents.refuse_other(there, self.folder, f"choose another {option}")
        if shards is None:
            _write_manifest(self.folder, self.contents, None)
        missing = [number for number in range(self.contents.shards) if not self._is_whole(number, shards, option)]
        if len(missing) < self.contents.shards:
            log.info(
                "%s: %d of %d shards are there already",
                self.folder,
                self.contents.shards - len(missing),
                self.contents.shards,
            )
        return missing

    def _is_whole(self, number: int, listed: Sequence[Shard] | None, option: str) -> bool:
        path = self.folder / shard_name(number)
        if not path.exists():
            return False
        try:
            identity = _header(path)["made_by"]
        except InputError as error:
            log.warning("%s; it is made again", error)
            return False
        if identity != self.contents.identity:
            raise InputError(f"{path}: was made with other settings; remove it, or choose another {option}")
        if listed is not None and self._entry(number) != listed[number]:
            log.warning("%s: is not as it was written; it is made again", path)
            return False
        return True


class ShardFolder:
    """A whole folder of shards, read item by item.

    digests: compare the files with the manifest's SHA-256 as well as with its sizes. They are remembered: gigabytes are
        read once.

    Raises:
        InputError: the folder is not whole, or holds another kind; `remedy` says what to do.
    """

    def __init__(self, folder: Path, kind: str, remedy: str, *, digests: bool = True) -> None:
        self.folder, self.remedy = folder, remedy
        self._known: dict[int, list[str]] = {}  # prompts of shards
        below = [] if (folder / MANIFEST).exists() else sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
        if below:
            raise InputError(f"{folder}: no {MANIFEST} here; did you mean {' or '.join(map(str, below))}?")
        try:
            self.contents, shards = read_manifest(folder)
            if self.contents.kind != kind:
                raise InputError(f"{folder}: holds {self.contents.kind}, not {kind}")
            if shards is None:
                there = sum((folder / shard_name(number)).exists() for number in range(self.contents.shards))
                raise InputError(f"{folder}: unfinished, {there} of {self.contents.shards} shards are there")
            for shard in shards:
                _check(folder / shard.name, shard, digests)
        except InputError as error:
            raise InputError(f"{error}; {remedy}") from error

    def __len__(self) -> int:
        return self.contents.count

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        """Item `index`: its tensor as it is stored, and its prompt. No other item is read."""
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        shard, row = divmod(index, self.contents.shard_size)
        path, dtype = self.folder / shard_name(shard), DTYPES[self.contents.dtype]
        size = math.prod(self.contents.shape) * dtype.itemsize
        # Read, not mapped: file systems that are not local give mapped pages one by one.
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            file.seek(8 + header + row * size)
            raw = bytearray(file.read(size))
        if len(raw) != size:
            raise InputError(f"{path}: damaged (ends within item {row}); {self.remedy}")
        return torch.frombuffer(raw, dtype=dtype).view(self.contents.shape), self._prompts(shard)[row]

    def prompts(self) -> list[str]:
        """The prompts of all items, in order."""
        return [prompt for shard in range(self.contents.shards) for prompt in self._prompts(shard)]

    def _prompts(self, shard: int) -> list[str]:
        if shard not in self._known:
            self._known[shard] = _header(self.folder / shard_name(shard))["prompts"]
        return self._known[shard]


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def read_manifest(folder: Path) -> tuple[Contents, list[Shard] | None]:
    """Read what the folder holds, and its shards; None while they are being made.

    Raises:
        InputError: there is no manifest, or it cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder}: no {MANIFEST} here")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version, shards = values.pop("format"), values.pop("shards")
        if version != FORMAT:
            raise InputError(f"{path}: format {version}; this version reads {FORMAT}")
        contents = Contents(**values | {"shape": tuple(values["shape"])})
        listed = None if shards is None else [Shard(**shard) for shard in shards]
        fits = listed is None or [(shard.name, shard.items) for shard in listed] == [
            (shard_name(number), len(contents.rows(number))) for number in range(contents.shards)
        ]
        if contents.dtype not in DTYPES or not contents.count > 0 or not fits or not isinstance(contents.made_by, dict):
            raise ValueError("its parts contradict each other")
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, RecursionError) as error:
        raise InputError(f"{path}: damaged ({' '.join(str(error).split())})") from error
    return contents, listed


def _write_manifest(folder: Path, contents: Contents, shards: Sequence[Shard] | None) -> None:
    listed = None if shards is None else [shard._asdict() for shard in shards]
    manifest = {"format": FORMAT, **contents.as_json(), "shards": listed}
    atomic_write_text(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def _header(path: Path) -> dict[str, Any]:
    """made_by and prompts of a shard; the file is as long as its header says."""
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, Any] = json.loads(file.metadata()["shard"])
        return header
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: damaged ({' '.join(str(error).split())})") from error


def _check(path: Path, shard: Shard, digests: bool) -> None:
    if not path.is_file():
        raise InputError(f"{path}: missing")
    size = path.stat().st_size
    if size != shard.bytes:
        raise InputError(f"{path}: {size} bytes, the manifest says {shard.bytes}")
    if digests and file_sha256(path) != shard.sha256:
        raise InputError(f"{path}: not the file of the manifest (another SHA-256)")


def _short(value: Any) -> str:
    text = re.sub(r"\b[0-9a-f]{64}\b", lambda digest: f"{digest[0][:8]}...", str(value))
    return text if len(text) <= 60 else f"{text[:57]}..."
