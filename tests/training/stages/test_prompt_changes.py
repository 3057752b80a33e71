"""Streams whose prompt changes: a history that is absorbed from scratch, and a run that goes on to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longsana.chunks import ChunkPlan
from longsana.config import load_config
from longsana.models.embeddings import TextEmbedding
from longsana.runtime.distributed import World
from longsana.runtime.errors import InputError
from longsana.sampling.sampler import absorb
from longsana.training.build import StageBuilder
from longsana.training.checks import check_sources, check_training
from longsana.training.config import TrainingConfig
from longsana.training.stages.longsana import LongSana
from longsana.training.stages.prompt_changes import Progress, Switches
from longsana.training.stages.stage import MicroBatch, MicroBatches
from tests.training.conftest import PROMPTS
from tests.training.stages.test_longsana import assert_goes_on_to_the_bit, micro_batch, saved
from tests.training.stages.test_self_forcing import Recorder

SECOND = tuple(f"{prompt}, and then it rains" for prompt in PROMPTS)
SWITCH = ("streaming.switch_prompt_path=second.txt", "streaming.prompt_change=recache=1")
MODES = {
    "fixed": ("streaming.fixed_switch_index=6",),
    "random": ("streaming.switch_mode=random",),
    "random_choice": ("streaming.switch_mode=random_choice", "streaming.switch_choices=[2,9]"),
}
ALWAYS = ("streaming.streaming_max_length=13", "streaming.prompt_change_prob=1", "rollout.overlap_latents=1")
STRETCHES = (5, 4, 4)
CHANGES = ("keep", "recache=1", "recache=2", "rebuild=1", "rebuild=3")
PASTS = [(), ("model.state_decay=learned", "model.num_sink_blocks=3"), ("model.num_cached_blocks=2",)]


@pytest.fixture
def build(distilled: Callable[..., Any]) -> Callable[..., LongSana]:
    def make(*overrides: str, processes: int = 1, accumulation: int = 1, **parts: Any) -> LongSana:
        parts["micro_batches"] = MicroBatches(0, processes, accumulation)
        stage: LongSana = distilled(LongSana, "longsana", *ALWAYS, *overrides, **parts)
        # The last latent as it is: to decode it would take half of the time, and test_longsana.py shows that.
        stage.overlap = lambda new, cache: (new[:, :, -1:], None)  # type: ignore[method-assign]
        return stage

    return make


@pytest.fixture
def build_switching(build: Callable[..., LongSana]) -> Callable[..., LongSana]:
    """`build_switching("random", ...)`: streams of stretches from 0, 5 and 9 that switch at 5 or 9."""

    def make(mode: str, *overrides: str, **parts: Any) -> LongSana:
        settings = (*SWITCH, "streaming.prompt_change_prob=0", *MODES[mode], *overrides)
        return build(*settings, switch_prompts=SECOND, **parts)

    return make


@pytest.mark.parametrize(
    ("change", "past"),
    [
        # That any past is absorbed again is shown of the network itself, in tests/sampling/test_recent.py.
        pytest.param(change, past, marks=() if not past or change == "recache=2" else pytest.mark.slow)
        for change in CHANGES
        for past in PASTS
    ],
    ids=str,
)
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
        *(
            # What reaches back one chunk has nothing that one that reaches back farther has not.
            pytest.param(change, (), marks=pytest.mark.slow if change.endswith("=1") else ())
            for change in CHANGES
        ),
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
    assert not other.streams and "no kv of its last 2 chunks" in caplog.text
    plain = build("streaming.prompt_change_prob=0")
    plain.restore(sorted(groups), groups.__getitem__)
    assert plain.streams[0].recent.nbytes == 0, "what it does not need it does not keep"
    switching = build(*SWITCH, "streaming.prompt_change_prob=0", *MODES["random"], switch_prompts=SECOND)
    switching.restore(sorted(groups), groups.__getitem__)
    assert not switching.streams and "no numbers of its prompts" in caplog.text


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
        return stage.changes.happens(micro_batch("generator", step, index), None)

    drawn = [happens(step, 0) for step in range(2000)]
    assert abs(sum(drawn) / 2000 - 0.3) < 0.03
    assert drawn[:50] == [happens(step, 7) for step in range(50)]

    def drawn_prompts(step: int) -> list[Sequence[str] | None]:
        pairs = [MicroBatch(0, step, "critic", index, range(2), torch.device("cpu")) for index in range(40)]
        return [stage.changes.prompts(pair, Progress(0, 5, (0, 1))) for pair in pairs]

    found = drawn_prompts(3)
    assert len({tuple(pair or ()) for pair in found}) > 1
    assert {prompt for pair in found for prompt in pair or ()} == set(PROMPTS)
    assert found == drawn_prompts(4), "the stream decides, not the update"


def calls(stage: LongSana, now: MicroBatch) -> int:
    """Take a stretch, and count the generator's passes."""
    recorder = Recorder(stage.generator)
    stage.generator = recorder
    stage.rollout(now)
    stage.generator = recorder.model  # type: ignore[assignment]
    return len(recorder.calls)


