"""The training command as its user meets it: flags, folders, and one line for whatever cannot be."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import av
import pytest
import torch
from torch import Tensor

from longsana.config import leaf_keys, load_config
from longsana.models.dit import LongSanaDiT
from longsana.training import build
from longsana.training import run as launch
from longsana.training.config import TrainingConfig
from longsana.training.learner import Learner
from longsana.training.loop import Stop
from longsana.training.validation import Report, Validation
from tests.training.conftest import ROOT, forbidden
from tests.training.test_resume import assert_equal, contents, lines


@pytest.fixture(scope="module")
def config(small_training, trajectories) -> Path:
    """The quickest stage: 3 iterations, a checkpoint and two lengths of validation videos after each."""
    return small_training(
        "ode",
        f"data.data_path={trajectories}",
        "train.max_iters=3",
        "train.log_iters=1",
        "train.ema_weight=0.5",
        "train.ema_start_step=0",
        "validation.vis_interval=1",
        "validation.vis_video_lengths=[3,5]",
        "validation.val_samples=1",
    )


def saved(logdir: Path) -> TrainingConfig:
    loaded: TrainingConfig = load_config(logdir / "config.yaml", (), TrainingConfig)
    return loaded


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint_*"))


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


class Ran(NamedTuple):
    """sampled: the network's weights in each validation."""

    folder: Path
    logdir: Path
    sampled: list[dict[str, Tensor]]


@pytest.fixture(scope="module")
def ran(command, config, tmp_path_factory) -> Ran:
    """Two iterations with every flag that takes a value, and settings in all three spellings."""
    folder = tmp_path_factory.mktemp("command")
    sampled: list[dict[str, Tensor]] = []
    sample = Validation.run

    def recorded(self: Validation, step: int, model: LongSanaDiT, vae: Any, stop: Stop) -> Report | None:
        weights = {name: weight.detach().full_tensor().clone() for name, weight in model.named_parameters()}
        sampled.append(weights)
        return sample(self, step, model, vae, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Validation, "run", recorded)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        result = command(
            *("--config_path", config, "--logdir", folder / "run", "--max_iters", "2", "--threads", "1"),
            *("--wandb_name", "a-name-of-mine", "--wandb-save-dir", folder / "curves"),
            *("train.max_checkpoints=7", "--wandb.project=mine", "--optimizer.generator.lr", "0.002"),
            "validation.vis_ema=true",
            wandb=True,
        )
    assert result.status == 0, result.err
    return Ran(folder, folder / "run", sampled)


# --- flags -----------------------------------------------------------------------------------------------------------


def test_flags_and_settings_in_every_spelling_arrive(ran, config):
    before: TrainingConfig = load_config(config, (), TrainingConfig)
    now = saved(ran.logdir)
    assert (before.train.max_iters, now.train.max_iters) == (3, 2)
    assert (now.train.max_checkpoints, now.wandb.project, now.optimizer.generator.lr) == (7, "mine", 0.002)
    assert now.train.log_iters == before.train.log_iters
    assert [line["step"] for line in lines(ran.logdir) if "generator_loss" in line] == [0, 1]
    assert checkpoints(ran.logdir) == ["checkpoint_model_000001", "checkpoint_model_000002"]
    for name in checkpoints(ran.logdir):  # a checkpoint can be understood without its folder
        assert saved(ran.logdir / name) == now


def test_wandb_has_the_name_the_place_and_the_videos(ran):
    (found,) = (ran.folder / "curves" / "wandb").glob("offline-run-*/*.wandb")
    assert found.stem == f"run-{(ran.logdir / 'wandb_id').read_text().strip()}"
    assert b"a-name-of-mine" in found.read_bytes()
    assert len(list(found.parent.glob("files/media/videos/*.mp4"))) == 4
    sheets = {path.read_bytes() for path in found.parent.glob("files/media/images/*.png")}
    assert sheets == {(ran.logdir / f"vis/step_{step:07d}.png").read_bytes() for step in (1, 2)}


