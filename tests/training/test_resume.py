"""A run that was killed and goes on ends where one that was not ends: every tensor, to the bit.

And two processes do what one does in two accumulation steps.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from longsana.weights.checkpoint_folder import open_tensors, own_names, read_own
from tests.forks import Fork, Forks
from tests.training.conftest import PROMPTS, ROOT, SCRIPT

pytestmark = pytest.mark.timeout(600)
FREE = "train.text_encoder=free"
FIRST_CHUNK = ["train.first_chunk_probability=0.5", "sampling.first_chunk_frames=1"]
# (trainer, overrides, updates before the kill): in iteration 4 of 6, after a checkpoint at 4 of all iterations.
STAGES: dict[str, tuple[str, list[str], int]] = {
    "base": ("flow_matching", [], 4),
    "base_muon": (
        "flow_matching",
        ["optimizer.generator.muon_lr=1e-3", "optimizer.generator.decay_after=2", "train.ema_relative_width=0.1"],
        4,
    ),
    "causal": ("flow_matching", ["flow_matching.causal=true", "scheduler.sampling_algo=chunk_flow_euler"], 5),
    "picture": ("flow_matching", ["train.image_probability=0.5"], 4),  # first in iterations 0, 2 and 4
    "ode": ("ode", [], 5),
    "ode_picture": ("ode", ["train.image_probability=0.5", "sampling.image_first=absorb"], 5),
    # Generator and critic play in iterations 0, 2, 4, the critic alone in 1, 3, 5: the kill is between the two of 4.
    "self_forcing": ("self_forcing", [], 7),
    "longsana": ("longsana", [], 7),
    "past": ("longsana", ["model.state_decay=learned", "model.num_sink_blocks=1"], 7),
    # Streams of up to 17 latents; their captions are encoded ahead, those of the switch file too.
    "switching": ("longsana", ["streaming.switch_mode=random", "streaming.streaming_max_length=17", FREE], 7),
    # Their prompts name pictures: of clips in iterations 0, 2 and 4; of every stream.
    "self_forcing_picture": ("self_forcing", ["train.image_probability=0.5"], 7),
    "longsana_picture": ("longsana", ["train.image_probability=1", "sampling.image_first=absorb"], 7),
    # In iterations 1 to 5, of the critic but in 4; of the second of streams of four stretches, from iteration 2 on.
    "self_forcing_first_chunk": ("self_forcing", FIRST_CHUNK, 7),
    "longsana_first_chunk": ("longsana", [*FIRST_CHUNK, "streaming.streaming_max_length=17"], 7),
    "lora": ("longsana", ["train.lora.rank=2", "train.gradient_checkpointing=true"], 7),
    "changing": ("longsana", ["streaming.prompt_change_prob=0.7", "streaming.prompt_change=recache=2"], 7),
}
EVERY_DAY = [pytest.param(name, marks=() if name in ("base", "longsana") else pytest.mark.slow) for name in STAGES]
"""One that trains one network, and of those that train two the one whose streams hold the most."""


@pytest.fixture(scope="module")
def run(train_script) -> Callable[..., int]:
    def train(config: Path, logdir: Path, *arguments: str) -> int:
        """The training command in this process."""
        status: int = train_script.main(
            ["--config_path", str(config), "--logdir", str(logdir), "--disable-wandb", "--threads", "1", *arguments]
        )
        return status

    return train


@pytest.fixture(scope="module")
def stage_config(small_training, trajectories, pictured_prompts, tmp_path_factory) -> Callable[..., Path]:
    second = tmp_path_factory.mktemp("switch") / "second.txt"
    second.write_text("".join(f"{prompt}, and then it rains\n" for prompt in PROMPTS), encoding="utf-8")

    def write(name: str, *overrides: str) -> Path:
        trainer, own, _ = STAGES[name]
        data = [f"data.data_path={trajectories}"] if trainer == "ode" else []
        if name in ("self_forcing_picture", "longsana_picture"):
            data = [f"data.data_path={pictured_prompts}"]
        if name == "switching":
            data += [f"streaming.switch_prompt_path={second}", "streaming.prompt_change=recache=1"]
        return small_training(trainer, *own, *data, *overrides)

    return write


@pytest.fixture(scope="module")
def launch(forks: Forks) -> Callable[..., list[Fork]]:
    def start(processes: int, config: Path, logdir: Path) -> list[Fork]:
        """The training command in so many processes."""
        arguments = ["--config_path", config, "--logdir", logdir, "--disable-wandb", "--threads", "1"]
        return forks.launch(processes, "train", arguments)

    return start


def contents(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by name: networks, averages, moments, generators of random numbers, streams."""
    tensors = {name: stored.read() for name, stored in open_tensors(checkpoint).items()}
    for name in own_names(checkpoint):
        tensors |= {f"{name}.{key}": tensor for key, tensor in (read_own(checkpoint, name) or {}).items()}
    return tensors


