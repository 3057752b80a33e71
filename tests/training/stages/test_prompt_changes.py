"""Streams whose prompt changes: a history that is absorbed from scratch, and a run that goes on to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from longsana.chunks import ChunkPlan
from longsana.config import load_config
from longsana.models.embeddings import TextEmbedding
from longsana.runtime.errors import InputError
from longsana.sampling.sampler import absorb
from longsana.training.checks import check_training
from longsana.training.config import TrainingConfig
from longsana.training.stages.longsana import LongSana
from longsana.training.stages.stage import MicroBatch, MicroBatches
from tests.training.conftest import PROMPTS
from tests.training.stages.test_longsana import assert_goes_on_to_the_bit, micro_batch, saved
from tests.training.stages.test_self_forcing import Recorder

ALWAYS = ("streaming.streaming_max_length=13", "streaming.prompt_change_prob=1")
STRETCHES = (5, 4, 4)
CHANGES = ("keep", "recache=1", "recache=2", "rebuild=1", "rebuild=3")
PASTS = [(), ("model.state_decay=learned", "model.num_sink_blocks=3"), ("model.num_cached_blocks=2",)]


@pytest.fixture
def build(distilled: Callable[..., Any]) -> Callable[..., LongSana]:
    def make(*overrides: str, processes: int = 1, accumulation: int = 1) -> LongSana:
        parts = {"micro_batches": MicroBatches(0, processes, accumulation)}
        stage: LongSana = distilled(LongSana, "longsana", *ALWAYS, *overrides, **parts)
        return stage

    return make


@pytest.mark.parametrize("past", PASTS, ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_a_stream_is_a_story(build: Callable[..., LongSana], change: str, past: tuple[str, ...]) -> None:
    """Each stretch is what follows a history that is absorbed from scratch, under the captions of its definition."""
    stage = build(f"streaming.prompt_change={change}", *past)
    kind, _, reach = change.partition("=")
    history: list[tuple[Tensor, TextEmbedding, int]] = []
    frames, captions = 0, []
    for step, length in enumerate(STRETCHES):
        now, plan = micro_batch("critic", step), ChunkPlan.split(length, 2)
        window = stage.rollout(now)
        captions.append(window.text.tokens)
        if step:
            count = int(reach or 0)
            heard = [(x0, window.text, start) for x0, _, start in history[-count:]] if count else []
            history = {"keep": history, "recache": history[:-count] + heard, "rebuild": heard}[kind]
        state = stage.generator.empty_state(1, *stage.latent_shape[1:], frames=history[0][2]) if history else None
        for x0, text, _ in history:
            state = absorb(stage.generator, x0, text, state)
        with torch.no_grad():
            new, after = stage.generate(now, plan, window.text, state, window.exit_steps, keep_state=True)
        assert torch.equal(window.latents[:, :, -length:], new), step
        assert after is not None and after.frames == frames + length
        history = [*history, *((new[:, :, part], window.text, frames + part.start) for part in plan.slices())]
        frames += length
    assert not stage.streams
    assert not torch.equal(captions[0], captions[1]) or not torch.equal(captions[1], captions[2])


NOISY = "rollout.noisy_absorb=true"


@pytest.mark.parametrize(
    ("change", "more"),
    [
        *((change, ()) for change in CHANGES),
        *(
            pytest.param(change, (NOISY,), marks=() if change == "recache=2" else pytest.mark.slow)
            for change in CHANGES
        ),
    ],
    ids=str,
)
def test_a_stage_that_was_stopped_goes_on_to_the_bit(
    build: Callable[..., LongSana], change: str, more: tuple[str, ...]
) -> None:
    past = ("model.state_decay=0.9", "model.num_sink_blocks=3")
    settings = (f"streaming.prompt_change={change}", *past, *more)
    assert_goes_on_to_the_bit(*(build(*settings, accumulation=2) for _ in range(2)))


def test_a_stream_without_what_a_change_needs_ends(build: Callable[..., LongSana], caplog: Any) -> None:
    stage, other = build("streaming.prompt_change=rebuild=2"), build("streaming.prompt_change=recache=2")
    stage.rollout(micro_batch("critic", 0))
    groups = saved(stage)
    other.restore(sorted(groups), groups.__getitem__)
    assert not other.streams and "no kv of its last chunks" in caplog.text
    plain = build("streaming.prompt_change_prob=0")
    plain.restore(sorted(groups), groups.__getitem__)
    assert plain.streams[0].recent.nbytes == 0, "what it does not need it does not keep"


def test_without_a_change_a_stream_is_what_it_was(build: Callable[..., LongSana]) -> None:
    """And holds nothing more."""
    stage = build("streaming.prompt_change_prob=0", "streaming.prompt_change=recache=2")
    texts = []
    for step in range(3):
        texts.append(stage.rollout(micro_batch("critic", step)).text.tokens)
        if step < 2:
            assert stage.streams[0].recent.nbytes == 0
            assert not any(name.startswith("recent_") for name in stage.state_tensors()["stream_00000"])
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[1], texts[2])


def test_streams_change_together_and_each_to_its_own(build: Callable[..., LongSana]) -> None:
    """All micro-batches of an update or none, as often as was asked for; each takes other prompts."""
    stage = build("streaming.prompt_change_prob=0.3")

    def happens(step: int, index: int) -> bool:
        return stage.changes.happens(micro_batch("generator", step, index))

    drawn = [happens(step, 0) for step in range(2000)]
    assert abs(sum(drawn) / 2000 - 0.3) < 0.03
    assert drawn[:50] == [happens(step, 7) for step in range(50)]
    numbers = [stage.changes.prompts(index, 0, 5, 2) for index in range(40)]
    assert len({tuple(pair) for pair in numbers}) > 1
    assert {number for pair in numbers for number in pair} == set(range(len(PROMPTS)))
    assert numbers == [stage.changes.prompts(index, 0, 5, 2) for index in range(40)]


@pytest.mark.parametrize("change", CHANGES)
def test_processes_run_their_networks_equally_often(build: Callable[..., LongSana], change: str) -> None:
    """Whether a stream begins, goes on, or is shorter than a change reaches back."""

    def calls(stage: LongSana, now: MicroBatch) -> int:
        recorder = Recorder(stage.generator)
        stage.generator = recorder
        stage.rollout(now)
        stage.generator = recorder.model  # type: ignore[assignment]
        return len(recorder.calls)

    last = "rollout.last_step_only=true"
    stage = build(f"streaming.prompt_change={change}", last, processes=2)
    counts = [calls(stage, micro_batch("critic", step)) for step in range(4)]
    assert len(set(counts)) == 1
    alone = build(f"streaming.prompt_change={change}", last)
    assert calls(alone, micro_batch("critic", 0)) == counts[0] - alone.changes.change.chunks


def test_the_generator_learns_after_a_change(build: Callable[..., LongSana]) -> None:
    stage = build("streaming.prompt_change=recache=2")
    stage.rollout(micro_batch("critic", 0))
    loss = stage.loss(micro_batch("generator", 1))
    gradients = torch.autograd.grad(loss.value, list(stage.generator.parameters()), allow_unused=True)
    assert any(gradient is not None and gradient.any() for gradient in gradients)
    stream = stage.streams[0]
    assert not any(tensor.requires_grad for tensor in (*stream.state[:3], *stream.recent.tensors().values()))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("streaming.prompt_change=cut", "streaming.prompt_change=cut: a stream that is cut is another stream"),
        ("streaming.prompt_change=recahe=2", "did you mean 'recache'?"),
        ("streaming.prompt_change_prob=1.5", "streaming.prompt_change_prob=1.5"),
    ],
)
def test_what_no_stream_can_have(small_training: Callable[..., Any], setting: str, message: str) -> None:
    with pytest.raises(InputError) as refusal:
        check_training(load_config(small_training("longsana", setting), (), TrainingConfig))
    assert message in str(refusal.value) and "\n" not in str(refusal.value)
