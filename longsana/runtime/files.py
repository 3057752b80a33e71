"""Files that appear whole under their final name or not at all, locks, and what a file system may lack or run out of.

What the file systems of clusters do not all have is done without, and said once: locks, and folders that can be synced.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from longsana.runtime.errors import InputError

log = logging.getLogger(__name__)

LOCK = ".lock"  # in a folder that a command has for itself
LINGERING = ".nfs"  # how names begin of files that were deleted while somebody had them open, on NFS
TRIES = 10  # at a lock; more often no writer finishes in between, and some file systems number files anew at each look

# Lustre without -o flock, NFS without its lock daemon, many file systems in user space.
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
_NO_SYNC = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF, errno.EISDIR, errno.EACCES}
_OF_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}
_said: set[tuple[int, str]] = set()
_unfinished: set[Path] = set()


def expanded(path: str | Path) -> Path:
    """A path that somebody typed, with the home folder for `~`.

    Raises:
        InputError: `~user` of a user that there is not.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{path}: not found: there is no such user") from error


def files_below(folder: Path) -> list[Path]:
    """Every file of a folder and of the folders in it, in order of their names; hidden ones are left out.

    Links to folders are followed, each folder once.

    Raises:
        InputError: there is no such folder, or one in it cannot be read.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give one that is there")

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}); see to its rights") from error

    found: list[Path] = []
    seen = {os.path.realpath(folder)}
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        names, folders[:] = sorted(folders, key=lambda name: (Path(parent, name).is_symlink(), name)), []
        for name in names:  # a folder itself before links to it
            if not name.startswith(".") and (place := os.path.realpath(Path(parent, name))) not in seen:
                seen.add(place)
                folders.append(name)
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    return sorted(found)


def partial_name(path: Path) -> Path:
    """Name the place where `path` is written until it is whole: hidden, beside it, and the same on each run."""
    return path.with_name(f".{path.stem}.partial{path.suffix}")


@contextmanager
def unfinished(partial: Path) -> Iterator[None]:
    """Inside the block this process writes a partial file, which goes if the process has to end at once."""
    _unfinished.add(partial)
    try:
        yield
    finally:
        _unfinished.discard(partial)


def remove_unfinished() -> None:
    """Remove the files and folders that this process is writing, for an end at once."""
    for partial in list(_unfinished):
        with suppress(OSError):
            remove(partial)


def open_exclusive(path: Path) -> BinaryIO:
    """Open an empty file for writing that no other process writes; the lock goes with the file or the process.

    Where the file system has no locks, the file is opened without one, which is said once.

    Raises:
        BlockingIOError: another process is writing it.
        OSError: it is a symbolic link, which is not followed: what it points to is somebody else's.
    """
    for left in reversed(range(TRIES)):
        # Not opened with "wb": that would empty what another process is writing.
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise OSError(errno.ELOOP, "a symbolic link, which is not followed; remove it", str(path)) from error
            raise
        file = os.fdopen(descriptor, "r+b")
        try:
            _lock(file, path)
            if not left or _names(path, file):
                file.truncate()
                return file
        except BlockingIOError as error:
            file.close()
            raise BlockingIOError(f"{path}: another command is writing this file") from error
        except BaseException:
            file.close()
            raise
        file.close()  # its writer has just finished and moved it away
    raise AssertionError("unreachable")


@contextmanager
def hold_folder(folder: Path, option: str) -> Iterator[None]:
    """Have a folder, which `option` names, for this command alone inside the block, by a lock on a file in it.

    The lock goes with this process, however it ends; the file may stay then, and keeps nobody out.

    Raises:
        InputError: another command has the folder; the message says which, and what to do.
    """
    path = folder / LOCK
    try:
        file = open_exclusive(path)
    except BlockingIOError as error:
        raise InputError(
            f"{folder}: in use by another command{_owner(path)}; wait for its end, stop it, or choose another "
            f"{option}; if it is gone all the same (a lock may outlive its host), delete {path}"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another {option}") from error
    with file:
        with suppress(OSError):  # only to tell others
            since = time.strftime("%Y-%m-%d %H:%M")
            # Past the file's buffer: what a full disk leaves in it would fail again when the file is closed.
            write_all(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode())
        try:
            yield
        finally:
            # While it is held: who waits for this name looks again. Not one that somebody made after deleting this.
            with suppress(OSError):
                if _names(path, file):
                    path.unlink()


def move_into_place(partial: Path, path: Path) -> None:
    """Rename a finished, synced file; durable when this returns, where the file system can do that."""
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on disk; on a file system that cannot, say so once."""
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
        _say_once(
            folder,
            "sync",
            f"{folder}: this file system cannot sync folders ({error.strerror}): what was written last may be gone "
            "after a power failure",
        )


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give the block a hidden, empty file to fill, which becomes `path` when the block has ended well.

    Readers see the old file or the new one, also after a crash or a full disk.

    Raises:
        OSError: it could not be written; `path` is as it was.
    """
    path = Path(path)
    partial = partial_name(path)
    with _whole(partial, path):
        partial.write_bytes(b"")
        mode = partial.stat().st_mode  # as other files come out here; some libraries write files for oneself alone
        yield partial
        partial.chmod(mode)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        move_into_place(partial, path)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Give the block the name of a hidden folder to make and fill, which takes the place of `path` when it is done.

    Raises:
        OSError: it could not be written; `path` is as it was.
        InputError: what it replaced before is in use, and lingers.
    """
    path = Path(path).absolute()  # "." has no name
    partial, replaced = partial_name(path), path.with_name(f".{path.name}.replaced")
    with _whole(partial, path):
        remove(partial)
        try:
            yield partial
            if path.exists():
                _remove_replaced(replaced)
                os.rename(path, replaced)
            move_into_place(partial, path)
        except BaseException:
            if replaced.exists() and not path.exists():
                os.rename(replaced, path)
            raise
    with suppress(OSError):
        remove(replaced)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 `text`; readers see the old file or the new one, also after a crash or a full disk.

    Raises:
        OSError: it could not be written; `path` is as it was.
    """
    with whole_file(path) as partial:
        partial.write_bytes(text.encode())


def write_exclusive(path: Path, content: bytes) -> None:
    """Write a file that no other process is writing: whole and synced to disk, or not at all.

    Raises:
        BlockingIOError: another process is writing it.
        OSError: it could not be written; `path` is as it was.
    """
    partial = partial_name(path)
    with open_exclusive(partial) as stream, _whole(partial, path):
        # Past the file's buffer: what a full disk leaves in it would fail again when the file is closed.
        write_all(stream.fileno(), content)
        os.fsync(stream.fileno())
        move_into_place(partial, path)


def write_all(handle: int, content: bytes) -> None:
    """Write bytes to an open file, however many the system takes at a time."""
    left = memoryview(content)
    while left:
        left = left[os.write(handle, left) :]


def check_writable(folder: Path, option: str = "--work_dir") -> None:
    """Make the folder, which `option` names, where it is missing, and make sure that files can be written there.

    Raises:
        InputError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as probe:
            probe.write(b"x")  # a full disk still takes an empty file
    except FileExistsError as error:
        reason = "a link that leads nowhere" if folder.is_symlink() else "a file has this name"
        raise InputError(f"{folder}: cannot be a folder ({reason}); choose another {option}") from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = f"{error.strerror}; {free_space(folder)}" if full else str(error.strerror)
        raise InputError(f"{folder}: cannot be written to ({reason}); choose another {option}") from error