@pytest.mark.parametrize("change", CHANGES)
def test_processes_run_their_networks_equally_often(build: Callable[..., LongSana], change: str) -> None:
    """Whether a stream begins, goes on, or is shorter than a change reaches back."""

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
    assert not any(tensor.requires_grad for tensor in (*stream.state[:3], *stream.recent.held.tensors().values()))


@pytest.mark.parametrize(
    ("mode", "more"),
    [
        *((mode, ()) for mode in MODES),
        *(
            pytest.param(mode, ("train.batch_size=2",), marks=() if mode == "random" else pytest.mark.slow)
            for mode in MODES
        ),
    ],
    ids=str,
)
def test_a_stream_switches_once_to_the_same_lines(
    build_switching: Callable[..., LongSana], embed: Callable[..., TextEmbedding], mode: str, more: tuple[str, ...]
) -> None:
    """Its latents are those of a naive rollout whose caption changes there: the last chunk is absorbed again."""
    stage = build_switching(mode, *more)
    batch, places = stage.config.train.batch_size, set()
    for serial in range(4):
        state, before, last, frames, switched = None, None, None, 0, False
        first, second = (
            embed([prompts[stage.order["generator"][serial * batch + row]] for row in range(batch)])
            for prompts in (PROMPTS, SECOND)
        )
        for number, length in enumerate(STRETCHES):
            now = MicroBatch(0, 3 * serial + number, "critic", 0, range(batch), torch.device("cpu"))
            window = stage.rollout(now)
            if torch.equal(window.text.tokens, second.tokens) and not switched:
                assert last is not None, "a stream begins with its own prompts"
                state, switched = absorb(stage.generator, last, second, before), True
                places.add(frames)
            text = second if switched else first
            assert torch.equal(window.text.tokens, text.tokens)
            with torch.no_grad():
                new, after = stage.generate(
                    now, ChunkPlan.split(length, 2), text, state, window.exit_steps, keep_state=True
                )
            assert torch.equal(window.latents[:, :, -length:], new)
            for part in ChunkPlan.split(length, 2).slices():
                before, last = state, new[:, :, part]
                state = absorb(stage.generator, last, text, state)
            assert after is not None and state is not None
            assert all(map(torch.equal, after[:3], state[:3]))
            frames += length
        assert switched and not stage.streams
    assert places <= {"fixed": {9}, "random": {5, 9}, "random_choice": {5, 9}}[mode]


@pytest.mark.parametrize("mode", ["random", "random_choice"])
def test_places_are_drawn_for_each_stream(build_switching: Callable[..., LongSana], mode: str) -> None:
    """By the seed, the micro-batch and the stream's number alone, each place as often as the other."""
    stage = build_switching(mode)
    assert isinstance(stage.changes, Switches)
    found = [stage.changes.place(index, serial) for index in range(20) for serial in range(50)]
    assert found == [stage.changes.place(index, serial) for index in range(20) for serial in range(50)]
    assert set(found) == {5, 9} and 400 < found.count(5) < 600
    assert len({tuple(found[50 * index : 50 * index + 50]) for index in range(20)}) == 20
    other = build_switching(mode, "train.seed=1")
    assert isinstance(other.changes, Switches)
    assert found[:50] != [other.changes.place(0, serial) for serial in range(50)]


