"""The command that measures what videos keep of a picture, in a form that takes seconds."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from longsana.shapes.scenes import draw_scene, render
from longsana.shapes.sight import observe
from tests.full_size import tables
from tests.scripts import load_script

pytestmark = pytest.mark.slow

SMALL = ("--pictures", "2", "--seeds", "0", "--seconds", "2")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(Path(__file__).parents[1] / "full_size/measure_pictures.py")


def test_the_scenes_own_videos_keep_all_of_their_pictures(script: ModuleType) -> None:
    """And those of other scenes do not."""
    scenes = [draw_scene(script.SCENES, index, held_out=True) for index in range(4)]
    drawn = ((render(scenes, range(6 * 16)) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)
    captions = [scene.caption for scene in scenes]
    seen, picture = observe(drawn), observe(drawn[:, :1])
    for figures in script.figures_of(seen, picture, captions):
        assert figures.keys() == {"identity, 1 s", "identity, 5 s", "persistence, 1 s", "persistence, 5 s", "place"}
        assert figures["place"] == 1 and min(figures.values()) > 0.9
    others = script.figures_of(seen, observe(drawn[:, :1].roll(1, 0)), captions)
    assert all(not figures["identity, 1 s"] > 0.5 for figures in others)
    moved = script.figures_of(observe(drawn.roll(40, 3)), picture, captions)
    assert all(figures["place"] == 0 for figures in moved)


def test_each_way_has_its_figures_and_the_command_goes_on(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--out", str(tmp_path), *SMALL]
    assert script.main([*arguments, "--only", "absorb", "pin"]) == 0
    absorb, pin = (json.loads((tmp_path / f"pictures_{way}.json").read_text()) for way in ("absorb", "pin"))
    assert absorb["figures"].keys() == {"identity, 1 s", "persistence, 1 s", "place", "seam index"}
    assert absorb["figures"] != pin["figures"]
    assert [line.split("|")[1].strip() for line in (tmp_path / "table.md").read_text().splitlines()[2:]] == [
        "absorb",
        "pin",
    ]
    monkeypatch.setattr(script, "Films", None)
    assert script.main([*arguments, "--only", "absorb", "pin"]) == 0
    assert script.main([*arguments, "--only", "nothing", "--minutes=-1"]) == tables.UNFINISHED
    assert script.main(["--out", str(tmp_path), "--pictures", "0"]) == 2
