"""The command that measures changes of prompt, in a form that takes seconds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import imageio.v3 as iio
import pytest
import torch

from longsana.sampling.checks import default_change
from longsana.shapes.scenes import draw_scene, parse_caption, render
from longsana.shapes.sight import observe
from tests.full_size import tables
from tests.scripts import load_script

pytestmark = pytest.mark.slow

NAMES = ("keep", "cut")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(Path(__file__).parents[1] / "full_size/measure_stories.py")


@pytest.fixture(scope="module")
def measured(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two policies, of four stories of six chunks of a latent."""
    out = tmp_path_factory.mktemp("stories")
    assert script.main([*arguments(out), "--only", *NAMES]) == 0
    return out


def arguments(out: Path, changes: int = 4) -> list[str]:
    return ["--out", str(out), "--changes", str(changes), "--seeds", "0", "--chunk_frames", "1", "--batch", "3"]


def test_a_story_changes_one_thing(script: ModuleType) -> None:
    told = script.stories(64)
    assert [story.aspect for story in told] == [*script.ASPECTS] * 16
    for story in told:
        first, second = parse_caption(story.first), parse_caption(story.second)
        assert first is not None and second is not None
        (before,), (after,) = first.actors, second.actors
        differs = {
            "colour": before.colour != after.colour,
            "kind": before.kind != after.kind,
            "background": first.background != second.background,
            "motion": before.motion != after.motion,
        }
        assert [name for name, yes in differs.items() if yes] == [story.aspect]
        assert before.size == after.size


def test_policies_reach_the_engine(script: ModuleType) -> None:
    films = script.Films.__new__(script.Films)
    films._chunk_frames, films._device = 10, torch.device("cpu")
    found = {}
    for policy in script.POLICIES:
        engine = films.engine(policy)
        sampling = engine.config.sampling
        found[policy.file] = (str(default_change(engine.config)), sampling.transition_chunks, sampling.transition)
        assert engine.plan.lengths == (11, 10, 10, 10, 10, 10)
    assert len(set(found.values())) == len(found) == len(script.POLICIES) == 11


def test_a_world_that_changes_at_once_has_every_figure(script: ModuleType) -> None:
    """The second caption's own scene, rendered, is what it says in each chunk."""
    scenes = [scene for scene in (draw_scene(5, index) for index in range(40)) if len(scene.tracks) == 1][:4]
    told = [story._replace(second=scene.caption) for story, scene in zip(script.stories(4), scenes, strict=True)]
    pictures = render(scenes, range(3 * 40)).permute(0, 2, 3, 4, 1)
    seen = observe(((pictures + 1) * 127.5).round().to(torch.uint8))
    for figures, story in zip(script.figures_of(seen, told, 40), told, strict=True):
        assert figures.keys() == {story.aspect, script.NEW, script.SHARED, "persistence"}
        for values in figures.values():
            assert len(values) == 3 and all(math.isnan(value) or value > 0.95 for value in values)


def test_figures_of_each_and_a_table(script: ModuleType, measured: Path) -> None:
    scores = [json.loads(path.read_text()) for path in sorted(measured.glob("story_*.json"))]
    assert [score["asked"]["policy"] for score in scores] == ["cut", "keep"]
    cut, keep = scores
    assert cut["figures"].keys() == {*script.ASPECTS, script.NEW, script.SHARED, "persistence"}
    assert all(len(chunks) == 3 for chunks in cut["figures"].values())
    assert cut["figures"] != keep["figures"] or cut["seam index"] != keep["seam index"]
    header, _, *lines = (measured / "table.md").read_text().splitlines()
    columns = [cell.strip() for cell in header.strip("|").split("|")]
    assert columns == ["change", *script.ASPECTS, script.NEW, script.SHARED, "persistence", "seam index", "stories"]
    assert [line.strip("| ").split(" ")[0] for line in lines] == ["keep", "cut"]


def test_strips_are_one_picture_an_aspect(script: ModuleType, tmp_path: Path) -> None:
    """Rows of six frames of 96 x 160, with a rim, around the change of 97 pictures at the 49th."""
    assert script.main([*arguments(tmp_path, changes=1), "--chunk_frames", "4", "--only", *NAMES, "--strips"]) == 0
    (path,) = tmp_path.iterdir()
    assert path.name == "strips_colour.png"
    height, width = iio.imread(path).shape[:2]
    assert (height, width) == (2 * 100, 6 * 164)


def test_it_goes_on_where_it_was(
    script: ModuleType, measured: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in measured.glob("story_*.json")}

    def refuse(*arguments: Any) -> None:
        raise AssertionError("nothing is left to make")

    monkeypatch.setattr(script, "Films", refuse)
    assert script.main([*arguments(measured), "--only", *NAMES]) == 0
    assert {path: path.read_bytes() for path in measured.glob("story_*.json")} == before
    assert script.main([*arguments(measured), "--minutes=-1", "--only", "recache=1"]) == tables.UNFINISHED
    assert script.main([*arguments(measured, changes=5), "--only", *NAMES]) == 2
    assert "choose another --out" in capsys.readouterr().err


def test_standard_errors_are_of_stories(script: ModuleType) -> None:
    """By hand: seeds are averaged first, and a story without a figure in one of them has the others'."""
    mean, error = script.over_stories([[0.0, 1.0, math.nan], [0.5, 1.0, 0.0]])
    assert mean == pytest.approx((0.25 + 1 + 0) / 3)
    assert error == pytest.approx((((0.25 - mean) ** 2 + (1 - mean) ** 2 + mean**2) / 2 / 3) ** 0.5)
    assert script.over_stories([[0.5]]) == (0.5, None) and script.over_stories([[math.nan]]) == (None, None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--only", "burn"], "--only 'burn': no such policy"),
        (["--changes", "0"], "--changes 0: must be at least 1"),
        (["--chunk_frames", "0"], "--chunk_frames 0: must be at least 1"),
    ],
)
def test_bad_input(
    script: ModuleType, given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--out", str(tmp_path / "out"), *given]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