@pytest.mark.parametrize(
    ("mode", "updates"),
    [
        *(("fixed", 2), ("fixed", 4), ("random", 5)),
        *(
            pytest.param(mode, updates, marks=pytest.mark.slow)
            for mode, updates in (("random", 1), ("random_choice", 4))
        ),
    ],
)
def test_streams_that_switch_go_on_to_the_bit(
    build_switching: Callable[..., LongSana], mode: str, updates: int
) -> None:
    """Before, at and after their switch, and with as many micro-batches as before or fewer."""
    stage, other = (build_switching(mode, accumulation=2) for _ in range(2))
    fewer = build_switching(mode, accumulation=1)
    for step in range(updates):
        for index in (0, 1):
            stage.rollout(micro_batch("critic", step, index))
    groups = saved(stage)
    for resumed in (other, fewer):
        resumed.restore(sorted(groups), groups.__getitem__)
    for step in range(updates, updates + 5):
        for index in (0, 1):
            now = micro_batch("critic", step, index)
            theirs, own = stage.rollout(now), other.rollout(now)
            assert torch.equal(own.latents, theirs.latents) and torch.equal(own.text.tokens, theirs.text.tokens)
            if index == 0 and step < 3 * -(-updates // 3):  # the next video has other prompts
                alone = fewer.rollout(now)
                assert torch.equal(alone.latents, theirs.latents) and torch.equal(alone.text.tokens, theirs.text.tokens)
    for one, two in zip(saved(stage).values(), saved(other).values(), strict=True):
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_stream_of_more_prompts_than_there_are_ends(build_switching: Callable[..., LongSana], caplog: Any) -> None:
    stage, other = build_switching("fixed"), build_switching("fixed")
    stage.rollout(micro_batch("critic", 0))
    groups = saved(stage)
    groups["stream_00000"]["prompts"] += len(PROMPTS)
    other.restore(sorted(groups), groups.__getitem__)
    assert not other.streams and f", where there are {len(PROMPTS)}" in caplog.text


def test_a_stream_may_go_on_without_the_switch_file(build: Callable[..., LongSana], build_switching: Any) -> None:
    stage, plain = build_switching("fixed"), build("streaming.prompt_change_prob=0")
    window = stage.rollout(micro_batch("critic", 0))
    groups = saved(stage)
    plain.restore(sorted(groups), groups.__getitem__)
    assert torch.equal(plain.rollout(micro_batch("critic", 1)).text.tokens, window.text.tokens)


@pytest.mark.parametrize("change", ["recache=1", "rebuild=3", "keep"])
def test_processes_whose_streams_switch_apart_run_their_networks_equally_often(
    build_switching: Callable[..., LongSana], change: str
) -> None:
    """One switches at 5, the other at 9 or begins anew: both know of it in each update."""
    here: list[bool] = []

    def any_process(own: bool) -> bool:
        here.append(own)
        return there[len(here) - 1]

    settings = (f"streaming.prompt_change={change}", "rollout.last_step_only=true")
    apart = build_switching("fixed", *settings, processes=2, any_process=any_process)
    alone = build_switching("fixed", *settings, processes=2)
    there = [False, True, True, False, True, True]  # on this process at 9, on the other at 5
    found = [calls(apart, micro_batch("critic", step)) for step in range(6)]
    assert here == [False, False, True, False, False, True]
    usual, chunks = found[0], apart.changes.change.chunks
    assert found == [usual + chunks * switches for switches in there]
    assert [calls(alone, micro_batch("critic", step)) for step in range(3)] == [usual, usual, usual + chunks]


def test_the_file_is_aligned_with_the_prompts(small_training: Callable[..., Path], tmp_path: Path) -> None:
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"

    def refusal(*settings: str) -> str:
        config = load_config(
            small_training("longsana", f"data.data_path={first}", f"streaming.switch_prompt_path={second}"),
            ("streaming.fixed_switch_index=5", *settings),
            TrainingConfig,
        )
        check_training(config)
        try:
            check_sources(config)
        except InputError as error:
            return str(error)
        return ""

    first.write_text("a\nb\n\nc\n")
    second.write_text("d\ne\n\nf\n")
    assert refusal() == ""
    second.write_text("d\ne\n")
    assert refusal() == (
        f"streaming.switch_prompt_path={second}: 2 prompts, where data.data_path={first} has 3; write line i of the "
        "one for line i of the other"
    )
    second.write_text("d\n\ne\nf\n")
    assert f"{second}: line 2 is blank here or in data.data_path={first}, and not in both" in refusal()
    second.unlink()
    assert "streaming.switch_prompt_path: " in refusal() and "not found" in refusal()


def test_all_prompts_are_encoded_ahead(
    small_training: Callable[..., Path], embed: Callable[..., TextEmbedding], tmp_path: Path
) -> None:
    """Those of the switch file too, for text encoders that leave before training."""

    class Recorded:
        asked: tuple[str, ...] = ()

        def prepare(self, prompts: Sequence[str]) -> None:
            self.asked += tuple(prompts)

        def embed(self, prompts: Sequence[str]) -> TextEmbedding:
            return embed(prompts)

        def negative(self) -> TextEmbedding:
            return embed(["blurred"])

    (tmp_path / "second.txt").write_text("\n".join(SECOND))
    settings = (f"streaming.switch_prompt_path={tmp_path / 'second.txt'}", "streaming.fixed_switch_index=5")
    config = load_config(small_training("longsana"), settings, TrainingConfig)
    world, captions = World(), Recorded()
    world.connect(alone=True)
    try:
        parts = {"world": world, "device": torch.device("cpu"), "folder": tmp_path}
        builder = StageBuilder(config, micro_batches=MicroBatches(0, 1, 1), **parts)  # type: ignore[arg-type]
        builder.captions = captions  # type: ignore[assignment]
        stage = builder.stage()
    finally:
        world.disconnect()
    assert captions.asked == (*PROMPTS, *SECOND)
    assert isinstance(stage, LongSana)
    windows = [stage.rollout(micro_batch("critic", step)) for step in range(2)]
    number = stage.order["generator"][0]
    for window, prompts in zip(windows, (PROMPTS, SECOND), strict=True):
        assert torch.equal(window.text.tokens, embed([prompts[number]]).tokens)


FILE = "streaming.switch_prompt_path=second.txt"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("streaming.switch_mode=random", "streaming.switch_mode=random: has no meaning without"),
        ("streaming.fixed_switch_index=5", "streaming.fixed_switch_index=5: has no meaning without"),
        (f"{FILE} streaming.prompt_change_prob=0.5", "streaming.prompt_change_prob=0.5: has no meaning with"),
        (
            f"{FILE} streaming.switch_mode=random streaming.fixed_switch_index=5",
            "streaming.fixed_switch_index=5: has no meaning with streaming.switch_mode=random",
        ),
        (f"{FILE} streaming.switch_choices=[5]", "has no meaning with streaming.switch_mode=fixed"),
        (f"{FILE} streaming.switch_mode=random_choice", "streaming.switch_mode=random_choice needs at least one"),
        (FILE, "streaming.fixed_switch_index: 21 is a place that no stretch reaches: the last of a stream begins at"),
        (
            f"{FILE} streaming.switch_mode=random_choice streaming.switch_choices=[5,6]",
            "streaming.switch_choices: 6 is a place that no stretch reaches",
        ),
        (f"{FILE} streaming.streaming_max_length=5", "make streaming.streaming_max_length=5 at least 9"),
        (f"{FILE} streaming.switch_mode=rendom", "streaming.switch_mode"),
        (f"{FILE} streaming.fixed_switch_index=0", "streaming.fixed_switch_index=0: must be at least 1"),
    ],
)
def test_what_no_switch_can_be(small_training: Callable[..., Any], settings: str, message: str) -> None:
    with pytest.raises(InputError) as refusal:
        check_training(load_config(small_training("longsana"), settings.split(), TrainingConfig))
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


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
