"""A run's folder: one run at a time, the run that it belongs to, and what is told before anything is loaded."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file, save_file

from longsana.config import load_config, save_config
from longsana.runtime import files
from longsana.runtime.distributed import PeerError, World
from longsana.runtime.errors import InputError
from longsana.runtime.files import LOCK, hold_folder
from longsana.training import build, run_folder
from longsana.training.checkpoint import checkpoints_of
from longsana.training.checks import check_same_run
from longsana.training.config import TrainingConfig
from longsana.training.run_folder import Record, check_fits, check_shared, sources
from longsana.training.stages.stage import MicroBatches
from longsana.training.validation import Validation
from tests.training.conftest import PROMPTS, ROOT, SCRIPT, forbidden
from tests.training.test_resume import contents, lines

Command = Callable[..., Any]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


class Run(NamedTuple):
    """A finished run: 2 iterations, and a checkpoint at the end."""

    config: Path
    logdir: Path

    def copy(self, place: Path) -> Run:
        shutil.copytree(self.logdir, place / "run")
        return Run(self.config, place / "run")


@pytest.fixture(scope="module")
def finish(command: Command, small_training, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    def train(trainer: str, *settings: str) -> Run:
        logdir = tmp_path_factory.mktemp(trainer) / "run"
        path = small_training(trainer, "train.max_iters=2", "train.log_iters=9", "train.ema_weight=0.5", *settings)
        result = command("--config_path", path, "--logdir", logdir, "--threads", "1")
        assert result.status == 0, result.err
        return Run(path, logdir)

    return train


@pytest.fixture(scope="module")
def quick(finish, trajectories) -> Run:
    """The quickest stage."""
    return finish("ode", f"data.data_path={trajectories}")


@pytest.fixture(scope="module")
def streaming(finish, prompts) -> Run:
    """The stage that reads the most, and keeps the most."""
    return finish("longsana", f"data.data_path={prompts}", "streaming.streaming_max_length=21")


@pytest.fixture
def run(quick: Run, tmp_path: Path) -> Path:
    """A copy of the quickest one's folder."""
    return quick.copy(tmp_path).logdir


@pytest.fixture
def streams(streaming: Run, tmp_path: Path) -> Path:
    """A copy of the other's."""
    return streaming.copy(tmp_path).logdir


@pytest.fixture
def start(command: Command, quick: Run, monkeypatch: pytest.MonkeyPatch) -> Command:
    """`start(run, "train.seed=1")`: the run's command with other settings; loads=False: nothing may be loaded."""

    def train(logdir: Path, *arguments: str | Path, loads: bool = True, config: Path = quick.config) -> Any:
        with monkeypatch.context() as patch:
            if not loads:
                patch.setattr(Validation, "__init__", forbidden)
                patch.setattr(build, "build_model", forbidden)
                patch.setattr(build, "load_vae", forbidden)
            return command("--config_path", config, "--logdir", logdir, "--threads", "1", *arguments)

    return train


@pytest.fixture
def stream(start: Command, streaming: Run) -> Command:
    """`start`, of the stage with streams."""
    return partial(start, config=streaming.config)


def everything(logdir: Path) -> dict[str, bytes]:
    return {str(path.relative_to(logdir)): path.read_bytes() for path in logdir.rglob("*") if path.is_file()}


# --- one run at a time -----------------------------------------------------------------------------------------------


def test_a_folder_that_another_run_has_is_refused_and_left_as_it_is(start, run):
    before = everything(run)
    with hold_folder(run, "--logdir"):
        for arguments in ((), ("--no-auto-resume",), ("--allow-config-change", "train.seed=1"), ("--no_save",)):
            result = start(run, "--max_iters", "3", *arguments, loads=False)
            assert result.status == 2
            assert result.error.startswith(f"error: {run}: in use by another command (process {os.getpid()} on ")
        assert everything(run) == before | {LOCK: (run / LOCK).read_bytes()}
    # One that was left over keeps nobody out.
    (run / LOCK).write_text("process 1 on another host, since yesterday\n")
    assert start(run, "--max_iters", "3").status == 0
    assert not (run / LOCK).exists()
    assert len(lines(run)) == 3


