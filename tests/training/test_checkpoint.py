"""Checkpoints by one process here, and by two in checkpoint_worker.py."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from longsana.runtime.distributed import World
from longsana.runtime.errors import InputError
from longsana.runtime.files import disk_failure, remove
from longsana.training import checkpoint, parts
from longsana.training.checkpoint import Checkpointer, SaveFailed
from longsana.weights.checkpoint_folder import (
    MANIFEST,
    TENSOR_FILES,
    Stored,
    open_tensors,
    own_names,
    read_own,
    read_progress,
)
from tests.forks import Forks
from tests.training.checkpoint_worker import Run, assert_equal, save

SHARD = "shard-00001-model-00001-of-00001.safetensors"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = World()
    world.connect("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", alone=True)
    yield world
    world.disconnect()


@pytest.fixture
def make(world: World, tmp_path: Path) -> Callable[..., Checkpointer]:
    """As a run makes it when it starts."""

    def build(keep: int = 3, asynchronous: bool = False) -> Checkpointer:
        return Checkpointer(tmp_path, world, keep=keep, asynchronous=asynchronous)

    return build


def at(folder: Path, step: int) -> Path:
    return folder / f"checkpoint_model_{step:06d}"


def there(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder that holds nothing else."""
    names = sorted(path.name for path in folder.iterdir())
    assert all(name.startswith("checkpoint_model_") for name in names), names
    return [int(name[-6:]) for name in names]


def loaded(checkpointer: Checkpointer, path: Path) -> dict[str, Tensor]:
    run = Run(seed=9)
    checkpointer.load(path, run.tensors())
    return run.whole()


WORKER = "tests.training.checkpoint_worker"


