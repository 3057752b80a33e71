"""Pictures that clips, trajectories and videos begin with in training: what is learned and how each is seen."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from longsana.chunks import ChunkPlan
from longsana.config import load_config
from longsana.data.pictures import read_picture
from longsana.data.prompts import training_pictures, training_prompts
from longsana.encoders.vae import WanVAE
from longsana.flow.schedule import FlowSchedule
from longsana.runtime.errors import InputError
from longsana.sampling.sampler import generate
from longsana.training.checks import check_sources, check_training
from longsana.training.config import TrainingConfig
from longsana.training.pictures import Pictures
from longsana.training.stages.longsana import LongSana
from longsana.training.stages.self_forcing import SelfForcing
from longsana.training.stages.stage import MicroBatches
from tests.training.conftest import CHANNELS, HEIGHT, PROMPTS, WIDTH
from tests.training.stages.test_self_forcing import Recorder, TurnNoise, micro_batch

SHAPE = (CHANNELS, HEIGHT, WIDTH)
WAYS = ("absorb", "pin")


@pytest.fixture
def pictures(pictured_prompts: Path, vae: WanVAE) -> Pictures:
    return Pictures([own.path for own in training_pictures(pictured_prompts)], vae, 32, 48, "cover")


@pytest.fixture
def build(distilled: Callable[..., Any], pictures: Pictures) -> Callable[..., Any]:
    """`build(SelfForcing, "pin", ...)`: a stage whose videos all begin with a picture."""

    def make(stage: type[Any], way: str, *overrides: str, share: float = 1.0, **parts: Any) -> Any:
        trainer = {SelfForcing: "self_forcing", LongSana: "longsana"}[stage]
        own = [f"train.image_probability={share}", f"sampling.image_first={way}", *overrides]
        if stage is LongSana:
            parts = {"micro_batches": MicroBatches(0, 1, 1)} | parts
        return distilled(stage, trainer, *own, pictures=pictures, **parts)

    return make


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_rollout_from_a_picture_is_inference_from_it(build, pictures, way, batch):
    stage = build(SelfForcing, way, "rollout.last_step_only=true")
    now = micro_batch(batch=batch)
    window = stage.rollout(now)
    first = pictures([stage.order["generator"][number] for number in now.samples])
    plan = {"absorb": ChunkPlan((1, 2, 2)), "pin": ChunkPlan((3, 2))}[way]
    chunks = generate(
        stage.generator,
        FlowSchedule(7.0),
        [window.text] * len(plan),
        plan,
        shape=SHAPE,
        rng=TurnNoise(now, batch),  # type: ignore[arg-type]
        device="cpu",
        first=first,
    )
    assert torch.equal(window.latents, torch.cat([chunk.latents for chunk in chunks], dim=2))
    assert torch.equal(window.latents[:, :, :1], first)
    assert (window.learned_from, window.pictured) == (1, True)
    assert len(window.exit_steps) == 2, "of the chunks that take steps"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("role", ["generator", "critic"])
def test_scores_see_the_picture_clean_and_nothing_is_learned_of_it(build, way, role):
    """As a base model sees it: timestep 0, no noise; its own prediction changes neither loss nor gradient."""
    stage = build(SelfForcing, way)
    stage.critic, stage.teacher = Recorder(stage.critic), Recorder(stage.teacher)
    now = micro_batch(role, batch=2)
    stage.loss(now)
    window = stage.rollout(now)
    calls = [*stage.critic.calls, *stage.teacher.calls]
    assert len(calls) == {"generator": 3, "critic": 1}[role]
    for call in calls:
        assert call.t.shape == (2, 5) and (call.t[:, 0] == 0).all() and (call.t[:, 1:] == call.t[:, 1:2]).all()
        assert (call.t[:, 1] > 0).all()
        assert torch.equal(call.x[:, :, :1], window.latents[:, :, :1])
        assert not torch.equal(call.x[:, :, 1:], window.latents[:, :, 1:])

    def losses(of_picture: float) -> list[Tensor]:
        def network(model: torch.nn.Module) -> Any:
            def forward(x: Tensor, t: Tensor, text: Any) -> Any:
                velocity = model.model(x, t, text)[0].clone()
                velocity[:, :, 0] += of_picture
                return velocity, None

            return forward

        stage = build(SelfForcing, way)
        scores = Recorder(stage.critic), Recorder(stage.teacher)
        stage.critic, stage.teacher = map(network, scores)
        learner = scores[0].model if role == "critic" else stage.generator
        loss = stage.loss(now).value
        return [loss.detach(), *torch.autograd.grad(loss, list(learner.parameters()), materialize_grads=True)]

    assert all(map(torch.equal, losses(0.0), losses(5.0)))


@pytest.mark.parametrize("way", WAYS)
def test_every_video_of_an_update_begins_alike(build, way):
    stage = build(SelfForcing, way, share=0.4)
    begun = []
    for step in range(60):
        drawn = {stage.picture(micro_batch(step=step, index=index), [0]) is not None for index in range(3)}
        assert len(drawn) == 1
        begun += drawn
    assert sum(begun) == pytest.approx(60 * 0.4, abs=4 * (60 * 0.4 * 0.6) ** 0.5)


def test_without_pictures_nothing_is_another(distilled, build):
    """A share of 0 is the stage as it is without pictures, to the bit."""
    plain, with_them = distilled(SelfForcing, "self_forcing"), build(SelfForcing, "pin", share=0.0)
    assert torch.equal(plain.loss(micro_batch()).value, with_them.loss(micro_batch()).value)


def test_a_window_from_the_middle_knows_no_picture(build):
    stage = build(SelfForcing, "pin", "rollout.num_training_frames=9", "rollout.slice_last_frames=5")
    window = stage.rollout(micro_batch())
    assert not window.pictured and window.learned_from == 1


@pytest.mark.parametrize("way", WAYS)
def test_a_stream_begins_with_a_picture_and_goes_on_as_any(build, pictures, way):
    stage = build(LongSana, way, "streaming.streaming_max_length=13")
    windows = [stage.rollout(micro_batch("critic", step)) for step in range(3)]
    first = pictures([stage.order["generator"][0]])
    assert torch.equal(windows[0].latents[:, :, :1], first)
    assert [window.pictured for window in windows] == [True, False, False]
    state, videos = None, []
    plans = [{"absorb": ChunkPlan((1, 2, 2)), "pin": ChunkPlan((3, 2))}[way], ChunkPlan((2, 2)), ChunkPlan((2, 2))]
    with torch.no_grad():
        for step, (plan, window) in enumerate(zip(plans, windows, strict=True)):
            now, begins = micro_batch("critic", step), first if step == 0 else None
            exits = [0, *window.exit_steps] if len(plan) == 3 else window.exit_steps
            new, state = stage.generate(now, plan, window.text, state, exits, first=begins, keep_state=True)
            videos.append(new)
    assert torch.equal(windows[0].latents, videos[0])
    for window, video in zip(windows[1:], videos[1:], strict=True):
        assert torch.equal(window.latents[:, :, 1:], video)


@pytest.mark.parametrize("way", WAYS)
def test_processes_run_the_network_as_often_wherever_their_streams_are(build, way):
    """One stream begins, another goes on: under FSDP each pass is one of all processes."""
    counts = []
    for begun in (False, True):
        stage = build(LongSana, way, micro_batches=MicroBatches(0, 2, 1))
        if begun:
            stage.rollout(micro_batch("critic", 0))
        stage.generator = Recorder(stage.generator)
        stage.rollout(micro_batch("critic", 1))
        counts.append(len(stage.generator.calls))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("way", WAYS)
def test_a_trajectory_begins_with_its_own_end(training_config, random_model, network, embed, trajectories, way):
    """Latent 0 is clean, at timestep 0, and has no loss; the others are as the plan's chunks have drawn them."""
    from longsana.data.trajectories import Trajectories
    from longsana.training.learner import Learner
    from longsana.training.stages.ode import OdeInitialisation

    config = training_config("ode", "train.image_probability=1.0", f"sampling.image_first={way}")
    seen: list[SimpleNamespace] = []

    class Noting(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, t: Tensor, text: Any, *, plan: ChunkPlan) -> Any:
            velocity, after = self.model(x, t, text, plan=plan)
            seen.append(SimpleNamespace(x=x, t=t, plan=plan, velocity=velocity))
            return velocity, after

    learner = Learner("generator", random_model(network, torch.float32), config.optimizer.generator)
    stage = OdeInitialisation(config, learner, embed=embed, trajectories=Trajectories.open(trajectories), frames=5)
    stage.generator = Noting(stage.generator)
    levels, noisy = [*stage.schedule.steps, 0], 0
    for step in range(4):
        now = micro_batch(step=step, batch=2)
        loss = stage.loss(now).value.detach()
        call = seen[-1]
        items = [stage.trajectories[stage.order[number]].states for number in now.samples]
        clean = torch.stack([states[-1] for states in items]).float()
        assert call.plan.lengths == {"absorb": (1, 2, 2), "pin": (3, 2)}[way]
        assert (call.t[:, 0] == 0).all() and torch.equal(call.x[:, :, 0], clean[:, :, 0])
        for row, states in enumerate(items):
            for frame in range(1, 5):
                assert torch.equal(call.x[row, :, frame], states[levels.index(int(call.t[row, frame])), :, frame])
        error = (stage.schedule.to_x0(call.x, call.velocity, call.t) - clean).square().mean(dim=(1, 3, 4))
        counts = call.t != 0
        noisy += int(counts.sum())
        if counts.any():
            assert float(loss.detach()) == pytest.approx(float(error[counts].mean().detach()), rel=1e-5)
    assert noisy