def test_a_start_that_is_refused_gives_the_folder_back(start, run):
    assert start(run, "train.seed=1", loads=False).status == 2
    with hold_folder(run, "--logdir"):
        pass


def test_a_file_system_without_locks_is_said_once_and_trained_on(start, run, monkeypatch, caplog):
    def missing(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    monkeypatch.setattr(files, "_said", set())
    assert start(run, "--max_iters", "4").status == 0
    (message,) = [message for message in caplog.messages if "no locks" in message]
    assert message.startswith(f"{run}: ")


# --- what is there ---------------------------------------------------------------------------------------------------


def test_nothing_left_to_do_is_said_before_anything_is_loaded(start, run, caplog):
    before = everything(run)
    caplog.set_level("INFO")
    for arguments in ((), ("train.max_iters=1",), ("--no_save",)):
        caplog.clear()
        started = time.process_time()  # of the processor: others may be busy here
        assert start(run, *arguments, loads=False).status == 0
        assert time.process_time() - started < 3
        (message,) = [message for message in caplog.messages if "nothing left to do" in message]
        assert str(run) in message and "checkpoint_model_000002 is of iteration 2" in message
        assert everything(run) == before
    # A validation after the last iteration that is still owed is something.
    assert start(run, "validation.vis_interval=2", "validation.val_samples=1").status == 0
    assert len(list(run.glob("vis/*/*.mp4"))) == 1


@pytest.mark.parametrize("name", ["vis", "captions", "checkpoint_model_000007"])
def test_a_file_where_a_folder_goes(name, start, run):
    (run / name).write_text("a user's")
    result = start(run, "--max_iters", "3", loads=False)
    assert result.status == 2
    assert f"error: {run / name}: a file, where a run has a folder" in result.error
    assert (run / name).read_text() == "a user's"


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "run.json", "wandb_id"])
def test_a_folder_where_a_file_goes(name, start, run):
    (run / name).unlink(missing_ok=True)
    (run / name).mkdir()
    result = start(run, "--max_iters", "3", "--allow-config-change", loads=False)
    assert result.status == 2
    assert f"error: {run / name}: a folder, where a run has a file" in result.error


def test_links_files_of_others_and_numbers_that_are_taken(start, run, tmp_path):
    """A logdir that is a link, a checkpoint that is one, notes in the folder, and gaps among what was moved aside."""
    link = tmp_path / "link"
    link.symlink_to(run)
    elsewhere = tmp_path / "elsewhere"
    (run / "checkpoint_model_000002").rename(elsewhere)
    (run / "checkpoint_model_000002").symlink_to(elsewhere)
    (run / "notes.txt").write_text("a user's")
    (run / "superseded_001").mkdir()
    assert start(link, "--max_iters", "4", "train.log_iters=1", "train.max_checkpoints=1").status == 0
    assert [path.name for path in checkpoints_of(run)] == ["checkpoint_model_000004"]
    assert contents(elsewhere)
    assert start(link, "--no-auto-resume", "--max_iters", "1").status == 0
    assert sorted(path.name for path in (run / "superseded_002").iterdir()) == [
        *("checkpoint_model_000004", "config.yaml", "metrics.jsonl", "notes.txt", "run.json")
    ]
    assert link.is_symlink() and [path.name for path in checkpoints_of(link)] == ["checkpoint_model_000001"]


def test_what_cannot_be_moved_aside_stays_where_it_is(start, run, monkeypatch):
    before, rename = everything(run), Path.rename

    def busy(self: Path, target: Path) -> Path:
        if self.name == "metrics.jsonl":
            raise OSError(errno.EBUSY, "Device or resource busy", str(self))
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", busy)
        result = start(run, "--no-auto-resume", loads=False)
    assert result.status == 2
    assert f"error: {run / 'metrics.jsonl'}: cannot be moved aside (Device or resource busy)" in result.error
    assert everything(run) == before and not list(run.glob("superseded_*"))


# --- whose run it is -------------------------------------------------------------------------------------------------


