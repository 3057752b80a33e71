"""Streams: videos that live across iterations, of which each loss sees the next stretch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from longsana.chunks import ChunkPlan
from longsana.config import load_config
from longsana.runtime.errors import InputError
from longsana.state import CausalState
from longsana.training.checks import check_training
from longsana.training.config import TrainingConfig
from longsana.training.stages.longsana import LongSana
from longsana.training.stages.stage import MicroBatch, MicroBatches
from tests.training.conftest import CHANNELS, HEIGHT, PROMPTS, WIDTH
from tests.training.stages.test_self_forcing import Recorder

SHAPE = (CHANNELS, HEIGHT, WIDTH)
PASTS = [
    (),
    ("model.state_decay=learned", "model.num_sink_blocks=3"),  # a stretch is of two chunks
    ("model.state_decay=[0.5, 0.9]", "model.num_cached_blocks=2"),
]


@pytest.fixture
def build(distilled) -> Callable[..., LongSana]:
    """`build("streaming.streaming_max_length=13", micro-batches=2)`: the stage with random float32 networks."""

    def make(*overrides: str, micro_batches: int = 1) -> LongSana:
        return distilled(LongSana, "longsana", *overrides, micro_batches=MicroBatches(0, 1, micro_batches))

    return make


def micro_batch(role: str, step: int, index: int = 0) -> MicroBatch:
    return MicroBatch(0, step, role, index, range(1), torch.device("cpu"))


def saved(stage: LongSana) -> dict[str, dict[str, Tensor]]:
    return {name: {key: value.clone() for key, value in group.items()} for name, group in stage.state_tensors().items()}


def test_stretches_make_one_video_whoever_asks(build, vae):
    """The latents of all stretches are those of one uninterrupted rollout; both learners take from the same stream."""
    stage = build("streaming.streaming_max_length=13")
    micro_batches = [micro_batch("critic", 0), micro_batch("generator", 1), micro_batch("critic", 1)]
    windows = []
    for now in micro_batches:
        windows.append(stage.rollout(now))
        if now is not micro_batches[-1]:
            assert stage.streams[0].state.frames == 5 + 4 * (len(windows) - 1)
    assert not stage.streams, "13 latents: the stream has come to its end"

    state, videos = None, []
    with torch.no_grad():
        for now, frames, window in zip(micro_batches, (5, 4, 4), windows, strict=True):
            plan = ChunkPlan.split(frames, 2)
            new, state = stage.generate(now, plan, window.text, state, window.exit_steps, keep_state=True)
            videos.append(new)
    assert torch.equal(windows[0].latents, videos[0])
    assert windows[0].learned_from == 0
    for index, window in enumerate(windows[1:], start=1):
        assert torch.equal(window.latents[:, :, 1:], videos[index])
        assert window.learned_from == 1
        # What leads it is the last picture of all before, as if the whole video had been decoded in one call.
        picture = vae.decode_stream(torch.cat(videos[:index], dim=2))[0][:, :, -1:]
        assert torch.equal(window.latents[:, :, :1], vae.encode(picture))


@pytest.mark.parametrize(("longest", "ratio"), [(9, 1), (9, 2), (9, 3), (13, 1), (13, 2), (13, 3), (17, 3)])
def test_every_stretch_is_learned_or_the_config_is_refused(build, small_training, longest, ratio):
    """The check is the law of what really happens: learners share the streams, so the generator takes one stretch in
    ratio + 1, and must come to all of them."""
    settings = (f"streaming.streaming_max_length={longest}", f"distillation.dfake_gen_update_ratio={ratio}")
    stage = build(*settings)
    stage.generate = lambda micro_batch, plan, text, state, *_, **__: (
        torch.zeros(1, *SHAPE[:1], plan.frames, *SHAPE[1:]),
        CausalState(*[torch.zeros(1)] * 3, frames=plan.frames + (state.frames if state else 0)),
    )
    stage.overlap = lambda new, cache: (new[:, :, -1:], None)
    stretches, learned = 1 + (longest - 5) // 4, set()
    for step in range(stretches * ratio):
        for learner in stage.learners:
            if learner.learns_in(step):
                if learner.name == "generator":
                    learned.add(stage.streams[0].state.frames if stage.streams else 0)
                stage.rollout(micro_batch(learner.name, step))
    allowed = (
        nullcontext() if len(learned) == stretches else pytest.raises(InputError, match="the generator would learn")
    )
    with allowed:
        check_training(load_config(small_training("longsana", *settings), (), TrainingConfig))


def test_a_cold_cache_decodes_the_last_latents_alone(build, vae):
    """And keeps none: the overlap latent is that of a clip of these latents."""
    stage = build("rollout.overlap_latents=2")
    first = stage.rollout(micro_batch("critic", 0))
    assert stage.streams[0].cache is None
    window = stage.rollout(micro_batch("critic", 1))
    picture = vae.decode_stream(first.latents[:, :, -2:])[0][:, :, -1:]
    assert torch.equal(window.latents[:, :, :1], vae.encode(picture))


@pytest.mark.parametrize("past", PASTS, ids=str)
def test_stretches_of_every_past_are_chunks_of_one_video(build, past):
    """A stream's next stretch knows how many chunks have joined the sinks, and what has faded."""
    stage = build("streaming.streaming_max_length=13", *past)
    micro_batches = [micro_batch("critic", 0), micro_batch("critic", 1), micro_batch("critic", 2)]
    windows = [stage.rollout(now) for now in micro_batches]
    assert windows[-1].latents.isfinite().all() and not stage.streams
    state, videos = None, []
    with torch.no_grad():
        for now, frames, window in zip(micro_batches, (5, 4, 4), windows, strict=True):
            plan = ChunkPlan.split(frames, 2)
            new, state = stage.generate(now, plan, window.text, state, window.exit_steps, keep_state=True)
            videos.append(new)
    for window, video in zip(windows, videos, strict=True):
        assert torch.equal(window.latents[:, :, -video.shape[2] :], video)
    assert state.sinks == stage.generator.past.sinks