def test_two_processes(world: World, forks: Forks, tmp_path: Path) -> None:
    """Resharding both ways, resume, asynchronous writing, a failure of one; and kill -9 in the middle of a save.

    And three processes read what two and one have written, and write what one reads.
    """
    one = Run(seed=0).train(0, 1)
    save(Checkpointer(tmp_path / "one", world, keep=1, asynchronous=False), 2, one)

    parts = ("reshard", "resume", "asynchronous", "replicas", "fail_on_one", "save_forever")
    processes = forks.launch(2, WORKER, [tmp_path, *parts])
    deadline = time.monotonic() + 120
    unfinished = tmp_path / "two" / ".checkpoint_model_000004.partial"

    def running() -> bool:
        return all(process.returncode is None for process in processes)

    while running() and not list(unfinished.glob("shard-00002-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    begun = running() and list(unfinished.glob("shard-00002-*"))
    for process in processes:
        process.send_signal(signal.SIGKILL)
    output = "".join(process.finish() for process in processes)
    assert begun, output

    assert_equal(torch.load(tmp_path / "one_by_2.pt", weights_only=True), one.whole())
    two = Checkpointer(tmp_path / "two", world, keep=2, asynchronous=False)
    assert there(tmp_path / "two") == [2]
    assert two.latest() == at(tmp_path / "two", 2)
    saved = torch.load(tmp_path / "two.pt", weights_only=True)
    assert_equal(loaded(two, at(tmp_path / "two", 2)), saved)
    assert_equal(loaded(two, at(tmp_path / "replicas", 2)), saved)

    for process in forks.launch(3, WORKER, [tmp_path, "reshard", "asynchronous"]):
        output = process.finish()
        assert process.returncode == 0, output
    for name, expected in (("one", one.whole()), ("two", saved), ("async", saved)):
        assert_equal(torch.load(tmp_path / f"{name}_by_3.pt", weights_only=True), expected)
    assert len(list(at(tmp_path / "async3", 2).glob(TENSOR_FILES))) == 3
    assert_equal(loaded(two, at(tmp_path / "async3", 2)), torch.load(tmp_path / "async3.pt", weights_only=True))


def test_resume_is_uninterrupted(make: Callable[..., Checkpointer], tmp_path: Path) -> None:
    run = Run(seed=0).train(0, 1)
    save(make(), 2, run)
    other = Run(seed=1)
    checkpointer = make()
    assert checkpointer.latest() == at(tmp_path, 2)
    checkpointer.load(at(tmp_path, 2), other.tensors())
    assert_equal(other.whole(), run.whole())
    assert_equal(other.train(2, 3).whole(), run.train(2, 3).whole())


def test_the_same_state_makes_the_same_files(make: Callable[..., Checkpointer], tmp_path: Path) -> None:
    save(make(), 2, Run(0).train(0, 1))
    manifest = (at(tmp_path, 2) / "manifest.json").read_text()
    shutil.rmtree(at(tmp_path, 2))
    checkpointer = make(asynchronous=True)
    save(checkpointer, 2, Run(0).train(0, 1))
    checkpointer.wait()
    assert (at(tmp_path, 2) / "manifest.json").read_text() == manifest


def test_everything_comes_back(make: Callable[..., Checkpointer], tmp_path: Path) -> None:
    base = torch.arange(6.0)
    own: dict[str, dict[str, Tensor]] = {
        "stream_00003": {"state": base[:4], "part_of_state": base[2:].view(2, 2).T, "frames": torch.tensor(21)},
        "rng_00000": {"cpu": torch.get_rng_state()},
        "empty": {},
    }
    progress = {"step": 7, "samples": {"generator": 12}, "loss": 0.1, "none": None}
    save(make(), 7, Run(0), own=own, progress=progress, texts={"config.yaml": "model: ü\n", "notes.txt": ""})
    assert read_progress(at(tmp_path, 7)) == progress
    assert own_names(at(tmp_path, 7)) == ["empty", "rng_00000", "stream_00003"]
    for name, tensors in own.items():
        assert_equal(read_own(at(tmp_path, 7), name), tensors)
    assert "stream_00004" not in own_names(at(tmp_path, 7))
    assert (at(tmp_path, 7) / "config.yaml").read_text(encoding="utf-8") == "model: ü\n"
    manifest = json.loads((at(tmp_path, 7) / "manifest.json").read_text())
    assert {*manifest["files"], "manifest.json"} == {path.name for path in at(tmp_path, 7).iterdir()}


def test_asynchronous_saves_what_was_there(
    make: Callable[..., Checkpointer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    genuine = checkpoint.write_parts

    def held(*arguments: Any, **options: Any) -> Any:
        assert go.wait(20)
        return genuine(*arguments, **options)

    monkeypatch.setattr(checkpoint, "write_parts", held)
    checkpointer, run, own = make(asynchronous=True), Run(0).train(0, 1), torch.zeros(3)
    expected = run.whole()
    save(checkpointer, 2, run, own={"stream": {"state": own}})
    for tensors in run.tensors().values():
        for tensor in tensors.values():
            tensor.detach().fill_(torch.nan)
    own.fill_(torch.nan)
    assert not at(tmp_path, 2).exists()
    go.set()
    checkpointer.wait()
    assert_equal(loaded(checkpointer, at(tmp_path, 2)), expected)
    assert_equal(read_own(at(tmp_path, 2), "stream"), {"state": torch.zeros(3)})


@pytest.mark.gpu
@pytest.mark.parametrize("asynchronous", [False, True])
def test_from_the_gpu_and_back(asynchronous: bool, make: Callable[..., Checkpointer], tmp_path: Path) -> None:
    """Also to the host: the device is no part of a checkpoint."""
    checkpointer, run = make(asynchronous=asynchronous), Run(0, "cuda").train(0, 1)
    own = torch.randn(5, device="cuda")
    expected = run.whole()
    save(checkpointer, 2, run, own={"stream": {"state": own}})
    if asynchronous:
        own.fill_(torch.nan)
        run.train(2, 3)
    checkpointer.wait()
    for device in ("cuda", "cpu"):
        other = Run(1, device)
        checkpointer.load(at(tmp_path, 2), other.tensors())
        found = other.whole()
        assert found["generator/0.weight"].device.type == device
        assert_equal({name: value.cpu() for name, value in found.items()}, {k: v.cpu() for k, v in expected.items()})
    stream = read_own(at(tmp_path, 2), "stream")
    assert stream["state"].device.type == "cpu" and stream["state"].isfinite().all()


@pytest.mark.parametrize("how", ["wait", "save", "latest"])
def test_an_error_in_the_background_is_heard(
    how: str, make: Callable[..., Checkpointer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    checkpointer, run = make(asynchronous=True), Run(0)
    save(checkpointer, 1, run)
    checkpointer.wait()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_tensors", full_disk)
        save(checkpointer, 2, run)
        with pytest.raises(OSError, match="No space left"):
            save(checkpointer, 3, run) if how == "save" else getattr(checkpointer, how)()
    assert there(tmp_path) == [1]
    checkpointer.wait()  # told once
    save(checkpointer, 4, run)
    assert checkpointer.latest() == at(tmp_path, 4)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_full_disk(
    asynchronous: bool, make: Callable[..., Checkpointer], tmp_path: Path, limited: Callable[..., Any]
) -> None:
    """A real one, as far as the tensors' file goes: files may not grow beyond some bytes."""
    checkpointer, run = make(keep=1, asynchronous=asynchronous), Run(0)
    save(checkpointer, 1, run)
    checkpointer.wait()
    size = next(at(tmp_path, 1).glob(TENSOR_FILES)).stat().st_size
    with limited(size // 2):
        if asynchronous:
            save(checkpointer, 2, run)
        with pytest.raises(SaveFailed, match="File too large") as caught:
            checkpointer.wait() if asynchronous else save(checkpointer, 2, run)
        assert not checkpointer.failed, "told once"
    assert (disk_failure(caught.value) or "").startswith(f"{at(tmp_path, 2)}: File too large (it takes ")
    assert there(tmp_path) == [1]
    assert make().latest() == at(tmp_path, 1)
    save(checkpointer, 2, run)
    assert checkpointer.latest() == at(tmp_path, 2)


@pytest.mark.parametrize("part", ["own", "texts"])
def test_a_full_disk_met_by_the_files_beside_the_tensors(
    part: str, make: Callable[..., Checkpointer], tmp_path: Path, limited: Callable[..., Any]
) -> None:
    """safetensors has an error of its own for it."""
    checkpointer, run = make(), Run(0)
    save(checkpointer, 1, run)
    large: dict[str, Any] = (
        {"own": {"stream": {"state": torch.zeros(1 << 20)}}} if part == "own" else {"texts": {"a.txt": "x" * (1 << 20)}}
    )
    with limited(1 << 19), pytest.raises(SaveFailed, match=r"File too large.*checkpoint_model_000002"):
        save(checkpointer, 2, run, **large)
    assert there(tmp_path) == [1]
    save(checkpointer, 2, run, **large)
    assert there(tmp_path) == [1, 2]


def missing(folder: Path) -> None:
    (folder / "rng_00000.safetensors").unlink()


def short(folder: Path) -> None:
    file = folder / SHARD
    file.write_bytes(file.read_bytes()[:-1])


def changed(folder: Path) -> None:
    file = folder / SHARD
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def garbled_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"files": ["a"]}')


def nothing(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize("damage", [missing, short, changed, no_manifest, garbled_manifest, nothing])
def test_a_damaged_one_is_told_of_and_the_one_before_is_used(
    damage: Callable[[Path], None],
    make: Callable[..., Checkpointer],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = Run(0)
    for step in (1, 2, 3):
        save(make(keep=3), step, run.train(step))
    damage(at(tmp_path, 3))
    checkpointer = make(keep=2)
    assert checkpointer.latest() == at(tmp_path, 2)
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert str(at(tmp_path, 3)) in warning
    # It does not count among the two that stay, and is replaced when its step comes again.
    save(checkpointer, 4, run)
    assert there(tmp_path) == [2, 3, 4]
    save(checkpointer, 3, run)
    assert make().latest() == at(tmp_path, 4)
    assert_equal(loaded(checkpointer, at(tmp_path, 3)), run.whole())


def test_only_damaged_ones_are_no_fresh_start(make: Callable[..., Checkpointer], tmp_path: Path) -> None:
    assert make().latest() is None
    save(make(), 1, Run(0))
    changed(at(tmp_path, 1))
    with pytest.raises(InputError, match="all 1 checkpoints are damaged"):
        make().latest()


def test_retention(make: Callable[..., Checkpointer], tmp_path: Path) -> None:
    checkpointer, run = make(keep=2), Run(0)
    for step in (2, 4, 6, 1_000_000):
        save(checkpointer, step, run)
    assert [path.name[17:] for path in sorted(tmp_path.iterdir())] == ["000006", "1000000"]
    assert checkpointer.latest() == tmp_path / "checkpoint_model_1000000"
    save(checkpointer, 3, run)  # the one just written stays, old as it is
    assert at(tmp_path, 3).exists()
    with pytest.raises(InputError, match="max_checkpoints=0"):
        make(keep=0)


def test_saving_a_step_again_replaces_it(
    make: Callable[..., Checkpointer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(0)
    save(make(), 2, run)
    first = run.whole()
    save(make(), 2, run.train(0))
    assert_equal(loaded(make(), at(tmp_path, 2)), run.whole())
    assert there(tmp_path) == [2]
    with monkeypatch.context() as patch:  # the rename fails: the old one is there again
        patch.setattr(checkpoint, "move_into_place", lambda *_: (_ for _ in ()).throw(OSError("no")))
        with pytest.raises(OSError, match="no"):
            save(make(), 2, Run(5))
    assert_equal(loaded(make(), at(tmp_path, 2)), run.whole())
    assert not torch.equal(first["generator/0.weight"], run.whole()["generator/0.weight"])


def test_leftovers(make: Callable[..., Checkpointer], tmp_path: Path) -> None:
    """Of a process that died in a save, in a deletion, and between the two renames of a replacement."""
    save(make(), 2, Run(0))
    for name in (".checkpoint_model_000004.partial", ".checkpoint_model_000001.removed"):
        shutil.copytree(at(tmp_path, 2), tmp_path / name)
    shutil.copytree(at(tmp_path, 2), tmp_path / ".checkpoint_model_000002.replaced")
    at(tmp_path, 2).rename(tmp_path / ".checkpoint_model_000003.replaced")
    (tmp_path / ".other").write_text("")
    checkpointer = make()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(".other", "checkpoint_model_000002", "checkpoint_model_000003")
    ]
    assert checkpointer.latest() == at(tmp_path, 3)


def test_none_is_retired_where_that_is_asked(make: Callable[..., Checkpointer], tmp_path: Path) -> None:
    checkpointer, run = make(keep=2), Run(0)
    for step in range(5):
        save(checkpointer, step, run, retire=step == 4)
        assert there(tmp_path) == ([*range(step + 1)] if step < 4 else [3, 4])


def test_links_are_unlinked_and_what_they_lead_to_stays(
    make: Callable[..., Checkpointer], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A checkpoint that was moved to a larger disk, with a link in its place: retired, replaced, and left over."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    checkpointer, run = make(keep=2), Run(0)
    for step in (1, 2):
        save(checkpointer, step, run)
        at(tmp_path, step).rename(elsewhere / str(step))
        at(tmp_path, step).symlink_to(elsewhere / str(step))
    assert make().latest() == at(tmp_path, 2)
    save(checkpointer, 2, run)  # again
    assert not at(tmp_path, 2).is_symlink() and checkpointer.latest() == at(tmp_path, 2)
    save(checkpointer, 3, run)  # 1 goes
    at(tmp_path, 4).symlink_to(elsewhere / "gone")
    save(checkpointer, 4, run)
    assert there(tmp_path) == [3, 4]
    for name in (".checkpoint_model_000001.removed", ".checkpoint_model_000005.partial"):
        (tmp_path / name).symlink_to(elsewhere / "1")
    assert make().latest() == at(tmp_path, 4)
    assert there(tmp_path) == [3, 4]
    assert [len(list((elsewhere / name).iterdir())) for name in "12"] == [len(list(at(tmp_path, 4).iterdir()))] * 2


def test_what_is_not_a_checkpoint_of_the_run_is_left_alone(make: Callable[..., Checkpointer], tmp_path: Path) -> None:
    checkpointer, run = make(keep=1), Run(0)
    save(checkpointer, 7, run)
    names = ["checkpoint_model_best", "checkpoint_model_before_it_broke_000009", "checkpoint_model_000007.tar", "notes"]
    for name in names[:2]:
        shutil.copytree(at(tmp_path, 7), tmp_path / name)
    for name in names[2:]:
        (tmp_path / name).write_text("a user's")
    assert checkpointer.latest() == at(tmp_path, 7)
    save(checkpointer, 8, run)
    assert make().latest() == at(tmp_path, 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "checkpoint_model_000008"])


def test_what_cannot_be_removed_costs_no_checkpoint(
    make: Callable[..., Checkpointer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Names that linger on NFS, a checkpoint of another user's, or one that somebody has mounted."""
    checkpointer, run = make(keep=1), Run(0)
    save(checkpointer, 1, run)
    shutil.copytree(at(tmp_path, 1), tmp_path / ".checkpoint_model_000000.removed")

    def busy(*_: Any) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "remove", busy)
        checkpointer = make(keep=1)
    with monkeypatch.context() as patch:
        rename = os.rename
        patch.setattr(os, "rename", lambda old, new: busy() if old == at(tmp_path, 1) else rename(old, new))
        save(checkpointer, 2, run)
    assert [message.split(":")[0] for message in caplog.messages if "could not be removed" in message] == [
        str(tmp_path / ".checkpoint_model_000000.removed"),
        str(at(tmp_path, 1)),
    ]
    assert make(keep=1).latest() == at(tmp_path, 2)
    unfinished = tmp_path / ".checkpoint_model_000003.partial"
    unfinished.mkdir()
    (unfinished / ".nfs0001").write_text("")

    def lingering(path: Path) -> None:
        if path == unfinished:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        remove(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "remove", lingering)
        save(checkpointer, 3, run)
    assert make(keep=1).latest() == at(tmp_path, 3)


def test_what_does_not_fit_is_listed(make: Callable[..., Checkpointer], tmp_path: Path) -> None:
    run = Run(0)
    save(make(), 2, run)
    before, tensors = run.whole(), run.tensors()
    del tensors["generator_ema"]["2.bias"]
    tensors["generator"]["table"] = torch.zeros(3, 4)
    tensors["generator"]["other"] = torch.zeros(1)
    tensors["optimizer.generator"]["0.weight.step"] = torch.zeros((), dtype=torch.float64)
    with pytest.raises(InputError) as caught:
        make().load(at(tmp_path, 2), tensors)
    message = str(caught.value)
    assert "missing 1: generator/other; unexpected 1: generator_ema/2.bias" in message
    assert "wrong shape or dtype 2: generator/table" in message
    assert "[4, 3] float32 (needed: [3, 4] float32), optimizer.generator/0.weight.step [] float32" in message
    assert "\n" not in message
    assert_equal(run.whole(), before)
    with pytest.raises(InputError, match="no manifest"):
        make().load(at(tmp_path, 3), run.tensors())


def test_a_checkpoint_of_the_old_format_is_refused(make: Callable[..., Checkpointer], tmp_path: Path) -> None:
    """It is neither counted as damaged, nor is a run started anew beside it."""
    run = Run(0)
    save(make(), 2, run)
    old = at(tmp_path, 4)
    old.mkdir()
    for name in ("__0_0.distcp", ".metadata", MANIFEST):
        (old / name).write_bytes(b"{}")
    for action in (make().latest, lambda: make().load(old, run.tensors()), lambda: open_tensors(old)):
        with pytest.raises(InputError, match=r"4: a checkpoint with \.distcp files, .* commit 3377696: `git") as caught:
            action()
        assert "\n" not in str(caught.value)


def test_no_pickle_and_nothing_hidden_is_in_it(make: Callable[..., Checkpointer], tmp_path: Path) -> None:
    """PyTorch's own reader of such files finds the tensors where ours does."""
    run = Run(0).train(0)
    save(make(), 2, run, own={})
    assert {path.name for path in at(tmp_path, 2).iterdir()} == {SHARD, MANIFEST, "progress.json", "config.yaml"}
    assert len({path.stat().st_mode for path in at(tmp_path, 2).iterdir()}) == 1, "all can be read by the same people"
    metadata = HuggingFaceStorageReader(str(at(tmp_path, 2))).read_metadata()
    found = {name: (tuple(value.size), value.properties.dtype) for name, value in metadata.state_dict_metadata.items()}
    assert found == {name: (value.shape, value.dtype) for name, value in open_tensors(at(tmp_path, 2)).items()}
    assert_equal({name: value.read() for name, value in open_tensors(at(tmp_path, 2)).items()}, run.whole())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_tensors_of_every_kind_in_several_files(
    asynchronous: bool, make: Callable[..., Checkpointer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "SHARD_BYTES", 40)
    base = torch.arange(24.0)
    tensors = {
        "step": torch.tensor(5.0),
        "empty": torch.zeros(0, 3, dtype=torch.int64),
        "transposed": base.view(4, 6).T,
        "half": base[:7].half(),
        "view": base[3:9],
        "float8": base[:8].to(torch.float8_e4m3fn),
        "flag": torch.tensor([True, False]),
        "larger than a file": base.double(),
    }
    expected = {f"a/{name}": value.clone() for name, value in tensors.items()}
    checkpointer = make(asynchronous=asynchronous)
    checkpointer.save(1, {"a": tensors}, own={}, progress={}, texts={})
    base.fill_(-1) if asynchronous else None
    checkpointer.wait()
    assert len(list(at(tmp_path, 1).glob(TENSOR_FILES))) == 5
    assert own_names(at(tmp_path, 1)) == []
    found = {name: torch.full_like(value, 1) for name, value in tensors.items()}
    checkpointer.load(at(tmp_path, 1), {"a": found})
    as_bytes = {name: value.view(torch.uint8) if "float8" in name else value for name, value in expected.items()}
    assert_equal({f"a/{k}": v.view(torch.uint8) if k == "float8" else v for k, v in found.items()}, as_bytes)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads /proc")
def test_reading_holds_no_second_copy(make: Callable[..., Checkpointer], tmp_path: Path) -> None:
    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

    live = {"a": {f"{i}": torch.full((1 << 22,), float(i)) for i in range(8)}}
    make().save(1, live, own={}, progress={}, texts={})
    before, most = anonymous(), []
    genuine = Stored.read_into

    def measured(*arguments: Any) -> None:
        genuine(*arguments)
        most.append(anonymous())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stored, "read_into", measured)
        make().load(at(tmp_path, 1), live)
    assert max(most) - before < 3 << 24, "of eight tensors of 1 << 24 bytes"


def test_a_file_damaged_since_the_check(make: Callable[..., Checkpointer], tmp_path: Path) -> None:
    run = Run(0)
    save(make(), 2, run)
    file = at(tmp_path, 2) / SHARD
    file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(InputError, match="damaged"):
        make().load(at(tmp_path, 2), run.tensors())
