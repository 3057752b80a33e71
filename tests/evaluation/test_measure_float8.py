"""The command that measures networks in float8 beside themselves, in a form that takes seconds."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from longsana.config import load_config
from longsana.evaluation.score_model import Trial, try_model
from longsana.models.float8 import PRODUCTS
from longsana.shapes.scenes import draw_scene
from tests.scripts import load_script

SMALL = (
    *("model.depth=1", "model.hidden_size=112", "model.num_heads=4", "model.linear_head_dim=28"),
    *("model.caption_channels=64", "model.caption_length=8"),
    *("sampling.height=32", "sampling.width=48", "sampling.num_frames=17", "sampling.chunk_frames=2"),
    "sampling.aspect_ratio_type=none",
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(Path(__file__).parents[1] / "full_size/measure_float8.py")


@pytest.mark.slow
def test_a_networks_passes_kernels_and_errors(script: ModuleType, tmp_path: Path) -> None:
    assert script.main(["480p", "--out", str(tmp_path), "--settings", *SMALL]) == 0
    result = json.loads((tmp_path / "480p.json").read_text())["result"]
    assert len(result["errors"]) == len(PRODUCTS) + 3
    assert all(0.005 < error < 0.5 for error in result["errors"].values())
    for way in script.WAYS:
        assert result[way]["passes"]["forward"] > 0 and result[way]["kernels"]
    assert "aten::_scaled_mm" in result["float8"]["kernels"]
    assert "aten::_scaled_mm" not in result["own dtype"]["kernels"]
    lines = (tmp_path / "480p.md").read_text()
    assert "| forward " in lines and "| error of feed_forward.temporal " in lines


@pytest.mark.slow
def test_scores_in_both_ways(script: ModuleType, tmp_path: Path) -> None:
    assert script.main(["scores", "--out", str(tmp_path), "--videos", "2", "--seconds", "1"]) == 0
    found = json.loads((tmp_path / "scores.json").read_text())["result"]["1"]
    trial = Trial([draw_scene(0, index, held_out=True).caption for index in range(2)], [0], [1], 2)
    for way, setting in zip(script.WAYS, ("false", "true"), strict=True):
        config = load_config(script.CONFIG, ["vae.decoder=full", f"model.float8={setting}"])
        expected = try_model(config, trial, torch.device("cpu"))["figures"]["1"]
        assert {name: figures[way][0] for name, figures in found.items()} == {
            name: None if mean is None else pytest.approx(mean) for name, (mean, _) in expected.items()
        }
    kind = found["kind"]
    assert kind["difference"][0] == pytest.approx(kind["float8"][0] - kind["own dtype"][0])
    lines = [[cell.strip() for cell in line.split("|")] for line in (tmp_path / "scores.md").read_text().splitlines()]
    assert lines[0][1:-1] == ["seconds", "figure", *script.WAYS, "difference"]
    assert [line[2] for line in lines[2:]] == ["colour", "kind", "background", "persistence", "identity"]


def test_another_part_is_refused(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["1080p", "--out", str(tmp_path)]) == 2
    assert "1080p: is not measured; there are 480p, 720p, scores" in capsys.readouterr().err
