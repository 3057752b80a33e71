"""The loop: whose turn it is, what an update is made of, which ones are thrown away, and what survives on disk."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from longsana.models.embeddings import TextEmbedding
from longsana.runtime.distributed import World
from longsana.runtime.errors import InputError
from longsana.runtime.logging import RunLog
from longsana.runtime.stop import Stopped, caught
from longsana.training import checkpoint
from longsana.training.checkpoint import Checkpointer, SaveFailed
from longsana.training.config import AdamWConfig, TrainConfig
from longsana.training.learner import Learner
from longsana.training.loop import SKIPS, Loop, Progress, Stop, TrainingFailed
from longsana.training.parallel import connect
from longsana.training.stages.ode import OdeInitialisation
from longsana.training.stages.stage import Ahead, Loss, MicroBatch, MicroBatches, Stage
from longsana.weights.checkpoint_folder import read_progress
from tests.training.conftest import ROOT, SCRIPT
from tests.training.test_resume import assert_equal, contents, lines

CPU = torch.device("cpu")
NAME = "blocks.0.attn.qkv.weight"


@pytest.fixture
def group() -> Iterator[World]:
    world = World()
    connect(world, CPU)
    yield world
    world.disconnect()


class Toy(Stage):
    """Learners whose networks are to say nothing about noise that is a function of the sample's number.

    poison(turn): how this turn's numbers go wrong: "", "loss" or "gradient".
    """

    def __init__(self, learners: Sequence[Learner], text: TextEmbedding, poison: Callable[[MicroBatch], str]) -> None:
        self.learners, self._text, self._poison = learners, text, poison
        self.micro_batches: list[MicroBatch] = []

    def loss(self, micro_batch: MicroBatch) -> Loss:
        self.micro_batches.append(micro_batch)
        learner = next(learner for learner in self.learners if learner.name == micro_batch.role)
        value = self.values(learner, micro_batch.samples).mean()
        wrong = self._poison(micro_batch)
        if wrong == "loss":  # and its gradient is as good as ever
            value = value + torch.nan
        if wrong == "gradient":  # 0, with a slope of 0 times infinity
            value = value + (0 * learner.weights[NAME]).sqrt().sum()
        return Loss(value, {f"{micro_batch.role}_loss": value.detach()})

    def values(self, learner: Learner, samples: Sequence[int]) -> Tensor:
        """(B,), the loss of each sample."""
        x = torch.stack(
            [torch.randn(16, 2, 4, 6, generator=torch.Generator().manual_seed(number)) for number in samples]
        ).to(learner.model.dtype)
        text = TextEmbedding(*(part.expand(len(x), *part.shape[1:]) for part in self._text))
        velocity, _ = learner.model(x, torch.full((len(x),), 700.0), text)
        return velocity.square().flatten(1).mean(dim=1)


class Recorder(Learner):
    """Notes its turns and gradients."""

    log: list[tuple[int, str]]
    gradients: list[dict[str, Tensor]]

    def update(self, step: int) -> Tensor:
        self.log.append((step, self.name))
        self.gradients.append({name: weight.grad.clone() for name, weight in self.weights.items()})
        return super().update(step)


@pytest.fixture
def make(random_model, network, embed, tmp_path, group) -> Callable[..., Loop]:
    """`make(max_iters=3, accumulation=2)`: a loop of a generator that plays every second time and a critic."""

    def build(
        *,
        folder: Path = tmp_path,
        accumulation: int = 1,
        poison: Callable[[MicroBatch], str] = lambda micro_batch: "",
        dtype: torch.dtype = torch.float32,
        save: bool = False,
        asynchronous: bool = False,
        validate: Any = None,
        vis_interval: int = 0,
        **settings: Any,
    ) -> Loop:
        log: list[tuple[int, str]] = []
        learners = []
        for seed, (name, every) in enumerate((("generator", 2), ("critic", 1))):
            model = random_model(dataclasses.replace(network, depth=1), dtype, seed)
            learner = Recorder(name, model, AdamWConfig(lr=1e-3, beta1=0.9), every=every, ema_weight=0.5)
            learner.log, learner.gradients = log, []
            learners.append(learner)
        train = TrainConfig(**{"max_iters": 4, "log_iters": 1, "max_checkpoints": 9, **settings})
        return Loop(
            Toy(learners, embed(["a ball"]), poison),
            train,
            micro_batches=MicroBatches.of(group, accumulation),
            world=group,
            device=CPU,
            run_log=RunLog(folder, step=0, total=train.max_iters, main=True, wandb=None),
            checkpointer=Checkpointer(folder, group, keep=train.max_checkpoints, asynchronous=asynchronous),
            saves=save,
            validate=validate,
            vis_interval=vis_interval,
            texts={"config.yaml": "a: 1\n"},
        )

    return build


def steps_of(folder: Path) -> list[int]:
    """Of the checkpoints in a folder."""
    return sorted(int(path.name[-6:]) for path in folder.glob("checkpoint_*"))


def tensors(loop: Loop, name: str) -> dict[str, Tensor]:
    """Copies of all that a checkpoint keeps of a learner."""
    learner = next(learner for learner in loop.stage.learners if learner.name == name)
    return {f"{group}/{key}": t.clone() for group, held in learner.tensors().items() for key, t in held.items()}


def test_the_generator_plays_before_the_critic_and_every_second_time(make):
    loop = make(max_iters=5)
    assert loop.run() == 0
    both, critic = ["generator", "critic"], ["critic"]
    expected = [(step, name) for step in range(5) for name in (critic if step % 2 else both)]
    assert loop.stage.learners[0].log == expected
    assert [(micro_batch.step, micro_batch.role) for micro_batch in loop.stage.micro_batches] == expected


def test_samples_are_counted_and_nobody_takes_one_twice(make):
    loop = make(max_iters=3, accumulation=2, batch_size=3)
    loop.run()
    for name, updates in (("generator", 2), ("critic", 3)):
        taken = [
            number
            for micro_batch in loop.stage.micro_batches
            if micro_batch.role == name
            for number in micro_batch.samples
        ]
        assert taken == list(range(updates * 6))  # in the order of micro-batches, one after another
        assert loop.progress.samples[name] == updates * 6
    assert [micro_batch.index for micro_batch in loop.stage.micro_batches if micro_batch.role == "critic"] == [0, 1] * 3


def test_what_a_micro_batch_needs_is_made_once_after_the_loss_of_the_one_before(make):
    loop = make(max_iters=3, accumulation=2, batch_size=3)
    loop.stage.learners = loop.stage.learners[1:]
    events: list[tuple[str, MicroBatch]] = []
    loop.stage.inputs = Ahead(lambda micro_batch: events.append(("made", micro_batch)))
    loss = loop.stage.loss

    def noted(micro_batch: MicroBatch) -> Loss:
        loop.stage.inputs.take(micro_batch)
        events.append(("loss", micro_batch))
        return loss(micro_batch)

    loop.stage.loss = noted
    assert loop.run() == 0
    asked = loop.stage.micro_batches
    assert len(asked) == 6
    assert events == [event for micro_batch in asked for event in (("made", micro_batch), ("loss", micro_batch))]


def test_accumulated_gradients_are_those_of_all_micro_batchs_samples_at_once(make, tmp_path):
    loop = make(max_iters=1, accumulation=3, batch_size=2, dtype=torch.float64)
    twin = make(dtype=torch.float64)  # the same weights, before the step
    loop.run()
    for learner, whole in zip(loop.stage.learners, twin.stage.learners, strict=True):
        loss = twin.stage.values(whole, range(6)).mean()
        expected = dict(zip(whole.weights, torch.autograd.grad(loss, list(whole.weights.values())), strict=True))
        torch.testing.assert_close(learner.gradients[0], expected, rtol=1e-9, atol=1e-14)
        logged = lines(tmp_path)[0]
        assert logged[f"{learner.name}_loss"] == pytest.approx(loss.item(), rel=1e-6)
        norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
        assert logged[f"{learner.name}_grad_norm"] == pytest.approx(float(norm), rel=1e-6)


def test_a_run_whose_last_updates_were_skipped_fails_and_saves_nothing_of_them(make, tmp_path):
    loop = make(max_iters=5, save=True, log_iters=2, poison=lambda micro_batch: "loss" if micro_batch.step > 2 else "")
    with pytest.raises(TrainingFailed, match=r"the last updates were not finite \(.*2 of the critic\).*of step 2\)"):
        loop.run()
    assert [path.name for path in tmp_path.glob("checkpoint_*")] == ["checkpoint_model_000002"]


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_numbers_that_are_not_finite_change_nothing_and_are_counted(make, tmp_path, wrong):
    """In one of three micro-batches is enough; the other learner is not concerned."""
    before: dict[str, dict[str, Tensor]] = {}

    def poison(micro_batch: MicroBatch) -> str:
        if micro_batch.index == 0:
            before[f"{micro_batch.role} {micro_batch.step}"] = tensors(loop, micro_batch.role)
        return wrong if (micro_batch.role, micro_batch.step, micro_batch.index) == ("critic", 2, 1) else ""

    loop = make(max_iters=4, accumulation=3, poison=poison)
    assert loop.run() == 0
    assert_equal(before["critic 2"], before["critic 3"])
    for earlier, later in (("critic 1", "critic 2"), ("generator 0", "generator 2")):  # the comparison can fail
        assert all(
            not torch.equal(value, before[later][name]) for name, value in before[earlier].items() if NAME in name
        )
    assert (loop.progress.skipped, loop.progress.in_a_row["critic"], loop.progress.step) == (1, 0, 4)
    logged = lines(tmp_path)
    assert [line["skipped_updates"] for line in logged] == [0, 0, 1, 1]
    assert logged[2]["critic_grad_norm"] is None
    assert (logged[2]["critic_loss"] is None) == (wrong == "loss")
    assert logged[2]["generator_loss"] > 0
    assert loop.progress.samples["critic"] == 12  # the data go on: the same samples would fail again
    assert all(weight.grad is None for learner in loop.stage.learners for weight in learner.weights.values())


def test_an_update_in_which_no_micro_batch_learns_is_not_made(make, tmp_path):
    """And one in which some do is."""
    for idle, moves in (((0, 1), False), ((0,), True)):
        loop = make(max_iters=1, accumulation=2)
        learn = loop.stage.loss
        loop.stage.loss = lambda micro_batch, idle=idle, learn=learn: learn(micro_batch)._replace(
            learns=micro_batch.index not in idle
        )
        before = tensors(loop, "critic")
        loop.run()
        after = tensors(loop, "critic")
        assert any(not torch.equal(before[name], after[name]) for name in before) == moves
        assert loop.progress.skipped == 0


def test_a_validation_that_a_signal_skipped_is_made_up(make, tmp_path):
    seen: list[int] = []

    def validate(step: int, stop: Stop) -> dict[str, float]:
        seen.append(step)
        return {}

    def poison(micro_batch: MicroBatch) -> str:
        if micro_batch.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return ""

    stopped = make(save=True, validate=validate, vis_interval=2, poison=poison)
    assert stopped.run() == 128 + signal.SIGTERM
    assert seen == []
    again = make(save=True, validate=validate, vis_interval=2)
    again.resume(again.checkpointer.latest())
    assert again.run() == 0
    assert seen == [2, 4]
    ended = make(save=True, validate=validate, vis_interval=2)
    ended.resume(ended.checkpointer.latest())
    assert ended.run() == 0
    assert seen == [2, 4]


def test_a_signal_ends_a_validation_between_its_videos_and_saves(make, tmp_path):
    """And the validation is made up by the next start."""
    asked: list[bool] = []

    def validate(step: int, stop: Stop) -> dict[str, float] | None:
        for video in range(5):
            asked.append(stop())
            if asked[-1]:
                return None
            if video == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        return {}

    loop = make(max_iters=9, log_iters=100, save=True, validate=validate, vis_interval=3)
    assert loop.run() == 128 + signal.SIGTERM
    assert asked == [False, False, False, True]
    assert steps_of(tmp_path) == [3]
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]
    again = make(max_iters=9, log_iters=100, save=True, validate=validate, vis_interval=3)
    again.resume(again.checkpointer.latest())
    # Nothing has been trained since the start: it need not wait for the video.
    with pytest.raises(Stopped), caught():
        again.run()
    assert again.progress.step == 3 and asked[4:] == [False] * 3


def test_a_signal_while_the_last_checkpoint_is_being_written_does_not_lose_it(make, tmp_path, monkeypatch):
    """A scheduler's SIGTERM, on a slow disk that is written to in the background."""
    save, killers = checkpoint.write_parts, []

    def slow(*arguments: Any, **options: Any) -> Any:
        killers.append(threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)))
        killers[-1].start()
        time.sleep(0.5)
        return save(*arguments, **options)

    monkeypatch.setattr(checkpoint, "write_parts", slow)
    # What would happen without a handler; as it is, pytest would die.
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the signal was not waited for"))
    try:
        assert make(max_iters=2, log_iters=100, save=True, asynchronous=True).run() == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(killers) == 1 and not killers[0].is_alive()
    assert steps_of(tmp_path) == [2]


