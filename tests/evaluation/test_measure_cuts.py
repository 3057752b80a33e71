"""The command that measures cuts to pictures."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from tests.scripts import load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(Path(__file__).parents[1] / "full_size/measure_cuts.py")


def test_figures(script: ModuleType) -> None:
    frames = torch.zeros(3, 20, 4, 6)
    assert script.psnr(frames, frames + 0.2) == pytest.approx(20)
    assert script.cell(torch.tensor([1.0, 3.0])) == "2.00 ± 1.00" and script.cell(torch.tensor([1.0])) == "1.00"
    assert script.strip(frames).shape == (4, 10 * 6, 3)
    assert script.main(["--pairs", "0"]) == 2


def test_noise_after_the_cut_is_that_of_the_video_alone(script: ModuleType) -> None:
    alone, cut = script.Later(0, [("a", 0)]), script.PromptNoise(0, [("a", 0)])
    assert torch.equal(alone.draw(1, 2, (4, 9, 2, 2), "cpu"), cut.draw(12, 2, (4, 9, 2, 2), "cpu"))


@pytest.mark.slow
def test_the_command(script: ModuleType, tmp_path: Path) -> None:
    assert script.main(["--out", str(tmp_path), "--pairs", "1", "--strips", "1"]) == 0
    rows = [line.split("|")[1].strip() for line in (tmp_path / "table.md").read_text().splitlines()[2:]]
    assert rows == ["alone", "still"] and Image.open(tmp_path / "strips.png").size == (1600, 3 * 96)
