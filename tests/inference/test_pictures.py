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
        given = [f"scheduler.sampling_algo={sampler}", f"sampling.image_fit={fit}"]
        config = load_config(CONFIG, given, InferenceConfig)
        settings = resolved_settings(config, prompt, torch.device("cpu"))
        return fingerprint(settings, prompt, digests, meaningless(config), picture=picture)

    for sampler in ("flow_euler", "flow_dpm-solver", "longlive_flow_euler"):
        assert identity(sampler, "cover", None) == identity(sampler, "stretch", None)
    marks = [identity("flow_euler", fit, picture) for fit in ("cover", "stretch") for picture in ("x", "y", None)]
    assert len(set(marks)) == 5  # without a picture the fit decides nothing


def test_videos_with_and_without_a_picture_are_in_different_batches() -> None:
    images = (None, Path("a.png"), None, Path("b.png"))
    prompts = [Prompt(line, TEXT, (TEXT,), 0, 32, 48, image=image) for line, image in enumerate(images, 1)]
    jobs = [Job(prompt, Path(f"{prompt.line}.mp4"), {"frames": 17, "parts": []}) for prompt in prompts]
    assert [[job.prompt.line for job in batch] for batch in batches_of(jobs, 4)] == [[1, 3], [2, 4]]
