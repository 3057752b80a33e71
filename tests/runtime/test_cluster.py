"""What docs/cluster.md says of file systems: whole commands, on disks that lack something, are full or read-only."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from longsana.data.trajectories import Trajectories
from longsana.training.checkpoint import checkpoints_of
from tests.full_size.hub_cache import snapshot
from tests.pipelines.repository import few_blocks, shallow
from tests.runtime.test_stop import INFERENCE, SMALL

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TRAINING = ROOT / "train_video_scripts/train_longsana.py"
EXPORT = ROOT / "train_video_scripts/export.py"
EVALUATE = ROOT / "inference_video_scripts/evaluate.py"
EVALUATED = ["evaluation.html", "evaluation.json", "evaluation.md", "evaluation.png", "evaluation_frames.png"]
SHARD = "shard-00001-model-00001-of-00001.safetensors"
POOR = {"flock": errno.ENOSYS, "fsync_folder": errno.EINVAL, "link": errno.EPERM, "symlink": errno.EPERM, "nfs": 1}
"""What a file system lacks that is no more than the command needs; names of open files linger on it."""


class Done(NamedTuple):
    status: int
    output: str

    def line(self, start: str) -> str:
        """The one line that begins so; there is no traceback."""
        assert "Traceback" not in self.output, self.output
        found = [line for line in self.output.splitlines() if line.startswith(start)]
        assert len(found) == 1, self.output
        return found[0]


Run = Callable[..., Done]
UNSHARE = ["unshare", "-rm"]
MAY_MOUNT = shutil.which(UNSHARE[0]) is not None and not subprocess.run([*UNSHARE, "true"], check=False).returncode
mounting = pytest.mark.skipif(not MAY_MOUNT, reason="mounts of one's own are not allowed here")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the faults, faulty.so, which all commands of `run` share as their home; hub/ is the hub's cache."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler, to make system calls fail with")
    folder = tmp_path_factory.mktemp("cluster")
    source, library = HERE / "faulty.c", folder / "faulty.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return folder


def mounts(read_only: Sequence[Path], writes: Path | None = None) -> str:
    """Commands that make folders read-only, but for one inside."""
    bound = [path for path in (*read_only, *([] if writes is None else [writes])) if path != Path("/")]
    return "; ".join(
        [*(f"mount --rbind {path} {path}" for path in bound)]
        + [f"mount -o remount,bind,ro {path}" for path in read_only]
    )


@pytest.fixture(scope="module")
def run(place: Path) -> Iterator[Run]:
    """`run(INFERENCE, "--work_dir", folder, faults=POOR, on=folder)`: a command on a poor file system.

    on: where system calls fail. quota: bytes that may be written there. read_only: folders that are mounted so.
    writes: the one folder of the machine that is not read-only.
    """
    library, output, home = place / "faulty.so", place / "output", place / "home"
    home.mkdir()
    # Where temporary files may go, which may be disks of their own.
    disks = [path for path in (Path("/tmp"), Path("/var/tmp"), ROOT, place.parent) if path.is_dir()]
    process = subprocess.Popen(
        [*(UNSHARE if MAY_MOUNT else []), sys.executable, str(HERE / "commands_here.py")],
        cwd=ROOT,
        env=os.environ | {"LD_PRELOAD": str(library), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(place / "hub")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def command(
        script: Path,
        *arguments: str | Path,
        faults: dict[str, int] | None = None,
        on: Path | None = None,
        quota: int | None = None,
        read_only: tuple[Path, ...] = (),
        writes: Path | None = None,
        **environment: str,
    ) -> Done:
        environment = {"HOME": str(home), **environment}
        if faults:
            environment |= {"FAULTS": "".join(f" {call}={number}" for call, number in faults.items())}
            environment |= {"FAULT_FOLDER": str(on)} | ({} if quota is None else {"QUOTA": str(quota)})
        asked = {
            "script": str(script),
            "arguments": [str(argument) for argument in arguments],
            "environment": environment,
            "mounts": mounts(read_only) if writes is None else mounts((*disks, Path("/")), writes),
            "output": str(output),
        }
        assert process.stdin is not None and process.stdout is not None
        print(json.dumps(asked), file=process.stdin, flush=True)
        return Done(int(process.stdout.readline()), output.read_text())

    yield command
    process.stdin.close()  # type: ignore[union-attr]
    process.wait(timeout=60)


def videos(run: Run, folder: Path, *arguments: str | Path, prompts: int = 2, **options: Any) -> Done:
    """The inference command, of two blocks of the small default."""
    file = folder.parent / "prompts" / "prompts.txt"
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(f"a red circle number {i}\n" for i in range(prompts)))
    given = [*SMALL, *shallow(), "--num_frames", "5", "--txt_file", file, "--work_dir", folder, "--dataset", "v"]
    return run(INFERENCE, *given, *arguments, **options)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def made(count: int) -> list[str]:
    slugs = [f"v/{i + 1:05d}-a-red-circle-number-{i}" for i in range(count)]
    return [f"{slug}.{suffix}" for slug in slugs for suffix in ("json", "mp4")]


LINGERS = """
import os, sys
from pathlib import Path
folder = Path(sys.argv[1])
os.environ |= {"FAULT_FOLDER": str(folder), "FAULTS": " nfs=1"}
file = (folder / "file").open("w")
os.unlink(folder / "file")
(left,) = folder.iterdir()
assert left.name == ".nfs_0_file"
try:
    left.unlink()
