"""The command that measures what the state should keep, in a form that takes seconds."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from longsana.config import InferenceConfig, load_config
from longsana.evaluation.score_model import FIGURES
from longsana.models.past import Past
from tests.forks import Fork, Forks
from tests.full_size import tables
from tests.scripts import load_script

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("everything", "sink 1, decay 0.5 a chunk")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(Path(__file__).parents[1] / "full_size/measure_policies.py")


@pytest.fixture(scope="module")
def measured(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two policies, of three seconds in three chunks."""
    out = tmp_path_factory.mktemp("policies")
    script.CHUNK = 4
    assert script.main([*arguments(out), "--only", *NAMES]) == 0
    return out


def arguments(out: Path, prompts: int = 1) -> list[str]:
    return ["--out", str(out), "--prompts", str(prompts), "--seconds", "2", "3"]


def test_policies_are_those_of_the_question(script: ModuleType) -> None:
    """Factors of a chunk of ten become those of a frame."""
    pasts = {policy.name: Past.of(script.sampler(policy).model) for policy in script.POLICIES}
    assert len({policy.file for policy in script.POLICIES}) == len(pasts) == 13
    assert pasts["everything"] == pasts["everything, no absorbing pass"] == Past()
    assert {name: past.window for name, past in pasts.items() if past.window > 0} == {
        "window 1": 1, "window 2": 2, "window 4": 4, "sink 1, window 2": 2, "window 2, no absorbing pass": 2,
    }  # fmt: skip
    assert {name for name, past in pasts.items() if past.sinks} == {"sink 1, window 2", "sink 1, decay 0.5 a chunk"}
    for share in (0.3, 0.5, 0.7, 0.85):
        decay = pasts[f"decay {share} a chunk"].decay
        assert isinstance(decay, float) and decay**10 == pytest.approx(share)
    ends: Any = pasts["by head, 0.3 to 0.9 a chunk"].decay
    assert [end**10 for end in ends] == pytest.approx([0.3, 0.9])
    assert {policy.name for policy in script.POLICIES if "scheduler.absorb=last_step" in policy.settings} == {
        "everything, no absorbing pass", "window 2, no absorbing pass",
    }  # fmt: skip


def test_figures_of_each_and_a_table(measured: Path) -> None:
    scores = [json.loads(path.read_text()) for path in sorted(measured.glob("policy_*.json"))]
    assert [score["asked"]["policy"] for score in scores] == list(NAMES)
    whole, sink = (score["figures"] for score in scores)
    assert whole.keys() == sink.keys() == {"2", "3"}
    assert whole != sink, "the settings reach the network"
    header, _, *lines = (measured / "table.md").read_text().splitlines()
    columns = [cell.strip() for cell in header.strip("|").split("|")]
    # Nothing leaves, and in three seconds nothing drifts: empty columns are left out.
    figures = [name for name in FIGURES if name != "returns"]
    assert columns == ["past", "seconds", *figures, "seam index", "steps", "videos"]
    assert len(lines) == 4


def test_it_goes_on_where_it_was(
    script: ModuleType, measured: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in measured.glob("policy_*.json")}
    made: list[Any] = []

    def result(config: Any, *others: Any) -> dict[str, Any]:
        made.append(config)
        return json.loads(next(iter(before.values())))

    monkeypatch.setattr(script, "try_model", result)
    assert script.main([*arguments(measured), "--only", *NAMES, "window 1"]) == 0
    assert [config.model.num_cached_blocks for config in made] == [1]
    assert all(path.read_bytes() == content for path, content in before.items())
    assert script.main([*arguments(measured), "--minutes", "0", "--only", *NAMES, "window 2"]) == tables.UNFINISHED
    assert len(made) == 1
    assert script.main([*arguments(measured, prompts=2), "--only", *NAMES]) == 2
    assert "choose another --out" in capsys.readouterr().err


def test_processes_share_the_policies(
    script: ModuleType, measured: Path, forks: Forks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one has measured two find there; a fault of one is the command's."""

    def start(command: list[str]) -> Fork:
        assert command[:2] == [sys.executable, script.__file__]
        return forks.start("tests.full_size.measure_policies", command[2:])

    monkeypatch.setattr(script.subprocess, "Popen", start)
    shutil.copytree(measured, tmp_path / "out")
    (tmp_path / "out/table.md").unlink()
    next((tmp_path / "out").glob("policy_sink*")).unlink()  # one finds its policy there, and one measures its own
    again = [str(tmp_path / "out") if word == str(measured) else word for word in arguments(measured)]
    assert script.main([*again, "--only", *NAMES, "--processes", "2"]) == 0
    table = (tmp_path / "out/table.md").read_text()
    assert all(f"| {name} " in table for name in NAMES)
    other = [*again, "--prompts", "2"]
    assert script.main([*other, "--only", *NAMES, "--processes", "2"]) == 2


def test_speed_is_added_to_the_table(script: ModuleType, measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "measure_speed", lambda config, text, seconds: 12.5)
    assert script.main([*arguments(measured), "--speed", "--only", NAMES[0]]) == 0
    lines = (measured / "table.md").read_text().splitlines()
    assert ["12.5" in line for line in lines if line.startswith(("| everything ", "| sink"))] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--only", "window 3"], "--only 'window 3': no such policy"),
        (["--prompts", "0"], "--prompts 0: must be at least 1"),
        (["--seconds", "0"], "--seconds 0: must be at least 1"),
    ],
)
def test_bad_input(
    script: ModuleType, given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--out", str(tmp_path / "out"), *given]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_page_has_what_was_measured(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its table is made of the figures beside it, none of them anew; and the default is the best of them."""
    monkeypatch.setattr(script, "CHUNK", 10)
    monkeypatch.setattr(script, "try_model", None)
    shutil.copytree(ROOT / "asset/policies", tmp_path / "out")
    assert script.main(["--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/table.md").read_text().strip() in (ROOT / "docs/state.md").read_text()
    figures = {
        policy.name: json.loads((ROOT / "asset/policies" / policy.file).read_text())["figures"]["300"]
        for policy in script.POLICIES
    }
    best = max(figures, key=lambda name: figures[name]["persistence"][0] + figures[name]["kind"][0])
    default = load_config(script.CONFIG, [], InferenceConfig).model
    assert best == "decay 0.5 a chunk" and default.state_decay == pytest.approx(0.5**0.1, abs=1e-4)
