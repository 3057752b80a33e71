"""The command that measures what a short first chunk costs, in a form that takes seconds."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from longsana.config import load_config
from longsana.evaluation.score_model import Trial, try_model
from longsana.shapes.scenes import draw_scene
from tests.scripts import load_script

SMALL = ("--videos", "1", "--seeds", "0", "--seconds", "1", "--only", "3")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(Path(__file__).parents[1] / "full_size/measure_first_chunk.py")


def test_a_lengths_figures_are_those_of_the_setting(script: ModuleType, tmp_path: Path) -> None:
    assert script.main(["--out", str(tmp_path), *SMALL]) == 0
    found = json.loads((tmp_path / "first_3.json").read_text())["figures"]["1"]
    config = load_config(script.CONFIG, ["sampling.first_chunk_frames=3", "vae.decoder=full"])
    trial = Trial([draw_scene(0, 0, held_out=True).caption], [0], [1], 1)
    expected = try_model(config, trial, torch.device("cpu"))["figures"]["1"]
    assert {name: value[0] for name, value in found.items()} == {
        name: None if value[0] is None else pytest.approx(value[0]) for name, value in expected.items()
    }
    assert [line.split("|")[1].strip() for line in (tmp_path / "table.md").read_text().splitlines()[2:]] == ["3"]


def test_another_length_is_refused(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--out", str(tmp_path), "--only", "3", "4"]) == 2
    assert "--only 4: is not measured; there are 0, 1, 2, 3, 5, 8" in capsys.readouterr().err