def test_the_generator_learns_its_factors(build):
    """From the chunks that read a past; a critic sees one chunk, and nothing learns from a first chunk alone."""
    stage = build("model.state_decay=learned")
    logit = stage.generator.decay_logit
    (found,) = torch.autograd.grad(stage.loss(micro_batch("generator", 0)).value, [logit])
    assert found.isfinite().all() and (found != 0).all()


def test_positions_go_on_and_states_carry_no_graph(build):
    stage = build()
    recorder = Recorder(stage.generator)
    stage.generator = recorder
    stage.rollout(micro_batch("generator", 0))
    assert not any(part.requires_grad for part in (*stage.streams[0].state[:3], stage.streams[0].overlap))
    recorder.calls.clear()
    window = stage.rollout(micro_batch("generator", 2))
    assert {call.state.frames for call in recorder.calls} == {5, 7}
    assert window.latents.requires_grad
    assert [call.grad for call in recorder.calls].count(True) == 2


def test_a_stream_holds_on_to_nothing_but_itself(build):
    stage = build("streaming.streaming_max_length=100")
    sizes = set()
    for step in range(5):
        stage.rollout(micro_batch("generator", step))
        stream = stage.streams[0]
        assert stream.overlap.untyped_storage().nbytes() == stream.overlap.nbytes
        sizes.add((stream.state.nbytes, stream.overlap.nbytes, stream.cache.nbytes))
    assert len(sizes) == 1


def test_every_stream_takes_the_next_prompt(build):
    stage = build(micro_batches=2)
    seen: dict[int, list[Tensor]] = {0: [], 1: []}
    for step in range(6):  # three streams of two stretches in each micro-batch
        for index in (0, 1):
            fresh = index not in stage.streams
            window = stage.rollout(micro_batch("critic", step, index))
            if fresh:
                seen[index].append(window.text.tokens)
    order = [PROMPTS[stage.order["generator"][i]] for i in range(6)]
    for index in (0, 1):
        expected = [stage.embed([prompt]).tokens for prompt in order[index::2]]
        assert len(seen[index]) == 3
        assert all(torch.equal(a, b) for a, b in zip(seen[index], expected, strict=True))


def assert_goes_on_to_the_bit(stage: LongSana, other: LongSana) -> None:
    """After two stretches of streams of three, what is saved of one stage is gone on from by the other as by itself."""
    for step in range(2):
        for index in (0, 1):
            stage.rollout(micro_batch("critic", step, index))
    groups = saved(stage)
    other.restore(sorted(groups), groups.__getitem__)
    for step in range(2, 5):  # to the end of the streams, and into the next ones
        for index in (0, 1):
            now = micro_batch("critic", step, index)
            theirs, own = stage.rollout(now), other.rollout(now)
            assert torch.equal(own.latents, theirs.latents) and torch.equal(own.text.tokens, theirs.text.tokens)
    one, two = ({name: sorted(group) for name, group in saved(either).items()} for either in (stage, other))
    assert one == two and one


@pytest.mark.parametrize("past", PASTS, ids=str)
def test_a_revived_stage_goes_on_to_the_bit(build, past):
    assert_goes_on_to_the_bit(*(build("streaming.streaming_max_length=13", *past, micro_batches=2) for _ in range(2)))


