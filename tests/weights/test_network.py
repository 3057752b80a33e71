from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from longsana.runtime.errors import InputError
from longsana.weights.build import build_model
from longsana.weights.names import NULL_TOKENS
from longsana.weights.network import LAYOUTS, Layout, load_weights, save_checkpoint
from tests.weights.checkpoints import PATHS, TINY, assert_same, load, meta, upstream, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_round_trip(layout: Layout, dtype: torch.dtype, tmp_path: Path) -> None:
    expected = {name: tensor.to(dtype) for name, tensor in weights().items()}
    path = tmp_path / PATHS[layout]
    save_checkpoint(weights(seed=1), path, layout, TINY)
    save_checkpoint(expected, path, layout, TINY)  # over another
    if layout == "diffusers":
        expected[NULL_TOKENS] = torch.zeros_like(expected[NULL_TOKENS])  # diffusers has no place for it
    assert_same(load(path, dtype=dtype), expected)
    assert not [file for file in tmp_path.rglob("*") if "partial" in file.name]


@pytest.mark.parametrize("layout", ["diffusers", "safetensors"])
def test_round_trip_in_shards(layout: Layout, tmp_path: Path) -> None:
    path = tmp_path / PATHS[layout]
    expected = weights()
    save_checkpoint(weights(seed=1), path, layout, TINY)
    save_checkpoint(expected, path, layout, TINY, shard_bytes=60_000)
    if layout == "diffusers":
        expected[NULL_TOKENS].zero_()
    folder = path if layout == "diffusers" else tmp_path
    (index,) = folder.glob("*.safetensors.index.json")
    assert len(list(folder.glob("*-of-*.safetensors"))) > 3
    assert not index.with_name(index.name.removesuffix(".index.json")).exists()  # the whole file of before
    assert_same(load(index), expected)
    assert_same(load(folder), expected)
    save_checkpoint(weights(seed=2), path, layout, TINY)  # whole again
    assert torch.equal(load(path)["final.linear.bias"], weights(seed=2)["final.linear.bias"])
    assert not index.exists()


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_consumed_weights_are_let_go(layout: Layout, tmp_path: Path) -> None:
    for name, given, consume in (("kept", weights(), False), ("consumed", weights(), True)):
        (tmp_path / name).mkdir()
        count = len(given)
        save_checkpoint(given, tmp_path / name / PATHS[layout], layout, TINY, consume=consume)
        assert len(given) == (0 if consume else count)
    assert_same(load(tmp_path / "consumed" / PATHS[layout]), load(tmp_path / "kept" / PATHS[layout]))


def test_upstream_file_is_the_public_one(tmp_path: Path) -> None:
    expected = weights()
    save_checkpoint(expected, tmp_path / "a.pth", "upstream", TINY)
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    assert list(content) == ["state_dict"]
    assert_same(content["state_dict"], upstream())
    assert torch.equal(content["state_dict"]["y_embedder.y_embedding"], expected[NULL_TOKENS])
    assert torch.equal(
        content["state_dict"]["blocks.1.mlp.point_conv.conv.weight"],
        expected["blocks.1.feed_forward.project.weight"][:, :, None, None],
    )


def test_trainer_file_holds_several_networks(tmp_path: Path) -> None:
    networks = {name: weights(seed) for seed, name in enumerate(("generator", "generator_ema", "critic"))}
    path = tmp_path / "model.pt"
    others = {name: networks[name] for name in ("generator_ema", "critic")}
    save_checkpoint(networks["generator"], path, "trainer", TINY, others=others, step=700)
    content = torch.load(path, weights_only=True)
    assert set(content) == {"generator", "generator_ema", "critic", "step"}
    assert content["step"] == 700
    assert all(name.startswith("model.") for name in content["critic"])
    assert_same(load(path), networks["generator"])
    for key, expected in networks.items():
        assert_same(load(path, key=key), expected)
        config = dataclasses.replace(TINY, load_from=str(path), checkpoint_key=key)
        assert_same(dict(build_model(config, device="cpu", dtype=torch.float32).state_dict()), expected)

    save_checkpoint(networks["generator"], path, "trainer", TINY)
    with pytest.raises(
        InputError, match=r"no network 'generator_ema'.*set checkpoint_key, or --key of longsana convert, to generator$"
    ):
        load(path, key="generator_ema")
    with pytest.raises(ValueError, match="only the trainer layout"):
        save_checkpoint(networks["generator"], path, "upstream", TINY, others=others)