def test_a_checkpoint_alone_says_what_it_was_made_with(start, run, tmp_path):
    """A new folder with a copy of a checkpoint in it goes on with its settings, or as its user says."""
    other = tmp_path / "other"
    shutil.copytree(run / "checkpoint_model_000002", other / "checkpoint_model_000002")
    result = start(other, "train.seed=1", loads=False)
    assert result.status == 2 and "train.seed: 0 -> 1" in result.error
    assert start(other, "--max_iters", "3").status == 0


def test_settings_that_an_earlier_version_did_not_have_are_changes(small_training, tmp_path):
    """Their defaults now are not what was done then."""
    path = small_training("ode")
    config: TrainingConfig = load_config(path, (), TrainingConfig)
    save_config(config, tmp_path / "config.yaml")
    assert check_same_run(config, tmp_path / "config.yaml") == []
    text = (tmp_path / "config.yaml").read_text()
    new = ["softcap", "captions_together", "crf", "dropped_caption", "overlap_latents", "vis_ema"]
    assert all(f"  {name}: " in text for name in new)
    kept = [line for line in text.splitlines() if line.strip().partition(":")[0] not in new]
    (tmp_path / "config.yaml").write_text("\n".join(kept))
    # The others are of other trainers, or decide nothing that is learned.
    assert check_same_run(config, tmp_path / "config.yaml") == [
        "text_encoder.softcap: not said -> False",
        "train.captions_together: not said -> 1",
    ]


def test_a_config_that_this_version_cannot_read(start, run, caplog):
    with (run / "config.yaml").open("a") as stream:
        stream.write("train_of_tomorrow: 1\n")
    result = start(run, "--max_iters", "3", loads=False)
    assert result.status == 2
    assert "train_of_tomorrow" in result.error and "--allow-config-change" in result.error
    assert start(run, "--max_iters", "3", "--allow-config-change").status == 0
    assert any("train_of_tomorrow" in message for message in caplog.messages)


CAPTIONS = tuple(f"{network}.caption_length=40" for network in ("model", "real_score", "fake_score"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("train.ema_weight=0",), "generator_ema/"),
        (("fake_score.depth=2",), "missing"),
        pytest.param(("model.depth=1",), "unexpected", marks=pytest.mark.slow),
        pytest.param(CAPTIONS, "wrong shape or dtype", marks=pytest.mark.slow),
    ],
)
def test_networks_that_do_not_fit_are_refused_without_a_flag_that_would_not_help(changes, words, stream, streams):
    before = everything(streams)
    for flags in ((), ("--allow-config-change",)):
        result = stream(streams, *changes, *flags, loads=False)
        assert result.status == 2
        assert "checkpoint_model_000002: does not fit this run" in result.error and words in result.error
        assert changes[0].partition("=")[0] in result.error, "what was changed"
        assert "--allow-config-change" not in result.error and "--no-auto-resume" in result.error
    assert everything(streams) == before


@pytest.mark.parametrize("anew", [False, True])
def test_a_run_with_checkpoints_of_the_old_format_is_refused_or_put_aside(anew, start, run):
    (checkpoint,) = run.glob("checkpoint_model_*")
    for file in checkpoint.glob("shard-*"):
        file.rename(checkpoint / "__0_0.distcp")
    (checkpoint / ".metadata").write_bytes(b"")
    before = everything(run)
    if anew:
        assert start(run, "--no-auto-resume").status == 0
        return
    result = start(run, "--max_iters", "3", loads=False)
    assert result.status == 2 and f"{checkpoint}: a checkpoint with .distcp files" in result.error
    assert "commit 3377696" in result.error
    assert everything(run) == before


def test_a_stage_of_other_learners_is_refused_and_one_of_the_same_goes_on(start, quick, small_training, streams):
    """ODE has no critic; Self-Forcing has no streams."""
    more = ("--max_iters", "3", "train.ema_weight=0.5")
    result = start(streams, *more, "--allow-config-change", loads=False)
    assert result.status == 2 and "does not fit this run" in result.error and "trainer: longsana -> ode" in result.error
    forcing = small_training("self_forcing")
    result = start(streams, *more, config=forcing, loads=False)
    assert result.status == 2 and "--allow-config-change" in result.error
    assert start(streams, *more, "--allow-config-change", config=forcing).status == 0
    assert not any(name.startswith("stream_") for name in contents(streams / "checkpoint_model_000003"))


