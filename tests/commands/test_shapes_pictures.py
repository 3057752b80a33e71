"""`longsana shapes pictures`: prompts of a world that name the first pictures of their scenes."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from longsana.commands import shapes
from longsana.data.pictures import read_picture
from longsana.data.prompts import read_prompts, training_pictures, training_prompts
from longsana.shapes.remembered import WORLDS
from longsana.shapes.scenes import render, to_bytes

COUNT = 70  # more than are drawn together


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "TRAINING_PROMPTS", COUNT)


@pytest.mark.parametrize("world", list(WORLDS))
def test_each_prompt_has_the_picture_that_its_scene_begins_with(world: str, tmp_path: Path) -> None:
    for tool in ("prompts", "pictures"):
        assert shapes.main([tool, str(tmp_path), "--world", world]) == 0
    file = tmp_path / "pictured.txt"
    assert training_prompts(file, pictures=True) == training_prompts(tmp_path / "prompts.txt")
    paths = [picture.path for picture in training_pictures(file)]
    assert len(set(paths)) == COUNT == len(list((tmp_path / "pictures").iterdir()))
    scenes = shapes.distinct_scenes(1, COUNT, held_out=False, draw=WORLDS[world])
    first = to_bytes(render(scenes, range(1)))[:, 0].numpy()
    for path, own in zip(paths, first, strict=True):
        assert (read_picture(path, *own.shape[:2]) == own).all()
    named = read_prompts(file, height=32, width=32, aspect_ratio_type="none", pictures=True)
    assert [prompt.image for prompt in named] == paths, "the batch command reads them too"


def test_the_same_command_makes_what_is_missing_and_no_other_world_is_mixed_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["pictures", str(tmp_path)]
    assert shapes.main(command) == 0
    file, picture = tmp_path / "pictured.txt", tmp_path / "pictures" / "00007.png"
    text, before = file.read_text(), read_picture(picture, 64, 64)
    file.unlink()  # it is written last
    Image.new("RGB", (8, 8)).save(picture)
    assert shapes.main(command) == 0
    assert file.read_text() == text and (read_picture(picture, 64, 64) == before).all()
    capsys.readouterr()
    assert shapes.main([*command, "--world", "remembered_shapes"]) == 2
    assert capsys.readouterr().err.endswith("holds other prompts than are made here; give another folder\n")
    assert file.read_text() == text and (read_picture(picture, 64, 64) == before).all()