def test_what_is_being_written_is_finished_when_a_run_fails(make, tmp_path, monkeypatch):
    save = checkpoint.write_parts

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.3)
        return save(*arguments, **options)

    monkeypatch.setattr(checkpoint, "write_parts", slow)
    loop = make(
        max_iters=99,
        save=True,
        asynchronous=True,
        poison=lambda micro_batch: "loss" if micro_batch.step > 0 else "",
        log_iters=1,
    )
    with pytest.raises(TrainingFailed, match=r"the newest is of step 1\)"):
        loop.run()
    assert steps_of(tmp_path) == [1]


def test_a_failure_to_write_in_the_background_ends_the_run_soon(make, tmp_path, limited):
    """And not only when the next checkpoint is due."""
    loop = make(max_iters=1000, log_iters=900, save=True, asynchronous=True)
    loop.progress.step = 899
    with limited(10_000), pytest.raises(SaveFailed, match=r"File too large.*checkpoint_model_000900"):
        loop.run()
    assert 900 <= loop.progress.step < 1000
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_no_checkpoint_comes_or_goes_while_updates_are_skipped(make, tmp_path):
    """A divergence leaves the last checkpoints before it, though one is due in every iteration."""
    loop = make(
        max_iters=99,
        save=True,
        max_checkpoints=3,
        poison=lambda micro_batch: "gradient" if micro_batch.step > 4 else "",
    )
    with pytest.raises(TrainingFailed):
        loop.run()
    assert steps_of(tmp_path) == [3, 4, 5]


