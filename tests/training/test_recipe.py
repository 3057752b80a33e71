"""The whole recipe of the shapes world in tiny steps: each part is made once, and all later steps can use it."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from longsana.commands import shapes
from longsana.config import InferenceConfig, load_config
from longsana.data.clips import GENERATORS
from longsana.evaluation.shapes_table import ROWS, sampler
from longsana.sampling.checks import check_config
from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(900)  # the tiny recipe, which slow tests run: 95 s alone on two cores
recipe = load_script(ROOT / "train_video_scripts" / "shapes_recipe.py")
CONFIGS = ROOT / "configs/sana_video_config/longsana/shapes"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the recipe makes, which takes two minutes: the first of pytest's processes that asks runs it."""
    own = tmp_path_factory.getbasetemp()
    run = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "recipe"
    with FileLock(run.with_suffix(".lock")):
        if not run.exists():
            unfinished = run.with_suffix(".unfinished")
            assert recipe.main(["--out", str(unfinished), "--size", "tiny"]) == 0
            unfinished.rename(run)
    return Path(shutil.copytree(run, own / "copy")) / "parts"


@pytest.mark.slow
def test_every_step_makes_its_part(made):
    table = (made / "table.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [row.name for row in ROWS]
    assert {"plot.png", "strips.png"} <= {path.name for path in made.iterdir()}
    noted = json.loads((made / "times.json").read_text())
    assert {
        "text",
        "vae",
        "decoder",
        *recipe.PHASES,
        "scores",
        "speed",
        "table",
        "vae score",
        "decoder score",
    } <= noted.keys()
    assert max(path.stat().st_size for path in made.rglob("*") if path.is_file()) < 10e6
    assert sum(path.stat().st_size for path in made.glob("*.*")) < 125e6


@pytest.mark.slow
def test_networks_differ_from_stage_to_stage(made):
    weights = [load_file(made / f"{name}.safetensors") for name in recipe.PHASES]
    for before, after in itertools.pairwise(weights):
        assert before.keys() == after.keys()
        assert any(not (before[name] == after[name]).all() for name in before)


@pytest.mark.slow
def test_what_ships_is_whole_and_small(made):
    """Networks in bfloat16, a card that says how they were made, and the default config can use them."""
    asset = made / "asset"
    assert sum(path.stat().st_size for path in asset.rglob("*") if path.is_file()) < 40e6
    assert {value.dtype for value in load_file(asset / "longsana.safetensors").values()} == {torch.bfloat16}
    card = (asset / "README.md").read_text()
    assert "no clean absorbing pass" in card
    assert "at commit " in card
    settings = [
        f"model.load_from={asset}/longsana.safetensors",
        f"vae.vae_pretrained={asset}/vae",
        f"text_encoder.text_encoder_name={asset}/text_encoder",
    ]
    check_config(load_config(CONFIGS / "longsana.yaml", settings, InferenceConfig))


def test_the_table_and_the_plot_are_made_of_what_ships(tmp_path, capsys):
    """The page's too: every number of its table is one of these."""
    parts = tmp_path / "parts"
    parts.mkdir()
    for name in ("scores.json", "speed.json"):
        shutil.copy(ROOT / "asset/shapes" / name, parts)
    assert recipe.main(["--out", str(tmp_path), "--steps", "table", "plot"]) == 0
    table = (parts / "table.md").read_text().strip()
    assert table in (ROOT / "docs/shapes.md").read_text()
    assert table in (ROOT / "asset/shapes/README.md").read_text()
    assert (parts / "plot.png").stat().st_size > 10_000


def test_what_ships_can_be_measured_where_it_lies():
    rows = [row for row in ROWS if row.weights in shapes.NETWORKS]
    assert {row.weights for row in rows} == set(shapes.NETWORKS)
    for row in rows:
        check_config(sampler(ROOT / "asset/shapes", row))


def test_what_ships_is_small():
    """Forty MB together and ten each, as the recipe's own product is; its weights are bfloat16."""
    files = [path for path in (ROOT / "asset/shapes").rglob("*") if path.is_file()]
    assert {f"{name}.safetensors" for name in (*shapes.NETWORKS, "tae_shapes")} <= {path.name for path in files}
    assert sum(path.stat().st_size for path in files) < 40e6
    assert max(path.stat().st_size for path in files) < 10e6
    for name in shapes.NETWORKS:
        assert {value.dtype for value in load_file(ROOT / f"asset/shapes/{name}.safetensors").values()} == {
            torch.bfloat16
        }


def test_networks_that_are_not_there_are_told_before_any_is_scored(tmp_path, capsys):
    (tmp_path / "held_out.txt").write_text("A small red circle moves slowly to the right on a black background.\n")
    for name in ("base", "ode", "self_forcing", "longsana", "two_step", "whole_longsana"):
        (tmp_path / f"{name}.safetensors").touch()
    assert shapes.main(["scores", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert (
        "two_step_consistency.safetensors not found; make them: train_video_scripts/shapes_recipe.py --steps two_"
        in said
    )
    assert not list(tmp_path.glob("scores*"))


def test_the_table_of_bars_is_that_of_the_record():
    """What a LoRA learned on an H200, which no test can train."""
    record = json.loads((ROOT / "asset/shapes/bars.json").read_text())
    text = (ROOT / "docs/shapes.md").read_text()
    for model, kinds in record["percent after 30 s, mean and spread over three seeds"].items():
        cells = [f"{mean:.1f} ± {spread:.1f}" for one in kinds.values() for mean, spread in one.values()]
        assert f"| {model} | {' | '.join(cells)} |" in text
    seconds = [value for part, value in record["seconds"].items() if part != "scores"]
    minutes, rest = divmod(round(sum(seconds)), 60)
    assert f"From nothing to a LoRA that is {minutes}:{rest:02d}" in text


@pytest.mark.parametrize("tool", ["scores", "speed", "strips", "bar-scores"])
def test_tiny_measurements_do_not_pass_for_full_ones(tool, tmp_path, capsys):
    (tmp_path / "base.safetensors").touch()
    assert shapes.main([tool, str(tmp_path), "--tiny"]) == 2
    assert "holds parts of full size (base.safetensors, ...)" in capsys.readouterr().err
    (tmp_path / shapes.TINY_RECORD).touch()
    assert shapes.main([tool, str(tmp_path)]) == 2
    assert "was made with --size tiny, which trains nothing" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("step", ["longsana", "two_step", "whole_longsana"])
def test_a_stage_whose_critic_does_not_ship_says_what_makes_it(step, tmp_path, capsys):
    assert recipe.main(["--out", str(tmp_path), "--steps", step]) == 2
    forced, critic = recipe.CRITICS[step]
    said = capsys.readouterr().err
    assert f"{critic}.safetensors: not found; Self-Forcing makes it" in said and f"--steps {forced} {step}" in said


@pytest.mark.slow
def test_what_is_there_is_passed_over(made, capsys):
    times = (made / "times.json").read_text()
    newest = {path: path.stat().st_mtime_ns for path in made.glob("*.safetensors")}
    (made / "plot.png").unlink()
    assert recipe.main(["--out", str(made.parent), "--size", "tiny"]) == 0
    assert {path: path.stat().st_mtime_ns for path in made.glob("*.safetensors")} == newest
    assert (made / "plot.png").exists(), "and what is not there is made again"
    assert json.loads((made / "times.json").read_text()).keys() == json.loads(times).keys()


@pytest.mark.slow
def test_parts_are_all_that_a_step_needs(made, tmp_path):
    """Another machine goes on from the parts alone."""
    shutil.copytree(made, tmp_path / "parts")
    (tmp_path / "parts" / "ode.safetensors").unlink()
    assert recipe.main(["--out", str(tmp_path), "--size", "tiny", "--steps", "ode"]) == 0
    again, first = (load_file(folder / "ode.safetensors") for folder in (tmp_path / "parts", made))
    assert all((again[name] == first[name]).all() for name in first), "trajectories are made again from their seed"


@pytest.mark.slow
def test_a_base_model_needs_no_earlier_phase(made, tmp_path):
    parts = tmp_path / "parts"
    parts.mkdir()
    for name in ("base.safetensors", shapes.TINY_RECORD):
        shutil.copy(made / name, parts)
    assert recipe.main(["--out", str(tmp_path), "--size", "tiny", "--steps", *recipe.BASE_PHASES]) == 0
    assert {path.name for path in parts.glob("*.safetensors")} == {"base.safetensors"}


@pytest.mark.slow
def test_what_a_step_lacks_is_named(made, tmp_path, capsys):
    for step, says in (
        ("package", "vae, text_encoder, decoder/tae_shapes.safetensors"),
        ("table", "scores.json: not found"),
        ("longsana", "critic"),
    ):
        assert recipe.main(["--out", str(tmp_path), "--size", "tiny", "--steps", step]) == 2
        assert says in capsys.readouterr().err


def test_a_wrong_step_is_refused(tmp_path, capsys):
    assert recipe.main(["--out", str(tmp_path), "--steps", "vea"]) == 2
    assert "--steps vea: no such step; there are prompts, text, vae, decoder, base" in capsys.readouterr().err


def test_another_world_has_its_own_prompts_clips_and_folder(tmp_path, capsys):
    tiny = ["--out", str(tmp_path), "--size", "tiny"]
    other = [*tiny, "--world", "remembered_shapes"]
    assert recipe.main([*other, "--steps", "text"]) == 0
    assert "travels" in (tmp_path / "parts" / "held_out.txt").read_text()
    steps = recipe.recipe(tmp_path, tiny=True, world="remembered_shapes")
    paths = {
        phase: next(word for word in steps[phase].commands[0] if "data_path" in word) for phase in recipe.BASE_PHASES
    }
    assert set(paths.values()) == {"data.data_path=generated:turning_remembered_shapes"}
    assert all(setting.rpartition(":")[2] in GENERATORS for setting in paths.values())
    assert recipe.main([*tiny, "--steps", "text"]) == 2
    assert "holds other prompts than are made here; give another folder" in capsys.readouterr().err
    assert recipe.main([*other, "--steps", "text"]) == 0, "it is there"


def test_a_lora_on_what_ships_needs_nothing_else(capsys, tmp_path):
    """Its commands: few films and others of old kinds, factors alone, the adapted base as teacher and critic, and
    LongSANA to begin with."""
    steps = recipe.lora_recipe(tmp_path)
    assert list(steps) == ["prompts", "teacher", "bars", "scores"]
    (new, old, encode, teacher, *_), (bars, *_) = steps["teacher"].commands, steps["bars"].commands
    films, clips = tmp_path / "runs/films", tmp_path / "runs/clips"
    assert new == ["shapes", "bar-films", str(films / "bars")]
    assert {"generate", str(tmp_path / "parts/old.txt"), str(films / "old")} <= set(old)
    assert encode[:4] == ["encode", str(films), "--out", str(clips)]
    assert {f"data.data_path={clips / '96x160'}", "train.lora.rank=32"} <= set(teacher)
    adapted = tmp_path / "parts/teacher.safetensors"
    assert {f"real_score.load_from={adapted}", f"fake_score.load_from={adapted}", "train.lora.rank=32"} <= set(bars)
    assert "model.load_from=asset/shapes/longsana.safetensors" in bars
    assert recipe.main(["--out", str(tmp_path), "--lora", "--steps", "vae"]) == 2
    assert "no such step; there are prompts, teacher, bars, scores" in capsys.readouterr().err
    assert recipe.main(["--out", str(tmp_path), "--lora", "--world", "remembered_shapes"]) == 2
    assert "what ships, on which --lora is put, is of the world shapes" in capsys.readouterr().err


@pytest.mark.parametrize("tiny", [False, True])
def test_no_command_has_an_option_twice(tiny, tmp_path):
    steps = [*recipe.recipe(tmp_path, tiny=tiny).values(), *recipe.lora_recipe(tmp_path, tiny=tiny).values()]
    for command in itertools.chain.from_iterable(step.commands for step in steps):
        options = [word for word in command if word.startswith("--")]
        assert len(options) == len(set(options)), command


@pytest.mark.parametrize("which", [[], ["--lora"]])
def test_parts_of_one_size_do_not_pass_for_another(which, tmp_path, capsys):
    tiny, full = (["--out", str(tmp_path / name), *which, "--steps", "prompts"] for name in ("tiny", "full"))
    assert recipe.main([*tiny, "--size", "tiny"]) == 0
    assert recipe.main([*tiny, "--size", "tiny"]) == 0, "it goes on"
    assert recipe.main(tiny) == 2
    assert f"{tmp_path / 'tiny/parts'}: was made with --size tiny, which trains nothing" in capsys.readouterr().err
    assert recipe.main(full) == 0
    before = sorted((tmp_path / "full/parts").iterdir())
    assert recipe.main([*full, "--size", "tiny"]) == 2
    assert f"{tmp_path / 'full/parts'}: holds parts of full size" in capsys.readouterr().err
    assert sorted((tmp_path / "full/parts").iterdir()) == before
    assert recipe.main([*full, "--size", "tiny", "--show"]) == 0, "it only shows"


def test_scores_of_a_lora_are_printed_again(tmp_path, capsys, monkeypatch):
    """Nothing is sampled for it, and the seconds that they took stay."""

    def score(config, trial, device):
        return {"figures": {"30": {key: [0.5, None] for key in ("colour", "kind", "motion")}}}

    monkeypatch.setattr("longsana.evaluation.score_model.try_model", score)
    command = ["--out", str(tmp_path), "--lora", "--steps", "prompts", "scores"]
    assert recipe.main(command[:-1]) == 0
    (tmp_path / "parts/bars.safetensors").touch()
    printed, noted = [], []
    for _ in range(2):
        capsys.readouterr()
        assert recipe.main(command) == 0
        printed.append(capsys.readouterr().out)
        noted.append((tmp_path / "parts/times.json").read_text())
        monkeypatch.setattr("longsana.evaluation.score_model.try_model", None)
    assert "| with the LoRA, bars " in printed[0] and printed[1] == printed[0]
    assert noted[1] == noted[0]


@pytest.mark.slow
def test_the_recipe_of_a_lora_runs_at_tiny_size(tmp_path, capsys):
    assert recipe.main(["--out", str(tmp_path), "--size", "tiny", "--lora"]) == 0
    parts = tmp_path / "parts"
    table = capsys.readouterr().out
    for row in ("what ships, bars", "with the LoRA, bars", "what ships, held_out", "with the LoRA, held_out"):
        assert f"| {row} " in table
    for name, start in (("teacher", "base"), ("bars", "longsana")):
        fused, before = load_file(parts / f"{name}.safetensors"), load_file(ROOT / f"asset/shapes/{start}.safetensors")
        changed = {key for key in before if not torch.equal(fused[key], before[key])}
        assert changed and all(key.endswith(".weight") for key in changed)
        assert all("transformer." in key for key in load_file(parts / f"{name}_lora.safetensors"))
