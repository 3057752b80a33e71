"""Folders in diffusers' layout whose headers tell that a part is none, or not whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from longsana.pipelines.files import check_repository
from longsana.pipelines.transformer import SanaVideoCausalTransformer3DModel
from longsana.runtime.errors import InputError
from tests.pipelines.repository import shapes_repository

WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes_repository(tmp_path_factory.mktemp("repository"))


@pytest.fixture
def repository(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(whole, tmp_path / "repository"))


def refusal(repository: Path) -> str:
    with pytest.raises(InputError) as caught:
        check_repository(repository)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_whole_repository_passes_and_the_hub_is_left_alone(whole: Path) -> None:
    check_repository(whole)
    check_repository(str(whole))
    check_repository("owner/repository")
    check_repository("~nosuchuser/repository")


@pytest.mark.parametrize("part", WEIGHTS)
def test_parts_that_are_none(part: str, repository: Path) -> None:
    file = repository / part / WEIGHTS[part]
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}  # not the file itself, mapped
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert f"{file}: a git-lfs pointer" in refusal(repository)
    save_file({name: weights[name] for name in sorted(weights)[1:]}, file)
    assert sorted(weights)[0] in refusal(repository)
    file.unlink()
    torch.save([1, 2], file)
    assert f"{file}: no network in this file" in refusal(repository)
    file.unlink()
    save_file(weights, file.with_name("outside.safetensors"))
    index = file.with_name(f"{file.name}.index.json")
    for target, says in (
        ("../outside.safetensors", "must be plain file names beside it"),
        ("outside.bin", "must be .safetensors files"),
    ):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, target)}))
        assert f"{index}: its shards {says}" in refusal(repository)


def test_a_transformer_is_looked_at_wherever_it_is_loaded(repository: Path) -> None:
    folder = repository / "transformer"
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text("{}")
    for source, options in ((folder, {}), (repository, {"subfolder": "transformer"})):
        with pytest.raises(InputError, match=r"not an index of safetensors shards \(no 'weight_map'\)"):
            SanaVideoCausalTransformer3DModel.from_pretrained(source, **options)
    index.unlink()
    SanaVideoCausalTransformer3DModel.from_pretrained(folder)
    (folder / "config.json").write_text("[")
    with pytest.raises(InputError, match=r"config\.json: cannot be read as JSON"):
        SanaVideoCausalTransformer3DModel.from_pretrained(folder)
