"""From a checkpoint of training to every file of weights, and from each of them to the same video."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from longsana import convert
from longsana.config import ModelConfig, load_config, save_config
from longsana.runtime.distributed import World
from longsana.runtime.errors import InputError
from longsana.training.checkpoint import Checkpointer
from longsana.training.config import TrainingConfig
from longsana.weights.build import build_model
from longsana.weights.names import NULL_TOKENS
from tests.scripts import load_script
from tests.weights.checkpoints import assert_same, weights
from tests.weights.test_files import write_manifest

ROOT = Path(__file__).resolve().parents[2]
INFERENCE = ROOT / "configs/sana_video_config/longsana/shapes/longsana.yaml"
SHAPES = dataclasses.replace(load_config(INFERENCE).model, depth=2, num_cached_blocks=2)


def script(path: str) -> ModuleType:
    return load_script(ROOT / path)


def trained(seed: int, config: ModelConfig = SHAPES) -> dict[str, Tensor]:
    return {name: 0.1 * tensor for name, tensor in weights(seed, config).items()}


def changes(config: ModelConfig) -> dict[str, Any]:
    default = dataclasses.asdict(ModelConfig())
    return {key: value for key, value in dataclasses.asdict(config).items() if value != default[key]}


def write(
    folder: Path,
    networks: dict[str, dict[str, Tensor]],
    critic: ModelConfig = SHAPES,
    generator: ModelConfig = SHAPES,
) -> Path:
    """A run of one process, saved once."""
    world = World()
    world.connect(alone=True)
    try:
        # Not all of the settings, as a run keeps them: those take a second to read.
        given = {"trainer": "longsana", "model": changes(generator), "fake_score": changes(critic)}
        texts = {"config.yaml": yaml.safe_dump(given)}
        moments = {"optimizer.generator": {"final.linear.bias.step": torch.zeros(())}}
        Checkpointer(folder, world, keep=1, asynchronous=False).save(
            20, networks | moments, own={}, progress={"step": 20}, texts=texts
        )
    finally:
        world.disconnect()
    return folder / "checkpoint_model_000020"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of three networks."""
    networks = {name: trained(seed) for seed, name in enumerate(("generator", "generator_ema", "critic"))}
    return write(tmp_path_factory.mktemp("run"), networks)


@pytest.fixture(scope="module")
def export() -> Callable[..., int]:
    module = script("train_video_scripts/export.py")
    return lambda *arguments: module.main([str(argument) for argument in arguments])


def read(path: Path, **changes: Any) -> dict[str, Tensor]:
    config = dataclasses.replace(SHAPES, load_from=str(path), **changes)
    return dict(build_model(config, device="cpu", dtype=torch.float32).state_dict())


LAYOUTS = {"safetensors": "m.safetensors", "upstream": "m.pth", "trainer": "m.pt", "diffusers": "folder"}


@pytest.mark.parametrize(("name", "seed"), [("raw", 0), ("ema", 1), ("critic", 2)])
@pytest.mark.parametrize("layout", ["safetensors", "upstream", "diffusers"])
def test_each_network_in_each_layout(
    layout: str, name: str, seed: int, run: Path, export: Callable[..., int], tmp_path: Path
) -> None:
    out = tmp_path / LAYOUTS[layout]
    assert export(run, "--out", out, "--layout", layout, "--weights", name) == 0
    expected = trained(seed)
    if layout == "diffusers":
        expected[NULL_TOKENS].zero_()  # it has no place for it
    assert_same(read(out), expected)
    assert list(tmp_path.iterdir()) == [out]


def test_trainer_layout_holds_all(run: Path, export: Callable[..., int], tmp_path: Path) -> None:
    out = tmp_path / "m.pt"
    assert export(run, "--out", out, "--layout", "trainer", "--dtype", "bfloat16") == 0
    content = torch.load(out, weights_only=True)
    assert set(content) == {"generator", "generator_ema", "critic", "step"} and content["step"] == 20
    assert {tensor.dtype for tensor in content["critic"].values()} == {torch.bfloat16}
    for seed, key in enumerate(("generator", "generator_ema", "critic")):
        rounded = {name: tensor.bfloat16().float() for name, tensor in trained(seed).items()}
        assert_same(read(out, checkpoint_key=key), rounded)


