"""A run's checkpoint is compared with its digests wherever it is read, and its data looked at before it begins."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from longsana import convert
from longsana.config import load_config
from longsana.encoders.text import GemmaTextEncoder
from longsana.runtime.distributed import World
from longsana.runtime.errors import InputError
from longsana.training.build import StageBuilder
from longsana.training.config import TrainingConfig
from longsana.training.stages.stage import MicroBatches
from longsana.weights.build import build_model
from longsana.weights.network import load_weights
from tests.commands.test_export import INFERENCE, ROOT, SHAPES, trained, write
from tests.data.test_trajectories import write as write_shards
from tests.data.test_trajectories import write_lmdb
from tests.scripts import load_script
from tests.weights.checkpoints import meta

SAYS = "has changed since it was written (SHA-256)"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("run"), {"generator": trained(0), "critic": trained(1)})


@pytest.fixture(params=["shard-00001-model-00001-of-00001.safetensors", "config.yaml"])
def rotten(request: pytest.FixtureRequest, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint that was read once, and then one bit of a file changed and the time of its content did not."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(whole, tmp_path / "run" / whole.name))
    load_weights(meta(SHAPES), folder)
    file = folder / request.param
    content, stamp = bytearray(file.read_bytes()), file.stat()
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    return file


def refused(line: str, file: Path) -> bool:
    return str(file) in line and SAYS in line


def test_export(rotten: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export = load_script(ROOT / "train_video_scripts/export.py")
    for layout in ("safetensors", "trainer"):
        assert export.main([str(rotten.parent), "--out", str(tmp_path / "m"), "--layout", layout]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert refused(line, rotten)
    assert not (tmp_path / "m").exists()


def test_convert(rotten: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert.main([str(rotten.parent), str(tmp_path / "m"), "--to", "safetensors"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert refused(line, rotten)
    assert not (tmp_path / "m").exists()


def test_inference(
    rotten: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before captions are encoded."""

    def forbidden(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("too late: a caption is being encoded")

    monkeypatch.setattr(GemmaTextEncoder, "load", forbidden)
    script: ModuleType = load_script(ROOT / "inference_video_scripts/inference_sana_video.py")
    arguments = ["--config", str(INFERENCE), "--model_path", str(rotten.parent), "--work_dir", str(tmp_path / "out")]
    assert script.main([*arguments, "model.depth=2", "model.num_cached_blocks=2", "--end_index", "1"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert refused(line, rotten)
    assert not list(tmp_path.rglob("*.mp4"))


def test_in_python(rotten: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_weights(meta(SHAPES), rotten.parent)
    assert refused(str(caught.value), rotten)
    with pytest.raises(InputError):
        build_model(dataclasses.replace(SHAPES, load_from=str(rotten.parent)), device="cpu", dtype=torch.float32)


def test_a_run_that_starts_from_it(
    rotten: Path, small_training: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before captions are encoded, which may take hours."""
    path = small_training("self_forcing", f"fake_score.load_from={rotten.parent}")
    config: TrainingConfig = load_config(path, schema=TrainingConfig)
    world = World()
    monkeypatch.setattr(StageBuilder, "captions", property(lambda self: pytest.fail("too late: captions")))
    micro_batches = MicroBatches.of(world, 1)
    builder = StageBuilder(
        config, micro_batches=micro_batches, world=world, device=torch.device("cpu"), folder=tmp_path
    )
    with pytest.raises(InputError) as caught:
        builder.stage()
    assert refused(str(caught.value), rotten)


def test_data_is_looked_at_while_a_run_prepares(
    small_training: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(World, "connect", lambda *arguments, **options: pytest.fail("too late: processes meet"))
    script = load_script(ROOT / "train_video_scripts/train_longsana.py")
    write_shards(tmp_path / "shards", finish=False)
    lacking = write_lmdb(tmp_path / "lacking", lambda entries: entries.pop(b"latents_1_data"))
    cut = write_lmdb(tmp_path / "cut")
    os.truncate(cut / "data.mdb", 9000)
    for trainer, data, says in (
        ("ode", lacking, "no entry latents_1_data"),
        ("ode", cut, "an LMDB that is cut short: 9000 bytes"),
        ("ode", write_lmdb(tmp_path / "other"), "(4, 3, 2, 6) latents, the config asks for (16, 5, 4, 6)"),
        ("ode", tmp_path / "shards", "unfinished, 3 of 3 shards"),
        ("flow_matching", tmp_path / "shards", "holds trajectories, not clips"),
    ):
        path = small_training(trainer, f"data.data_path={data}")
        assert script.main(["--config_path", str(path), "--logdir", str(tmp_path / "run"), "--disable-wandb"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {data}: ") and says in line
    assert not (tmp_path / "run").exists()