@pytest.mark.slow
def test_the_networks_of_every_stage_fit_their_own_checkpoints(finish, quick, streaming):
    """What is compared without memory is what is there with it."""
    for done in (quick, streaming, finish("flow_matching"), finish("self_forcing")):
        config: TrainingConfig = load_config(done.config, (), TrainingConfig)
        check_fits(config, done.logdir / "checkpoint_model_000002")


# --- what it reads ---------------------------------------------------------------------------------------------------


def test_prompts_that_were_replaced_under_their_path(stream, streams, prompts, caplog):
    whole = prompts.read_bytes()
    try:
        prompts.write_bytes(whole.replace(b"red", b"tan"))
        result = stream(streams, "--max_iters", "3", loads=False)
        assert result.status == 2
        told = f"error: {streams}: belongs to a run with another config (data.data_path: another content than before"
        assert result.error.startswith(told) and "--allow-config-change" in result.error
        assert stream(streams, "--max_iters", "3", "--allow-config-change").status == 0
        assert any("going on with other settings: data.data_path: another content" in m for m in caplog.messages)
        assert stream(streams).status == 0  # these are its prompts now
    finally:
        prompts.write_bytes(whole)
    assert stream(streams).status == 2


def test_prompts_that_have_moved_are_the_same(stream, streams, prompts, tmp_path):
    shutil.copy(prompts, tmp_path / "moved.txt")
    assert stream(streams, f"data.data_path={tmp_path / 'moved.txt'}", loads=False).status == 0
    (tmp_path / "others.txt").write_text("a prompt\n")
    result = stream(streams, f"data.data_path={tmp_path / 'others.txt'}", loads=False)
    assert result.status == 2 and f"data.data_path: {prompts} -> {tmp_path / 'others.txt'}" in result.error


@pytest.fixture
def teacher(tmp_path: Path, streaming: Run) -> Path:
    """A file of weights for the teacher: those of a critic."""
    path = tmp_path / "teacher.safetensors"
    stored = contents(streaming.logdir / "checkpoint_model_000002")
    save_file({name[7:]: t.contiguous() for name, t in stored.items() if name.startswith("critic/")}, path)
    return path


def test_a_teacher_that_was_replaced_under_its_path(stream, teacher, tmp_path):
    other = tmp_path / "other"
    arguments = (f"real_score.load_from={teacher}",)
    assert stream(other, *arguments, "--max_iters", "1").status == 0
    assert json.loads((other / "run.json").read_text())["sha256"].keys() == {
        *("data.data_path", "real_score.load_from", "text_encoder.text_encoder_name", "vae.vae_pretrained")
    }
    save_file({name: 2 * tensor for name, tensor in load_file(teacher).items()}, teacher)
    result = stream(other, *arguments, loads=False)
    assert result.status == 2 and "real_score.load_from: another content than before (SHA-256 " in result.error


def test_what_a_trainer_reads(training_config, trajectories):
    def read(trainer: str, *overrides: str) -> set[str]:
        return {setting.partition(".")[0] for setting in sources(training_config(trainer, *overrides))}

    assert read("ode", f"data.data_path={trajectories}") == {"text_encoder", "data"}
    assert read("flow_matching") == {"text_encoder", "vae"}  # its clips are made with it
    assert read("flow_matching", "data.data_path=clips") == {"text_encoder", "data"}
    assert read("self_forcing") == read("longsana") == {"text_encoder", "data", "vae", "real_score"}
    switching = read("longsana", "streaming.switch_prompt_path=second.txt")
    assert switching == read("longsana") | {"streaming"}


def test_data_that_cannot_be_read_is_named(training_config, tmp_path, monkeypatch):
    def broken(*_: Any, **__: Any) -> str:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(run_folder, "file_sha256", broken)
    config = training_config("longsana")
    with pytest.raises(InputError, match=r"^text_encoder\.text_encoder_name: .*: cannot be read \(Input/output error"):
        Record.of(config, MicroBatches(0, 1, 1))


