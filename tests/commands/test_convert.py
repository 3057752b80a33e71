"""`python -m longsana.convert`: round trips to the bit, of networks and VAEs, in the published layouts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from longsana import convert
from longsana.weights.files import open_checkpoint
from longsana.weights.names import BASE_CLASS, CAUSAL_CLASS, NULL_TOKENS
from longsana.weights.network import LAYOUTS, Layout, read_weights, save_checkpoint
from tests.weights.checkpoints import PATHS, TINY, assert_same, weights

SIZES = ("depth", "hidden_size", "num_heads", "linear_head_dim", "caption_channels", "caption_length")


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., int]:
    """`command(SRC, DST, "--to", ...)` for the small network."""
    config = tmp_path / "config.yaml"
    OmegaConf.save({"model": {name: getattr(TINY, name) for name in SIZES}}, config)
    return lambda *arguments: convert.main([*map(str, arguments), "--config", str(config)])


def mixed() -> dict[str, Tensor]:
    """Weights of which some are in bfloat16."""
    return {name: tensor.bfloat16() if "norm" in name else tensor for name, tensor in weights().items()}


@pytest.mark.parametrize("there", list(LAYOUTS))
@pytest.mark.parametrize("back", list(LAYOUTS))
def test_there_and_back_is_the_same(there: Layout, back: Layout, command: Callable[..., int], tmp_path: Path) -> None:
    expected = mixed()
    source, between, end = (tmp_path / part for part in ("a", "b", "c"))
    for folder in (source, between, end):
        folder.mkdir()
    save_checkpoint(expected, source / PATHS[back], back, TINY)
    assert command(source / PATHS[back], between / PATHS[there], "--to", there) == 0
    assert command(between / PATHS[there], end / PATHS[back], "--to", back) == 0
    if "diffusers" in (there, back):
        del expected[NULL_TOKENS]  # it has no place for them
    assert_same(read_weights(end / PATHS[back], TINY), expected)
    names = [dict.fromkeys(open_checkpoint(at / PATHS[back], "generator")) for at in (source, end)]
    if there != "diffusers":
        assert names[0] == names[1]


def test_a_diffusers_folder_says_its_size_and_class(tmp_path: Path) -> None:
    """LongSANA's class comes back, or is given to what has none; no YAML is needed."""
    save_checkpoint(mixed(), tmp_path / "a", "diffusers", TINY, causal=True)
    for target, more in (("b.pth", ["upstream"]), ("c", ["diffusers"])):
        assert convert.main([str(tmp_path / "a"), str(tmp_path / target), "--to", *more]) == 0
    assert json.loads((tmp_path / "c" / "config.json").read_text())["_class_name"] == CAUSAL_CLASS
    config = tmp_path / "config.yaml"
    OmegaConf.save({"model": {name: getattr(TINY, name) for name in SIZES}}, config)
    for folder, flags, name in (("d", [], BASE_CLASS), ("e", ["--causal"], CAUSAL_CLASS)):
        given = [str(tmp_path / "b.pth"), str(tmp_path / folder), "--to", "diffusers", "--config", str(config), *flags]
        assert convert.main(given) == 0
        assert json.loads((tmp_path / folder / "config.json").read_text())["_class_name"] == name


def test_a_vae_of_one_layout_is_told_apart(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"")
    (tmp_path / "vae/config.json").write_text('{"_class_name": "AutoencoderKLLTX2Video"}')
    assert convert.main([str(tmp_path / "vae"), str(tmp_path / "b.pth"), "--to", "upstream"]) == 2
    assert "an AutoencoderKLLTX2Video, which has no other layout" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "says"), [("{", "cannot be read"), ("[]", "expected a mapping, found a list")])
def test_a_damaged_config_is_named(text: str, says: str, tmp_path: Path, capsys: Any) -> None:
    save_checkpoint(mixed(), tmp_path / "a", "diffusers", TINY)
    (tmp_path / "a" / "config.json").write_text(text)
    assert convert.main([str(tmp_path / "a"), str(tmp_path / "b.pth"), "--to", "upstream"]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "b.pth").exists()