except OSError as error:
    print(error.strerror)
file.close()
assert list(folder.iterdir()) == []
"""


def test_names_of_open_files_linger_here(place: Path, tmp_path: Path) -> None:
    """The faults are what they are said to be; those of other calls are seen in what commands say."""
    environment = os.environ | {"LD_PRELOAD": str(place / "faulty.so")}
    command = [sys.executable, "-c", LINGERS, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "Device or resource busy\n", done.stderr


# Inference -----------------------------------------------------------------------------------------------------------


def test_inference_without_locks_links_and_synced_folders(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    done = videos(run, folder, faults=POOR, on=tmp_path)
    assert done.status == 0, done.output
    assert "no locks (flock: Function not implemented)" in done.line(f"{folder / 'v'}: this file system has no locks")
    assert "cannot sync folders (Invalid argument)" in done.line(f"{folder / 'v'}: this file system cannot sync")
    assert names(folder) == made(2)
    # What is made is known by its content, whatever the clocks of other hosts say.
    for number, file in enumerate(folder.rglob("*")):
        os.utime(file, (number, 2**32 - number))
    done = videos(run, folder, faults=POOR, on=tmp_path)
    assert done.status == 0 and "2 of 2 videos are in" in done.output


def test_inference_leaves_digests_at_home(run: Run, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    places = {"HOME": str(home), "TMPDIR": str(home), "PWD": str(home)}
    assert videos(run, tmp_path / "out", prompts=1, **places).status == 0
    assert names(home) == [".cache/longsana/sha256.json"]


@mounting
def test_inference_writes_to_its_work_dir_alone(run: Run, tmp_path: Path) -> None:
    """Also with weights in a pickle, which PyTorch is given by its name."""
    folder = tmp_path / "out"
    folder.mkdir()
    weights = tmp_path / "model.pth"
    torch.save({"state_dict": load_file(few_blocks("longsana"))}, weights)
    done = videos(run, folder, "--model_path", weights, writes=folder)
    assert done.status == 0, done.output
    assert names(folder) == made(2)


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.ENOSPC])
def test_a_quota_stops_inference_with_one_line(number: int, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    done = videos(run, folder, prompts=3, faults={"write": number}, on=folder / "v", quota=3000)
    assert done.status == 1
    line = done.line("failed: ")
    assert os.strerror(number) in line and str(folder / "v") in line and " GB are free" in line
    assert set(names(folder)) <= set(made(3)) and len(names(folder)) < 6


def test_a_stale_handle_stops_inference_with_one_line(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    done = videos(run, folder, faults={"rename": errno.ESTALE}, on=folder)
    assert done.status == 1
    assert "Stale file handle" in done.line("failed: ")
    assert names(folder) == []


@mounting
@pytest.mark.parametrize("linked", [True, False])
def test_a_hub_cache_may_be_read_only_and_without_links(linked: bool, place: Path, run: Run, tmp_path: Path) -> None:
    hub = place / "hub"
    repo = f"linked-{linked}"
    file = snapshot(hub, repo, "some") / "model.safetensors"
    if linked:
        blob = file.parents[2] / "blobs" / "0"
        blob.parent.mkdir()
        shutil.copy(few_blocks("longsana"), blob)
        file.symlink_to("../../blobs/0")
    else:
        shutil.copy(few_blocks("longsana"), file)
    before = names(hub)
    weights = ("--model_path", f"hf://some/{repo}/model.safetensors")
    options = {"read_only": (hub,), "faults": {"flock": errno.ENOSYS}, "on": hub}
    done = videos(run, tmp_path / "out", *weights, prompts=1, **options)
    assert done.status == 0, done.output
    assert names(tmp_path / "out") == made(1) and names(hub) == before


CACHES = """
import os, sys
from huggingface_hub.file_download import are_symlinks_supported
from huggingface_hub.utils import WeakFileLock
from torch.utils._filelock import FileLock
folder = sys.argv[1]
for name, lock in (("hub", WeakFileLock), ("inductor", FileLock)):
    try:
        with lock(f"{folder}/{name}.lock", timeout=5):
            print(name, "locked", end=", ")
    except (OSError, TypeError) as error:
        print(name, getattr(error, "strerror", "failed"), end=", ")
