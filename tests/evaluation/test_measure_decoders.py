"""The command that measures a tiny decoder beside the full one, in a form that takes seconds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from longsana.evaluation.score_model import Trial, try_model
from longsana.shapes.scenes import draw_scene
from tests.scripts import load_script

CPU = torch.device("cpu")
SMALL = ("--videos", "2", "--seeds", "0", "--seconds", "2", "1", "--decoder_path", "seeded:0")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(Path(__file__).parents[1] / "full_size/measure_decoders.py")


@pytest.fixture(scope="module")
def measured(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("decoders")
    script.TIMES = 1
    assert script.main(["--out", str(out), *SMALL]) == 0
    return out


@pytest.mark.slow
def test_the_full_decoders_figures_are_those_of_its_videos(script: ModuleType, measured: Path) -> None:
    """It is given latents here, and is a part of the engine there."""
    found = json.loads((measured / "decoders.json").read_text())["figures"]
    captions = [draw_scene(0, index, held_out=True).caption for index in range(2)]
    config = script.config_of(script.prepare(["--out", str(measured), *SMALL]))
    expected = try_model(config, Trial(captions, [0], [1, 2], 2), CPU)["figures"]
    for seconds in ("1", "2"):
        means = {name: mean for name, (mean, _) in found[seconds]["full"].items()}
        assert means == {
            name: mean if mean is None else pytest.approx(mean) for name, (mean, _) in expected[seconds].items()
        }


@pytest.mark.slow
def test_an_untrained_decoder_shows_nothing_of_what_the_full_one_does(measured: Path) -> None:
    report = json.loads((measured / "decoders.json").read_text())
    own = report["figures"]["2"]
    assert own["full"]["kind"][0] > 0.9
    assert own["tiny"]["kind"][0] == 0
    assert own["difference"]["kind"] == [-own["full"]["kind"][0], own["full"]["kind"][1]]
    assert own["worst"]["PSNR"] < own["tiny"]["PSNR"][0] < 25
    assert report["frames a second"]["tiny"] > 0 and report["commit"] and report["machine"]["threads"]
    lines = [[cell.strip() for cell in line.split("|")] for line in (measured / "table.md").read_text().splitlines()]
    assert [line[1:3] for line in lines[2:8]] == [
        [seconds, name] for seconds in ("1", "2") for name in ("full", "tae_shapes", "difference")
    ]


def test_a_decoder_beside_itself_makes_no_difference(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    films = film_of(script)
    films.decoders[script.TINIER] = films.decoders[script.FULL]
    own = script.summarize([films.score(0)])["1"]
    assert own["tiny"]["PSNR"] == (script.MOST, None) and own["tiny"]["SSIM"] == (1, None)
    assert own["worst"] == {"PSNR": script.MOST, "SSIM": 1}
    assert {mean for mean, _ in own["difference"].values()} <= {0, None}


def film_of(script: ModuleType) -> Any:
    """One caption, of one second."""
    options = script.prepare(["--videos", "1", "--seconds", "1", "--decoder_path", "seeded:0"])
    return script.Films(options, CPU)


def test_differences_are_taken_caption_by_caption(script: ModuleType) -> None:
    """Their error is that of the differences, however far apart captions are; what is not judged is left out."""

    def video(full: float, tiny: float) -> dict[int, Any]:
        return {5: {"full": {"kind": full}, "tiny": {"kind": tiny, "PSNR": 30 + full, "SSIM": tiny}}}

    runs = [
        [video(0.2, 0.1), video(0.9, 0.8), video(math.nan, 0.5)],
        [video(0.4, 0.3), video(0.7, 0.6), video(math.nan, 0.5)],
    ]
    own = script.summarize(runs)["5"]
    assert own["difference"]["kind"] == (pytest.approx(-0.1), pytest.approx(0))
    assert own["full"]["kind"] == (pytest.approx(0.55), pytest.approx(0.25))
    assert own["worst"]["SSIM"] == 0.1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--seconds", "0"], "--seconds 0: must be at least 1"),
        (["--videos", "0"], "--videos 0: must be at least 1"),
        (["--decoder", "taeltx_2"], "taeltx_2"),
    ],
)
def test_bad_input_is_told(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    assert script.main(["--out", str(tmp_path), "--decoder_path", "seeded:0", *arguments]) == 2
    assert reason in capsys.readouterr().err