def test_a_model_card_says_what_it_is(command: Callable[..., int], tmp_path: Path) -> None:
    save_checkpoint(mixed(), tmp_path / "model.pth", "upstream", TINY)
    assert command(tmp_path / "model.pth", tmp_path / "folder", "--to", "diffusers") == 0
    card = (tmp_path / "folder/README.md").read_text()
    count = sum(tensor.numel() for tensor in weights().values())
    assert f"{count:,} parameters, bfloat16, float32" in card and "model.pth" in card
    assert f"Network LongSANA (generator), {TINY.depth} blocks of width {TINY.hidden_size}" in card, "not a known size"
    # A folder with its card is replaced like one without.
    assert command(tmp_path / "model.pth", tmp_path / "folder", "--to", "diffusers") == 2
    assert command(tmp_path / "model.pth", tmp_path / "folder", "--to", "diffusers", "--force") == 0
    assert command(tmp_path / "folder", tmp_path / "m.safetensors", "--to", "safetensors") == 0
    card = tmp_path / "m.safetensors.md"
    assert (tmp_path / "m.safetensors").stat().st_mode == card.stat().st_mode


def test_a_network_of_a_training_checkpoint_is_chosen(command: Callable[..., int], tmp_path: Path) -> None:
    networks = {"generator": weights(0), "generator_ema": weights(1), "critic": weights(2)}
    generator = networks.pop("generator")
    save_checkpoint(generator, tmp_path / "model.pt", "trainer", TINY, others=networks, step=7)
    for seed, key in enumerate(("generator", "generator_ema", "critic")):
        out = tmp_path / f"{key}.pth"
        assert command(tmp_path / "model.pt", out, "--to", "upstream", "--key", key) == 0
        assert_same(read_weights(out, TINY), weights(seed))