print("links" if are_symlinks_supported(folder) else "copies")
os._exit(0)
"""


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (0, "hub locked, inductor locked, links\n"),
        (errno.ENOSYS, "hub locked, inductor locked, inductor failed, copies\n"),
        (errno.ENOLCK, "hub No locks available, inductor No locks available, copies\n"),
    ],
)
def test_caches_of_others(number: int, says: str, place: Path, tmp_path: Path) -> None:
    """Without flock the hub's client alone goes on, and where it is refused nobody does."""
    environment = os.environ | {"LD_PRELOAD": str(place / "faulty.so"), "FAULT_FOLDER": str(tmp_path)}
    environment["FAULTS"] = f" flock={number} symlink={errno.EPERM if number else 0}"
    command = [sys.executable, "-c", CACHES, str(tmp_path)]
    assert subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False).stdout == says


# Training ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def train(run: Run, small_training, trajectories) -> Run:
    """`train(folder, "train.max_iters=2")`: the quickest stage."""
    config = small_training(
        "ode", f"data.data_path={trajectories}", "train.max_iters=3", "train.log_iters=1", "train.max_checkpoints=1"
    )

    def command(folder: Path, *arguments: str | Path, **options: Any) -> Done:
        given = ["--config_path", config, "--logdir", folder, "--disable-wandb", "--threads", "1", *arguments]
        return run(TRAINING, *given, **options)

    return command


RUN = ["checkpoint_model_000003", "config.yaml", "metrics.jsonl", "run.json"]


