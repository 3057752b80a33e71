"""Rollouts and streams whose first chunk is short: what is made, who draws it, and a run that goes on to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longsana.chunks import ChunkPlan
from longsana.config import load_config
from longsana.data.prompts import training_pictures
from longsana.encoders.vae import WanVAE
from longsana.flow.schedule import FlowSchedule
from longsana.runtime.errors import InputError
from longsana.sampling.sampler import generate
from longsana.training.checks import check_training
from longsana.training.config import TrainingConfig
from longsana.training.pictures import Pictures
from longsana.training.stages.longsana import LongSana
from longsana.training.stages.self_forcing import SelfForcing
from longsana.training.stages.stage import MicroBatches
from tests.training.conftest import CHANNELS, HEIGHT, PROMPTS, WIDTH
from tests.training.stages.test_longsana import assert_goes_on_to_the_bit, saved
from tests.training.stages.test_prompt_changes import calls
from tests.training.stages.test_self_forcing import Recorder, TurnNoise, micro_batch

# The way of a picture to begin with, and the first chunk: what it makes of 5 latents in chunks of 3 and 2.
PLANS = {(None, 1): (1, 2), (None, 2): (2, 2), ("absorb", 1): (1, 1, 2), ("pin", 2): (2, 2)}
# Three stretches, and two latents too few for a fourth, which a stream that begins shorter by two does not get either.
LONGER = "streaming.streaming_max_length=15"
SHORTER = "streaming.streaming_max_length=11"


@pytest.fixture
def build(distilled: Callable[..., Any], pictured_prompts: Path, vae: WanVAE) -> Callable[..., Any]:
    """`build(SelfForcing, "rollout.last_step_only=true")`: a stage whose first chunks all have one latent."""

    def make(
        stage: type[Any], *overrides: str, share: float = 1, first: int = 1, way: str | None = None, **parts: Any
    ) -> Any:
        trainer = {SelfForcing: "self_forcing", LongSana: "longsana"}[stage]
        own = [f"train.first_chunk_probability={share}", f"sampling.first_chunk_frames={first}", *overrides]
        if way is not None:
            own += ["train.image_probability=1", f"sampling.image_first={way}"]
            files = [picture.path for picture in training_pictures(pictured_prompts)]
            parts["pictures"] = Pictures(files, vae, 32, 48, "cover")
        if stage is LongSana:
            parts = {"micro_batches": MicroBatches(0, 1, 1)} | parts
        return distilled(stage, trainer, *own, **parts)

    return make


@pytest.mark.parametrize(("way", "first"), PLANS, ids=str)
def test_a_rollout_is_inference_with_that_first_chunk(build: Callable[..., Any], way: str | None, first: int) -> None:
    stage = build(SelfForcing, "rollout.last_step_only=true", first=first, way=way)
    now, lengths = micro_batch(batch=2), PLANS[way, first]
    plan = ChunkPlan.split(sum(lengths), 2, first)
    if way is not None:
        plan = ChunkPlan.with_picture(sum(lengths), 2, way, first)  # type: ignore[arg-type]
    assert plan.lengths == lengths, "as sampling cuts a video of this length"
    window = stage.rollout(now)
    chunks = generate(
        stage.generator,
        FlowSchedule(7.0),
        [window.text] * len(plan),
        plan,
        shape=(CHANNELS, HEIGHT, WIDTH),
        rng=TurnNoise(now, 2),  # type: ignore[arg-type]
        device="cpu",
        first=stage.picture(now, [stage.order["generator"][number] for number in now.samples]),
    )
    assert torch.equal(window.latents, torch.cat([chunk.latents for chunk in chunks], dim=2))


def test_the_scores_see_what_was_made_and_the_first_chunk_learns(build: Callable[..., Any]) -> None:
    stage = build(SelfForcing)
    stage.generator, stage.critic = Recorder(stage.generator), Recorder(stage.critic)
    stage.loss(micro_batch())
    assert [call.x.shape[2] for call in stage.generator.calls if call.grad] == [1, 2]
    assert [call.x.shape[2] for call in stage.critic.calls] == [3]


def test_longer_rollouts_are_shorter_by_the_same(build: Callable[..., Any]) -> None:
    stage = build(SelfForcing, "rollout.num_training_frames=9", "rollout.slice_last_frames=5")
    for step in range(12):
        now = micro_batch("critic", step)
        window = stage.rollout(now)
        assert window.latents.shape[2] == min(stage._length(now) - 2, 5)


@pytest.mark.parametrize("trainer", [SelfForcing, LongSana])
def test_every_video_of_an_update_begins_alike(build: Callable[..., Any], trainer: type[Any]) -> None:
    """As often as was asked for, whichever process it is on."""
    stage = build(trainer, share=0.3)
    drawn = [stage.begins_short(micro_batch(step=step)) for step in range(500)]
    assert sum(drawn) == pytest.approx(150, abs=4 * (500 * 0.3 * 0.7) ** 0.5)
    assert drawn[:50] == [stage.begins_short(micro_batch(step=step, index=7)) for step in range(50)]
    lengths = {short: set() for short in (False, True)}
    for step in range(8):
        now = micro_batch("critic", step)
        lengths[stage.begins_short(now)].add(stage.rollout(now).latents.shape[2])
        if trainer is LongSana:
            stage.streams.clear()
    assert lengths == {False: {5}, True: {3}}


@pytest.mark.parametrize("trainer", [SelfForcing, LongSana])
def test_a_share_of_nothing_changes_no_bit(distilled: Callable[..., Any], build: Callable[..., Any], trainer) -> None:
    own = {} if trainer is SelfForcing else {"micro_batches": MicroBatches(0, 1, 1)}
    plain = distilled(trainer, "self_forcing" if trainer is SelfForcing else "longsana", **own)
    other = build(trainer, share=0)
    for role in ("critic", "generator"):
        assert torch.equal(*(stage.loss(micro_batch(role)).value for stage in (plain, other)))
    one, two = saved(plain), saved(other)
    assert one.keys() == two.keys()
    for name, group in one.items():
        assert group.keys() == two[name].keys()
        assert all(torch.equal(tensor, two[name][key]) for key, tensor in group.items())


@pytest.mark.parametrize(("way", "first"), PLANS, ids=str)
def test_a_stream_begins_so_and_goes_on_as_any(build: Callable[..., Any], way: str | None, first: int) -> None:
    """It has as many stretches as others, of the usual chunks, and is one video."""
    stage = build(LongSana, LONGER, first=first, way=way)
    windows = [stage.rollout(micro_batch("critic", step)) for step in range(3)]
    assert not stage.streams, "it has come to its end"
    state = None
    with torch.no_grad():
        for step, window in enumerate(windows):
            now, plan = micro_batch("critic", step), ChunkPlan((2, 2)) if step else ChunkPlan(PLANS[way, first])
            begins = None if step else stage.picture(now, [stage.order["generator"][0]])
            exits = [0] * (len(plan) - len(window.exit_steps)) + window.exit_steps
            new, state = stage.generate(now, plan, window.text, state, exits, first=begins, keep_state=True)
            assert torch.equal(window.latents[:, :, -plan.frames :], new)
            assert window.latents.shape[2] == plan.frames + (step > 0)


@pytest.mark.parametrize(("way", "first"), PLANS, ids=str)
def test_processes_run_the_network_as_often_wherever_their_streams_are(
    build: Callable[..., Any], way: str | None, first: int
) -> None:
    counts = []
    for begun in (False, True):
        stage = build(LongSana, LONGER, first=first, way=way, micro_batches=MicroBatches(0, 2, 1))
        if begun:
            stage.rollout(micro_batch("critic", 0))
        counts.append(calls(stage, micro_batch("critic", 1)))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("change", ["", "recache=2", "rebuild=3"])
def test_a_stage_that_was_stopped_goes_on_to_the_bit(build: Callable[..., Any], change: str) -> None:
    """Where all streams begin so, and where those do that begin in update 3, after the stop."""
    own = [LONGER, *([f"streaming.prompt_change={change}", "streaming.prompt_change_prob=1"] if change else [])]
    for share in (1,) if change else (0.5, 1):
        stages = [build(LongSana, *own, share=share, micro_batches=MicroBatches(0, 1, 2)) for _ in range(2)]
        assert [stages[0].begins_short(micro_batch("critic", step)) for step in (0, 3)] == [share == 1, True]
        assert_goes_on_to_the_bit(*stages)


def test_what_is_saved_says_how_a_stream_began(build: Callable[..., Any], caplog: Any) -> None:
    """Another share changes no stream that has begun; one that would not fit ends by the same rule as others."""
    stage, other, shorter = build(LongSana, LONGER), build(LongSana, LONGER, share=0), build(LongSana, SHORTER)
    for step in range(2):
        stage.rollout(micro_batch("critic", step))
    groups = saved(stage)
    assert int(groups["stream_00000"]["fewer"]) == 2 and int(groups["stream_00000"]["frames"]) == 7
    other.restore(sorted(groups), groups.__getitem__)
    now = micro_batch("critic", 2)
    assert torch.equal(stage.rollout(now).latents, other.rollout(now).latents)
    assert not stage.streams and not other.streams
    shorter.restore(sorted(groups), groups.__getitem__)
    assert not shorter.streams and "7 latents, which leave no room for a stretch" in caplog.text


@pytest.mark.parametrize("share", [0, 1])
def test_streams_switch_at_the_same_stretch(build: Callable[..., Any], share: float) -> None:
    second = tuple(f"{prompt}, and then it rains" for prompt in PROMPTS)
    own = ("streaming.switch_prompt_path=second.txt", "streaming.switch_mode=random", LONGER)
    stage = build(LongSana, *own, share=share, switch_prompts=second)
    switched = []
    for serial in range(6):
        text = stage.embed([second[stage.order["generator"][serial]]])
        seen = [
            torch.equal(stage.rollout(micro_batch("critic", 3 * serial + step)).text.tokens, text.tokens)
            for step in range(3)
        ]
        switched.append(seen.index(True))
        assert seen == sorted(seen)
    places = [stage.changes.place(0, serial) for serial in range(6)]
    assert switched == [{5: 1, 9: 2}[place] for place in places] and set(switched) == {1, 2}


SHORT = ("train.first_chunk_probability=0.5", "sampling.first_chunk_frames=1")
PICTURES = ("train.image_probability=0.5", "rollout.slice_last_frames=5")


@pytest.mark.parametrize(
    ("trainer", "settings", "words"),
    [
        ("self_forcing", SHORT[1:], "first_chunk_frames=1: has no meaning for training with train.first_chunk_prob"),
        ("longsana", SHORT[:1], "first_chunk_probability=0.5: does not say how short; set sampling.first_chunk_frames"),
        *(
            (trainer, SHORT, f"first_chunk_probability=0.5: the trainer {trainer} learns clips that are cut")
            for trainer in ("flow_matching", "ode", "consistency")
        ),
        ("self_forcing", ("train.first_chunk_probability=1.5",), "must be at most 1"),
        (
            "self_forcing",
            (*SHORT, "sampling.first_chunk_frames=3"),
            "must be below 3, the first chunk of a rollout of 5",
        ),
        (
            "self_forcing",
            (*SHORT, "rollout.min_num_training_frames=1"),
            "must be below 1, the first chunk of a rollout of 1 latents",
        ),
        (
            "self_forcing",
            (*SHORT, *PICTURES, "sampling.first_chunk_frames=2", "sampling.image_first=absorb"),
            "must be below 2, the first chunk of a rollout of 5 latents after its picture",
        ),
        (
            "longsana",
            (*SHORT, *PICTURES, "sampling.image_first=pin"),
            "a picture that is pinned is all of such a chunk",
        ),
        (
            "longsana",
            (*SHORT, "streaming.train_first_chunk=false"),
            "train_first_chunk=false first chunks have no loss",
        ),
    ],
)
def test_short_first_chunks_that_cannot_be_learned(
    small_training: Callable[..., Path], trainer: str, settings: tuple[str, ...], words: str
) -> None:
    with pytest.raises(InputError) as caught:
        check_training(load_config(small_training(trainer, *settings), (), TrainingConfig))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("trainer", ["self_forcing", "longsana"])
def test_short_first_chunks_that_can(small_training: Callable[..., Path], trainer: str) -> None:
    for more in ((), (*PICTURES, "sampling.image_first=absorb"), (*PICTURES, "sampling.first_chunk_frames=2")):
        check_training(load_config(small_training(trainer, *SHORT, *more), (), TrainingConfig))