def test_data_in_folders_and_in_an_lmdb_is_known_again(training_config, trajectories, tmp_path):
    lmdb = tmp_path / "lmdb"
    lmdb.mkdir()
    digests = set()
    for content in (b"one", b"two"):
        (lmdb / "data.mdb").write_bytes(content)
        config = training_config("ode", f"data.data_path={lmdb}")
        digests.add(Record.of(config, MicroBatches(0, 1, 1)).sha256["data.data_path"])
    shards = tmp_path / "trajectories"
    shutil.copytree(trajectories, shards)
    for _ in range(2):
        config = training_config("ode", f"data.data_path={shards}")
        digests.add(Record.of(config, MicroBatches(0, 1, 1)).sha256["data.data_path"])
        shard = sorted(shards.glob("*.safetensors"))[-1]
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert len(digests) == 4


@pytest.mark.parametrize("damage", ["{", '{"processes": 1}', '{"processes": 1, "samples": 1, "sha256": {"a": 1}}'])
def test_a_record_that_is_damaged_is_said(damage, tmp_path, caplog):
    (tmp_path / "run.json").write_text(damage)
    assert Record.read(tmp_path) is None
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path / 'run.json'}: damaged")


def test_a_run_of_a_version_without_records_is_given_one(start, run, caplog):
    caplog.set_level("INFO")
    shutil.rmtree(run / "checkpoint_model_000002")
    record = (run / "run.json").read_text()
    (run / "run.json").unlink()
    assert start(run, "--max_iters", "1").status == 0
    assert any("no record of data and networks from before" in message for message in caplog.messages)
    assert (run / "run.json").read_text() == record


def test_an_update_of_other_samples_is_warned_of(start, run, caplog):
    record = json.loads((run / "run.json").read_text())
    assert (record["processes"], record["samples"]) == (1, 1)
    (run / "run.json").write_text(json.dumps(record | {"processes": 2, "samples": 2}))
    assert start(run, "--max_iters", "3").status == 0
    (message,) = [message for message in caplog.messages if "samples" in message]
    assert "takes 1 samples now, and took 2 before (1 processes now, 2 before)" in message
    assert "train.total_batch_size=2" in message
    caplog.clear()
    assert start(run).status == 0
    assert not [message for message in caplog.messages if "samples now" in message]


# --- all hosts -------------------------------------------------------------------------------------------------------


def main(folders: list[str]) -> int:
    """What two processes tell of the first two folders, of which each sees one, and then of the others."""
    world = World.from_environment()
    world.connect()
    for seen in (folders[:2], folders[2:]):
        folder = Path(seen[world.rank])
        try:
            check_shared(folder, world, patience=0.5)
            print("shared")
        except PeerError:
            print("told")
        except InputError as error:
            print(error)
        world.gather(None)
        assert not list(folder.iterdir())
    world.disconnect()
    return 0


