"""Checkpoints of a run: written by all processes, whole or not at all, and read by any number of them.

Each process writes and reads its parts of the tensors (`parts`). Around that: a folder that appears by one rename,
digests of every file, retention, and writing while training goes on.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from torch import Tensor

from longsana.runtime.distributed import World
from longsana.runtime.errors import InputError
from longsana.runtime.files import LINGERING, move_into_place, partial_name, remove, sync_folder, unfinished
from longsana.training.parts import (
    Part,
    check_match,
    flatten,
    host_copy,
    own_parts,
    read_parts,
    save_tensors,
    write_parts,
)
from longsana.weights.checkpoint_folder import (
    CHECKPOINTS,
    MANIFEST,
    PROGRESS,
    FileRecord,
    Stored,
    check_content,
    checkpoints_in,
    digests,
    folder_name,
    open_tensors,
    read_manifest,
    refuse_old,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

# The longest that processes wait for the slowest one's writing, or for the main one's reading of every byte.
PATIENCE = timedelta(hours=2)


class SaveFailed(OSError):
    """A checkpoint could not be written, as every process knows: the error of the disk, with the checkpoint's path."""


class Checkpointer:
    """Saves and loads the checkpoints in `folder`, named checkpoint_model_{step:06d}; every process holds one.

    keep: how many stay.
    asynchronous: `save` returns once the tensors are copied to the host; files are written while training goes on.

    There must be a process group, of one process too. All methods are called by all processes, in the same order, and
    fail on all of them if they fail on one. Writing has a gloo group of its own: it does not meet training's messages.
    What an earlier run left half done in the folder is removed here.

    Raises:
        InputError: `keep` is below 1.
        OSError: leftovers could not be removed.
    """

    def __init__(self, folder: Path, world: World, *, keep: int, asynchronous: bool) -> None:
        if keep < 1:
            raise InputError(f"train.max_checkpoints={keep}: must be at least 1")
        self.folder, self.world, self.keep = folder, world, keep
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint") if asynchronous else None
        self._writing: Future[None] | None = None
        self._damaged: set[Path] = set()
        self._on_main(self._remove_leftovers)

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        *,
        own: Mapping[str, Mapping[str, Tensor]],
        progress: Mapping[str, Any],
        texts: Mapping[str, str],
        retire: bool = True,
    ) -> None:
        """Write everything as it is now; a checkpoint of this step that is there is replaced.

        tensors: live tensors by group and name, the same on all processes: DTensors, or plain tensors that are equal.
        own: tensors of this process alone; each name, unique among all processes, becomes NAME.safetensors.
        progress: becomes progress.json; the same on all processes.
        texts: further files by name; the same on all processes.
        retire: whether checkpoints go that are more than `keep`.

        Raises:
            SaveFailed, RuntimeError: it could not be written (in asynchronous use: an earlier one could not; see
                `wait`). The folder's checkpoints are as they were.
        """
        self.wait()
        flat = flatten(tensors)
        texts = {PROGRESS: json.dumps(progress, indent=2) + "\n", **texts}
        assert all(re.fullmatch(r"\w+", name) for name in own), list(own)
        assert all(Path(name).suffix in (".json", ".yaml", ".txt") and name != MANIFEST for name in texts), list(texts)
        # Copies in any case: safetensors refuses tensors that share memory.
        copies = {name: {key: host_copy(value) for key, value in group.items()} for name, group in own.items()}
        size = sum(tensor.numel() * tensor.itemsize for tensor in flat.values())
        parts = own_parts(flat, self.world)
        if self._thread is None:
            self._write(step, parts, size, copies, texts, retire)
        else:
            parts = {name: part.on_host() for name, part in parts.items()}
            self._writing = self._thread.submit(self._write, step, parts, size, copies, texts, retire)

    def wait(self) -> None:
        """Until what `save` began is on disk.

        Raises:
            SaveFailed, RuntimeError: it could not be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    @property
    def failed(self) -> bool:
        """True if writing in the background has failed on this process, and so does on all: `wait` raises it."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def latest(self) -> Path | None:
        """The newest checkpoint that is whole to the byte, or None where there is none at all; damaged ones are logged.

        Raises:
            InputError: there are some, and all are damaged; or those are of a format that is no longer read.
        """
        self.wait()
        return self._on_main(self._newest_whole)

    def load(self, path: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Fill live tensors in place, whatever number of processes saved them.

        Raises:
            InputError: the checkpoint is damaged, or its groups, names, shapes or dtypes are not exactly those of
                `tensors`. Nothing is filled, unless a file cannot be read to its end.
        """
        self.wait()
        flat = flatten(tensors)
        stored: dict[str, Stored] = {}

        def check() -> None:
            stored.update(open_tensors(path))
            check_match(path, stored, flat)

        self._everywhere(check)
        self._everywhere(partial(read_parts, flat, stored))

    def _write(
        self,
        step: int,
        parts: Mapping[str, Part],
        size: int,
        own: Mapping[str, dict[str, Tensor]],
        texts: Mapping[str, str],
        retire: bool,
    ) -> None:
        path = self.folder / folder_name(step)
        folder = partial_name(path)
        try:
            with unfinished(folder) if self.world.is_main else nullcontext():
                self._on_main(partial(_make_empty, folder))
                written = self._everywhere(partial(self._write_files, folder, parts, own, texts))
                self._on_main(partial(self._finish, path, folder, step, written))
        except BaseException as error:
            if self.world.is_main:
                with suppress(OSError):
                    remove(folder)
            if isinstance(error, OSError):
                reason = f"{error.strerror or error} (it takes {size / 1e9:.3g} GB)"
                raise SaveFailed(error.errno, reason, str(path)) from error
            raise
        if retire:
            self._on_main(partial(self._remove_old, path))

    def _write_files(
        self,
        folder: Path,
        parts: Mapping[str, Part],
        own: Mapping[str, dict[str, Tensor]],
        texts: Mapping[str, str],
    ) -> dict[str, FileRecord]:
        """Write and sync this process's files; gives their sizes and digests."""
        names = write_parts(parts, folder, self.world.rank, copied=self._thread is not None)
        for name, group in own.items():
            names.append(f"{name}.safetensors")
            save_tensors(group, folder / names[-1])
        if self.world.is_main:
            for name, text in texts.items():
                (folder / name).write_text(text, encoding="utf-8")
            names += texts
        for name in names:
            _sync(folder / name)
        return {
            name: FileRecord((folder / name).stat().st_size, digest) for name, digest in digests(folder, names).items()
        }

    def _finish(self, path: Path, folder: Path, step: int, written: list[dict[str, FileRecord]]) -> None:
        files: dict[str, FileRecord] = {}
        for rank, records in enumerate(written):
            assert not files.keys() & records.keys(), f"process {rank}: a name of another: {sorted(records)}"
            for name, record in records.items():
                if not (folder / name).is_file():
                    raise InputError(
                        f"{folder / name}: written by process {rank} and not seen by the main one; "
                        "--logdir must be in a file system that all hosts share"
                    )
                files[name] = record
        listed = {name: record._asdict() for name, record in sorted(files.items())}
        content = {"step": step, "processes": self.world.size, "files": listed}
        (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        _sync(folder / MANIFEST)
        sync_folder(folder)
        if os.path.lexists(path):
            replaced = _hidden(path, "replaced")
            os.rename(path, replaced)
            try:
                move_into_place(folder, path)
            except OSError:
                if not os.path.lexists(path):
                    os.rename(replaced, path)
                raise
            _delete(replaced)
        else:
            move_into_place(folder, path)
        self._damaged.discard(path)
        log.info("%s: %.1f MB", path, sum(record.size for record in files.values()) / 1e6)

    def _remove_old(self, newest: Path) -> None:
        """Keep the newest whole ones and the one just written; damaged ones go when they are older than those."""
        found = checkpoints_of(self.folder)
        kept = [path for path in found if path == newest or not self._is_damaged(path)][: self.keep]
        for path in found[found.index(kept[-1]) + 1 :]:
            if path != newest:
                try:
                    removed = _hidden(path, "removed")
                    os.rename(path, removed)
                except OSError as error:  # somebody else's, or in use
                    log.warning("%s: could not be removed (%s)", path, error)
                else:
                    _delete(removed)

    def _is_damaged(self, path: Path) -> bool:
        if path not in self._damaged:
            try:
                read_manifest(path)  # sizes alone; `latest` has read what was there at the start
            except InputError as error:
                log.warning("%s; not counted among the %d that are kept", error, self.keep)
                self._damaged.add(path)
        return path in self._damaged

    def _remove_leftovers(self) -> None:
        for path in self.folder.glob(f".{CHECKPOINTS}"):
            whole = path.with_name(path.stem[1:])
            if path.suffix == ".replaced" and not os.path.lexists(whole):
                os.rename(path, whole)  # the process died between two renames
            elif path.suffix in (".partial", ".removed", ".replaced"):
                _delete(path)

    def _newest_whole(self) -> Path | None:
        found = checkpoints_of(self.folder)
        for path in found:
            refuse_old(path)
            try:
                size = sum(record.size for record in read_manifest(path).values())
                log.info("%s: reading %.3g GB, to be sure that they are what was written", path, size / 1e9)
                check_content(path)
                return path
            except (InputError, OSError) as error:
                log.warning("damaged checkpoint: %s", error)
                self._damaged.add(path)
        if found:
            raise InputError(
                f"{self.folder}: all {len(found)} checkpoints are damaged; move them away to start from the beginning"
            )
        return None

    def _on_main(self, action: Callable[[], T]) -> T:
        """Run `action` on the main process alone; all get what it gives."""
        results = self._everywhere(action if self.world.is_main else lambda: None)
        return results[0]  # type: ignore[return-value]

    def _everywhere(self, action: Callable[[], T]) -> list[T]:
        """Run `action` on each process; all get what it gives, in order. If it fails on one, this raises on all."""
        value: T | None = None
        failure: Exception | None = None
        try:
            value = action()
        except Exception as error:
            failure = error
        box: list[Any] = [None] * self.world.size
        dist.all_gather_object(box, (value, None if failure is None else _Told.of(failure)), group=self._group)
        if failure is not None:
            raise failure
        for rank, (_, told) in enumerate(box):
            if told is not None:
                raise told.error(rank)
        return [value for value, _ in box]


class _Told(NamedTuple):
    """An error of one process, as the others are told of it."""

    kind: str
    message: str
    number: int | None  # of an OSError
    reason: str
    file: str

    @classmethod
    def of(cls, error: Exception) -> _Told:
        number, reason, file = (getattr(error, name, None) for name in ("errno", "strerror", "filename"))
        kind = "OSError" if isinstance(error, OSError) and number is not None else type(error).__name__
        return cls(kind, str(error), number, str(reason), str(file))

    def error(self, rank: int) -> Exception:
        """Return what the others raise: bad input and the disk's errors stay what they are."""
        if self.kind == InputError.__name__:
            return InputError(self.message)
        if self.kind == "OSError":
            return OSError(self.number, self.reason, self.file)
        return RuntimeError(f"process {rank}: {self.kind}: {self.message}")


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoint folders that a run has written to its own, newest first, whole or not.

    Names that are only like theirs, such as those of copies that somebody has put aside, are none.
    """
    return [path for path in checkpoints_in(folder) if path.name == folder_name(int(path.name.rpartition("_")[2]))]


def _hidden(path: Path, why: str) -> Path:
    """Name the place where a checkpoint goes before it is deleted: half a folder never has a checkpoint's name."""
    hidden = path.with_name(f".{path.name}.{why}")
    remove(hidden)
    return hidden


def _make_empty(folder: Path) -> None:
    try:
        remove(folder)
    except OSError:
        # On NFS, names of files that somebody still has open linger for a while; they are no obstacle.
        if not folder.is_dir() or any(not path.name.startswith(LINGERING) for path in folder.iterdir()):
            raise
    folder.mkdir(parents=True, exist_ok=True)


def _delete(path: Path) -> None:
    try:
        remove(path)
    except OSError as error:  # nothing depends on it; the next start tries again
        log.warning("%s: could not be removed (%s)", path, error)


def _sync(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
