"""Training of the small text encoder: it learns what a caption promises, and is loaded as any Gemma."""

from __future__ import annotations

import itertools
import logging
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longsana.config import TextEncoderConfig
from longsana.encoders.text import GemmaTextEncoder
from longsana.runtime.stop import Stopped
from longsana.shapes import train_text_encoder as training
from longsana.shapes.remembered import WorldName, draw_remembered
from longsana.shapes.scenes import BACKGROUNDS, COLOURS, KINDS, MOTIONS, SIZES, SPEEDS, Actor, Promise, draw_scene
from longsana.shapes.snapshot import NAME
from longsana.shapes.train_text_encoder import NONE, WORDS, TextTrainingConfig, train_text_encoder

SHAPE = Path(__file__).resolve().parents[2] / "asset/shapes/text_encoder"
CPU = torch.device("cpu")
LENGTH = 48
SHORT = TextTrainingConfig(shape=str(SHAPE), steps=3, batch=8, test_captions=16)


def load(folder: str | Path, length: int = LENGTH) -> GemmaTextEncoder:
    return GemmaTextEncoder.load(
        TextEncoderConfig(text_encoder_name=str(folder), chi_prompt="none"),
        caption_length=length,
        caption_channels=64,
        device=CPU,
        dtype=torch.float32,
    )


def final_loss(config: TextTrainingConfig, folder: Path, caplog: pytest.LogCaptureFixture) -> float:
    caplog.clear()
    with caplog.at_level(logging.INFO, logger=training.log.name):
        train_text_encoder(config, folder, CPU)
    line = next(record.getMessage() for record in caplog.records if f"of {config.steps}, loss" in record.getMessage())
    return float(line.rpartition(" ")[2])


def test_the_loss_falls(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = replace(SHORT, batch=64)
    first = final_loss(replace(config, steps=1), tmp_path / "first", caplog)
    assert final_loss(replace(config, steps=40), tmp_path / "last", caplog) < 0.75 * first


@pytest.mark.slow
def test_it_learns_to_understand_captions_in_full(tmp_path: Path) -> None:
    assert train_text_encoder(replace(SHORT, steps=400, batch=64, test_captions=256), tmp_path / "trained", CPU) > 0.5


def test_two_runs_write_the_same_bytes_and_leave_the_inputs(tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in SHAPE.iterdir()}
    for name, noise in (("one", 1), ("two", 2)):
        torch.manual_seed(noise)
        train_text_encoder(SHORT, tmp_path / name, CPU)
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    assert set(files) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert before == {path.name: path.read_bytes() for path in SHAPE.iterdir()}
    train_text_encoder(replace(SHORT, seed=1), tmp_path / "other", CPU)
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != files["model.safetensors"]


def test_what_is_written_is_a_text_encoder(tmp_path: Path) -> None:
    train_text_encoder(SHORT, tmp_path, CPU)
    trained, new = load(tmp_path), load(f"seeded:{SHAPE}")
    caption = draw_scene(0, 0).caption
    one, other = trained.encode(caption), new.encode(caption)
    assert one.tokens.shape == (1, LENGTH, 64)
    assert torch.isfinite(one.tokens[one.mask]).all()
    assert torch.equal(one.mask, other.mask), "it reads the same tokens"
    assert (one.tokens - other.tokens)[one.mask].abs().max() > 1e-3, "and has learnt"
    assert not any(weight.requires_grad for weight in trained.model.parameters())


# What it is asked


def test_answers_of_a_promise_by_hand() -> None:
    one = Promise((Actor("big", "cyan", "ring", "clockwise", "slowly"),), "teal")
    two = Promise(
        (Actor("small", "red", "circle", "still", ""), Actor("big", "white", "cross", "up", "quickly", travels=True)),
        "black",
    )
    background, *rest = training._answers([one, two])
    assert [tuple(BACKGROUNDS)[index] for index in background] == ["teal", "black"]
    said = [[words[int(index)] for index in answer] for words, answer in zip(WORDS * 2, rest, strict=True)]
    first, second = zip(*said, strict=True)
    assert first == ("big", "cyan", "ring", "clockwise", "slowly", NONE, *[NONE] * 6)
    assert second == (
        "small",
        "red",
        "circle",
        "still",
        NONE,
        NONE,
        "big",
        "white",
        "cross",
        "up",
        "quickly",
        "travels",
    )


def test_there_is_an_answer_to_everything_and_a_logit_for_each() -> None:
    heads = training._Heads(8)
    logits = heads(torch.zeros(3, training.SUMMARY, 8))
    sizes = [values.shape for values in logits]
    words = (SIZES, COLOURS, KINDS, MOTIONS, SPEEDS, ("travels",))
    counts = [len(BACKGROUNDS), *[1 + len(some) for some in words] * 2]
    assert sizes == [(3, training.SUMMARY, count) for count in counts]
    answers = training._answers([draw_remembered(0, index).promise for index in range(2000)])
    # Of the first actor only the speed, and whether it travels, may be none.
    for number, (answer, count) in enumerate(zip(answers, counts, strict=True)):
        classes = set(range(count)) - ({0} if 1 <= number <= 4 else set())
        assert set(answer.tolist()) == classes


def test_the_summary_is_the_end_of_the_caption() -> None:
    encoder = load(f"seeded:{SHAPE}")
    captions = [draw_scene(0, index).caption for index in range(6)]
    summary = training._summary(encoder, captions)
    for caption, states in zip(captions, summary, strict=True):
        embedding = encoder.encode(caption)
        torch.testing.assert_close(states, embedding.tokens[embedding.mask][-training.SUMMARY :], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("world", ["shapes", "remembered_shapes"])
def test_every_caption_fits(world: WorldName) -> None:
    encoder = load(f"seeded:{SHAPE}")
    captions, promises = training._captions(world, 1, 0, 2000, held_out=False)
    assert max(encoder.overflow(caption) for caption in captions) == 0
    assert len(promises) == 2000
    # All scores, and none at all.
    said = {caption.rpartition("motion score: ")[2] for caption in captions if "motion score" in caption}
    assert said == {f"{score}." for score in training.MOTION_SCORES if score}
    assert any("motion score" not in caption for caption in captions)


def test_training_and_test_captions_are_of_different_scenes() -> None:
    some, promises = training._captions("shapes", 1, 0, 64, held_out=False)
    assert training._captions("shapes", 1, 32, 32, held_out=False)[1] == promises[32:]
    assert not set(some) & set(training._captions("shapes", 0, 0, 64, held_out=True)[0])


def test_a_stop_saves_and_the_same_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_text_encoder(SHORT, tmp_path / "whole", CPU)
    summary, calls = training._summary, itertools.count(1)

    def asked(*arguments: Any) -> Any:
        if next(calls) == 2:
            signal.raise_signal(signal.SIGHUP)
        return summary(*arguments)

    monkeypatch.setattr(training, "_summary", asked)
    broken = tmp_path / "broken"
    with pytest.raises(Stopped):
        train_text_encoder(SHORT, broken, CPU)
    assert [path.name for path in broken.iterdir()] == [NAME]
    train_text_encoder(SHORT, broken, CPU)
    assert next(calls) == SHORT.steps + 2, "each step once, and one look at the end"
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert {path.name: path.read_bytes() for path in broken.iterdir()} == whole
