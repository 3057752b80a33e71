"""A LoRA that was trained, in files: the pipeline reads it, and `longsana convert --fuse` adds it to the weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longsana import convert
from longsana.commands import export
from longsana.pipelines.lora import read_base
from longsana.runtime.distributed import World
from longsana.runtime.errors import InputError
from longsana.weights.checkpoint_folder import open_tensors
from longsana.weights.files import open_checkpoint
from tests.pipelines.repository import (
    DISTILLED,
    few_blocks,
    quiet,
    shallow,
    shapes_config,
    shapes_repository,
    write_transformer,
)
from tests.scripts import load_script
from tests.training.conftest import ROOT, SCRIPT

SHIPPED = ROOT / "asset/shapes/longsana.safetensors"
SHAPES = ROOT / "configs/sana_video_config/longsana/shapes/longsana.yaml"
SCALE = 6 / 4  # alpha / rank


def trained(logdir: Path, *own: str) -> Path:
    """Two iterations of a base model, which change what it does; returns the checkpoint."""
    settings = [
        *("data.data_path=generated:blobs", "data.num_clips=2", "rollout.num_training_frames=5", "train.batch_size=1"),
        *("sampling.height=32", "sampling.width=48", "train.max_iters=2", "optimizer.generator.lr=0.02"),
        *("optimizer.generator.num_warmup_steps=0", "train.mixed_precision=false", "train.compile=false"),
        "train.ema_start_step=0",
    ]
    config = ROOT / "configs/sana_video_config/longsana/shapes/base.yaml"
    arguments = ["--config_path", str(config), "--logdir", str(logdir), "--disable-wandb", "--threads", "1"]
    try:
        assert load_script(SCRIPT).main([*arguments, "--no_visualize", *settings, *own]) == 0
    finally:
        World().disconnect()
    return logdir / "checkpoint_model_000002"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA on the shipped LongSANA."""
    targets = "[to_q,attn1.to_k,to_v,to_out.0,conv_inverted,conv_point,linear_1,proj_out]"
    lora = ("train.lora.rank=4", "train.lora.alpha=6", f"train.lora.targets={targets}")
    return trained(tmp_path_factory.mktemp("run"), f"model.load_from={SHIPPED}", *lora)


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of a network of two blocks, and a LoRA on the average of its weights, whose change is huge."""
    folder = tmp_path_factory.mktemp("averaged")
    run = trained(folder / "run", *shallow())
    base = ("model.depth=2", f"model.load_from={run}", "model.checkpoint_key=generator_ema")
    lora = ("train.lora.rank=4", "train.lora.alpha=1e6", "train.lora.targets=[to_q]", "optimizer.generator.lr=1")
    return run, trained(folder / "lora", *base, *lora)


@pytest.fixture(scope="module")
def changes(checkpoint: Path) -> dict[str, Tensor]:
    """What each weight changes by, by hand, in float64."""
    factors = {
        name.removeprefix("generator/").replace(".trained.weight", ""): stored.read().double()
        for name, stored in open_tensors(checkpoint).items()
        if name.startswith("generator/")
    }
    base, found = load_file(SHIPPED), {}
    for name in [name.removesuffix(".lora_A") for name in factors if name.endswith(".lora_A")]:
        a, b = factors[f"{name}.lora_A"], factors[f"{name}.lora_B"]
        found[f"{name}.weight"] = change = torch.zeros(base[f"{name}.weight"].shape, dtype=torch.float64)
        places = {"qkv": (0, 1, 2), "kv": (1,)}.get(name.rpartition(".")[2], (0,))  # of kv, attn1 alone has a to_k
        rows = len(b) // len(places)
        for place, above, below in zip(places, a.split(4), b.split(rows), strict=True):
            change[place * rows : (place + 1) * rows] = SCALE * below @ above
    return found


def run(*arguments: Any) -> int:
    return convert.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def lora(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "own.safetensors"
    assert run(checkpoint, path, "--to", "lora") == 0
    return path


def assert_changed(weights: dict[str, Tensor], changes: dict[str, Tensor]) -> None:
    """Each weight is the base's with its change, rounded once; the others are to the bit what they were."""
    base = load_file(SHIPPED)
    assert weights.keys() == base.keys()
    for name, tensor in base.items():
        if name not in changes:
            assert torch.equal(weights[name], tensor), name
            continue
        assert changes[name].abs().max() > 1e-3, name
        expected = (tensor.double() + changes[name]).to(tensor.dtype)
        torch.testing.assert_close(weights[name], expected, rtol=2 * torch.finfo(tensor.dtype).eps, atol=1e-7)


