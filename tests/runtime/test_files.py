"""Files that appear whole, locks, and the file systems of clusters: without locks, without synced folders, full."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from longsana.runtime import files
from longsana.runtime.errors import InputError
from longsana.runtime.files import (
    LOCK,
    atomic_write_text,
    check_writable,
    disk_failure,
    files_below,
    hold_folder,
    move_into_place,
    open_exclusive,
    remove,
    write_exclusive,
)
from tests.training.conftest import ROOT


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_said", set())


def failing(number: int) -> Callable[..., Any]:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


HOLDER = """
import sys, time
from pathlib import Path
from longsana.runtime.files import hold_folder
with hold_folder(Path(sys.argv[1]), "--logdir"):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has tmp_path."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_folder_is_had_by_one_command_and_free_when_that_is_gone(holder, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught, hold_folder(tmp_path, "--logdir"):
        pass
    message = str(caught.value)
    assert f"{tmp_path}: in use by another command (process {holder.pid} on " in message
    assert "--logdir" in message and str(tmp_path / LOCK) in message and "\n" not in message
    assert (tmp_path / LOCK).exists()
    # However it goes: its lock goes with it, though its file stays.
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK).exists()
    with hold_folder(tmp_path, "--logdir"):
        assert f"process {os.getpid()} " in (tmp_path / LOCK).read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_does_not_keep_a_folder_from_its_command(tmp_path: Path, limited) -> None:
    """Nor from a word of its own, where the disk is met next."""
    with limited(0), hold_folder(tmp_path, "--logdir"):
        assert (tmp_path / LOCK).read_bytes() == b""
        with pytest.raises(InputError, match=r"in use by another command;"), hold_folder(tmp_path, "--logdir"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_outlived_its_host_is_left_behind_by_deleting_its_file(holder, tmp_path: Path) -> None:
    (tmp_path / LOCK).unlink()
    with hold_folder(tmp_path, "--logdir"):
        # The first one must not take the second one's lock away when it ends.
        os.kill(holder.pid, signal.SIGINT)
        holder.wait()
        assert (tmp_path / LOCK).exists()
        with pytest.raises(InputError, match="in use"), hold_folder(tmp_path, "--logdir"):
            pass


@pytest.mark.parametrize("there", [True, False])
def test_a_link_in_the_place_of_a_partial_file_is_not_followed(tmp_path: Path, there: bool) -> None:
    target = tmp_path / "target"
    if there:
        target.write_text("precious")
    (tmp_path / "file").symlink_to(target)
    with pytest.raises(OSError, match="a symbolic link, which is not followed; remove it") as caught:
        open_exclusive(tmp_path / "file")
    assert caught.value.filename == str(tmp_path / "file")
    assert target.exists() == there and (not there or target.read_text() == "precious")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_without_locks_it_goes_on_and_says_so_once(number: int, tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(number))
    with hold_folder(tmp_path, "--logdir"):
        for name in ("a", "b"):
            write_exclusive(tmp_path / name, b"content")
            assert (tmp_path / name).read_bytes() == b"content"
    (message,) = caplog.messages
    assert "no locks" in message and os.strerror(number) in message and str(tmp_path) in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_lock_that_fails_otherwise_is_an_error(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        open_exclusive(tmp_path / "file")
    with pytest.raises(InputError, match="Input/output"), hold_folder(tmp_path, "--logdir"):
        pass


def test_files_that_are_numbered_anew_at_each_look_are_opened_all_the_same(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os.path, "samestat", lambda *_: False)
    with open_exclusive(tmp_path / "file") as file:
        file.write(b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_folders_that_cannot_be_synced(number: int, tmp_path: Path, monkeypatch, caplog) -> None:
    fsync = os.fsync

    def of_files_alone(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", of_files_alone)
    for text in ("one", "two"):
        atomic_write_text(tmp_path / "file", text)
        assert (tmp_path / "file").read_text() == text
    (message,) = caplog.messages
    assert "cannot sync folders" in message
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    (tmp_path / "partial").write_text("")
    with pytest.raises(OSError, match="Input/output"):
        move_into_place(tmp_path / "partial", tmp_path / "other")


WRITERS: list[Callable[[Path], None]] = [
    lambda path: atomic_write_text(path, "x" * 5000),
    lambda path: write_exclusive(path, b"x" * 5000),
]


@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_leaves_what_was_there_and_is_blamed_on_the_file(write, tmp_path: Path, limited) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with limited(1000), pytest.raises(OSError, match="File too large") as caught:
        write(path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "before")]
    told = disk_failure(caught.value)
    assert told is not None and told.startswith(f"{path}: File too large; ")
    assert told.endswith(" GB are free") and "\n" not in told


def test_other_errors_are_none_of_the_disk() -> None:
    assert disk_failure(ConnectionResetError(errno.ECONNRESET, "reset")) is None
    assert disk_failure(FileNotFoundError(errno.ENOENT, "no such file", "x")) is None
    assert disk_failure(OSError("text alone")) is None
    told = disk_failure(OSError(errno.EDQUOT, "Disk quota exceeded", "/no/such/folder/file"))
    assert told is not None and told.startswith("/no/such/folder/file: Disk quota exceeded; ")


SMALL_DISK = """
import sys
from pathlib import Path
from longsana.runtime.errors import InputError
from longsana.runtime.files import check_writable
folder = Path(sys.argv[1])
try:
    check_writable(folder, "--logdir")
    print("writable")
except InputError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("mount", "words"),
    [
        ("mount -t tmpfs -o size=16k t {0} && head -c 16384 /dev/zero > {0}/file", "No space left on device; 0 GB of"),
        ("mount -t tmpfs -o ro t {0}", "Read-only file system"),
        ("mount -t tmpfs t {0}", "writable"),
    ],
)
def test_mounts_that_nothing_can_be_written_to(mount: str, words: str, tmp_path: Path) -> None:
    """A full one still takes an empty file."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("mounts of one's own are not allowed here")
    command = f"{mount.format(tmp_path)} && {sys.executable} -c '{SMALL_DISK}' {tmp_path}"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    assert words in line
    assert line == "writable" or (line.startswith(f"{tmp_path}: ") and line.endswith("choose another --logdir"))


def test_what_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"a file has this name.*--logdir"):
        check_writable(tmp_path / "file", "--logdir")
    with pytest.raises(InputError, match="leads nowhere"):
        check_writable(tmp_path / "link", "--logdir")
    with pytest.raises(InputError, match="Not a directory"):
        check_writable(tmp_path / "file" / "folder", "--logdir")
    (tmp_path / "nowhere").mkdir()
    check_writable(tmp_path / "link", "--logdir")


def test_links_to_folders_are_followed_each_folder_once(tmp_path: Path) -> None:
    (tmp_path / "all/films/more").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("all/films/a.mp4", "all/films/more/b.mp4", "elsewhere/c.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "all/again").symlink_to("films")
    (tmp_path / "all/films/more/up").symlink_to("../..")
    (tmp_path / "all/linked").symlink_to(tmp_path / "elsewhere")
    found = files_below(tmp_path / "all")
    assert [path.relative_to(tmp_path / "all").as_posix() for path in found] == [
        "films/a.mp4",
        "films/more/b.mp4",
        "linked/c.mp4",
    ]


def test_of_a_link_the_link_alone_is_removed(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("content")
    for name, target in (("one", "folder"), ("two", "nowhere"), ("three", "folder/file")):
        (tmp_path / name).symlink_to(tmp_path / target)
        remove(tmp_path / name)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "file"]
    remove(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []
    remove(tmp_path / "folder")  # it is gone already


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    with open_exclusive(tmp_path / "file") as first:
        first.write(b"first")
        first.flush()
        with pytest.raises(BlockingIOError, match="another command is writing"):
            open_exclusive(tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == b"first"


def test_the_owner_says_since_when(tmp_path: Path) -> None:
    with hold_folder(tmp_path, "--logdir"):
        assert (tmp_path / LOCK).read_text().strip().endswith(time.strftime("since %Y-%m-%d %H:%M"))
