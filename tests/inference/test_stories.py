"""Stories through the command: the videos, what their sidecars say, and what makes one another video."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longsana.config import InferenceConfig, load_config
from longsana.data.prompts import Prompt, read_prompts
from longsana.inference.sidecar import fingerprint, resolved_settings, told_parts
from longsana.sampling.checks import meaningless

from .conftest import ROOT, assert_whole, sidecars

Command = Callable[..., int]
Prompts = Callable[..., Path]
CONFIG = ROOT / "configs/sana_video_config/longsana/shapes/longsana.yaml"
# Chunks of 3, 2 and 2 latents: 25 pictures at 8 a second, which begin at 0, 1.125 and 2.125 s.
LONGER = ("--num_frames", "25", "--unified_noise")
FIRST, SECOND = "a red circle", "a blue square"


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    return tmp_path / "out" / "videos"


def test_the_sidecar_says_where_each_part_really_begins(command: Command, prompts: Prompts, videos: Path) -> None:
    story = f"{FIRST}[1s] | [recache=1] {SECOND}[0.2s] | [cut] {FIRST}"
    assert command("--txt_file", prompts(story, FIRST), *LONGER) == 0
    assert_whole(videos, 2, frames=25)
    told, plain = sidecars(videos)
    assert told["prompt"] == story and told["name"] == "00001-a-red-circle-a-blue-square-a-red-circle"
    assert told["parts"] == [
        {"text": FIRST, "chunk": 0, "frame": 0, "second": 0.0, "change": "keep"},
        {"text": SECOND, "chunk": 1, "frame": 9, "second": 1.125, "change": "recache=1"},
        {"text": FIRST, "chunk": 2, "frame": 17, "second": 2.125, "change": "cut"},
    ]
    assert plain["parts"] == [{"text": FIRST, "chunk": 0, "frame": 0, "second": 0.0, "change": "keep"}]


def test_parts_and_settings_say_the_same(command: Command, prompts: Prompts, videos: Path, tmp_path: Path) -> None:
    """With one noise for all: latents by what becomes of the past, however it was said; and each is another video."""

    def digest(line: str, *more: str) -> str:
        name = f"{len(list((tmp_path / 'out').glob('*')))}"
        assert command("--txt_file", prompts(line), *LONGER, "--dataset", name, *more) == 0
        (record,) = sidecars(tmp_path / "out" / name)
        return str(record["latents_sha256"])

    kept = digest(f"{FIRST}<split>{SECOND}", "--sampling.prompt_change", "keep")
    assert digest(f"{FIRST} | [keep] {SECOND}", "--sampling.prompt_change", "cut") == kept
    changed = [digest(f"{FIRST} | [{change}] {SECOND}") for change in ("cut", "recache=1", "rebuild=1")]
    assert digest(f"{FIRST}[2s] | {SECOND}") == changed[2], "the small world's default"
    blended = digest(f"{FIRST}[1s] | {SECOND}", "--sampling.transition_chunks", "1")
    assert len({kept, *changed, blended}) == 5
    for change, expected in zip(("cut", "recache=1", "rebuild=1"), changed, strict=True):
        assert digest(f"{FIRST}<split>{SECOND}", "--sampling.prompt_change", change) == expected
    assert digest(f"{FIRST} | [rebuild=2] {SECOND}") == digest(f"{FIRST} | [recache=2] {SECOND}")


def test_a_batch_is_of_one_history(command: Command, prompts: Prompts, tmp_path: Path) -> None:
    """Stories that change at different places are sampled apart, to the bit as alone."""
    lines = [f"{FIRST}[1s] | [cut] {SECOND}", f"{FIRST} | [cut] {SECOND}", FIRST]
    for name, size in (("alone", "1"), ("together", "4")):
        assert command("--txt_file", prompts(*lines), *LONGER, "--bs", size, "--dataset", name) == 0
    alone, together = (sidecars(tmp_path / "out" / name) for name in ("alone", "together"))
    assert [record["batch"] for record in together] == [1, 1, 1]
    assert [record["latents_sha256"] for record in alone] == [record["latents_sha256"] for record in together]


@pytest.mark.parametrize(
    ("line", "more", "message"),
    [
        ("a[9s] | b", [], "line 1: its parts last 9 s and leave nothing to the parts without a length"),
        ("a | [cut] b | c | d", [], "line 1: 4 parts between ' | ' for a video of 3 chunks"),
        ("a | [recache] b", [], "line 1: 'recache' is no change of the past"),
        ("a", ["--sampling.prompt_change", "recahe=2"], "did you mean 'recache'?"),
        ("a", ["--sampling.prompt_change", "recache=0"], "sampling.prompt_change: recache=0: must reach back from 1"),
        ("a", ["--sampling.transition_chunks=-1"], "sampling.transition_chunks=-1"),
        ("a", ["--sampling.transition", "round"], "sampling.transition"),
        ("a", ["--sampling.transition", "spherical"], "sampling.transition_chunks=0 leaves no way"),
        ("a[1s] | b", ["--sampling_algo", "flow_euler"], "parts between ' | ' need the streaming sampler"),
        ("a", ["--sampling_algo", "flow_euler", "--sampling.prompt_change", "cut"], "its prompts have one part"),
    ],
)
def test_what_no_story_can_be_is_one_line(
    line: str, more: list[str], message: str, command: Command, prompts: Prompts, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--txt_file", prompts(line), *LONGER, *more) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and message in error


# Identity -------------------------------------------------------------------------------------------------------------


def identity(prompt: Prompt, *settings: str) -> str:
    given = ["vae.decoder=full", "sampling.num_frames=121", "sampling.prompt_change=keep", *settings]
    config = load_config(CONFIG, given, InferenceConfig)
    resolved = resolved_settings(config, prompt, torch.device("cpu"))
    digests = {"model": "a", "vae": "b", "text_encoder": "c"}
    return fingerprint(resolved, prompt, digests, meaningless(config), told_parts(config, prompt))


@pytest.fixture
def read(prompts: Prompts) -> Callable[[str], Prompt]:
    def one(line: str) -> Prompt:
        (found,) = read_prompts(prompts(line), height=32, width=48, aspect_ratio_type="none")
        return found

    return one


CHANGE, BLEND = "sampling.prompt_change=recache=2", "sampling.transition_chunks=1"
ROUND = "sampling.transition=spherical"


def test_a_prompt_of_one_part_has_nothing_to_do_with_stories(read: Callable[[str], Prompt]) -> None:
    plain = read(FIRST)
    assert identity(plain) == identity(plain, CHANGE) == identity(plain, CHANGE, BLEND, ROUND)


def test_a_change_makes_another_video_where_it_happens(read: Callable[[str], Prompt]) -> None:
    split, told = read(f"{FIRST}<split>{SECOND}"), read(f"{FIRST} | [cut] {SECOND}")
    for prompt in (split, read(f"{FIRST}[2s] | {SECOND}")):
        marks = [identity(prompt), identity(prompt, CHANGE), identity(prompt, BLEND), identity(prompt, BLEND, ROUND)]
        assert len(set(marks)) == 4
    assert identity(told) == identity(told, CHANGE), "it says it itself"
    assert identity(told) == identity(told, "sampling.prompt_change=cut")
    assert identity(split) == identity(split, "sampling.prompt_change=keep")


def test_the_videos_of_earlier_versions_are_known(read: Callable[[str], Prompt]) -> None:
    """The identity of prompts that were there before stories is of the same things as then."""
    for line, mark in {FIRST: "one", f"{FIRST}<split>{SECOND}": "parts"}.items():
        settings = ["vae.decoder=full", "sampling.num_frames=121"]
        prompt, config = read(line), load_config(CONFIG, settings, InferenceConfig)
        resolved = resolved_settings(config, prompt, torch.device("cpu"))
        digests = {"model": "a", "vae": "b", "text_encoder": "c"}
        assert identity(prompt) == fingerprint(resolved, prompt, digests, meaningless(config)), mark