def test_validation_videos_of_every_length_when_they_are_due(ran):
    names = [
        f"vis/step_{step:07d}/step_{step:07d}_rank_0_sample_0_len_{length}.mp4" for step in (1, 2) for length in (3, 5)
    ]
    assert sorted(name for name in files(ran.logdir) if name.endswith(".mp4")) == sorted(names)
    for name in names:
        with av.open(str(ran.logdir / name)) as video:
            frames = sum(1 for _ in video.decode(video=0))
        assert frames == (9 if name.endswith("_3.mp4") else 17)  # 4 n - 3
    probes = [line for line in lines(ran.logdir) if "probe_movement_len_3" in line]
    assert [line["step"] for line in probes] == [0, 1]
    shares = {f"probe_{kind}_len_{length}" for kind in ("saturation", "movement", "contrast") for length in (3, 5)}
    others = {f"probe_{kind}_len_5" for kind in ("sharpness", "saturation_drift", "movement_drift", "seam_index")}
    for line in probes:
        assert shares | others <= line.keys()
        assert all(0 <= line[kind] <= (16 if "movement" in kind else 1) for kind in shares)


def test_the_average_is_sampled_and_then_the_weights_are_back(ran):
    for number, weights in enumerate(ran.sampled, start=1):
        stored = contents(ran.logdir / f"checkpoint_model_{number:06d}")
        raw, average = (
            {name: stored[f"{group}/{name}"] for name in weights} for group in ("generator", "generator_ema")
        )
        assert_equal(weights, average)
        assert any(not torch.equal(weights[name], raw[name]) for name in raw)