def test_pictures_are_those_of_the_prompts_and_are_kept(pictured_prompts, pictures, vae, monkeypatch):
    numbers = [3, 0, 3]
    by_hand = [
        vae.encode_pictures([read_picture(pictured_prompts.parent / f"{number}.png", 32, 48)]) for number in numbers
    ]
    assert torch.equal(pictures(numbers), torch.cat(by_hand))
    monkeypatch.setattr("longsana.training.pictures.read_picture", None)
    assert torch.equal(pictures(numbers), torch.cat(by_hand))


def lines(folder: Path, *texts: str) -> Path:
    path = folder / "mine.txt"
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def configured(small_training: Callable[..., Path], trainer: str, *settings: str) -> TrainingConfig:
    config: TrainingConfig = load_config(small_training(trainer, *settings), (), TrainingConfig)
    check_training(config)
    return config


def test_prompts_that_name_pictures(pictured_prompts, tmp_path):
    assert training_prompts(pictured_prompts, pictures=True) == list(PROMPTS)
    with pytest.raises(InputError, match=r"prompts\.txt, line 1: begins with a picture, which has no meaning"):
        training_prompts(pictured_prompts)
    with pytest.raises(InputError, match=r"mine\.txt, line 2: names no picture \('words<image>path'\)"):
        training_pictures(lines(tmp_path, f"a<image>{pictured_prompts.parent / '0.png'}", "b"))
    with pytest.raises(InputError, match=r"mine\.txt, line 1: gone\.png: no such picture"):
        training_pictures(lines(tmp_path, "a<image>gone.png"))