def lines(logdir: Path) -> list[dict[str, Any]]:
    """The log without what differs from run to run."""
    records = [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]
    measured = ("time", "per iteration time", "gpu_peak_allocated")
    return [{name: value for name, value in record.items() if name not in measured} for record in records]


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    differing = [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]
    assert not differing


@pytest.mark.parametrize("name", EVERY_DAY)
def test_kill_9_loses_nothing(stage_config, run, forks, tmp_path, name):
    config, whole, broken = stage_config(name), tmp_path / "whole", tmp_path / "broken"
    assert run(config, whole) == 0
    arguments = ["--config_path", config, "--logdir", broken, "--disable-wandb", "--threads", "1"]
    killed = forks.start("tests.training.killed", [STAGES[name][2], *arguments])
    told = killed.finish()
    assert killed.returncode == -signal.SIGKILL, told
    assert [path.name for path in sorted(broken.glob("checkpoint_*"))] == [
        "checkpoint_model_000002",
        "checkpoint_model_000004",
    ]
    assert run(config, broken) == 0
    assert_equal(contents(whole / "checkpoint_model_000006"), contents(broken / "checkpoint_model_000006"))
    assert lines(whole) == lines(broken)


def test_the_runs_differ_where_they_should(stage_config, run, tmp_path):
    """The comparison above can fail: another seed, or one iteration less, gives other tensors."""
    config = stage_config("longsana")
    assert run(config, tmp_path / "a", "train.seed=1") == 0
    assert run(config, tmp_path / "b", "--no_visualize") == 0
    a, b = (contents(tmp_path / name / "checkpoint_model_000006") for name in "ab")
    assert a.keys() == b.keys()
    moved = [name for name in a if not torch.equal(a[name], b[name])]
    for part in (
        "generator/",
        "critic/",
        "generator_ema/",
        "optimizer.generator/",
        "optimizer.critic/",
        "stream_00000.",
    ):
        assert any(name.startswith(part) for name in moved), part
    assert any(
        not torch.equal(b[name], value) for name, value in contents(tmp_path / "b" / "checkpoint_model_000004").items()
    )


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        pytest.param("base", ["train.sharding_strategy=no_shard"], marks=pytest.mark.slow),
        pytest.param("causal", ["train.sharding_strategy=hybrid_zero2"], marks=pytest.mark.slow),
        pytest.param("picture", [], marks=pytest.mark.slow),
        pytest.param("ode", [], marks=pytest.mark.slow),
        pytest.param("ode_picture", [], marks=pytest.mark.slow),
        pytest.param("self_forcing_picture", [], marks=pytest.mark.slow),
        pytest.param("longsana_picture", [], marks=pytest.mark.slow),
        pytest.param(
            "self_forcing",
            ["train.mixed_precision=true", "train.gradient_checkpointing=true"],
            marks=pytest.mark.slow,  # LongSANA, below, has its networks and losses
        ),
        ("longsana", []),
        pytest.param("self_forcing_first_chunk", [], marks=pytest.mark.slow),
        pytest.param("longsana_first_chunk", [], marks=pytest.mark.slow),
        ("lora", []),
        pytest.param("past", [], marks=pytest.mark.slow),
        pytest.param("changing", [], marks=pytest.mark.slow),
        # One switches at the second stretch, the other at the fourth.
        pytest.param("switching", ["train.seed=2"], marks=pytest.mark.slow),
    ],
)
def test_two_processes_do_what_one_does_in_two_steps(stage_config, run, launch, tmp_path, name, overrides):
    """Equal within 2e-5 of each tensor's size after four iterations: float32 sums are taken in another order."""
    config = stage_config(name, "train.max_iters=4", "train.total_batch_size=2", *overrides)
    assert run(config, tmp_path / "one") == 0
    for process in launch(2, config, tmp_path / "two"):
        told = process.finish()
        assert process.returncode == 0, told
    one, two = (contents(tmp_path / folder / "checkpoint_model_000004") for folder in ("one", "two"))
    names = [key for key in one if not key.startswith("rng_")]
    assert set(names) == {key for key in two if not key.startswith("rng_")}
    for key in names:
        scale = one[key].double().norm() + 1e-12
        assert (one[key].double() - two[key].double()).norm() / scale < 2e-5, key
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_a_signal_to_torchrun_is_obeyed_by_all(stage_config, run, tmp_path):
    """SIGTERM to the launcher: every process finishes its iteration, and together they save."""
    config = stage_config("self_forcing", "train.max_iters=100000", "train.log_iters=100000")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = ["--config_path", config, "--logdir", tmp_path, "--disable-wandb", "--threads", "1"]
    running = subprocess.Popen(
        [sys.executable, *launcher, str(SCRIPT), *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    log, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    _, told = running.communicate(timeout=120)
    assert running.returncode != 0
    assert "stopped by SIGTERM after iteration" in told, told
    (saved,) = tmp_path.glob("checkpoint_model_*")
    step = int(saved.name[-6:])
    assert step == len(lines(tmp_path)) >= 3
    assert (
        run(config, tmp_path, "train.total_batch_size=2", "--allow-config-change", f"train.max_iters={step + 1}") == 0
    )
    assert len(lines(tmp_path)) == step + 1


@pytest.mark.slow
def test_a_signal_during_validation_ends_it_for_all(stage_config, tmp_path):
    """SIGTERM to one of two processes: both stop before their next videos, and save together."""
    config = stage_config(
        "self_forcing",
        *("train.max_iters=100000", "train.log_iters=100000", "validation.vis_interval=2", "validation.val_samples=5"),
        "validation.vis_video_lengths=[3,61,121,181]",
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = ["--config_path", config, "--logdir", tmp_path, "--disable-wandb", "--threads", "1"]
    running = subprocess.Popen(
        [sys.executable, *launcher, str(SCRIPT), *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("vis/*/*_len_3.mp4")) and time.monotonic() < deadline:
        time.sleep(0.02)
    children = psutil.Process(running.pid).children()
    children[-1].send_signal(signal.SIGTERM)
    _, told = running.communicate(timeout=120)
    assert "stopped by SIGTERM after iteration 2" in told, told
    assert [path.name for path in tmp_path.glob("checkpoint_*")] == ["checkpoint_model_000002"]
    videos = list((tmp_path / "vis" / "step_0000002").iterdir())
    assert 0 < len(videos) < 20 and not [path for path in videos if path.name.startswith(".")]


def test_a_run_of_two_processes_goes_on_with_one(stage_config, run, launch, tmp_path):
    """Resharding: weights and moments are the same, streams of surplus micro-batches end, and the log says so."""
    config = stage_config("longsana", "train.max_iters=2", "streaming.streaming_max_length=41")
    for process in launch(2, config, tmp_path):
        told = process.finish()
        assert process.returncode == 0, told
    # What the main process alone finds is told once, also where others wait for it.
    other = stage_config("longsana", "train.max_iters=2", "train.seed=1")
    refused = launch(2, other, tmp_path)
    told = "".join(process.finish() for process in refused)
    assert [process.returncode for process in refused] == [2, 2], told
    assert told.count("belongs to a run with another config") == told.count("error: ") == 1
    assert told.startswith("error: ") and "train.seed: 0 -> 1" in told and "Traceback" not in told
    before = contents(tmp_path / "checkpoint_model_000002")
    assert run(config, tmp_path, "train.max_iters=3", "train.log_iters=1") == 0
    after = contents(tmp_path / "checkpoint_model_000003")
    streams = [{name[:12] for name in held if name.startswith("stream_")} for held in (before, after)]
    assert streams == [{"stream_00000", "stream_00001"}, {"stream_00000"}]
    assert int(after["optimizer.critic/blocks.0.attn.qkv.weight.step"]) == 3
    # Generator, critic, critic; then generator, critic: 5 latents and then 4 each time.
    assert int(before["stream_00000.frames"]) == 13
    assert int(after["stream_00000.frames"]) == 21
