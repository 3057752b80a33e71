"""Folders in diffusers' layout whose headers tell that a part is none, or not whole."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longsana.pipelines.files import check_repository, folder_of
from longsana.pipelines.transformer import SanaVideoCausalTransformer3DModel
from longsana.pipelines.video import LongSanaVideoPipeline
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
    assert folder_of(str(whole)) == folder_of(whole) == whole
    assert folder_of("owner/repository") is None


@pytest.mark.parametrize(
    "source",
    ["/nosuch", "~nosuchuser/x", "~/nosuch", "./nosuch", "a/b/c", "", "a\0b", "x" * 9999, Path("nosuch"), 5, b"a"],
)
@pytest.mark.parametrize("kind", [LongSanaVideoPipeline, SanaVideoCausalTransformer3DModel])
def test_what_is_not_there(kind: Any, source: Any) -> None:
    with pytest.raises(InputError, match=r": not found|must be a folder") as caught:
        kind.from_pretrained(source)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    assert not isinstance(source, str) or message.startswith(source[:200])


def test_what_is_there_but_no_repository(repository: Path) -> None:
    with pytest.raises(InputError, match=r"model_index\.json: a file; name the folder"):
        LongSanaVideoPipeline.from_pretrained(repository / "model_index.json")
    (repository / "model_index.json").unlink()
    with pytest.raises(InputError, match=r"repository: no model_index\.json; name the folder of the whole"):
        LongSanaVideoPipeline.from_pretrained(repository)


def test_the_home_folder(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(repository.parent))
    LongSanaVideoPipeline.from_pretrained("~/repository")
    SanaVideoCausalTransformer3DModel.from_pretrained("~/repository", subfolder="transformer")


@pytest.mark.parametrize("part", WEIGHTS)
def test_the_pipeline_looks_first(part: str, repository: Path) -> None:
    """But not at a part that it is given."""
    parts = LongSanaVideoPipeline.from_pretrained(repository).components
    file = repository / part / WEIGHTS[part]
    file.unlink()
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match="a git-lfs pointer"):
        LongSanaVideoPipeline.from_pretrained(repository)
    LongSanaVideoPipeline.from_pretrained(repository, **{part: parts[part]})


def test_whole_numbers_as_floats_are_quiet(repository: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        pipe = LongSanaVideoPipeline.from_pretrained(
            repository, num_cached_blocks=2.0, num_sink_blocks=1.0, state_decay=1, caption_length=48.0
        )
    finally:
        logger.removeHandler(caplog.handler)
    assert pipe.transformer.config["num_cached_blocks"] == 2 and "xpected types" not in caplog.text


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
