"""Seed, size and length of a line are those of its video, and no part of its neighbours'."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import assert_whole, frames_of, sidecars

TEXT = "a red circle"


def digests(folder: Path) -> list[tuple[str, str]]:
    return [(record["latents_sha256"], record["fingerprint"]) for record in sidecars(folder)]


def test_a_line_is_honoured_as_the_command_would(
    command: Callable[..., int], prompts: Callable[..., Path], tmp_path: Path
) -> None:
    lines = [
        {"prompt": TEXT, "seed": 5},
        {"prompt": TEXT, "seed": 6, "size": [48, 32]},
        {"prompt": TEXT, "frames": 9},
    ]
    out = tmp_path / "out"
    assert command("--txt_file", prompts(*map(json.dumps, lines), name="a.jsonl")) == 0
    made = sidecars(out / "videos")
    extents = [(r["seed"], r["frames"], r["height"], r["width"]) for r in made]
    assert extents == [(5, 17, 32, 48), (6, 17, 48, 32), (0, 9, 32, 48)]
    assert [frames_of(out / "videos" / f"{r['name']}.mp4")[:3] for r in made] == [extent[1:] for extent in extents]
    assert [(r["config"]["sampling"]["seed"], r["config"]["sampling"]["num_frames"]) for r in made] == [
        extent[:2] for extent in extents
    ]

    # The same videos as settings of the command: latents, and what they are known by.
    path = prompts(TEXT)
    expected = []
    for arguments in (("--seed", "5"), ("--seed", "6", "--height", "48", "--width", "32"), ("--num_frames", "9")):
        dataset = f"as{len(expected)}"
        assert command("--txt_file", path, "--dataset", dataset, *arguments) == 0
        expected += digests(out / dataset)
    assert digests(out / "videos") == expected
    assert len(set(expected)) == 3


def test_seeds_of_a_batch_are_its_lines_own(
    command: Callable[..., int], prompts: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [{"prompt": TEXT, "seed": 5}, {"prompt": TEXT, "frames": 9}, {"prompt": "a blue square", "seed": 6}]
    path = prompts(*map(json.dumps, rows), name="a.jsonl")
    assert command("--txt_file", path, "--bs", "3") == 0
    videos = tmp_path / "out/videos"
    assert [record["batch"] for record in sidecars(videos)] == [2, 1, 2]  # those of one length together
    before = {file: file.stat().st_mtime_ns for file in videos.iterdir()}
    assert command("--txt_file", path) == 0  # all there
    assert {file: file.stat().st_mtime_ns for file in videos.iterdir()} == before
    path.write_text(path.read_text().replace('"seed": 6', '"seed": 7'))
    assert command("--txt_file", path) == 0
    assert [record["seed"] for record in sidecars(videos)] == [5, 0, 7]
    assert sum(file.stat().st_mtime_ns != before.get(file) for file in videos.iterdir()) == 2


def test_a_json_of_fields_goes_the_same_way(command: Callable[..., int], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({TEXT: {"seed": 5, "frames": 9}}))
    assert command("--json_file", path) == 0
    (record,) = sidecars(tmp_path / "out/videos")
    assert (record["prompt"], record["seed"], record["frames"]) == (TEXT, 5, 9)
    assert_whole(tmp_path / "out/videos", 1, frames=9)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": [100_000, 48]}, "height=100000: must be at most 16384"),
        ({"size": [32, 16_400]}, "width=16400: must be at most 16384"),
        ({"size": [16_384, 16_384]}, "16384x16384: too large; height times width must be at most 134,217,728"),
        ({"frames": 10**10}, "num_frames=10000000000: must be at most 1000000000"),
        ({"seed": 2**63}, "seed=9223372036854775808: must be a whole number"),
    ],
)
def test_fields_have_the_bounds_of_the_settings(
    fields: dict[str, Any],
    message: str,
    command: Callable[..., int],
    prompts: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = prompts(json.dumps({"prompt": TEXT}), json.dumps({"prompt": TEXT} | fields), name="a.jsonl")
    assert command("--txt_file", path) == 2
    assert f"error: {path}, line 2: {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