def test_a_checkpoint_that_was_due_while_updates_were_skipped_comes_after(make, tmp_path):
    def poison(micro_batch: MicroBatch) -> str:
        return "loss" if (micro_batch.role, micro_batch.step) == ("critic", 3) else ""

    make(max_iters=7, log_iters=4, save=True, poison=poison).run()
    assert steps_of(tmp_path) == [5, 7]  # due after 4; the last one is that of the end


def test_a_stop_while_updates_are_skipped_saves_beside_what_is_there(make, tmp_path):
    def poison(micro_batch: MicroBatch) -> str:
        if micro_batch.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return "loss" if micro_batch.step > 3 else ""

    loop = make(max_iters=99, save=True, max_checkpoints=2, poison=poison)
    assert loop.run() == 128 + signal.SIGTERM
    assert steps_of(tmp_path) == [3, 4, 6]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"step": 3, "later": 1}', "unknown later"),
        ('{"samples": {}}', "damaged"),
        ('{"step": "3"}', "damaged"),
        ('{"step": -3}', "damaged"),
        ('{"step": 3, "samples": [1]}', "damaged"),
        ('{"step": 3, "in_a_row": {"critic": null}}', "damaged"),
    ],
)
def test_progress_of_another_version_or_damaged(tmp_path, text, words):
    (tmp_path / "progress.json").write_text(text)
    with pytest.raises(InputError, match=rf"progress\.json: {words}"):
        Progress.read(tmp_path)
    (tmp_path / "progress.json").write_text('{"step": 3, "samples": {"critic": 4}}')
    assert Progress.read(tmp_path) == Progress(3, {"critic": 4})


