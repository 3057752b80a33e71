"""What lies at a path, told by names, first bytes and config.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from longsana.runtime.errors import InputError
from longsana.weights.network import save_checkpoint
from longsana.weights.what_is import what_is
from tests.weights.checkpoints import TINY, weights
from tests.weights.test_files import checkpoint_folder


def test_each_kind_is_told(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2)}
    save_file(tensors, tmp_path / "misnamed.pth")
    torch.save(tensors, tmp_path / "misnamed.safetensors")
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "other.pth").write_bytes(b"anything")
    checkpoint = checkpoint_folder(tmp_path / "run" / "checkpoint_model_000001", {"generator": tensors})
    save_checkpoint(weights(), tmp_path / "shards/m.safetensors", "safetensors", TINY, shard_bytes=60_000)
    expected = {
        "misnamed.pth": "safetensors",
        "misnamed.safetensors": "pytorch",
        "old.pth": "old pytorch",
        "other.pth": "damaged",
        "none.pth": "missing",
        "shards/m.safetensors.index.json": "shards",
        "run/checkpoint_model_000001": "checkpoint",
    }
    assert {name: what_is(tmp_path / name).kind for name in expected} == expected
    assert [name for name in expected if not what_is(tmp_path / name).headers_tell] == ["old.pth"]
    assert what_is(checkpoint).file == checkpoint and what_is(checkpoint).config == {}
    assert what_is(tmp_path / "shards") == what_is(tmp_path / "shards/m.safetensors.index.json")


def test_a_folder_of_diffusers_a_pipeline_around_it_and_its_file(tmp_path: Path) -> None:
    save_checkpoint(weights(), tmp_path / "transformer", "diffusers", TINY)
    (tmp_path / "vae").mkdir()
    found = what_is(tmp_path)
    assert found == what_is(tmp_path / "transformer") == what_is(found.file)
    assert found.kind == "safetensors" and found.config["_class_name"] == "SanaVideoTransformer3DModel"
    (tmp_path / "transformer/config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config\.json: expected a mapping, found a list"):
        _ = found.config


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.safetensors").write_bytes(b"<!DOCTYPE html><html>")
    with pytest.raises(InputError, match="a web page"):
        what_is(tmp_path / "page.safetensors")
    (tmp_path / "b.pth").write_bytes(b"")
    with pytest.raises(InputError, match=r"several weights files \(b\.pth, page\.safetensors\) here; say which"):
        what_is(tmp_path, "say which")
    run = tmp_path / "run"
    checkpoint_folder(run / "checkpoint_model_000001", {"generator": weights()})
    (run / "checkpoint_model_000002").mkdir()
    (run / "checkpoint_model_000002/.metadata").write_bytes(b"")
    with pytest.raises(InputError, match=r"a run; name one of its checkpoints .*000001, the newest"):
        what_is(run)
    with pytest.raises(InputError, match=r"000002: a checkpoint with \.distcp files"):
        what_is(run / "checkpoint_model_000002")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan"}))
    with pytest.raises(InputError, match="no weights here"):
        what_is(tmp_path / "empty")