def test_without_flags_the_file_decides_and_what_is_not_wanted_is_not_made(command, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = command("--config_path", config, "--no_save", "--no_visualize", "--threads", "1")
    assert result.status == 0, result.err
    logdir = Path("output") / config.parent.name / config.stem
    assert [path.name for path in tmp_path.iterdir()] == ["output"]  # no wandb
    assert [line["step"] for line in lines(logdir)] == [0, 1, 2]
    assert saved(logdir).train.max_iters == 3
    assert sorted(files(logdir)) == ["config.yaml", "metrics.jsonl", "run.json"]


def test_a_run_that_saves_nothing_goes_on_from_what_is_saved(command, ran, config, tmp_path):
    shutil.copytree(ran.logdir, logdir := tmp_path / "run")
    before = {name: data for name, data in files(logdir).items() if name.startswith("checkpoint_")}
    same = ("optimizer.generator.lr=0.002", "--threads", "1", "--no_visualize")
    result = command("--config_path", config, "--logdir", logdir, "--no_save", *same)
    assert result.status == 0, result.err
    assert [line["step"] for line in lines(logdir) if "generator_loss" in line] == [0, 1, 2]
    assert {name: data for name, data in files(logdir).items() if name.startswith("checkpoint_")} == before


def test_a_run_that_starts_anew_leaves_the_old_one_whole(command, config, ran, tmp_path):
    shutil.copytree(ran.logdir, logdir := tmp_path / "run")
    before = files(logdir)
    # Another config is no obstacle, and no prompt for --allow-config-change.
    again = ("--config_path", config, "--logdir", logdir, "--no_visualize", "--threads", "1", "--no-auto-resume")
    result = command(*again, "--max_iters", "1", "train.seed=5")
    assert result.status == 0, result.err
    assert files(logdir / "superseded_000") == before
    assert [line["step"] for line in lines(logdir)] == [0]
    assert checkpoints(logdir) == ["checkpoint_model_000001"]
    assert command(*again, "--max_iters", "1", "--no_save").status == 0
    assert files(logdir / "superseded_000") == before
    assert checkpoints(logdir / "superseded_001") == ["checkpoint_model_000001"]
    assert checkpoints(logdir) == []


def test_a_folder_of_another_config_is_refused_until_it_is_allowed(command, config, ran, tmp_path, monkeypatch):
    shutil.copytree(ran.logdir, logdir := tmp_path / "run")
    before = files(logdir)
    arguments = ("--config_path", config, "--logdir", logdir, "--no_visualize", "--threads", "1", "train.seed=5")
    with monkeypatch.context() as patch:
        patch.setattr(Validation, "__init__", forbidden)
        patch.setattr(build, "build_model", forbidden)
        result = command(*arguments)
    assert result.status == 2
    assert f"error: {logdir}: belongs to a run with another config" in result.error
    assert "optimizer.generator.lr: 0.002 -> 0.001" in result.error
    assert "train.seed: 0 -> 5" in result.error
    assert "--allow-config-change" in result.error
    assert "max_iters" not in result.error and "wandb" not in result.error  # these are free to change
    assert files(logdir) == before
    allowed = command(*arguments, "--allow-config-change")
    assert allowed.status == 0, allowed.err
    assert checkpoints(logdir)[-1] == "checkpoint_model_000003"
    assert saved(logdir).train.seed == 5
    assert [line["step"] for line in lines(logdir) if "generator_loss" in line] == [0, 1, 2]


# --- a dry run -------------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_all_and_touches_nothing(command, small_training, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "train", forbidden)
    monkeypatch.chdir(tmp_path)
    path = small_training("self_forcing", "model.load_from=nowhere.pth", "data.data_path=nowhere.txt")
    result = command("--config_path", path, "--dry_run", "--max_iters", "7", "--logdir", "here")
    assert (result.status, result.err) == (0, "")
    text, _, table = result.out.partition("\n\n")
    (tmp_path / "printed.yaml").write_text(text)
    expected = load_config(path, ["train.max_iters=7"], TrainingConfig)
    assert load_config(tmp_path / "printed.yaml", (), TrainingConfig) == expected
    for role, settings in (("generator", expected.model), ("critic", expected.fake_score)):
        count = sum(weight.numel() for weight in LongSanaDiT(settings).parameters())
        (line,) = [line for line in table.splitlines() if line.startswith(f"{role} parameters")]
        assert line.split()[-1] == f"{count:,}"
    assert [line.split()[-1] for line in table.splitlines() if line.split()[0] == "total"] == ["GiB"]
    assert [path.name for path in tmp_path.iterdir()] == ["printed.yaml"]


@pytest.mark.parametrize("stage", ["ode", "self_forcing", "longsana"])
def test_the_published_launches(command, train_script, stage, monkeypatch):
    """The commands of issue 3, as one of their 64 processes sees them; the estimate has tests of its own."""
    seen: list[TrainingConfig] = []

    def estimate(config: TrainingConfig, size: int, *, local_size: int) -> Any:
        assert (size, local_size) == (64, 8)
        seen.append(config)
        return SimpleNamespace(table=lambda: "an estimate")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("longsana.training.estimate.estimate", estimate)
    monkeypatch.setattr(launch, "train", forbidden)
    for name, value in {"RANK": 0, "WORLD_SIZE": 64, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 8}.items():
        monkeypatch.setenv(name, str(value))
    arguments = (
        f"--config_path configs/sana_video_config/longsana/480ms/{stage}.yaml "
        f"--wandb_name debug_480p_{stage} --logdir output/debug_480p_{stage} --dry_run"
    )
    result = command(*arguments.split(), wandb=True)
    assert (result.status, result.err) == (0, "")
    assert [config.trainer for config in seen] == [stage]
    assert f"trainer: {stage}" in result.out and "an estimate" in result.out


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "arguments", "words"),
    [
        ("longsana", "train.max_iter=3", "unknown key train.max_iter (did you mean 'train.max_iters'?)"),
        ("longsana", "train.generator_ckpt=x", "unknown key train.generator_ckpt"),
        ("longsana", "model.load_from=nowhere.pth", "model.load_from: 'nowhere.pth' not found"),
        ("longsana", "real_score.load_from=nowhere.pth", "real_score.load_from: 'nowhere.pth' not found"),
        ("longsana", "data.data_path=EMPTY", "no prompts in this file"),
        ("longsana", "data.data_path=nowhere.txt", "data.data_path: 'nowhere.txt' not found"),
        ("longsana", "data.data_path=x/vidprom_filtered_extended.txt", "hf download gdhe17/Self-Forcing"),
        ("ode", "data.data_path=nowhere", "data.data_path: 'nowhere' not found"),
        ("ode", "validation.vis_interval=1 validation.val_data_path=no.txt", "validation.val_data_path: 'no.txt'"),
        ("longsana", "--max_iter 3", "unknown option --max_iter (did you mean '--max_iters'?)"),
        ("longsana", "--no-save", "unknown option --no-save (did you mean '--no_save'?)"),
        ("longsana", "--no_auto_resume", "unknown option --no_auto_resume (did you mean '--no-auto-resume'?)"),
        ("longsana", "--trainer longsama", "trainer=longsama"),
        ("longsana", "trainer=longsama", "trainer=longsama"),
        ("longsana", "lr=0", "optimizer.generator.lr=0.0: must be above 0"),
        ("longsana", "--generator_ckpt x.pt", "model.load_from: 'x.pt' not found"),
        ("longsana", "--max_iters many", "train.max_iters=many"),
        ("longsana", "--max_iters 0", "train.max_iters=0: must be at least 1"),
        ("longsana", "--max_iters=", "train.max_iters"),
        ("longsana", "--train.max_iters", "a value is missing"),
        ("longsana", "--threads few", "--threads"),
        ("longsana", "--config_path nowhere.yaml", "--config_path: 'nowhere.yaml' not found"),
        ("longsana", "train.total_batch_size=64", "the nearest that they can: 63 and 66"),
    ],
)
def test_bad_input_is_one_line_and_status_2(command, small_training, tmp_path, monkeypatch, stage, arguments, words):
    (tmp_path / "empty.txt").write_text("\n \n")
    monkeypatch.setattr(launch, "train", forbidden)
    monkeypatch.setenv("WORLD_SIZE", "3")
    logdir = tmp_path / "run"
    arguments = arguments.replace("EMPTY", str(tmp_path / "empty.txt"))
    everything = ("--config_path", small_training(stage), "--logdir", logdir, *arguments.split())
    result = command(*everything)
    assert result.status == 2
    assert result.error.startswith("error: ") and words in result.error
    assert result.out == ""
    assert not logdir.exists()
    monkeypatch.setenv("RANK", "1")  # what is wrong for all is said once
    assert command(*everything) == (2, "", "")


