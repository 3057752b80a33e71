"""Files that others made, as network, VAE and text encoder: read by their usual names, or refused alike in one line."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longsana.config import InferenceConfig, load_config
from longsana.encoders.headers import check_text_encoder
from longsana.encoders.layouts import wan_original_name, wan_tensors
from longsana.encoders.loading import load_vae
from longsana.encoders.text import GemmaTextEncoder
from longsana.runtime.errors import InputError
from longsana.sampling.checks import check_weights
from longsana.weights.build import build_model

ROOT = Path(__file__).parents[2]
ASSET = ROOT / "asset/shapes"
CONFIG = ROOT / "configs/sana_video_config/longsana/shapes/longsana.yaml"
SETTINGS = {
    "model": "model.load_from",
    "vae": "vae.vae_pretrained",
    "text_encoder": "text_encoder.text_encoder_name",
}
USUAL = {
    "model": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
PARTS = list(SETTINGS)


def tensors_of(part: str) -> dict[str, Tensor]:
    source = {"model": "longsana.safetensors", "vae": "vae", "text_encoder": "text_encoder"}[part]
    path = ASSET / source
    return load_file(path if path.is_file() else next(path.glob("*.safetensors")))


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    """A part's folder without weights."""

    def make(part: str) -> Path:
        made = tmp_path / part
        if part == "model":
            made.mkdir()
        else:
            shutil.copytree(ASSET / part, made, ignore=shutil.ignore_patterns("*.safetensors"))
        return made

    return make


BASE: InferenceConfig = load_config(CONFIG, ["vae.decoder=full"])


def config_of(part: str, path: Path) -> InferenceConfig:
    section = dataclasses.replace(getattr(BASE, part), **{SETTINGS[part].partition(".")[2]: str(path)})
    return dataclasses.replace(BASE, **{part: section})


def loaded(part: str, path: Path) -> dict[str, Tensor]:
    config = config_of(part, path)
    if part == "model":
        return dict(build_model(config.model, device="cpu", dtype=torch.float32).state_dict())
    if part == "vae":
        return dict(load_vae(config.vae, "cpu", torch.float32).model.state_dict())
    encoder = GemmaTextEncoder.load(
        config.text_encoder, caption_length=8, caption_channels=64, device="cpu", dtype=torch.float32
    )
    return dict(encoder.model.state_dict())


def assert_loaded(part: str, path: Path, expected: dict[str, Tensor]) -> None:
    check_weights(config_of(part, path))
    found = loaded(part, path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in expected.items())


def refusal(part: str, path: Path) -> str:
    """What is said by headers alone, and the same by loading."""
    with pytest.raises(InputError) as told:
        check_weights(config_of(part, path))
    with pytest.raises(InputError) as raised:
        loaded(part, path)
    message = str(told.value)
    assert message.removeprefix(f"{SETTINGS[part]}: ") == str(raised.value)
    assert "\n" not in message and "weights_only" not in message
    return message


