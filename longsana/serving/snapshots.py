"""A folder of saved states of live videos, from which a restarted studio goes on."""

from __future__ import annotations

import re
import secrets
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from longsana.runtime.errors import InputError
from longsana.runtime.files import check_writable, hold_folder, partial_name
from longsana.sampling.continuation import Continuation

ID = re.compile(r"[0-9a-f]{32}")
SUFFIX = ".safetensors"
RACES = 3
"""Times that a file is looked for which another process of the fleet may just be moving, or removing."""


class _Owner(NamedTuple):
    """Whose a snapshot is. session: its id; "": one of before this process. asked: somebody asked for it."""

    session: str = ""
    asked: bool = False


class _File(NamedTuple):
    """A snapshot, sorted by the time at which it was written."""

    written: int
    size: int
    path: Path

    @property
    def id(self) -> str:
        return self.path.stem


class Snapshots:
    """Saved states by random ids, which are no paths, whole or not there; a bounded number of them.

    Where there are too many, the session that has most of them loses one: the oldest that was asked for, or else the
    oldest. So none loses one to a session that has more. Those of before this process count as one session's.

    Files are those of `Continuation.save`, without the decoder's memory, which is rebuilt from the last latents.

    most, most_bytes: files, and their bytes, that there are after a new one. most_asked: of one session, of those that
    were asked for. fleet: this folder is one of several in a common one, each of a process that can have the snapshots
    of all. What is left in the folder, of one process or of a fleet, by those that are gone becomes this one's.
    """

    def __init__(self, folder: Path, most: int, most_bytes: int, most_asked: int = 16, *, fleet: bool = False) -> None:
        self.folder, self._most, self._most_bytes, self._most_asked = folder, most, most_bytes, most_asked
        self._fleet = fleet
        self._owners: dict[str, _Owner] = {}
        self._lock = threading.Lock()
        self._inherit()
        for left in folder.glob(partial_name(Path(f"*{SUFFIX}")).name):  # of a process that was killed
            left.unlink(missing_ok=True)
        self._make_room()

    @classmethod
    @contextmanager
    def opened(
        cls, folder: Path, most: int, most_bytes: int, most_asked: int = 16, *, fleet: bool = False
    ) -> Iterator[Snapshots]:
        """Have a folder, made if it is missing, for this process alone inside the block.

        Raises:
            InputError: it cannot be written to, or another process has it.
        """
        check_writable(folder, "folder of snapshots")
        with hold_folder(folder, "folder of snapshots"):
            yield cls(folder, most, most_bytes, most_asked, fleet=fleet)

    def save(self, state: Continuation, session: str, *, asked: bool = True) -> str:
        """Save a state of a session, which somebody asked for or which is saved of itself; returns its id.

        Raises:
            OSError: the disk is full, or failed; nothing of it is left.
        """
        with self._lock:
            owner, id = _Owner(session, asked), secrets.token_hex(16)
            self._make_room(owner)
            state.save(self._path(id), "latents")
            self._owners[id] = owner
            self._make_room(newest=id)
            return id

    def load(self, id: str) -> Continuation:
        """A state that was saved, on the host.

        Raises:
            InputError: there is none of this id, or its file is damaged.
        """
        for _ in range(RACES):
            path = self._found(id)
            if path is None:
                break
            try:
                return Continuation.load(path)
            except (InputError, OSError) as error:
                if path.is_file():  # where the folder lies is nobody's business
                    raise InputError(str(error).replace(str(path), f"snapshot={id}")) from error
        raise InputError(f"snapshot={id}: there is none of this id; it may have made room for a newer one")

    def remove(self, id: str) -> None:
        """Remove a state, if it is there. Raises InputError for what is no id."""
        if (path := self._found(id)) is not None:
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def sizes(self) -> list[int]:
        """Bytes of each file, the oldest first."""
        return [file.size for file in self._files()]

    def _path(self, id: str) -> Path:
        if not isinstance(id, str) or ID.fullmatch(id) is None:
            raise InputError(f"snapshot={id!r:.60}: must be the id of one, 32 digits from 0 to f")
        return self.folder / f"{id}{SUFFIX}"

    def _found(self, id: str) -> Path | None:
        """The file of an id, here or, in a fleet, beside."""
        path = self._path(id)
        places = [path, *self._common.glob(f"*/{path.name}")] if self._fleet else [path]
        return next((place for place in places if place.is_file()), None)

    @property
    def _common(self) -> Path:
        """The folder of all processes; one that is alone has it."""
        return self.folder.parent if self._fleet else self.folder

    def _inherit(self) -> None:
        """Take over what is in the folders of processes that are gone."""
        for folder in [self._common, *self._common.iterdir()]:
            if folder == self.folder or not folder.is_dir():
                continue
            with suppress(InputError, OSError):  # it is in use, or another one inherits too
                with hold_folder(folder, "folder of snapshots"):
                    for path in folder.glob(f"*{SUFFIX}"):
                        if ID.fullmatch(path.stem):
                            path.rename(self.folder / path.name)
                    for left in folder.glob(partial_name(Path(f"*{SUFFIX}")).name):
                        left.unlink(missing_ok=True)
                if folder != self._common:
                    folder.rmdir()

    def _files(self) -> list[_File]:
        found = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            if ID.fullmatch(path.stem):
                with suppress(FileNotFoundError):
                    status = path.stat()
                    found.append(_File(status.st_mtime_ns, status.st_size, path))
        return sorted(found)

    def _make_room(self, coming: _Owner | None = None, newest: str = "") -> None:
        """Remove what is too much, with one that is to come, or else without the newest, which stays."""
        files = self._files()
        self._owners = {file.id: self._owners.get(file.id, _Owner()) for file in files}
        while gone := self._too_much([file for file in files if file.id != newest], files, coming):
            files.remove(gone)
            del self._owners[gone.id]
            with suppress(OSError):
                gone.path.unlink(missing_ok=True)

    def _too_much(self, old: list[_File], files: list[_File], coming: _Owner | None) -> _File | None:
        """The one of the old files that goes next; None if all may stay."""
        owners = [self._owners[file.id] for file in files] + ([] if coming is None else [coming])
        if coming is not None and coming.asked and owners.count(coming) > self._most_asked:
            return next((file for file in old if self._owners[file.id] == coming), None)
        too_many = len(owners) > self._most
        if not too_many and sum(file.size for file in files) <= self._most_bytes:
            return None
        has = Counter(owner.session for owner in owners)
        if not too_many:
            has = Counter()
            for file in files:
                has[self._owners[file.id].session] += file.size
        if not old:
            return None
        loser = max((self._owners[file.id].session for file in old), key=lambda session: has[session])
        own = [file for file in old if self._owners[file.id].session == loser]
        return next((file for file in own if self._owners[file.id].asked), own[0])