def test_the_names_decide_and_not_the_suffix(tmp_path: Path) -> None:
    expected = weights()
    torch.save(upstream(), tmp_path / "bare.bin")
    torch.save({f"model.{name}": tensor for name, tensor in upstream().items()}, tmp_path / "prefixed.pt")
    torch.save({"generator": {"state_dict": upstream()}}, tmp_path / "nested.pt")
    torch.save({"generator": upstream(), "step": 1}, tmp_path / "unprefixed.pt")
    torch.save(expected, tmp_path / "own.pth")
    torch.save(upstream(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save({name: torch.nn.Parameter(tensor) for name, tensor in upstream().items()}, tmp_path / "parameters.pth")
    save_file(upstream(), tmp_path / "upstream.safetensors")
    save_file(upstream(), tmp_path / "misnamed.pth")
    for path in sorted(tmp_path.iterdir()):
        assert_same(load(path), expected)


def test_critic_may_start_from_the_base_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({"state_dict": upstream()}, tmp_path / "base.pth")
    with caplog.at_level(logging.INFO, "longsana"):
        assert_same(load(tmp_path / "base.pth", key="critic"), weights())
    assert "holds one network, which is taken for 'critic'" in caplog.text


def test_null_tokens_may_be_absent(tmp_path: Path) -> None:
    expected = weights()
    del expected[NULL_TOKENS]
    save_checkpoint(expected, tmp_path / "a.pth", "upstream", TINY)
    loaded = load(tmp_path / "a.pth")
    assert torch.equal(loaded.pop(NULL_TOKENS), torch.zeros(7, 20))
    assert_same(loaded, expected)


def test_writing_views_keeps_the_file_small(tmp_path: Path) -> None:
    """Tensors cut out of one flat buffer, as sharded training has them, and not contiguous ones."""
    expected = weights()
    sizes = [tensor.numel() for tensor in expected.values()]
    flat = torch.cat([*(tensor.flatten() for tensor in expected.values()), torch.zeros(sum(sizes))])
    parts = flat[: sum(sizes)].split(sizes)
    views = {name: part.view(expected[name].shape) for name, part in zip(expected, parts, strict=True)}
    views["final.linear.weight"] = expected["final.linear.weight"].T.contiguous().T
    for layout, name in PATHS.items():
        save_checkpoint(views, tmp_path / name, layout, TINY)
        size = sum(file.stat().st_size for file in (tmp_path / name, *(tmp_path / name).rglob("*")) if file.is_file())
        assert size < 1.3 * sum(tensor.nbytes for tensor in expected.values())
    assert_same(load(tmp_path / "model.pth"), expected)


def test_writer_refuses_other_networks(tmp_path: Path) -> None:
    wrong = weights()
    wrong["blocks.0.attn.qkw.weight"] = wrong.pop("blocks.0.attn.qkv.weight")
    wrong["final.linear.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"blocks.0.attn.qkv.weight, blocks.0.attn.qkw.weight, final.linear.bias$"):
        save_checkpoint(wrong, tmp_path / "a.pth", "upstream", TINY)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_failed_write_leaves_the_old_file(
    layout: Layout, tmp_path: Path, limited: Callable[..., AbstractContextManager[None]]
) -> None:
    path = tmp_path / PATHS[layout]
    save_checkpoint(weights(), path, layout, TINY)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    with limited(20_000), pytest.raises(OSError, match="File too large") as caught:
        save_checkpoint(weights(seed=1), path, layout, TINY)
    assert str(path) in str(caught.value)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_everything_wrong_is_listed_at_once(tmp_path: Path) -> None:
    state = upstream()
    state["blocks.0.attn.pro.weight"] = state.pop("blocks.0.attn.proj.weight")
    del state["t_block.1.bias"]
    state["blocks.1.mlp.t_conv.weight"] = torch.zeros(48, 48, 5, 1)
    state["y_embedder.y_embedding"] = torch.zeros(300, 20)
    state["x_embedder.proj.bias"] = torch.zeros(48, dtype=torch.int8)
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    model = build_model(TINY, device="cpu", dtype=torch.float32)
    before = dict(model.state_dict())
    with pytest.raises(InputError) as caught:
        load_weights(model, tmp_path / "a.pth")
    message = str(caught.value)
    assert "\n" not in message
    assert str(tmp_path / "a.pth") in message
    assert re.search(r"missing 2: t_block.1.bias, blocks.0.attn.proj.weight;", message)
    assert "unexpected 1: blocks.0.attn.pro.weight (did you mean 'blocks.0.attn.proj.weight'?);" in message
    assert "wrong shape or dtype 3: " in message
    assert "blocks.1.mlp.t_conv.weight [48, 48, 5, 1] (needed: [48, 48, 3, 1])" in message
    assert "y_embedder.y_embedding [300, 20] (needed: [7, 20])" in message
    assert "x_embedder.proj.bias [48] int8 (needed: [48])" in message
    after = dict(model.state_dict())
    assert all(after[name].data_ptr() == before[name].data_ptr() for name in before)
    assert torch.equal(after["final.linear.weight"], before["final.linear.weight"])


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_weights_of_another_depth_say_which(layout: Layout, tmp_path: Path) -> None:
    path = tmp_path / PATHS[layout]
    save_checkpoint(weights(), path, layout, TINY)
    deeper = dataclasses.replace(TINY, depth=TINY.architecture().depth + 1)
    with pytest.raises(InputError, match=r"2 blocks, and not 3 \(beside its load_from, depth: 2 takes them\); missing"):
        load_weights(meta(deeper), path)


@pytest.mark.parametrize("name", sorted(set(upstream()) - {"y_embedder.y_embedding"}))
def test_no_tensor_may_be_missing(name: str, tmp_path: Path) -> None:
    state = upstream()
    del state[name]
    save_file(state, tmp_path / "a.safetensors")
    model = meta()
    with pytest.raises(InputError, match=rf"missing 1: {re.escape(name)}$"):
        load_weights(model, tmp_path / "a.safetensors")
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_long_lists_are_cut(tmp_path: Path) -> None:
    deep = dataclasses.replace(TINY, depth=9)
    save_checkpoint(weights(config=deep), tmp_path / "deep.pth", "upstream", deep)
    with pytest.raises(InputError, match=r"unexpected 140: .*, \.\.\.") as caught:
        load(tmp_path / "deep.pth")
    assert len(str(caught.value)) < 2000


def test_only_two_names_are_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    extra = {"pos_embed": torch.zeros(1, 18, 48), "logvar_linear.weight": torch.zeros(1, 48)}
    torch.save({"state_dict": upstream() | extra}, tmp_path / "a.pth")
    with caplog.at_level(logging.INFO, "longsana"):
        assert_same(load(tmp_path / "a.pth"), weights())
    assert all(f"{name} is not used" in caplog.text for name in extra)
    torch.save({"state_dict": upstream() | {"blocks.0.pos_embed": torch.zeros(3)}}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"unexpected 1: blocks\.0\.pos_embed"):
        load(tmp_path / "a.pth")


def test_config_of_a_diffusers_folder_must_agree(tmp_path: Path) -> None:
    save_checkpoint(weights(), tmp_path, "diffusers", TINY)
    other = meta(dataclasses.replace(TINY, num_heads=2))  # invisible in the shapes
    with pytest.raises(InputError, match=r"config\.json 2: num_cross_attention_heads 4 \(needed: 2\), cross_att"):
        load_weights(other, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_cross_attention_heads": None}))
    load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: cannot be read"):
        load(tmp_path)
    (tmp_path / "config.json").unlink()
    load(tmp_path)