def in_shards(weights: dict[str, Tensor], stem: Path, count: int = 3) -> Path:
    names = sorted(weights)
    weight_map = {}
    for number in range(count):
        file = stem.with_name(f"{stem.name}-{number + 1:05d}-of-{count:05d}.safetensors")
        save_file({name: weights[name] for name in names[number::count]}, file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names[number::count], file.name)
    index = stem.with_name(f"{stem.name}.safetensors.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


# What is read


@pytest.mark.parametrize("part", PARTS)
def test_the_usual_name_wins_over_a_variant(part: str, folder: Callable[[str], Path]) -> None:
    where, expected = folder(part), tensors_of(part)
    for variant in ("fp16", "non_ema", "bf16"):
        save_file(
            {name: tensor + 1 for name, tensor in expected.items()}, where / f"{USUAL[part]}.{variant}.safetensors"
        )
    save_file(expected, where / f"{USUAL[part]}.safetensors")
    assert_loaded(part, where, expected)
    (where / f"{USUAL[part]}.safetensors").unlink()
    assert "several weights files" in refusal(part, where)
    for variant in ("non_ema", "bf16"):
        (where / f"{USUAL[part]}.{variant}.safetensors").unlink()
    assert_loaded(part, where, {name: tensor + 1 for name, tensor in expected.items()})  # the only one there


@pytest.mark.parametrize("part", PARTS)
def test_shards_are_read_by_their_index(part: str, folder: Callable[[str], Path]) -> None:
    where, expected = folder(part), tensors_of(part)
    index = in_shards(expected, where / USUAL[part])
    assert_loaded(part, where, expected)
    save_file(expected, where / f"{USUAL[part]}.fp16.safetensors")
    assert_loaded(part, where, expected)
    (where / f"{USUAL[part]}.fp16.safetensors").unlink()
    index.unlink()
    assert "without their index" in refusal(part, where)


@pytest.mark.parametrize("part", PARTS)
def test_the_content_decides_and_not_the_suffix(part: str, folder: Callable[[str], Path]) -> None:
    where, expected = folder(part), tensors_of(part)
    torch.save(expected, where / f"{USUAL[part]}.safetensors")
    assert_loaded(part, where, expected)
    (where / f"{USUAL[part]}.safetensors").unlink()
    save_file(expected, where / "pytorch_model.bin")
    assert_loaded(part, where, expected)
    torch.save({f"module.{name}": tensor for name, tensor in expected.items()}, where / "pytorch_model.bin")
    assert_loaded(part, where, expected)


# What is refused

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 134217984\n"


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def _program(path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)


def _archive(path: Path) -> None:
    os.replace(shutil.make_archive(str(path), "zip", ROOT / "longsana/ops"), path)


def holding(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pointer": (holding(LFS), "a git-lfs pointer, "),
    "a web page": (holding(b"<!DOCTYPE html>\n<html>"), "a web page, "),
    "gguf": (holding(b"GGUF\x03\0\0\0" + bytes(99)), "a GGUF file"),
    "a picture": (holding(b"\x89PNG\r\n\x1a\n" + bytes(99)), "neither a PyTorch nor a safetensors file"),
    "nothing": (holding(b""), "neither a PyTorch nor a safetensors file, or damaged"),
    "a zip": (_archive, "a zip archive, and none of PyTorch's"),
    "a program": (_program, "refused: a TorchScript archive"),
    "a pickle": (holding(pickle.dumps(Payload(), protocol=2)), "mkdir), which could run code"),
    "a PyTorch pickle": (
        lambda path: torch.save({"x": torch.ones(1), "y": Payload()}, path),
        "mkdir), which could run",
    ),
    "a header too long": (holding(b"\xff" * 8 + b"{" + bytes(99)), "damaged"),
    "no tensors": (lambda path: torch.save({"step": 3}, path), "no network in this file"),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore::DeprecationWarning", "ignore:.torch.jit")
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_none_is_refused_alike(
    part: str, fault: str, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    where, (plant, says) = folder(part), FAULTS[fault]
    file = where / f"{USUAL[part]}.safetensors"
    plant(file)
    if fault == "a pickle":  # of PyTorch's format before 1.6, as far as a header tells
        with pytest.raises(InputError) as caught:
            loaded(part, where)
        message = str(caught.value)
    else:
        message = refusal(part, where)
    assert str(file) in message and says in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("part", PARTS)
def test_a_cut_file_is_told_by_its_header(part: str, folder: Callable[[str], Path]) -> None:
    where = folder(part)
    file = where / f"{USUAL[part]}.safetensors"
    for write in (save_file, torch.save):
        write(tensors_of(part), file)
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content[:-9])
        assert "damaged or cut short" in refusal(part, where)


@pytest.mark.parametrize("part", PARTS)
def test_missing_and_misshapen_tensors_are_told_by_headers(part: str, folder: Callable[[str], Path]) -> None:
    where, weights = folder(part), tensors_of(part)
    names = sorted(weights)
    lacking = {name: weights[name] for name in names[1:]}
    for changed in (
        lacking,
        {**weights, names[3]: torch.zeros(3, 5)},
        {**weights, names[3]: torch.zeros(weights[names[3]].shape, dtype=torch.int8)},
        {**weights, "adaptor.weight": torch.zeros(3)},
    ):
        for file in where.glob("*.safetensors"):
            file.unlink()
        save_file(changed, where / f"{USUAL[part]}.safetensors")
        message = refusal(part, where)
        wrong = next(
            (name for name in names if name not in changed), names[3] if len(changed) == len(names) else "adaptor"
        )
        assert wrong in message


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Paths that Python opens. What safetensors opens is not among them."""
    seen: list[str] = []
    watching = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open":
            seen.append(str(arguments[0]))

    sys.addaudithook(hook)
    yield seen
    watching = False


INDICES: dict[str, tuple[str, str]] = {
    "a pickle": ('{"weight_map": {"a": "evil.bin"}}', "its shards must be .safetensors files, found evil.bin"),
    "a file outside": ('{"weight_map": {"a": "../outside.safetensors"}}', "must be plain file names beside it"),
    "an absolute path": ('{"weight_map": {"a": "/tmp/outside.safetensors"}}', "must be plain file names beside it"),
    "a folder": ('{"weight_map": {"a": ".."}}', "must be .safetensors files"),
    "a NUL": ('{"weight_map": {"a": "a\\u0000.safetensors"}}', "must be plain file names beside it"),
    "a long name": (f'{{"weight_map": {{"a": "{"x" * 300}.safetensors"}}}}', "must be plain file names beside it"),
    "a number": ('{"weight_map": {"a": 3}}', "must be plain file names beside it, found 3"),
    "no map": ('{"metadata": {}}', "not an index of safetensors shards (no 'weight_map')"),
    "an empty map": ('{"weight_map": {}}', "not an index of safetensors shards"),
    "a list": ("[]", "not an index of safetensors shards"),
    "half": ('{"weight_map": {"a"', "cannot be read as JSON"),
    "depth": ("[" * 100_000, "cannot be read as JSON (nested too deeply)"),
    "a pointer": (LFS.decode(), "a git-lfs pointer"),
    "a shard that is none": ('{"weight_map": {"a": "gone.safetensors"}}', "no such file, but"),
    "a misnamed pickle": ('{"weight_map": {"a": "evil.safetensors"}}', "cannot be read as safetensors"),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("case", INDICES)
def test_an_index_opens_nothing_but_shards_beside_it(
    part: str,
    case: str,
    folder: Callable[[str], Path],
    tmp_path: Path,
    opened: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    where, (content, says) = folder(part), INDICES[case]
    # Opening a pipe would wait for ever.
    os.mkfifo(tmp_path / "outside.safetensors")
    for name in ("evil.bin", "evil.safetensors"):
        torch.save({"a": torch.ones(1), "x": Payload()}, where / name)
    (where / f"{USUAL[part]}.safetensors.index.json").write_text(content)
    opened.clear()
    message = refusal(part, where)
    assert says in message
    assert not [path for path in opened if "outside" in path or "evil.bin" in path]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["{}", "[]", '{"model": 5}', "x"])
def test_a_tokenizer_that_is_none(text: str, folder: Callable[[str], Path]) -> None:
    where = folder("text_encoder")
    (where / "tokenizer.json").write_text(text)
    with pytest.raises(InputError, match=r"tokenizer\.json: (not a tokenizer|cannot be read as JSON)"):
        check_text_encoder(where, 64, seeded=False)


def test_a_tokenizer_that_is_a_pointer(folder: Callable[[str], Path]) -> None:
    where = folder("text_encoder")
    save_file(tensors_of("text_encoder"), where / "model.safetensors")
    (where / "tokenizer.json").write_bytes(LFS)
    assert "tokenizer.json: a git-lfs pointer, not the file itself; run `git lfs pull`" in refusal(
        "text_encoder", where
    )


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_config_that_is_none(part: str, folder: Callable[[str], Path]) -> None:
    where = folder(part)
    save_file(tensors_of(part), where / f"{USUAL[part]}.safetensors")
    for content, says in (
        (LFS, "config.json: a git-lfs pointer"),
        (b"{", "config.json: cannot be read as JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff", "not UTF-8"),
    ):
        (where / "config.json").write_bytes(content)
        assert says in refusal(part, where)


def test_quantised_text_encoders_are_refused(folder: Callable[[str], Path]) -> None:
    where = folder("text_encoder")
    save_file(tensors_of("text_encoder"), where / "model.safetensors")
    config = json.loads((where / "config.json").read_text())
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    (where / "config.json").write_text(json.dumps(config | quantised))
    assert "quantised weights (quantization_config) cannot be used here" in refusal("text_encoder", where)


def test_sizes_that_make_no_network_are_refused_at_once(folder: Callable[[str], Path]) -> None:
    where = folder("text_encoder")
    for sizes in ({"num_hidden_layers": 10**9}, {"head_dim": "wide"}, {"vocab_size": -1}):
        config = json.loads((ASSET / "text_encoder/config.json").read_text()) | sizes
        (where / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=r"config\.json: its sizes make no network"):
            check_weights(config_of("text_encoder", where))
    vae = folder("vae")
    config = json.loads((ASSET / "vae/config.json").read_text()) | {"num_res_blocks": 10**9}
    (vae / "config.json").write_text(json.dumps(config))
    save_file(tensors_of("vae"), vae / "diffusion_pytorch_model.safetensors")
    with pytest.raises(InputError, match="its config makes no AutoencoderKLWan"):
        check_weights(config_of("vae", vae))


def test_one_part_given_as_another(tmp_path: Path) -> None:
    for part, path in (
        ("model", ASSET / "vae/diffusion_pytorch_model.safetensors"),
        ("model", ASSET / "text_encoder"),
        ("vae", ASSET / "longsana.safetensors"),
        ("vae", ASSET / "text_encoder"),
        ("text_encoder", ASSET / "longsana.safetensors"),
    ):
        assert str(path) in refusal(part, path)
    with pytest.raises(InputError, match=r"model_type is 'None'; the text encoder must be a gemma2"):
        check_weights(config_of("text_encoder", ASSET / "vae"))


def test_wans_own_layout_is_told_by_its_names(tmp_path: Path) -> None:
    weights = {
        wan_original_name(name): torch.zeros(shape) for name, shape in (wan_tensors({"base_dim": 4}) or {}).items()
    }
    torch.save(weights, tmp_path / "a.pth")
    check_weights(config_of("vae", tmp_path / "a.pth"))
    weights.pop("decoder.conv1.bias")
    torch.save(weights, tmp_path / "a.pth")
    assert "missing 1: decoder.conv1.bias" in refusal("vae", tmp_path / "a.pth")
