"""LoRA in training: factors alone learn and are kept, and what they are is what files say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longsana.weights.checkpoint_folder import open_tensors
from tests.training.test_resume import assert_equal, contents

LORA = ("train.lora.rank=2", "train.lora.alpha=3", "optimizer.generator.lr=1e-2")


@pytest.fixture
def train(command: Callable[..., object], small_training: Callable[..., Path], trajectories: Path) -> Callable:
    """`train("ode", logdir, "train.max_iters=2")`: a small run with a LoRA; its result."""

    def run(trainer: str, logdir: Path, *overrides: str):
        data = (f"data.data_path={trajectories}",) if trainer == "ode" else ()
        config = small_training(trainer, *LORA, *data)
        return command("--config_path", config, "--logdir", logdir, "--threads", "1", *overrides)

    return run


@pytest.mark.parametrize("trainer", ["flow_matching", "ode", "self_forcing", "longsana"])
def test_factors_alone_are_kept_and_a_run_goes_on_from_its_own(train, tmp_path, trainer):
    """Stopped after iteration 4 and gone on with, to the bit what a run without a stop is."""
    assert train(trainer, tmp_path / "whole", "train.log_iters=6").status == 0
    assert train(trainer, tmp_path / "cut", "train.max_iters=4").status == 0
    assert train(trainer, tmp_path / "cut").status == 0
    whole, cut = (contents(tmp_path / name / "checkpoint_model_000006") for name in ("whole", "cut"))
    assert_equal(whole, cut)
    names = [name for name in open_tensors(tmp_path / "cut" / "checkpoint_model_000006")]
    assert all(".lora_A." in name or ".lora_B." in name for name in names), names
    roles = {"generator", "critic"} if trainer in ("self_forcing", "longsana") else {"generator"}
    assert {name.partition("/")[0] for name in names} == {
        *roles,
        *(f"optimizer.{role}" for role in roles),
        "generator_ema",
    }
    changed = [name for name in names if name.partition("/")[0] in roles and ".lora_B." in name]
    assert all(whole[name].any() for name in changed)
    assert len(changed) == len(roles) * 0 + sum(1 for _ in changed) > 0