def test_parts_of_different_dtypes_are_not_joined(command: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    from safetensors.torch import load_file, save_file

    save_checkpoint(weights(), tmp_path / "folder", "diffusers", TINY)
    (file,) = (tmp_path / "folder").glob("*.safetensors")
    tensors = load_file(file)
    name = "transformer_blocks.0.attn1.to_q.weight"
    save_file(tensors | {name: tensors[name].bfloat16()}, file)
    assert command(tmp_path / "folder", tmp_path / "m.pth", "--to", "upstream") == 2
    assert "differ in dtype" in capsys.readouterr().err


def test_a_card_of_someone_else_is_left_alone(command: Callable[..., int], tmp_path: Path) -> None:
    save_checkpoint(weights(), tmp_path / "model.pth", "upstream", TINY)
    (tmp_path / "README.md").write_text("mine")
    assert command(tmp_path / "model.pth", tmp_path / "README", "--to", "safetensors") == 2
    assert (tmp_path / "README.md").read_text() == "mine"


def test_into_the_folder_one_is_in(
    command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(weights(), tmp_path / "model.pth", "upstream", TINY)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert command(tmp_path / "model.pth", ".", "--to", "diffusers") == 0
    assert_same(read_weights(tmp_path / "here", TINY), without_null())
    assert (tmp_path / "here/README.md").exists()


def without_null() -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights().items() if name != NULL_TOKENS}


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import AutoencoderKLWan

    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKLWan(base_dim=4).save_pretrained(folder / "vae")
    return folder / "vae"


def test_a_vae_there_and_back(vae_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    assert convert.main([str(vae_folder), str(tmp_path / "Wan2.1_VAE.pth"), "--to", "upstream"]) == 0
    original = torch.load(tmp_path / "Wan2.1_VAE.pth", weights_only=True)
    assert "encoder.conv1.weight" in original and "decoder.upsamples.0.residual.0.gamma" in original
    assert convert.main([str(tmp_path / "Wan2.1_VAE.pth"), str(tmp_path / "vae"), "--to", "diffusers"]) == 0
    (file,) = (tmp_path / "vae").glob("*.safetensors")
    (before,) = vae_folder.glob("*.safetensors")
    assert_same(load_file(file), load_file(before))
    ignored = ("_name_or_path", "_diffusers_version")
    configs = [json.loads((folder / "config.json").read_text()) for folder in (vae_folder, tmp_path / "vae")]
    assert len({json.dumps({k: v for k, v in config.items() if k not in ignored}) for config in configs}) == 1
    assert "Wan 2.1 VAE" in (tmp_path / "vae/README.md").read_text()


@pytest.mark.parametrize(
    ("what", "layout"),
    [*(("network", layout) for layout in LAYOUTS), ("vae", "diffusers"), ("vae", "upstream")],
)
def test_a_full_disk_is_one_line_and_leaves_what_was_there(
    what: str,
    layout: Layout,
    vae_folder: Path,
    command: Callable[..., int],
    tmp_path: Path,
    limited: Callable[..., Any],
    capsys: Any,
) -> None:
    source, out = vae_folder, tmp_path / PATHS[layout]
    if what == "network":
        source = tmp_path / "source"
        save_checkpoint(weights(), source, "safetensors", TINY)
    run = command if what == "network" else (lambda *arguments: convert.main([*map(str, arguments)]))
    assert run(source, out, "--to", layout) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with limited(20_000):
        assert run(source, out, "--to", layout, "--force") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
    assert re.fullmatch(rf"failed: {tmp_path}/.*: File too large; .* are free", line)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/none", "{tmp}/x", "--to", "upstream"], "SRC: '"),
        (["{tmp}/model.pth", "{tmp}/model.pth", "--to", "upstream", "--force"], "model.pth, or where it lies"),
        (["{tmp}/model.pth", "{tmp}", "--to", "upstream"], "a folder; the layout upstream is one file"),
        (["{tmp}/model.pth", "{tmp}/y.pth", "--to", "upstream"], "does not fit SanaMSVideo_2000M_P2_D20"),
        (["{tmp}/model.pth", "{tmp}/y.pth", "--to", "zip"], "invalid choice: 'zip'"),
        (["{tmp}/model.pth", "hf://me/model", "--to", "diffusers"], "on this machine"),
        (["{tmp}/model.pth", "{tmp}/y.safetensors", "--to", "upstream"], "readers would not expect"),
        (["{tmp}/model.pth", "{tmp}/y.safetensors.index.json", "--to", "safetensors"], "readers would not expect"),
        (["{tmp}", "{tmp}/model.pth", "--to", "upstream", "--force"], ", or where it lies"),
        (["asset/shapes/vae", "{tmp}/y.pth", "--to", "trainer"], "this is a VAE"),
        (["asset/shapes/vae", "{tmp}/y.pth", "--to", "upstream"], "num_res_blocks"),
    ],
)
def test_bad_input(arguments: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    save_checkpoint(weights(), tmp_path / "model.pth", "upstream", TINY)
    assert convert.main([argument.format(tmp=tmp_path) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") <= 2, error
    assert {path.name for path in tmp_path.iterdir()} == {"model.pth"}


def test_it_is_a_command_of_the_package(tmp_path: Path, capsys: Any) -> None:
    save_checkpoint(weights(), tmp_path / "model.pth", "upstream", TINY)
    command = [sys.executable, "-m", "longsana.convert", tmp_path / "model.pth", tmp_path / "m.pth", "--to", "upstream"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "another size than the published one needs its YAML (--config)" in done.stderr
    with pytest.raises(SystemExit) as helped:
        convert.main(["--help"])
    assert helped.value.code == 0 and "SRC" in capsys.readouterr().out


PEAK = """
import sys
from longsana import convert
assert convert.main(sys.argv[1:]) == 0
with open("/proc/self/status") as status:
    print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024)
"""
"""Not getrusage's peak, which a process inherits from the one that started it: here pytest, with all weights."""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("there", "layout"), [("upstream", "diffusers"), ("diffusers", "upstream"), ("diffusers", "diffusers")]
)
def test_memory_is_a_little_more_than_the_checkpoint(there: Layout, layout: Layout, tmp_path: Path) -> None:
    """Where tensors are cut in three, where they are joined, and where they are joined and cut again."""
    peaks, sizes = [], []
    for name, width in (("small", 112), ("large", 1120)):
        config = replace(TINY, hidden_size=width, num_heads=width // 112, linear_head_dim=112, depth=4)
        OmegaConf.save({"model": {key: getattr(config, key) for key in SIZES}}, tmp_path / f"{name}.yaml")
        tensors = weights(config=config)
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        save_checkpoint(tensors, tmp_path / name, there, config)
        arguments = [tmp_path / name, tmp_path / f"{name}.out", "--to", layout, "--config", tmp_path / f"{name}.yaml"]
        done = subprocess.run([sys.executable, "-c", PEAK, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]))
    assert sizes[1] > 300e6
    print(f"{(peaks[1] - peaks[0]) / (sizes[1] - sizes[0]):.3f} of the checkpoint")
    assert peaks[1] - peaks[0] <= 1.3 * (sizes[1] - sizes[0])
