"""A picture first: asked for by a line, a field or a flag, checked before anything is loaded, told in the sidecar."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from longsana.config import InferenceConfig, load_config
from longsana.data.prompts import Prompt
from longsana.inference.batch import Job, batches_of
from longsana.inference.sidecar import fingerprint, resolved_settings
from longsana.runtime.errors import InputError
from longsana.sampling.checks import meaningless
from tests.inference.conftest import sidecars

CONFIG = "configs/sana_video_config/longsana/shapes/longsana.yaml"
CHUNK = "configs/sana_video_config/Sana_2000M_480px_AdamW_fsdp_chunk.yaml"
TEXT = "a red circle"
BASE = ("--sampling_algo", "flow_euler", "--step", "2", "--cfg_scale", "1")
Prompts = Callable[..., Path]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "ball.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    return path


def said(script: ModuleType, *arguments: str | Path) -> str:
    with pytest.raises(InputError) as caught:
        script.prepare([str(word) for word in arguments])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("sampler", ["flow_euler", "flow_dpm-solver"])
def test_lines_and_the_flag_name_pictures(
    sampler: str, script: ModuleType, prompts: Prompts, picture: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.png"
    Image.new("L", (9, 9)).save(other)
    path = prompts(TEXT, f"{TEXT}<image>ball.png")
    base = ["--sampling_algo", sampler, "--txt_file", str(path)]
    assert [prompt.image for prompt in script.prepare(base).prompts] == [None, picture]
    request = script.prepare([*base, "--image", str(other), "--image_fit", "stretch"])
    assert [prompt.image for prompt in request.prompts] == [other, picture]
    assert request.config.sampling.image_fit == "stretch"


def test_what_changes_nothing_is_said(
    script: ModuleType, prompts: Prompts, picture: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    script.prepare([*BASE, "--txt_file", str(prompts(TEXT)), "--image_fit", "stretch"])
    assert "--image_fit changes nothing here: no prompt begins with a picture" in caplog.messages
    other = picture.with_name("other.png")
    Image.new("L", (9, 9)).save(other)
    script.prepare([*BASE, "--txt_file", str(prompts(f"{TEXT}<image>{picture}")), "--image", str(other)])
    assert "--image changes nothing here: every prompt names a picture of its own" in caplog.messages


@pytest.mark.parametrize("given", [["--config", CHUNK]])
def test_other_samplers_say_what_takes_a_picture_there(
    given: list[str], script: ModuleType, prompts: Prompts, picture: Path
) -> None:
    path = prompts("fine", f"{TEXT}<image>{picture}")
    says = "a picture to begin with needs LongSANA (longlive_flow_euler) or the bidirectional base model "
    for arguments, place in ((["--txt_file", path], f"{path}, line 2"), (["--image", picture], "--image")):
        message = said(script, *given, *arguments)
        assert message.startswith(f"{place}: {says}")
        assert message.endswith("(flow_euler, flow_dpm-solver), not chunk_flow_euler")
    assert "--image_fit: has no meaning for the sampler" in said(script, *given, "--image_fit", "cover")


def test_a_story_begins_with_no_picture(script: ModuleType, prompts: Prompts, picture: Path) -> None:
    path = prompts(f"a<split>b<image>{picture}")
    assert "line 1: parts between '<split>' need the streaming sampler" in said(script, *BASE, "--txt_file", path)
    (prompt,) = script.prepare(["--txt_file", str(path)]).prompts
    assert (prompt.image, prompt.parts) == (picture, ("a", "b")), "LongSANA's does"
    state = ["--video", str(picture)]
    assert "line 1: a picture to begin with, and what the video goes on from" in said(
        script, "--txt_file", path, *state
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such picture"),
        (b"hello", "no picture of a kind that is read"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer"),
        ("cut", "cannot be read as a picture"),
    ],
)
def test_a_broken_picture_is_told_by_its_line_before_anything_is_loaded(
    content: bytes | str | None,
    says: str,
    command: Callable[..., int],
    prompts: Prompts,
    picture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("longsana.commands.generate.check_weights", lambda *_: pytest.fail("weights were looked at"))
    path = prompts(f"{TEXT}<image>ball.png", f"{TEXT}<image>broken.png")
    if content is not None:
        whole = picture.read_bytes()
        (tmp_path / "broken.png").write_bytes(whole[:3000] if isinstance(content, str) else content)
    assert command(*BASE, "--txt_file", path) == 2
    error = capsys.readouterr().err
    assert f"error: {path}, line 2: " in error and says in error and error.count("\n") == 1
    assert command(*BASE, "--txt_file", prompts(TEXT), "--image", tmp_path / "broken.png") == 2
    assert f"error: --image: {tmp_path / 'broken.png'}: {says}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_video_is_longer_than_its_picture(script: ModuleType, prompts: Prompts, picture: Path) -> None:
    path = prompts(f"{TEXT}<image>{picture}")
    assert "line 1: num_frames=1: shows the picture" in said(script, *BASE, "--txt_file", path, "--num_frames", "1")


def test_a_picture_is_read_once_for_a_size(
    script: ModuleType, prompts: Prompts, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longsana.sampling import checks

    read: list[tuple[Any, ...]] = []
    monkeypatch.setattr(checks, "read_picture", lambda *arguments: read.append(arguments))
    rows = [{"prompt": TEXT, "image": str(picture), "size": size} for size in ([32, 48], [32, 48], [48, 32])]
    script.prepare([*BASE, "--txt_file", str(prompts(*map(json.dumps, rows), name="a.jsonl"))])
    assert read == [(picture, 32, 48, "cover"), (picture, 48, 32, "cover")]


def test_a_sidecar_tells_the_picture_and_knows_it_by_its_content(
    command: Callable[..., int], prompts: Prompts, picture: Path, tmp_path: Path
) -> None:
    path = prompts(TEXT, f"{TEXT}<image>ball.png", f"a ball<image>{picture}")
    assert command(*BASE, "--txt_file", path, "--bs", "3") == 0
    plain, first, second = sidecars(tmp_path / "out/videos")
    digest = hashlib.sha256(picture.read_bytes()).hexdigest()
    assert "image" not in plain and "image_sha256" not in plain
    assert [(one["image"], one["image_sha256"]) for one in (first, second)] == [(str(picture), digest)] * 2
    assert [one["batch"] for one in (plain, first, second)] == [1, 2, 2]
    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "out/videos").iterdir()}
    (tmp_path / "moved").mkdir()
    picture.rename(tmp_path / "moved/it.png")
    moved = prompts(TEXT, f"{TEXT}<image>moved/it.png", "a ball<image>moved/it.png")
    assert command(*BASE, "--txt_file", moved) == 0  # all there
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out/videos").iterdir()} == stamps


def test_content_and_fit_make_another_video_where_there_is_a_picture() -> None:
    prompt = Prompt(1, TEXT, (TEXT,), 0, 32, 48)
    digests = {"model": "a", "vae": "b", "text_encoder": "c"}

    def identity(sampler: str, fit: str, picture: str | None) -> str:
        given = ["vae.decoder=full", f"scheduler.sampling_algo={sampler}", f"sampling.image_fit={fit}"]
        config = load_config(CONFIG, given, InferenceConfig)
        settings = resolved_settings(config, prompt, torch.device("cpu"))
        return fingerprint(settings, prompt, digests, meaningless(config), picture=picture)

    for sampler in ("flow_euler", "flow_dpm-solver", "longlive_flow_euler"):
        assert identity(sampler, "cover", None) == identity(sampler, "stretch", None)
    marks = [identity("flow_euler", fit, picture) for fit in ("cover", "stretch") for picture in ("x", "y", None)]
    assert len(set(marks)) == 5  # without a picture the fit decides nothing


def test_videos_with_and_without_a_picture_are_in_different_batches() -> None:
    places: list[tuple[int, ...]] = [(), (0,), (), (0,), (0, 2), (2,), (0, 2)]
    prompts = [Prompt(line, TEXT, (TEXT,), 0, 32, 48) for line in range(1, 8)]
    jobs = [
        Job(prompt, Path(f"{prompt.line}.mp4"), {"frames": 17, "parts": []}, pictured)
        for prompt, pictured in zip(prompts, places, strict=True)
    ]
    assert [[job.prompt.line for job in batch] for batch in batches_of(jobs, 4)] == [[1, 3], [2, 4], [5, 7], [6]]


# A picture at a cut ---------------------------------------------------------------------------------------------------

STORY = f"{TEXT}[1s] | [cut] a blue square<image>ball.png"
# Chunks of 3, 2, 2 and 2 latents; the second part begins with the second.
LONG = ("--num_frames", "33", "--unified_noise")


def other_picture(path: Path) -> Path:
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    return path


def test_a_part_tells_its_picture_and_is_known_by_its_content(
    command: Callable[..., int], prompts: Prompts, picture: Path, tmp_path: Path
) -> None:
    other_picture(tmp_path / "other.png")
    path = prompts(
        STORY, f"{TEXT}[1s] | [cut] a blue square", f"{TEXT}<image>other.png[1s] | [cut] a blue square<image>ball.png"
    )
    assert command("--txt_file", path, *LONG) == 0
    cut, plain, both = sidecars(tmp_path / "out/videos")
    digest, other = (hashlib.sha256(file.read_bytes()).hexdigest() for file in (picture, tmp_path / "other.png"))
    assert cut["prompt"] == plain["prompt"] == both["prompt"] == f"{TEXT}[1s] | [cut] a blue square"
    assert "image" not in cut and (both["image"], both["image_sha256"]) == (str(tmp_path / "other.png"), other)
    first, second = cut["parts"]
    assert "image" not in first and (second["image"], second["image_sha256"]) == (str(picture), digest)
    assert (second["chunk"], second["change"]) == (1, "cut") == (plain["parts"][1]["chunk"], "cut")
    assert [part["image_sha256"] for part in both["parts"]] == [other, digest]
    assert len({record["latents_sha256"] for record in (cut, plain, both)}) == 3
    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "out/videos").iterdir()}
    (tmp_path / "moved").mkdir()
    picture.rename(tmp_path / "moved/it.png")
    assert command("--txt_file", prompts(STORY.replace("ball.png", "moved/it.png")), *LONG) == 0  # all there
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out/videos").iterdir()} == stamps
    other_picture(tmp_path / "moved/it.png")
    assert command("--txt_file", prompts(STORY.replace("ball.png", "moved/it.png")), *LONG) == 0
    assert sidecars(tmp_path / "out/videos")[0]["fingerprint"] != cut["fingerprint"]


def test_a_batch_of_cuts_to_pictures_is_each_alone(
    command: Callable[..., int], prompts: Prompts, picture: Path, tmp_path: Path
) -> None:
    other_picture(tmp_path / "other.png")
    lines = [STORY, STORY.replace("ball", "other").replace("blue", "green"), STORY.replace("<image>ball.png", "")]
    for name, size in (("alone", "1"), ("together", "3")):
        assert command("--txt_file", prompts(*lines), *LONG, "--bs", size, "--dataset", name) == 0
    alone, together = (sidecars(tmp_path / "out" / name) for name in ("alone", "together"))
    assert [record["batch"] for record in together] == [2, 2, 1]
    assert [one["fingerprint"] for one in alone] == [one["fingerprint"] for one in together]


@pytest.mark.parametrize(
    ("line", "settings", "says"),
    [
        (
            f"{TEXT}[1s] | b<image>ball.png",
            (),
            "part 2 has a picture and begins with rebuild=1: a later part may bring",
        ),
        (
            f"{TEXT}[1s] | [keep] b<image>ball.png",
            ("--sampling.prompt_change", "cut"),
            "part 2 has a picture and begins",
        ),
        (f"{TEXT}[1s] | [recache=1] b<image>ball.png", (), "only where the past is cut; begin it with [cut]"),
        (f"{TEXT}[1s] | [cut] b<image>none.png", (), "none.png: no such picture"),
        (f"{TEXT}[1s] | [cut] b<image>broken.png", (), "broken.png: no picture of a kind that is read"),
        (f"{TEXT}[1s] | [cut] b<image>ball.png", ("--sampling_algo", "flow_euler"), "parts between ' | ' need"),
    ],
)
def test_a_picture_of_a_part_is_told_by_its_line(
    line: str,
    settings: tuple[str, ...],
    says: str,
    command: Callable[..., int],
    prompts: Prompts,
    picture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("longsana.commands.generate.check_weights", lambda *_: pytest.fail("weights were looked at"))
    (tmp_path / "broken.png").write_bytes(b"hello")
    path = prompts("fine", line)
    assert command("--txt_file", path, *LONG, *settings) == 2
    error = capsys.readouterr().err
    assert f"error: {path}, line 2: " in error and says in error and error.count("\n") == 1


def test_a_setting_cuts_too(script: ModuleType, prompts: Prompts, picture: Path) -> None:
    path = prompts(f"{TEXT}[1s] | b<image>ball.png")
    (prompt,) = script.prepare(["--txt_file", str(path), "--sampling.prompt_change", "cut"]).prompts
    assert prompt.pictures == {1: picture}
