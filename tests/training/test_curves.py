"""Every stage learns: its loss falls on the small config, along the curve recorded in curves.json.

The distilled stages take their teacher and critic from the base run of this file, the student begins random: there is
far to go, and what moves it is the difference of the two scores alone. Scores are compared at one noise level, because
the distance to the teacher depends on the level more than on the student.

To record the curves anew, after a change that is meant to change them:

    LONGSANA_RECORD_CURVES=1 pytest tests/training/test_curves.py
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from longsana.data.clips import open_clips
from longsana.data.trajectories import open_trajectories
from longsana.training.stages import self_forcing
from tests.training.conftest import CHANNELS, HEIGHT, WIDTH

pytestmark = pytest.mark.timeout(600)
RECORDED = Path(__file__).with_name("curves.json")
RECORD = os.environ.get("LONGSANA_RECORD_CURVES") == "1"
WINDOWS = 8  # a curve is the means of this many equal parts of a run
FALL = 0.1
"""Share by which the last quarter of a curve must be below the first."""
TOLERANCE = 0.02
"""Relative, of each mean. Kernels without vector instructions, or two threads, move none of them by over 0.3 %."""
CLIP = (CHANNELS, 5, HEIGHT, WIDTH)

# Without eps, steps of AdamW are as large where a gradient is only rounding: then two machines soon differ.
LEARNING = [
    "train.batch_size=4",
    "train.max_iters=96",
    "optimizer.generator.lr=3e-3",
    "optimizer.generator.eps=1e-4",
]
CAUSAL = ["flow_matching.causal=true", "scheduler.sampling_algo=chunk_flow_euler"]
DISTILLING = [
    "train.batch_size=2",
    "train.max_iters=24",
    "optimizer.generator.lr=3e-3",
    "optimizer.generator.eps=1e-4",
    "optimizer.critic.lr=3e-3",
    "optimizer.critic.eps=1e-4",
    "distillation.dfake_gen_update_ratio=1",
    "distillation.min_timestep=700",
    "distillation.max_timestep=700",
    "sampling.null_caption=learned",
    "real_score.depth=2",
    "fake_score.depth=2",
]


class StageRun(NamedTuple):
    """curves: what must fall, as the log names it."""

    trainer: str
    overrides: list[str]
    curves: list[str]


DISTANCE = "generator_distance_to_real"
STAGES = {
    "base": StageRun("flow_matching", LEARNING, ["generator_loss"]),
    "causal": StageRun("flow_matching", LEARNING + CAUSAL, ["generator_loss"]),
    "ode": StageRun("ode", LEARNING, ["generator_loss"]),
    "self_forcing": StageRun("self_forcing", DISTILLING, ["critic_loss", DISTANCE]),
    "longsana": StageRun("longsana", [*DISTILLING, "streaming.streaming_max_length=21"], ["critic_loss", DISTANCE]),
}
CURVES = [(name, key) for name, stage in STAGES.items() for key in stage.curves]

Log = list[dict[str, Any]]
"""metrics.jsonl, without the times."""


@pytest.fixture(scope="module")
def train(train_script, small_training, trajectories, tmp_path_factory) -> Callable[..., Log]:
    """`train("ode", "train.max_iters=3")`: the training command in this process, and its log."""
    folder = tmp_path_factory.mktemp("curves")
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(open_clips("generated:blobs", shape=CLIP).prompts()) + "\n", encoding="utf-8")

    def command(name: str, *overrides: str) -> tuple[Log, Path]:
        stage, logdir = STAGES[name], Path(tempfile.mkdtemp(dir=folder))
        own: list[str] = []
        if name == "ode":
            own = [f"data.data_path={trajectories}"]
        elif stage.trainer in ("self_forcing", "longsana"):
            own = [f"data.data_path={prompts}"]
            own += [f"{role}.load_from={teacher()}" for role in ("real_score", "fake_score")]
        config = small_training(stage.trainer, *stage.overrides, *own, "train.log_iters=1000", *overrides)
        flags = ["--disable-wandb", "--no_visualize", "--threads", "1", *([] if name == "base" else ["--no_save"])]
        assert train_script.main(["--config_path", str(config), "--logdir", str(logdir), *flags]) == 0
        lines = (logdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        times = ("time", "per iteration time")
        return [{k: v for k, v in json.loads(line).items() if k not in times} for line in lines], logdir

    whole = cache(command)  # a run without overrides is made once

    def teacher() -> Path:
        (checkpoint,) = whole("base")[1].glob("checkpoint_*")
        return checkpoint

    return lambda name, *overrides: (command(name, *overrides) if overrides else whole(name))[0]


def curve(log: Log, key: str) -> list[float]:
    values = torch.tensor([line[key] for line in log], dtype=torch.float64)
    assert len(values) % WINDOWS == 0
    return values.view(WINDOWS, -1).mean(1).tolist()


def falls(means: list[float]) -> bool:
    quarter = WINDOWS // 4
    return sum(means[-quarter:]) < (1 - FALL) * sum(means[:quarter])


@pytest.mark.parametrize(("name", "key"), CURVES)
def test_it_falls_as_recorded(train, name, key):
    means = curve(train(name), key)
    assert falls(means), means
    recorded = json.loads(RECORDED.read_text(encoding="utf-8")) if RECORDED.exists() else {}
    title = f"{name}, {key}"
    if RECORD:
        recorded[title] = [float(f"{mean:.5g}") for mean in means]
        rows = ",\n".join(f"  {json.dumps(title)}: {json.dumps(values)}" for title, values in recorded.items())
        RECORDED.write_text(f"{{\n{rows}\n}}\n", encoding="utf-8")
        pytest.skip(f"recorded {title}")
    assert means == pytest.approx(recorded[title], rel=TOLERANCE)


def test_more_is_learned_than_the_mean(train, trajectories):
    """A network that sees nothing of its input can do no better than to predict the mean of its target, which is 0."""
    clips = open_clips("generated:blobs", shape=CLIP)
    velocity = 1 + _mean_square([clips[i].latents for i in range(200)])
    ends = open_trajectories(str(trajectories), shape=CLIP)
    x0 = _mean_square([ends[i].states[-1] for i in range(len(ends))])
    for name, blind in {"base": velocity, "causal": velocity, "ode": x0}.items():
        assert curve(train(name), "generator_loss")[-1] < (1 - FALL) * blind, name


def _mean_square(videos: list[Tensor]) -> float:
    return float(torch.stack(videos).float().square().mean())


@pytest.mark.parametrize("name", ["causal", "longsana"])
def test_two_runs_are_equal_to_the_bit(train, name):
    short = train(name, "train.max_iters=3")
    assert short == train(name)[:3]
    assert short != train(name, "train.max_iters=3", "train.seed=1")


def test_without_steps_nothing_falls(train):
    """What a loop that forgets its optimizer would do."""
    means = curve(train("ode", "optimizer.generator.lr=1e-9", "train.max_iters=32"), "generator_loss")
    assert not falls(means), means
    assert falls(curve(train("ode")[:32], "generator_loss"))


def test_the_wrong_way_along_the_scores_leads_away(train, monkeypatch):
    right_way = train("self_forcing")[:8]
    gradient = self_forcing.dmd_gradient
    monkeypatch.setattr(self_forcing, "dmd_gradient", lambda x, fake, real: -gradient(x, fake, real))
    means = curve(train("self_forcing", "train.max_iters=8"), DISTANCE)
    assert not falls(means), means
    assert falls(curve(right_way, DISTANCE))