def test_factors_have_the_names_of_diffusers_and_their_rank(lora, changes):
    factors = load_file(lora)
    assert all(name.startswith("transformer.") for name in factors)
    ranks = {len(tensor) for name, tensor in factors.items() if ".lora_A." in name}
    assert ranks == {4}
    assert factors["transformer.transformer_blocks.0.attn1.to_q.lora_B.weight"].shape[1] == 4
    assert factors["transformer.transformer_blocks.0.ff.conv_point.lora_A.weight"].dim() == 4
    layers = {name.removeprefix("transformer.").partition(".lora_")[0] for name in factors}
    assert {"transformer_blocks.0.attn1.to_k", "transformer_blocks.0.attn2.to_v"} <= layers
    assert "transformer_blocks.0.attn2.to_k" not in layers, "attn1.to_k alone was asked for"
    assert (lora.with_name("own.safetensors.md")).read_text().startswith("# own.safetensors\n\nLoRA of rank 4 on")


@pytest.mark.parametrize("given", ["file", "folder", "checkpoint"])
def test_fused_weights_are_the_base_and_the_change(given, lora, checkpoint, changes, tmp_path):
    source = {"file": lora, "folder": lora.parent, "checkpoint": checkpoint}[given]
    assert (
        run(SHIPPED, tmp_path / "fused.safetensors", "--to", "safetensors", "--config", SHAPES, "--fuse", source) == 0
    )
    assert_changed(load_file(tmp_path / "fused.safetensors"), changes)
    assert f"the LoRA `{source}` added" in (tmp_path / "fused.safetensors.md").read_text()


def test_the_pipeline_reads_it(lora, changes, tmp_path):
    """Put on by `load_lora_weights` and fused there, it is the same change; and so is what the pipeline saves."""
    folder = shapes_repository(tmp_path)
    write_transformer(folder / "transformer", SHIPPED, shapes_config(**{"model.depth": 12}).model, DISTILLED)
    pipe = quiet(folder)
    pipe.load_lora_weights(lora, adapter_name="own")
    pipe.save_lora_weights(tmp_path / "again", "own")
    shapes = [
        {name: tensor.shape for name, tensor in load_file(path).items()}
        for path in (lora, tmp_path / "again" / "pytorch_lora_weights.safetensors")
    ]
    assert shapes[0] == shapes[1]
    first, again = (read_base(path, "name the file") for path in (lora, tmp_path / "again"))
    assert first is not None and again is not None and first.network == again.network
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    found, base = pipe.transformer.network.state_dict(), load_file(SHIPPED)
    for name, change in changes.items():
        expected = base[name].float() + change.float()
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6, msg=name)


def test_the_average_and_another_dtype(checkpoint, lora, changes, tmp_path):
    assert run(checkpoint, tmp_path / "a.safetensors", "--to", "lora", "--key", "generator_ema") == 0
    average, raw = load_file(tmp_path / "a.safetensors"), load_file(lora)
    assert average.keys() == raw.keys() and any(not torch.equal(average[name], raw[name]) for name in raw)
    given = [str(checkpoint), "--out", str(tmp_path / "b.safetensors"), "--layout", "lora", "--dtype", "bfloat16"]
    assert export.main(given) == 0
    for name, tensor in load_file(tmp_path / "b.safetensors").items():
        assert torch.equal(tensor, raw[name].bfloat16())


def test_fused_in_another_dtype_the_sum_is_rounded_once_to_it(lora, changes, tmp_path):
    given = ["--to", "safetensors", "--config", SHAPES, "--fuse", lora, "--dtype", "float32"]
    assert run(SHIPPED, tmp_path / "fused.safetensors", *given) == 0
    fused, base = load_file(tmp_path / "fused.safetensors"), load_file(SHIPPED)
    assert {tensor.dtype for tensor in fused.values()} == {torch.float32}
    for name, change in changes.items():
        torch.testing.assert_close(fused[name].double(), base[name].double() + change, rtol=1e-6, atol=1e-9)


def test_what_is_read_is_not_written_over(checkpoint, lora, tmp_path, capsys):
    own = tmp_path / "own.safetensors"
    shutil.copy(lora, own)
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint_model_000002")
    for target, fused in ((own, own), (folder / "new.safetensors", folder)):
        given = ["--to", "safetensors", "--config", SHAPES, "--force", "--fuse", fused]
        assert run(SHIPPED, target, *given) == 2
        assert f"DST {target}: is --fuse {fused}, or where it lies" in capsys.readouterr().err
    assert own.read_bytes() == lora.read_bytes() and not (folder / "new.safetensors").exists()