def test_training_without_locks_links_and_synced_folders(train: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for arguments in ((), ("train.max_iters=4", "--allow-config-change")):
        done = train(folder, *arguments, faults=POOR, on=tmp_path)
        assert done.status == 0, done.output
        assert "flock: Function not implemented" in done.line(f"{folder}: this file system has no locks")
        assert "Invalid argument" in done.line(f"{folder}: this file system cannot sync folders")
        for number, file in enumerate(folder.rglob("*")):  # the clocks of other hosts
            os.utime(file, (number, 2**32 - number))
    assert "going on from checkpoint_model_000003" in done.output
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint_model_000004", *RUN[1:]]


def test_checkpoints_that_are_in_use_linger_and_go_at_the_next_start(train: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    removed = folder / ".checkpoint_model_000001.removed"
    done = train(folder, faults={"nfs": 1}, on=folder, HELD=f"{removed.name}/{SHARD}")
    assert done.status == 0, done.output
    assert "could not be removed" in done.line(f"{removed}: ") and "Directory not empty" in done.output
    assert [path.name for path in removed.iterdir()] == [f".nfs_0_{SHARD}"]
    assert [path.name for path in checkpoints_of(folder)] == ["checkpoint_model_000003"]
    (folder / ".nfs_1_metrics.jsonl").write_text("")
    done = train(folder, "--no-auto-resume", "train.max_iters=1", faults={"nfs": 1}, on=folder)
    assert done.status == 0, done.output
    assert not removed.exists() and (folder / ".nfs_1_metrics.jsonl").exists()


@mounting
def test_training_writes_to_its_logdir_alone(train: Run, trajectories: Path, tmp_path: Path) -> None:
    """Also where it reads an LMDB, which others lock."""
    folder, data = tmp_path / "run", tmp_path / "lmdb"
    folder.mkdir()
    write_lmdb(data, Trajectories.open(trajectories))
    done = train(folder, f"data.data_path={data}", "train.max_iters=1", writes=folder)
    assert done.status == 0, done.output
    assert names(data) == ["data.mdb"]
    assert [path.name for path in checkpoints_of(folder)] == ["checkpoint_model_000001"]


def write_lmdb(folder: Path, trajectories: Trajectories) -> None:
    lmdb = pytest.importorskip("lmdb")
    states, channels, frames, height, width = trajectories.shape
    with lmdb.open(str(folder), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        shape = f"{len(trajectories)} {states} {frames} {channels} {height} {width}"
        transaction.put(b"latents_shape", shape.encode())
        for index in range(len(trajectories)):
            values, prompt = trajectories[index]
            layout = values.transpose(1, 2).to(torch.float16).contiguous()
            transaction.put(f"latents_{index}_data".encode(), layout.numpy().tobytes())
            transaction.put(f"prompts_{index}_data".encode(), prompt.encode())
    (folder / "lock.mdb").unlink()


def test_a_quota_ends_training_with_one_line(train: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = train(folder, faults={"write": errno.EDQUOT}, on=folder, quota=1_000_000)
    assert done.status == 1
    assert f"{folder / 'checkpoint_model_'}" in (line := done.line("failed: ")) and "Disk quota exceeded" in line
    assert not list(folder.glob(".*"))


def test_a_stale_handle_ends_training_with_one_line(train: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = train(folder, faults={"rename": errno.ESTALE}, on=folder / "checkpoint")
    assert done.status == 1
    assert "Stale file handle" in done.line("failed: ")
    assert names(folder) == ["config.yaml", "metrics.jsonl", "run.json"]


# What reads one folder and writes to another -------------------------------------------------------------------------


@mounting
def test_videos_that_lie_read_only_are_evaluated(run: Run, tmp_path: Path) -> None:
    folder, out = tmp_path / "out", tmp_path / "results"
    assert videos(run, folder, prompts=1).status == 0
    given = (folder / "v", "--device", "cpu")
    done = run(EVALUATE, *given, read_only=(folder,))
    assert done.status == 2
    assert "Read-only file system" in (line := done.line("error: ")) and line.endswith("choose another --out")
    out.mkdir()
    done = run(EVALUATE, *given, "--out", out, writes=out)
    assert done.status == 2 and done.line("error: ").endswith("give it one: TMPDIR or MPLCONFIGDIR"), done.output
    assert names(out) == []
    done = run(EVALUATE, *given, "--out", out, writes=tmp_path, TMPDIR=str(tmp_path), faults=POOR, on=out)
    assert done.status == 0, done.output
    assert names(out) == EVALUATED
    done = run(EVALUATE, *given, "--out", out, faults={"write": errno.EDQUOT}, on=out, quota=9)
    assert done.status == 1 and "Disk quota exceeded" in done.line("failed: ")
    assert names(out) == EVALUATED


@mounting
def test_a_run_that_lies_read_only_is_exported(train: Run, run: Run, tmp_path: Path) -> None:
    folder, out = tmp_path / "run", tmp_path / "out"
    out.mkdir()
    assert train(folder, "train.max_iters=1").status == 0
    for layout in ("safetensors", "trainer", "diffusers"):
        before = names(out)
        given = (checkpoints_of(folder)[0], "--layout", layout, "--out", out / layout)
        done = run(EXPORT, *given, faults={"write": errno.EDQUOT}, on=out, quota=9)
        assert done.status == 1 and "Disk quota exceeded" in (line := done.line("failed: ")), done.output
        assert str(out) in line and names(out) == before
        done = run(EXPORT, *given, read_only=(folder,), faults=POOR, on=out)
        assert done.status == 0, done.output
    given = (*given, "--force")
    for held, status in (("config.json", 0), (".nfs", 2)):
        done = run(EXPORT, *given, faults=POOR, on=out, HELD=f"{out.name}/.diffusers.replaced/{held}")
        assert done.status == status, done.output
    assert done.line("error: ").endswith("end what reads it, or write elsewhere")
    assert (out / "diffusers" / "config.json").exists()