def test_ten_in_a_row_stop_the_run_and_a_good_one_starts_a_new_row(make):
    good = SKIPS - 1
    loop = make(
        max_iters=99,
        poison=lambda micro_batch: "loss" if micro_batch.role == "critic" and micro_batch.step != good else "",
    )
    with pytest.raises(TrainingFailed, match=f"{SKIPS} updates of the critic in a row .*iteration {2 * SKIPS - 1}"):
        loop.run()
    assert loop.progress.skipped == 2 * SKIPS - 1
    assert loop.progress.in_a_row == {"generator": 0, "critic": SKIPS}


def test_a_row_goes_on_after_a_resume(make):
    def poison(micro_batch: MicroBatch) -> str:
        if (micro_batch.role, micro_batch.step) == ("critic", SKIPS - 1):  # after the generator's first five
            os.kill(os.getpid(), signal.SIGTERM)
        return "gradient" if micro_batch.role == "generator" else ""

    assert make(max_iters=99, log_iters=100, poison=poison, save=True).run() == 128 + signal.SIGTERM
    loop = make(max_iters=99, log_iters=100, poison=poison, save=True)
    found = loop.checkpointer.latest()
    assert read_progress(found)["in_a_row"] == {"generator": SKIPS // 2, "critic": 0}
    loop.resume(found)
    with pytest.raises(TrainingFailed, match="generator"):
        loop.run()
    assert (loop.progress.skipped, loop.progress.step) == (SKIPS, 2 * (SKIPS - 1))


def test_a_checkpoint_is_of_its_own_step_also_if_it_is_written_while_training_goes_on(make, tmp_path):
    runs = {}
    for name, asynchronous in (("at once", False), ("meanwhile", True)):
        (folder := tmp_path / name).mkdir()
        loop = make(folder=folder, save=True, asynchronous=asynchronous, max_iters=2)
        torch.manual_seed(0)  # the generator of random numbers is saved too
        assert loop.run() == 0
        loop.checkpointer.wait()
        runs[name] = folder
    steps = [f"checkpoint_model_{step:06d}" for step in (1, 2)]
    for step in steps:
        one, other = (folder / step for folder in runs.values())
        assert_equal(contents(one), contents(other))
        for path in one.iterdir():
            if path.suffix in (".json", ".yaml", ".safetensors") and path.name != "manifest.json":
                assert path.read_bytes() == (other / path.name).read_bytes(), path.name
    before, after = (contents(runs["meanwhile"] / step) for step in steps)  # each is another
    assert not torch.equal(before[f"critic/{NAME}"], after[f"critic/{NAME}"])


def test_a_signal_ends_the_run_after_the_iteration_and_saves_it(make, tmp_path):
    def poison(micro_batch: MicroBatch) -> str:
        if (micro_batch.role, micro_batch.step) == (
            "generator",
            2,
        ):  # the critic's turn of this iteration is still to come
            os.kill(os.getpid(), signal.SIGTERM)
        return ""

    before = signal.getsignal(signal.SIGTERM)
    loop = make(max_iters=9, log_iters=100, poison=poison, save=True)
    assert loop.run() == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in tmp_path.glob("checkpoint_*")] == ["checkpoint_model_000003"]
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]
    assert "critic_loss" in lines(tmp_path)[2]