def test_a_config_of_inference_is_not_trained(command, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "train", forbidden)
    path = ROOT / "configs/sana_video_config/Sana_2000M_480px_adamW_fsdp_longsana.yaml"
    result = command("--config_path", path, "--logdir", tmp_path / "run")
    assert result.status == 2
    assert "trainer" in result.error and str(path) in result.error


def test_a_start_that_fails_does_not_claim_the_folder(command, config, tmp_path):
    """Neither a new folder, nor one of a run that is refused a changed network."""
    start = ("--config_path", config, "--logdir", tmp_path / "new", "--no_visualize", "--threads", "1")
    assert command(*start, "rollout.num_training_frames=7").status == 2  # the trajectories have 5
    assert command(*start, "--max_iters", "1").status == 0
    refused = command(*start, "train.ema_weight=0.0", "--allow-config-change")
    assert refused.status == 2 and "does not fit this run" in refused.error
    assert command(*start, "--max_iters", "2").status == 0


def test_validation_that_is_not_wanted_needs_no_prompts(command, config, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "train", lambda *arguments: 0)
    nowhere = ("--config_path", config, "--logdir", tmp_path, "validation.val_data_path=no.txt")
    assert command(*nowhere).status == 2
    assert command(*nowhere, "--no_visualize").status == 0


def test_out_of_memory_says_what_to_lower(command, config, tmp_path, monkeypatch):
    def full(self: Learner, step: int) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.\nMore lines")

    monkeypatch.setattr(Learner, "update", full)
    result = command("--config_path", config, "--logdir", tmp_path, "--no_visualize", "--threads", "1")
    assert result.status == 1
    (line,) = [line for line in result.err.splitlines() if line.startswith("failed")]
    assert "out of memory (CUDA out of memory. Tried to allocate 3.00 GiB.)" in line
    known = leaf_keys(TrainingConfig)
    named = [word.strip(",;").partition("=")[0] for word in line.partition("lower ")[2].split() if "." in word]
    assert named and all(name in known for name in named), named


def test_any_other_failure_propagates(command, config, tmp_path, monkeypatch):
    def fail(self: Learner, step: int) -> Tensor:
        raise RuntimeError("planted")

    monkeypatch.setattr(Learner, "update", fail)
    with pytest.raises(RuntimeError, match="planted"):
        command("--config_path", config, "--logdir", tmp_path, "--no_visualize", "--threads", "1")