@pytest.mark.parametrize("trainer", ["self_forcing", "longsana"])
@pytest.mark.parametrize("broken", ["head", "pixels"])
def test_broken_pictures_are_told_before_anything_is_loaded(
    small_training, pictured_prompts, tmp_path, trainer, broken
):
    whole = pictured_prompts.parent / "0.png"
    picture = whole.read_bytes()
    (tmp_path / "broken.png").write_bytes(picture[:20] if broken == "head" else picture[: len(picture) // 2])
    prompts = lines(tmp_path, f"a<image>{whole}", "b<image>broken.png")
    config = configured(small_training, trainer, "train.image_probability=0.5", f"data.data_path={prompts}")
    with pytest.raises(InputError, match=r"mine\.txt, line 2: .*broken\.png: (no picture|cannot be read)"):
        check_sources(config)


@pytest.mark.parametrize(
    ("trainer", "settings", "words"),
    [
        ("ode", ["rollout.num_training_frames=1"], "a clip of one latent is its picture"),
        ("self_forcing", ["rollout.min_num_training_frames=1"], "a clip of one latent is its picture"),
        (
            "longsana",
            ["rollout.num_training_frames=4", "rollout.min_num_training_frames=4", "sampling.image_first=absorb"],
            r"as many chunks of 2 as without one.* for example 5, or sampling\.image_first=pin",
        ),
    ],
)
def test_lengths_that_no_picture_can_lead(small_training, trainer, settings, words):
    with pytest.raises(InputError, match=rf"train\.image_probability=0\.5|{words}") as caught:
        configured(small_training, trainer, "train.image_probability=0.5", *settings)
    assert re.search(words, str(caught.value))


def test_a_switch_file_beside_pictured_prompts(small_training, pictured_prompts, tmp_path):
    """Streams begin with pictures and switch to words."""
    from longsana.training.checks import switch_prompts

    switch = lines(tmp_path, *(f"then {prompt}" for prompt in PROMPTS))
    settings = [f"streaming.switch_prompt_path={switch}", "streaming.fixed_switch_index=5"]
    config = configured(
        small_training, "longsana", "train.image_probability=0.5", f"data.data_path={pictured_prompts}", *settings
    )
    assert switch_prompts(config) == [f"then {prompt}" for prompt in PROMPTS]
    with pytest.raises(InputError, match="line 1: begins with a picture"):
        switch_prompts(replace(config, streaming=replace(config.streaming, switch_prompt_path=str(pictured_prompts))))