def test_a_folder_that_not_all_hosts_see_is_found_at_the_start(forks, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    both = forks.launch(2, "tests.training.test_run_folder", [one, one, one, other])
    first, second = (process.finish() for process in both)
    assert [process.returncode for process in both] == [0, 0], (first, second)
    shared, message = first.splitlines()
    assert (shared, second) == ("shared", "shared\ntold\n")
    assert message.startswith(f"{one}: --logdir must be in a file system that all hosts share: process 1 on ")
    assert "does not see what the main process writes" in message


def test_one_process_shares_with_itself(tmp_path):
    check_shared(tmp_path / "nowhere", World())


# --- a full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [(), pytest.param(("train.async_checkpoint=true",), marks=pytest.mark.slow)])
def test_a_full_disk_ends_a_run_in_one_line(settings, start, run, limited):
    """Nothing half-written stays, and the run goes on when there is room."""
    size = max(path.stat().st_size for path in run.rglob("shard-*"))
    with limited(size // 2):
        result = start(run, "--max_iters", "4", "train.log_iters=1", *settings)
    assert result.status == 1
    assert result.error.startswith(
        f"failed: no checkpoint could be written: {run / 'checkpoint_model_000003'}: File too large (it takes "
    )
    assert "GB are free; the run is as its last one has it" in result.error
    assert sorted(path.name for path in run.iterdir()) == [
        *("checkpoint_model_000002", "config.yaml", "metrics.jsonl", "run.json")
    ]
    assert start(run, "--max_iters", "4").status == 0


@pytest.mark.slow
def test_a_full_disk_met_by_the_log_is_one_line_too(start, run, limited):
    size = (run / "metrics.jsonl").stat().st_size
    with limited(max(size + 10, 6000)):
        result = start(run, "--max_iters", "400", "train.log_iters=1000")
    assert result.status == 1
    assert result.error.startswith(f"failed: {run / 'metrics.jsonl'}: File too large; ")
    assert (run / "metrics.jsonl").read_bytes().endswith(b"}\n")


TINY = """
mount -t tmpfs -o size={size} t {folder} || exit 77
exec {python} {script} --config_path {config} --logdir {folder}/run --disable-wandb --threads 1 train.log_iters=1
"""


@pytest.mark.slow
def test_a_small_disk(quick, tmp_path):
    """A real one: room for the start and not for a checkpoint."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("mounts of one's own are not allowed here")
    size = sum(path.stat().st_size for path in (quick.logdir / "checkpoint_model_000002").iterdir())
    command = TINY.format(
        size=size * 3 // 2, folder=tmp_path, python=sys.executable, script=SCRIPT, config=quick.config
    )
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("failed: ")]
    assert "checkpoint_model_000002: No space left on device (it takes " in line
    assert "Traceback" not in done.stderr and "unexpected pos" not in done.stderr


def test_a_full_disk_of_two_processes_is_one_line(quick, run, forks):
    """Both know of it, and one says it."""
    arguments = ["--config_path", quick.config, "--logdir", run, "--disable-wandb", "--threads", "1"]
    more = ["--max_iters", "4", "train.total_batch_size=2", "--allow-config-change"]
    both = forks.launch(2, "train", [*arguments, *more], file_size=1 << 20)
    told = "".join(process.finish() for process in both)
    assert 1 in [process.returncode for process in both] and 0 not in [process.returncode for process in both], told
    (line,) = [line for line in told.splitlines() if line.startswith("failed: ")]
    assert f"{run / 'checkpoint_model_000004'}: File too large (it takes 0.00" in line
    assert "Traceback" not in told
    assert [path.name for path in checkpoints_of(run)] == ["checkpoint_model_000002"]


ENDS = {
    "train.batch_size=2": True,
    "model.num_cached_blocks=1": True,  # the sum of the past and a window of one chunk are of one shape
    "model.state_decay=0.9": False,
    "sampling.height=64": True,
    "sampling.width=96": True,
    "train.mixed_precision=true": True,
    "text_encoder.dtype=bfloat16": True,
    "vae.weight_dtype=bfloat16": True,
    "rollout.overlap_latents=1": True,
    "streaming.streaming_max_length=5": True,
    "train.ema_weight=0.9": False,
    "streaming.streaming_max_length=29": False,
}


@pytest.mark.slow
@pytest.mark.parametrize("change", ENDS)
def test_a_change_that_is_allowed_is_trained_on(change, stream, streams, caplog):
    assert stream(streams, change, loads=False).status == 2
    assert stream(streams, change, "--max_iters", "5", "--allow-config-change").status == 0
    ended = [message for message in caplog.messages if "streams" in message and " end" in message]
    assert bool(ended) == ENDS[change], caplog.messages
    assert len(lines(streams)) == 5
    # These are its settings now, and its streams fit them.
    caplog.clear()
    assert stream(streams, change, "--max_iters", "6").status == 0
    assert not [message for message in caplog.messages if "streams" in message and " end" in message]


@pytest.mark.slow
def test_streams_of_another_vae_end(stream, streams, caplog):
    """Also where their shapes are the same: the decoder would go on from what another one remembers."""
    assert stream(streams, "vae.latents_per_call=2", "--max_iters", "3", "--allow-config-change").status == 0
    assert any("1 of the streams" in message and "mean something else" in message for message in caplog.messages)