@contextmanager
def naming(path: Path | None) -> Iterator[None]:
    """Errors of the disk inside, which may not say of which file they are, say that they are of `path`.

    Raises:
        OSError: also for what a library made of one: safetensors tells it in words, PyTorch says something else.
    """
    try:
        yield
    except OSError as error:
        if path is not None and error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        if path is None or (number := _disk_errno(error)) is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _disk_errno(error: BaseException | None) -> int | None:
    while error is not None:
        told = re.search(r"\(os error (\d+)\)", str(error))
        number = int(told[1]) if told else getattr(error, "errno", None)
        if number in _OF_DISKS:
            return number
        error = error.__cause__ or error.__context__
    return None


def disk_failure(error: OSError) -> str | None:
    """Say what a disk failed at: file, reason and the space that is left; None for an error of another kind.

    For commands that stop at a full disk, a quota, a disk that has become read-only or is broken: as long as it lasts,
    nothing else will be written either.
    """
    if error.errno not in _OF_DISKS:
        return None
    if error.filename is None:
        return str(error.strerror)
    path = Path(os.fsdecode(error.filename))
    return f"{path}: {error.strerror}; {free_space(path)}"


def free_space(path: Path) -> str:
    """Say what is left on the file system of `path`, which need not exist."""
    there = next((place for place in (path, *path.parents) if place.exists()), Path("/"))
    usage = shutil.disk_usage(there)
    return f"{usage.free / 1e9:.3g} GB of {usage.total / 1e9:.3g} GB are free"


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, if it is there; of a link the link alone.

    Raises:
        OSError: some of it could not be removed.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def _remove_replaced(folder: Path) -> None:
    try:
        remove(folder)
    except OSError as error:
        if error.errno != errno.ENOTEMPTY and error.errno != errno.EBUSY:
            raise
        raise InputError(
            f"{folder}: is in use, and cannot be removed; end what reads it, or write elsewhere"
        ) from error


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _say_once(
            path.parent,
            "locks",
            f"{path.parent}: this file system has no locks (flock: {error.strerror}): two commands that write here at "
            "the same time will not notice each other",
        )


def _names(path: Path, file: BinaryIO) -> bool:
    """Tell whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _owner(path: Path) -> str:
    try:
        owner = path.read_text(encoding="utf-8", errors="replace").strip()[:200]
    except OSError:
        return ""
    return f" ({owner})" if owner else ""


def _say_once(folder: Path, lacking: str, message: str) -> None:
    """Warn of what a file system lacks, once for each of them."""
    key = (folder.stat().st_dev, lacking)
    if key not in _said:
        _said.add(key)
        log.warning("%s", message)


@contextmanager
def _whole(partial: Path, path: Path) -> Iterator[None]:
    """Blame what goes wrong inside on `path`, of which nothing half-written stays."""
    with naming(path), unfinished(partial):
        try:
            yield
        except BaseException:
            with suppress(OSError):
                remove(partial)
            raise