def test_validation_comes_when_it_is_due_and_sees_what_is_saved(make, tmp_path):
    seen = {}

    def validate(step: int, stop: Stop) -> dict[str, float]:
        seen[step] = loop.stage.learners[0].weights[NAME].detach().clone()
        return {"probe": float(step)}

    loop = make(max_iters=5, vis_interval=2, log_iters=2, validate=validate, save=True)
    loop.run()
    assert [(line["step"], line["probe"]) for line in lines(tmp_path) if "probe" in line] == [(1, 2.0), (3, 4.0)]
    for step, weights in seen.items():
        assert torch.equal(weights, contents(tmp_path / f"checkpoint_model_{step:06d}")[f"generator/{NAME}"])


# --- through the command ---------------------------------------------------------------------------------------------


@pytest.fixture
def config(small_training, trajectories) -> Path:
    path: Path = small_training("ode", f"data.data_path={trajectories}", "train.max_iters=5", "train.log_iters=1")
    return path


@pytest.fixture
def run(train_script: ModuleType, config) -> Iterator[Callable[..., int]]:
    def command(logdir: Path, *arguments: str) -> int:
        status: int = train_script.main(
            ["--config_path", str(config), "--logdir", str(logdir), "--disable-wandb", "--threads", "1", *arguments]
        )
        World().disconnect()
        return status

    yield command
    World().disconnect()