def test_networks_of_different_shapes(export: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    """Each by its own section of the config; not in one trainer's file."""
    deeper = dataclasses.replace(SHAPES, depth=3)
    networks = {"generator": trained(0), "critic": trained(1, deeper)}
    checkpoint = write(tmp_path, networks, critic=deeper)
    out = tmp_path / "m.safetensors"
    assert export(checkpoint, "--out", out, "--layout", "safetensors", "--weights", "critic") == 0
    assert_same(read(out, depth=3), networks["critic"])
    assert export(checkpoint, "--out", tmp_path / "m.pt", "--layout", "trainer") == 2
    assert "the critic has another shape than the generator" in capsys.readouterr().err


def test_learned_factors_of_the_generator_alone(export: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    """A critic sees clips without a past: it has none, and is in the trainer's file all the same."""
    learned = dataclasses.replace(SHAPES, state_decay="learned")
    networks = {"generator": trained(0, learned), "generator_ema": trained(1, learned), "critic": trained(2)}
    checkpoint = write(tmp_path / "run", networks, generator=learned)
    for layout, name in LAYOUTS.items():
        out = tmp_path / name
        assert export(checkpoint, "--out", out, "--layout", layout) == 0
        expected = dict(networks["generator"])
        if layout == "diffusers":
            expected[NULL_TOKENS] = torch.zeros_like(expected[NULL_TOKENS])
        assert_same(read(out, state_decay="learned"), expected)
    assert_same(read(tmp_path / LAYOUTS["trainer"], checkpoint_key="critic"), networks["critic"])
    other = write(tmp_path / "other", {"generator": trained(0), "critic": trained(2, learned)}, critic=learned)
    assert export(other, "--out", tmp_path / "n.pt", "--layout", "trainer") == 2
    assert "the critic has another shape than the generator" in capsys.readouterr().err


def test_the_whole_config_of_a_run(export: Callable[..., int], tmp_path: Path) -> None:
    checkpoint = write(tmp_path, {"generator": trained(0)})
    save_config(TrainingConfig(trainer="ode", model=SHAPES), checkpoint / "config.yaml")
    write_manifest(checkpoint)
    assert export(checkpoint, "--out", tmp_path / "m", "--layout", "upstream") == 0
    assert_same(read(tmp_path / "m"), trained(0))


def test_convert_does_it_too(run: Path, tmp_path: Path, capsys: Any) -> None:
    """One body, two commands: a run's networks together or one of them, of the sizes that its config.yaml says."""
    assert convert.main([str(run), str(tmp_path / "m.pt"), "--to", "trainer"]) == 0
    for seed, key in enumerate(("generator", "generator_ema", "critic")):
        assert_same(read(tmp_path / "m.pt", checkpoint_key=key), trained(seed))
    assert torch.load(tmp_path / "m.pt", weights_only=True)["step"] == 20
    assert "(generator, generator_ema, critic), 2 blocks" in (tmp_path / "m.pt.md").read_text()
    assert convert.main([str(run), str(tmp_path / "one.pt"), "--to", "trainer", "--key", "critic"]) == 0
    assert set(torch.load(tmp_path / "one.pt", weights_only=True)) == {"generator", "step"}
    assert_same(read(tmp_path / "one.pt"), trained(2))
    assert "Network LongSANA (critic)" in (tmp_path / "one.pt.md").read_text()


def test_a_checkpoint_of_the_old_format_is_refused_by_all(
    export: Callable[..., int], tmp_path: Path, capsys: Any
) -> None:
    old = tmp_path / "checkpoint_model_000200"
    old.mkdir()
    for name in ("__0_0.distcp", ".metadata", "manifest.json", "progress.json", "config.yaml"):
        (old / name).write_text("{}")
    says = f"{old}: a checkpoint with .distcp files"
    inference = script("inference_video_scripts/inference_sana_video.py")
    for command in (
        lambda: export(old, "--out", tmp_path / "m", "--layout", "upstream"),
        lambda: convert.main([str(old), str(tmp_path / "m"), "--to", "upstream"]),
        lambda: inference.main(["--model_path", str(old), "--work_dir", str(tmp_path / "out")]),
    ):
        status = command()
        line = capsys.readouterr().err.splitlines()[-1]
        assert status == 2 and says in line and "git worktree add ../longsana-3377696 3377696" in line
    with pytest.raises(InputError, match=re.escape(says)):
        read(old)
    assert [path.name for path in tmp_path.iterdir()] == [old.name]


def test_nothing_is_overwritten_unasked(run: Path, export: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    for layout, name in LAYOUTS.items():
        out, options = tmp_path / name, ("--layout", layout)
        assert export(run, "--out", out, *options) == 0
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        chosen = ("--dtype", "bfloat16") if layout == "trainer" else ("--weights", "ema")
        assert export(run, "--out", out, *options, *chosen) == 2
        assert f"--out {out}: exists; choose another, or replace it with --force" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        assert export(run, "--out", out, *options, *chosen, "--force") == 0
        assert {path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} != set(before.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(LAYOUTS.values())


def test_a_folder_with_other_files_is_left_alone(run: Path, export: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("")
    assert export(run, "--out", tmp_path, "--layout", "diffusers", "--force") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_failing_export_keeps_what_was_there(
    run: Path, export: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "folder"
    assert export(run, "--out", out, "--layout", "diffusers") == 0
    before = read(out)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for place in ("longsana.runtime.files.move_into_place", "safetensors.torch.save_file"):
        with monkeypatch.context() as patch:
            patch.setattr(place, fail)
            assert export(run, "--out", out, "--layout", "diffusers", "--weights", "ema", "--force") == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
        assert "folder" in line and ": No space left on device; " in line
        assert_same(read(out), before)
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "--out", "{tmp}/m", "--layout", "zip"], "invalid choice: 'zip'"),
        (["{run}", "--layout", "trainer"], "--out"),
        (["{run}/..", "--out", "{tmp}/m", "--layout", "upstream"], "checkpoint_model_000020, the newest"),
        (["{tmp}", "--out", "{tmp}/m", "--layout", "upstream"], "no weights here"),
        (["{tmp}/none", "--out", "{tmp}/m", "--layout", "upstream"], "none: no checkpoint folder of training"),
        (["{run}", "--out", "{tmp}", "--layout", "upstream"], "a folder; the layout upstream is one file"),
        (["{run}", "--out", "{run}/config.yaml", "--layout", "diffusers"], "a file; the layout diffusers is a folder"),
        (["{run}", "--out", "/proc/m", "--layout", "upstream"], "cannot be written to"),
        (["{run}", "--out", "{tmp}/m", "--layout", "trainer", "--weights", "ema"], "holds all networks; leave it out"),
    ],
)
def test_bad_input(
    arguments: list[str], message: str, run: Path, export: Callable[..., int], tmp_path: Path, capsys: Any
) -> None:
    assert export(*(word.format(run=run, tmp=tmp_path) for word in arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not list(tmp_path.iterdir())


def test_bad_checkpoints(export: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    checkpoint = write(tmp_path, {"generator": trained(0)})
    options = ("--out", tmp_path / "m", "--layout", "upstream")
    assert export(checkpoint, *options, "--weights", "ema") == 2
    assert "holds no such network; it has raw" in capsys.readouterr().err
    for name in ("config.yaml", "progress.json"):
        content = (checkpoint / name).read_text()
        (checkpoint / name).write_text("[")
        write_manifest(checkpoint)
        assert export(checkpoint, *options) == 2
        assert str(checkpoint / name) in capsys.readouterr().err
        (checkpoint / name).write_text(content)
    assert export(checkpoint, *options) == 2  # its manifest is the damaged one's
    assert not (tmp_path / "m").exists()


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., dict[str, Any]]]:
    """Make one small video; its sidecar."""
    inference = script("inference_video_scripts/inference_sana_video.py")
    folder = tmp_path_factory.mktemp("videos")
    prompts = folder / "prompts.txt"
    prompts.write_text("a red circle\n")
    small = ["--num_frames", "17", "--height", "32", "--width", "48", "--sampling.chunk_frames", "2", "--threads", "1"]

    def make(name: str, path: Path, *settings: str) -> dict[str, Any]:
        where = ["--work_dir", str(folder), "--dataset", name, "--txt_file", str(prompts), "--model_path", str(path)]
        assert inference.main([*where, *small, "--model.depth=2", *settings]) == 0
        (sidecar,) = (folder / name).glob("*.json")
        return dict(json.loads(sidecar.read_text()))

    return make


def test_the_same_video_from_all(
    run: Path, export: Callable[..., int], sample: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Told by the digest of its latents: from the checkpoint's own folder and from all that is made of it."""
    records = {"folder": sample("raw", run), "ema": sample("ema", run, "--model.checkpoint_key=generator_ema")}
    for layout, name in LAYOUTS.items():
        assert export(run, "--out", tmp_path / name, "--layout", layout) == 0
        records[layout] = sample(layout, tmp_path / name)
    digests = {name: record["latents_sha256"] for name, record in records.items()}
    ema = digests.pop("ema")
    assert len(set(digests.values())) == 1, digests
    assert ema not in digests.values()
    assert len({record["sha256"]["model"] for record in records.values()}) == 5  # five files, one of them used twice