def test_on_other_numbers_of_micro_batchs_whole_streams_go_on(build, caplog):
    stage = build(micro_batches=2)
    for index in (0, 1):
        stage.rollout(micro_batch("critic", 0, index))
    groups = saved(stage)
    fewer = build(micro_batches=1)
    fewer.restore(sorted(groups), groups.__getitem__)
    assert "2 micro-batches, this run has 1: 1 go on whole, 1 end, 0 begin anew" in caplog.text
    assert torch.equal(fewer.streams[0].state.kv, stage.streams[0].state.kv)
    more = build(micro_batches=3)
    more.restore(sorted(groups), groups.__getitem__)
    assert "2 micro-batches, this run has 3: 2 go on whole, 0 end, 1 begin anew" in caplog.text
    assert sorted(more.streams) == [0, 1]
    assert more._serials == {0: 1, 1: 1, 2: 1}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["train.batch_size=2"], "kv [2, 1, 1, 2, 28, 28] float32 (here: [2, 2, 1, 2, 28, 28] float32)"),
        (["model.num_cached_blocks=3"], "kv [2, 1, 1, 2, 28, 28] float32 (here: [2, 1, 3, 2, 28, 28] float32)"),
        (["train.mixed_precision=true"], "tail [2, 1, 6, 56] float32 (here: [2, 1, 6, 56] bfloat16)"),
        (["rollout.overlap_latents=1"], "cache_000 [1, "),
        (["streaming.streaming_max_length=9"], "9 latents, which leave no room for a stretch"),
    ],
)
def test_streams_that_do_not_fit_end_and_others_begin(build, caplog, changes, words):
    """One micro-batch of two had none at that time: it goes on with its next prompt all the same."""
    longest = "streaming.streaming_max_length=13"
    stage = build(longest, micro_batches=2)
    for step, index in ((0, 0), (1, 0), (0, 1), (1, 1), (2, 1)):
        stage.rollout(micro_batch("critic", step, index))
    assert sorted(stage.streams) == [0]
    groups = saved(stage)
    other = build(longest, *changes, micro_batches=2)
    other.restore(sorted(groups), groups.__getitem__)
    assert not other.streams and other._serials == {0: 1, 1: 1}
    (message,) = caplog.messages
    assert message.startswith("1 of the streams of 2 micro-batches") and words in message
    batch = other.config.train.batch_size
    now = micro_batch("critic", 3)
    window = other.rollout(dataclasses.replace(now, samples=range(batch)))
    assert window.latents.shape[:3] == (batch, CHANNELS, 5) and window.latents.isfinite().all()


def test_streams_that_begin_anew_go_on_along_the_prompts(build, caplog):
    stage, other = build(micro_batches=2), build(micro_batches=2)
    for index in (0, 1):
        stage.rollout(micro_batch("critic", 0, index))
    groups = saved(stage)
    other.restore(sorted(groups), groups.__getitem__, anew=True)
    assert not other.streams and other._serials == {0: 1, 1: 1}
    (message,) = caplog.messages
    assert message.startswith("2 of the streams of 2 micro-batches")
    prompt = PROMPTS[other.order["generator"][2]]
    assert torch.equal(other.rollout(micro_batch("critic", 1)).text.tokens, other.embed([prompt]).tokens)


@pytest.mark.parametrize("shape", [(CHANNELS, 2 * HEIGHT, WIDTH), (CHANNELS, HEIGHT, 2 * WIDTH)])
def test_streams_of_another_size_end(build, caplog, shape):
    stage, other = build(), build()
    stage.rollout(micro_batch("critic", 0))
    groups = saved(stage)
    other.latent_shape = shape
    other.restore(sorted(groups), groups.__getitem__)
    assert not other.streams and "do not fit" in caplog.text
    assert other.rollout(micro_batch("critic", 1)).latents.shape[3:] == shape[1:]


def test_the_first_stretch_may_be_made_without_being_learned(build):
    stage = build("streaming.train_first_chunk=false")
    for step, learns in enumerate((False, True, False)):
        value = stage.loss(micro_batch("critic", step)).value
        gradients = torch.autograd.grad(value, list(stage.critic.parameters()))
        assert any(gradient.any() for gradient in gradients) == learns


def test_a_stream_that_is_not_finite_ends(build, caplog):
    stage = build()
    stage.rollout(micro_batch("critic", 0))
    stage.streams[0].state.kv.fill_(float("nan"))
    stage.rollout(micro_batch("critic", 1))
    assert 0 not in stage.streams
    assert "not finite" in caplog.text
    assert stage.rollout(micro_batch("critic", 2)).latents.isfinite().all()