@pytest.mark.parametrize("given", ["file", "checkpoint"])
def test_the_network_that_it_was_trained_on_gets_it(given, averaged, tmp_path, caplog):
    """Of a run's networks, and with the config of the run; nothing else is named."""
    run_folder, source = averaged
    if given == "file":
        source = tmp_path / "lora.safetensors"
        assert run(averaged[1], source, "--to", "lora") == 0
    assert run(run_folder, tmp_path / "fused.safetensors", "--to", "safetensors", "--fuse", source) == 0
    fused = load_file(tmp_path / "fused.safetensors")
    average, raw = (open_checkpoint(run_folder, key) for key in ("generator_ema", "generator"))
    for name, tensor in fused.items():
        to_q = name.endswith(("attn.qkv.weight", "cross_attn.q.weight"))
        assert torch.equal(tensor, average[name].read()) != to_q, name
    assert not torch.equal(fused["final.linear.bias"], raw["final.linear.bias"].read())
    assert "was trained on other weights" not in caplog.text


def test_a_run_without_the_network_that_it_was_trained_on(averaged, tmp_path, capsys):
    """What the message says to do goes."""
    plain = trained(tmp_path / "run", *shallow(), "train.ema_weight=0")
    to = (tmp_path / "fused.safetensors", "--to", "safetensors", "--fuse")
    capsys.readouterr()
    assert run(plain, *to, averaged[1]) == 2
    assert "trained on the generator_ema of a run, and" in (line := capsys.readouterr().err)
    assert "has generator; write it to a file first (--to lora)" in line
    assert run(averaged[1], tmp_path / "lora.safetensors", "--to", "lora") == 0
    assert run(plain, *to, tmp_path / "lora.safetensors", "--key", "generator") == 0


def test_what_a_trainers_file_leaves_out_is_said(averaged, tmp_path, caplog):
    run_folder, source = averaged
    assert run(run_folder, tmp_path / "fused.pt", "--to", "trainer", "--fuse", source) == 0
    assert list(torch.load(tmp_path / "fused.pt")) == ["generator", "step"]
    assert "one network, the generator_ema; a run's checkpoint has others, to which no LoRA is added" in caplog.text


@pytest.mark.parametrize("given", ["file", "checkpoint"])
def test_other_weights_than_it_was_trained_on_are_told(given, lora, checkpoint, tmp_path, caplog):
    source = {"file": lora, "checkpoint": checkpoint}[given]
    to = (tmp_path / "fused.safetensors", "--to", "safetensors", "--config", SHAPES, "--force", "--fuse", source)
    assert run(SHIPPED, *to) == 0
    card = tmp_path / "fused.safetensors.md"
    assert "other weights" not in caplog.text + card.read_text()
    weights = load_file(SHIPPED)
    save_file({**weights, "final.linear.bias": 2 * weights["final.linear.bias"]}, tmp_path / "other.safetensors")
    assert run(tmp_path / "other.safetensors", *to) == 0
    told = "was trained on other weights, or on the same in another file (SHA-256 "
    (record,) = [record for record in caplog.records if told in record.message]
    assert record.levelname == "WARNING" and record.message.startswith(f"--fuse {source}: ")
    assert f"added, which {told}" in card.read_text()


def test_a_lora_for_fewer_blocks_is_for_another_network(averaged, tmp_path, capsys):
    """Its layers are all there; a file that does not say what it is for can only be taken."""
    small, plain = tmp_path / "small.safetensors", tmp_path / "plain.safetensors"
    assert run(averaged[1], small, "--to", "lora") == 0
    save_file(load_file(small), plain)
    to = (tmp_path / "fused.safetensors", "--to", "safetensors", "--config", SHAPES, "--fuse")
    for source in (small, averaged[1]):
        assert run(SHIPPED, *to, source) == 2
        assert f"--fuse {source}: LoRA: it is for another network, of num_layers 2 (here: " in capsys.readouterr().err
    assert run(SHIPPED, *to, plain) == 0
    folder = shapes_repository(tmp_path / "repository")
    write_transformer(folder / "transformer", SHIPPED, shapes_config(**{"model.depth": 12}).model, DISTILLED)
    pipe = quiet(folder)
    with pytest.raises(InputError, match=r"^LoRA: it is for another network, of num_layers 2"):
        pipe.load_lora_weights(small)
    pipe.load_lora_weights(plain)


