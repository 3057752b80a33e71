"""A folder of saved states of live videos, from which a restarted studio goes on."""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from longsana.runtime.errors import InputError
from longsana.runtime.files import check_writable, hold_folder, partial_name
from longsana.sampling.continuation import Continuation

ID = re.compile(r"[0-9a-f]{32}")
SUFFIX = ".safetensors"


class Snapshots:
    """Saved states by random ids, which are no paths, whole or not there; a bounded number of them, the oldest go.

    Files are those of `Continuation.save`, without the decoder's memory, which is rebuilt from the last latents.

    most, most_bytes: files, and their bytes, that there are after a new one.
    """

    def __init__(self, folder: Path, most: int, most_bytes: int) -> None:
        self.folder, self._most, self._most_bytes = folder, most, most_bytes
        self._lock = threading.Lock()
        for left in folder.glob(partial_name(Path(f"*{SUFFIX}")).name):  # of a process that was killed
            left.unlink(missing_ok=True)
        self._make_room(0)

    @classmethod
    @contextmanager
    def opened(cls, folder: Path, most: int, most_bytes: int) -> Iterator[Snapshots]:
        """Have a folder, made if it is missing, for this process alone inside the block.

        Raises:
            InputError: it cannot be written to, or another process has it.
        """
        check_writable(folder, "folder of snapshots")
        with hold_folder(folder, "folder of snapshots"):
            yield cls(folder, most, most_bytes)

    def save(self, state: Continuation) -> str:
        """Save a state; returns its id.

        Raises:
            OSError: the disk is full, or failed; nothing of it is left.
        """
        with self._lock:
            self._make_room(1)
            id = secrets.token_hex(16)
            state.save(self._path(id), "latents")
            self._make_room(0, newest=id)
            return id

    def load(self, id: str) -> Continuation:
        """A state that was saved, on the host.

        Raises:
            InputError: there is none of this id, or its file is damaged.
        """
        path = self._path(id)
        if not path.is_file():
            raise InputError(f"snapshot={id}: there is none of this id; it may have made room for a newer one")
        try:
            return Continuation.load(path)
        except InputError as error:  # where the folder lies is nobody's business
            raise InputError(str(error).replace(str(path), f"snapshot={id}")) from error

    def remove(self, id: str) -> None:
        """Remove a state, if it is there. Raises InputError for what is no id."""
        with suppress(OSError):
            self._path(id).unlink(missing_ok=True)

    def sizes(self) -> list[int]:
        """Bytes of each file, the oldest first."""
        return [size for _, size, _ in self._files()]

    def _path(self, id: str) -> Path:
        if not isinstance(id, str) or ID.fullmatch(id) is None:
            raise InputError(f"snapshot={id!r:.60}: must be the id of one, 32 digits from 0 to f")
        return self.folder / f"{id}{SUFFIX}"

    def _files(self) -> list[tuple[int, int, Path]]:
        found = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            if ID.fullmatch(path.stem):
                with suppress(FileNotFoundError):
                    status = path.stat()
                    found.append((status.st_mtime_ns, status.st_size, path))
        return sorted(found)

    def _make_room(self, coming: int, newest: str = "") -> None:
        files = self._files()
        total = sum(size for _, size, _ in files)
        while files and (len(files) + coming > self._most or total > self._most_bytes) and files[0][2].stem != newest:
            _, size, path = files.pop(0)
            total -= size
            with suppress(OSError):
                path.unlink(missing_ok=True)