def flip(file: Path) -> None:
    """Change one bit in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_loses_nothing(run, tmp_path, caplog, capfd):
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    assert run(whole, "train.max_checkpoints=2") == 0
    names = ["checkpoint_model_000004", "checkpoint_model_000005"]
    assert sorted(path.name for path in whole.glob("*checkpoint_*")) == names  # only so many are kept
    shutil.copytree(whole, damaged)
    (file,) = (damaged / names[1]).glob("shard-00001-*")
    flip(file)
    caplog.clear()
    with caplog.at_level("INFO"):
        assert run(damaged, "train.max_checkpoints=2") == 0
    (report,) = [message for message in caplog.messages if message.startswith("damaged checkpoint")]
    assert f"{damaged / names[1] / file.name}: has changed since it was written" in report
    assert any(message.endswith(f"going on from {names[0]}") for message in caplog.messages)
    assert_equal(contents(whole / names[1]), contents(damaged / names[1]))
    assert lines(whole) == lines(damaged)

    for name in names:
        (file,) = (damaged / name).glob("shard-00001-*")
        flip(file)
    capfd.readouterr()
    assert run(damaged) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"{damaged}: all 2 checkpoints are damaged" in line


def test_a_run_of_bad_numbers_ends_with_status_1_and_says_why(run, tmp_path, capfd, monkeypatch):
    loss = OdeInitialisation.loss

    def poisoned(self: OdeInitialisation, micro_batch: MicroBatch) -> Loss:
        value, metrics, _ = loss(self, micro_batch)
        if micro_batch.step < 1:
            return Loss(value, metrics)
        return Loss(value * torch.nan, {name: metric * torch.nan for name, metric in metrics.items()})

    monkeypatch.setattr(OdeInitialisation, "loss", poisoned)
    assert run(tmp_path, "--max_iters", "50", "train.log_iters=100") == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert f"{SKIPS} updates of the generator in a row" in line
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_updates"] for line in logged] == list(range(SKIPS))


def test_a_run_that_crashes_is_no_success(run, tmp_path, monkeypatch):
    """Its exception leaves the command, of which Python makes a traceback and status 1; nothing is saved."""

    def fail(self: Learner, step: int) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(Learner, "update", fail)
    with pytest.raises(RuntimeError, match="planted"):
        run(tmp_path)
    assert not list(tmp_path.glob("checkpoint_*"))


CRASH = """
import runpy, sys
sys.path.insert(0, {root!r})
from longsana.training.learner import Learner
def fail(self, step): raise RuntimeError("planted")
Learner.update = fail
sys.argv = ["train_longsana.py", *sys.argv[1:]]
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.slow
def test_a_process_that_crashes_does_not_exit_with_0(config, tmp_path):
    command = [sys.executable, "-c", CRASH.format(root=str(ROOT), script=str(SCRIPT)), "--config_path", str(config)]
    crash = subprocess.run(
        [*command, "--disable-wandb", "--threads", "1", "--logdir", str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert crash.returncode == 1, crash.stderr
    assert "RuntimeError: planted" in crash.stderr and "Traceback" in crash.stderr
    assert not list(tmp_path.glob("checkpoint_*"))


def test_a_process_that_is_told_to_stop_saves(run, forks, config, tmp_path):
    stopped = tmp_path / "stopped"
    arguments = ["--config_path", config, "--disable-wandb", "--threads", "1", "--logdir", stopped]
    stop = forks.start("train", [*arguments, "--max_iters", "100000", "train.log_iters=100000"])
    metrics, deadline = stopped / "metrics.jsonl", time.monotonic() + 120
    while not metrics.is_file() or metrics.read_bytes().count(b"\n") < 3:
        assert stop.returncode is None and time.monotonic() < deadline
        time.sleep(0.05)
    stop.send_signal(signal.SIGTERM)
    told = stop.finish()
    assert stop.returncode == 128 + signal.SIGTERM, told
    steps = [line["step"] for line in lines(stopped)]
    assert steps == list(range(len(steps)))
    assert [path.name for path in stopped.glob("checkpoint_*")] == [f"checkpoint_model_{len(steps):06d}"]
    assert run(stopped, "--max_iters", str(len(steps) + 2), "train.log_iters=100000") == 0
    assert [line["step"] for line in lines(stopped)] == list(range(len(steps) + 2))
    assert (stopped / f"checkpoint_model_{len(steps) + 2:06d}").is_dir()