def test_numbers_that_a_dtype_has_no_room_for(averaged, tmp_path, capsys):
    """Of a LoRA and of a network: neither is written, as bfloat16 has room for them both are."""
    run_folder, lora = averaged
    few = of_two_blocks(tmp_path)
    assert run(run_folder, tmp_path / "network.safetensors", "--to", "safetensors", "--fuse", lora) == 0
    for given, layout in ((lora, ("lora",)), (tmp_path / "network.safetensors", ("safetensors", "--config", few))):
        out = tmp_path / "out.safetensors"
        assert run(given, out, "--dtype", "float16", "--force", "--to", *layout) == 2
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert f" of {given} would not be finite in it; bfloat16 holds" in line and not out.exists()
        assert run(given, out, "--dtype", "bfloat16", "--force", "--to", *layout) == 0
        assert all(tensor.isfinite().all() for tensor in load_file(out).values())
        out.unlink()


def of_two_blocks(folder: Path) -> Path:
    path = folder / "few.yaml"
    path.write_text(f"base: {SHAPES}\nmodel: {{depth: 2}}\n")
    return path


def of_another_network(path: Path) -> dict[str, Tensor]:
    return {
        name: tensor[..., :5].contiguous() if tensor.dim() == 2 else tensor for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{base}", "x.safetensors", "--to", "safetensors", "--fuse", "{wide}"], "it is for another network"),
        (["{base}", "x.safetensors", "--to", "safetensors", "--fuse", "none"], "--fuse: 'none' not found"),
        (["{base}", "x.safetensors", "--to", "safetensors", "--fuse", "{huge}"], "would not be finite in bfloat16"),
        (["{base}", "x.safetensors", "--to", "safetensors", "--fuse", "{wide}", "--fuse", "{wide}"], "given twice"),
        (["{few}", "x.safetensors", "--to", "safetensors", "--fuse", "{run}"], "for another network, of num_layers 12"),
        (
            ["{plain few}", "x.safetensors", "--to", "safetensors", "--fuse", "{run}"],
            "on a network of 12 blocks",
        ),
        (["{plain few}", "x.safetensors", "--to", "safetensors", "--fuse", "{lora}"], "needs its YAML (--config): "),
        (
            ["{base}", "x.safetensors", "--to", "safetensors", "--fuse", "{run}", "--key", "critic"],
            "holds no such network; it has generator, generator_ema",
        ),
        (["{base}", "x.safetensors", "--to", "safetensors", "--fuse", "{odd}"], "odd.safetensors: its longsana_base"),
        (["{lora}", "x.pth", "--to", "upstream"], "a LoRA, which is no network by itself"),
        (["{run}", "x.safetensors", "--to", "lora", "--key", "critic"], "--key critic: "),
        (["{base}", "x.safetensors", "--to", "lora"], "is no checkpoint folder of training with train.lora.rank"),
        (["{run}", "x.safetensors", "--to", "safetensors"], "holds the factors of a LoRA alone; --to lora writes them"),
        (["{run}", "x.pth", "--to", "lora"], "the layout lora is a file, NAME.safetensors"),
        (["{run}", "x.safetensors", "--to", "lora", "--causal"], "--causal: has no meaning with --to lora"),
        (["{vae}", "x", "--to", "diffusers", "--fuse", "{wide}"], "--fuse: has no meaning for a VAE"),
    ],
)
def test_bad_input_is_one_line(arguments, says, checkpoint, lora, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_file(of_another_network(lora), "wide.safetensors")
    save_file({name: 1e25 * tensor for name, tensor in load_file(lora).items()}, "huge.safetensors")
    save_file(load_file(lora), "odd.safetensors", {"longsana_base": '{"network": 8}'})
    places = {
        "base": SHIPPED,
        "run": checkpoint,
        "vae": ROOT / "asset/shapes/vae",
        "lora": lora,
        "few": few_blocks("longsana"),
        "plain few": few_blocks("longsana"),
    }
    places |= {name: f"{name}.safetensors" for name in ("wide", "huge", "odd")}
    config = ["--config", str(SHAPES)] if arguments[0] in ("{base}", "{lora}") and "lora" not in arguments else []
    if arguments[0] == "{few}":
        config = ["--config", str(of_two_blocks(tmp_path))]
    before = sorted(tmp_path.iterdir())
    assert run(*(word.format(**places) for word in arguments), *config) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert sorted(tmp_path.iterdir()) == before


def test_a_checkpoint_of_factors_is_no_network(checkpoint):
    with pytest.raises(InputError, match="a checkpoint of a LoRA, which holds its factors alone; put them into"):
        open_checkpoint(checkpoint, "generator")
