from __future__ import annotations

import dataclasses
import json
import logging
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longsana.config import ModelConfig
from longsana.models.build import build_model
from longsana.models.dit import LongSanaDiT
from longsana.models.embeddings import TextEmbedding
from longsana.models.naming import NULL_TOKENS, diffusers_config, foreign
from longsana.models.weights import LAYOUTS, Layout, load_weights, save_checkpoint
from longsana.runtime.errors import InputError

TINY = ModelConfig(depth=2, hidden_size=48, num_heads=4, linear_head_dim=8, caption_channels=20, caption_length=7)
PATHS: dict[Layout, str] = {
    "upstream": "model.pth",
    "trainer": "model.pt",
    "diffusers": "folder",
    "safetensors": "model.safetensors",
}


def meta(config: ModelConfig = TINY) -> LongSanaDiT:
    with torch.device("meta"):
        return LongSanaDiT(config)


def weights(seed: int = 0, config: ModelConfig = TINY) -> dict[str, Tensor]:
    """Different random numbers in every tensor, so that no two can be mistaken for each other."""
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=rng) for name, tensor in meta(config).state_dict().items()}


def load(path: Path, **options: Any) -> dict[str, Tensor]:
    model = meta()
    load_weights(model, path, **options)
    return dict(model.state_dict())


def upstream(seed: int = 0) -> dict[str, Tensor]:
    """The dict inside the public checkpoint."""
    return {
        part.name: tensor.reshape(part.shape)
        for name, tensor in weights(seed).items()
        for part in foreign(name, tuple(tensor.shape), "upstream")
    }


def assert_same(loaded: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name


# ---- names ----------------------------------------------------------------------------------------------------------


def test_the_2b_network_in_three_namings() -> None:
    model = meta(ModelConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_056_862_144
    assert len(list(model.parameters())) == 416
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    there = {part.name: part.shape for name, shape in shapes.items() for part in foreign(name, shape, "upstream")}
    assert len(there) == 417  # 418 in the public file, with pos_embed
    # A sample of facts 2.1 and 2.2, literally.
    for name, shape in {
        "x_embedder.proj.weight": (2240, 16, 1, 2, 2),
        "t_block.1.weight": (13440, 2240),
        "y_embedder.y_embedding": (300, 2304),
        "final_layer.linear.weight": (64, 2240),
        "blocks.19.scale_shift_table": (6, 2240),
        "blocks.0.attn.qkv.weight": (6720, 2240),
        "blocks.0.cross_attn.kv_linear.bias": (4480,),
        "blocks.0.mlp.inverted_conv.conv.weight": (13440, 2240, 1, 1),
        "blocks.0.mlp.inverted_conv.conv.bias": (13440,),
        "blocks.0.mlp.depth_conv.conv.weight": (13440, 1, 3, 3),
        "blocks.0.mlp.point_conv.conv.weight": (2240, 6720, 1, 1),
        "blocks.0.mlp.t_conv.weight": (2240, 2240, 3, 1),
    }.items():
        assert there[name] == shape


# Shapes cannot tell most of these apart, and a round trip forgives a name that is wrong both ways.
UPSTREAM_NAMES = """
patch_embed.weight                      x_embedder.proj.weight
patch_embed.bias                        x_embedder.proj.bias
time_embed.linear_1.weight              t_embedder.mlp.0.weight
time_embed.linear_1.bias                t_embedder.mlp.0.bias
time_embed.linear_2.weight              t_embedder.mlp.2.weight
time_embed.linear_2.bias                t_embedder.mlp.2.bias
time_embed.modulation.weight            t_block.1.weight
time_embed.modulation.bias              t_block.1.bias
text_embed.linear_1.weight              y_embedder.y_proj.fc1.weight
text_embed.linear_1.bias                y_embedder.y_proj.fc1.bias
text_embed.linear_2.weight              y_embedder.y_proj.fc2.weight
text_embed.linear_2.bias                y_embedder.y_proj.fc2.bias
text_embed.norm.weight                  attention_y_norm.weight
text_embed.null_tokens                  y_embedder.y_embedding
final.modulation                        final_layer.scale_shift_table
final.linear.weight                     final_layer.linear.weight
final.linear.bias                       final_layer.linear.bias
blocks.1.modulation                     blocks.1.scale_shift_table
blocks.1.attn.qkv.weight                blocks.1.attn.qkv.weight
blocks.1.attn.q_norm.weight             blocks.1.attn.q_norm.weight
blocks.1.attn.k_norm.weight             blocks.1.attn.k_norm.weight
blocks.1.attn.out.weight                blocks.1.attn.proj.weight
blocks.1.attn.out.bias                  blocks.1.attn.proj.bias
blocks.1.cross_attn.q.weight            blocks.1.cross_attn.q_linear.weight
blocks.1.cross_attn.q.bias              blocks.1.cross_attn.q_linear.bias
blocks.1.cross_attn.kv.weight           blocks.1.cross_attn.kv_linear.weight
blocks.1.cross_attn.kv.bias             blocks.1.cross_attn.kv_linear.bias
blocks.1.cross_attn.q_norm.weight       blocks.1.cross_attn.q_norm.weight
blocks.1.cross_attn.k_norm.weight       blocks.1.cross_attn.k_norm.weight
blocks.1.cross_attn.out.weight          blocks.1.cross_attn.proj.weight
blocks.1.cross_attn.out.bias            blocks.1.cross_attn.proj.bias
blocks.1.feed_forward.expand.weight     blocks.1.mlp.inverted_conv.conv.weight
blocks.1.feed_forward.expand.bias       blocks.1.mlp.inverted_conv.conv.bias
blocks.1.feed_forward.depthwise.weight  blocks.1.mlp.depth_conv.conv.weight
blocks.1.feed_forward.depthwise.bias    blocks.1.mlp.depth_conv.conv.bias
blocks.1.feed_forward.project.weight    blocks.1.mlp.point_conv.conv.weight
blocks.1.feed_forward.temporal.weight   blocks.1.mlp.t_conv.weight
"""


def test_every_name_of_the_published_checkpoint() -> None:
    expected = dict(line.split() for line in UPSTREAM_NAMES.split("\n") if line)
    ours = {name: tuple(t.shape) for name, t in meta().state_dict().items() if not name.startswith("blocks.0.")}
    assert {name: foreign(name, shape, "upstream")[0].name for name, shape in ours.items()} == expected


def test_names_of_the_2b_network_in_diffusers() -> None:
    from diffusers import SanaVideoTransformer3DModel

    config = {k: v for k, v in diffusers_config(ModelConfig()).items() if not k.startswith("_")}
    with torch.device("meta"):
        theirs = SanaVideoTransformer3DModel(**config).state_dict()
    ours = [
        part
        for name, tensor in meta(ModelConfig()).state_dict().items()
        for part in foreign(name, tuple(tensor.shape), "diffusers")
    ]
    assert len(ours) == len(theirs) == 496
    assert {part.name: part.shape for part in ours} == {name: tuple(tensor.shape) for name, tensor in theirs.items()}


@pytest.mark.parametrize("shard_bytes", [10_000_000_000, 20_000])
def test_diffusers_loads_what_we_write(shard_bytes: int, tmp_path: Path) -> None:
    from diffusers import SanaVideoTransformer3DModel

    expected = weights()
    save_checkpoint(expected, tmp_path, "diffusers", TINY, shard_bytes=shard_bytes)
    theirs, info = SanaVideoTransformer3DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert theirs.config.num_cross_attention_heads == 4
    block = theirs.transformer_blocks[1]
    query, key, value = expected["blocks.1.attn.qkv.weight"].chunk(3)
    assert torch.equal(block.attn1.to_q.weight, query)
    assert torch.equal(block.attn1.to_k.weight, key)
    assert torch.equal(block.attn1.to_v.weight, value)
    assert torch.equal(block.attn2.to_v.bias, expected["blocks.1.cross_attn.kv.bias"].chunk(2)[1])
    assert torch.equal(block.ff.conv_inverted.weight[:, :, 0, 0], expected["blocks.1.feed_forward.expand.weight"])


@torch.no_grad()
def test_diffusers_computes_the_same_with_what_we_write(tmp_path: Path) -> None:
    """So every diffusers name is right: each tensor matters to the output, and no two are equal."""
    from diffusers import SanaVideoTransformer3DModel

    rng = torch.Generator().manual_seed(5)
    state = {name: 0.3 * tensor for name, tensor in weights().items()}
    save_checkpoint(state, tmp_path, "diffusers", TINY)
    theirs = SanaVideoTransformer3DModel.from_pretrained(tmp_path).eval()
    # The two eps that differ there.
    config = dataclasses.replace(TINY, load_from=str(tmp_path), linear_attn_eps=1e-15, cross_norm_eps=1e-5)
    ours = build_model(config, device="cpu", dtype=torch.float32)
    x = torch.randn(2, 16, 3, 4, 6, generator=rng)
    tokens, t = torch.randn(2, 7, 20, generator=rng), torch.tensor([700, 30])
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    velocity, _ = ours(x, t, TextEmbedding(tokens, mask))
    (expected,) = theirs(x, tokens, t, encoder_attention_mask=mask.long(), return_dict=False)
    torch.testing.assert_close(velocity, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_we_load_what_diffusers_writes(tmp_path: Path) -> None:
    from diffusers import SanaVideoTransformer3DModel

    config = {k: v for k, v in diffusers_config(TINY).items() if not k.startswith("_")}
    theirs = SanaVideoTransformer3DModel(**config)
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "pipeline/transformer", max_shard_size="50KB")
    (tmp_path / "pipeline/model_index.json").write_text("{}")
    one = load(tmp_path / "one")
    assert torch.equal(one["final.linear.weight"], theirs.proj_out.weight)
    assert not one[NULL_TOKENS].any()
    assert_same(load(tmp_path / "pipeline"), one)


# ---- layouts --------------------------------------------------------------------------------------------------------


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
    with pytest.raises(InputError, match=r"no network 'generator_ema'.*set checkpoint_key to generator$"):
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
def test_failed_write_leaves_the_old_file(layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / PATHS[layout]
    save_checkpoint(weights(), path, layout, TINY)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    def full(content: object, path: Path, **options: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(weights(seed=1), path, layout, TINY)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


# ---- strictness -----------------------------------------------------------------------------------------------------


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
    assert "wrong shape 3: " in message
    assert "blocks.1.mlp.t_conv.weight [48, 48, 5, 1] (this model: [48, 48, 3, 1])" in message
    assert "y_embedder.y_embedding [300, 20] (this model: [7, 20])" in message
    assert "x_embedder.proj.bias int8 [48] (this model: [48])" in message
    after = dict(model.state_dict())
    assert all(after[name].data_ptr() == before[name].data_ptr() for name in before)
    assert torch.equal(after["final.linear.weight"], before["final.linear.weight"])


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
    with pytest.raises(InputError, match=r"config\.json 2: num_cross_attention_heads 4 \(this model: 2\), cross_att"):
        load_weights(other, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_cross_attention_heads": None}))
    load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: cannot be read"):
        load(tmp_path)
    (tmp_path / "config.json").unlink()
    load(tmp_path)


# ---- bad files ------------------------------------------------------------------------------------------------------


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_with_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": upstream(), "extra": Payload()}, "code.pth")
    torch.save({"state_dict": upstream(), "extra": Payload()}, "old.pth", _use_new_zipfile_serialization=False)
    Path("bare.pkl").write_bytes(pickle.dumps(Payload()))
    for name in ("code.pth", "old.pth", "bare.pkl"):
        with pytest.raises(InputError, match=f"^{name}: refused: .*code"):
            load(Path(name))
    assert not Path("ran").exists()
    with pytest.raises(InputError, match=r"mkdir"):
        load(Path("code.pth"))


@pytest.mark.parametrize("kind", ["pth", "old.pth", "safetensors"])
@pytest.mark.parametrize("keep", [0, 5, 0.01, 0.5, 0.999])
def test_files_cut_short(kind: str, keep: float, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "safetensors":
        save_file(upstream(), path)
    else:
        torch.save({"state_dict": upstream()}, path, _use_new_zipfile_serialization=kind == "pth")
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep >= 1 else keep * len(content))])
    with pytest.raises(InputError, match=rf"{re.escape(str(path))}: .*download or copy it again"):
        load(path)


@pytest.mark.parametrize("kind", ["pth", "old.pth", "safetensors"])
def test_garbled_headers(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "safetensors":
        save_file(upstream(), path)
    else:
        torch.save({"state_dict": upstream()}, path, _use_new_zipfile_serialization=kind == "pth")
    content = bytearray(path.read_bytes())
    start = content.index(b"blocks.0.attn.qkv") - 20
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(str(path))):
        load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"<!DOCTYPE html><html><head>", "neither a PyTorch nor a safetensors file"),
        (b"PK\x03\x04 any other archive", "damaged"),
    ],
)
def test_files_of_another_kind(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(InputError, match=message):
        load(tmp_path / "a.pth")


@pytest.mark.parametrize("content", [{"a": torch.ones(1)}, {}, [torch.ones(1)], {"state_dict": {}}, {"step": 3}])
def test_files_without_this_network(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"a\.pth: (no network in this file|not a LongSANA or SANA-Video network)"):
        load(tmp_path / "a.pth")


def test_incomplete_shards(tmp_path: Path) -> None:
    save_checkpoint(weights(), tmp_path / "m.safetensors", "safetensors", TINY, shard_bytes=60_000)
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    held = load_file(second)
    second.unlink()
    with pytest.raises(InputError, match=rf"{second.name}: no such file, but m\.safetensors\.index\.json lists it"):
        load(tmp_path)
    save_file(held | dict([next(iter(load_file(first).items()))]), second)
    with pytest.raises(InputError, match="is in another shard"):
        load(tmp_path)


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no weights here"):
        load(tmp_path)
    save_checkpoint(weights(), tmp_path / "a.pt", "trainer", TINY)
    assert_same(load(tmp_path), weights())
    (tmp_path / ".b.partial.safetensors").write_bytes(b"half")  # left by a killed save
    assert_same(load(tmp_path), weights())
    save_checkpoint(weights(), tmp_path / "b.pth", "upstream", TINY)
    with pytest.raises(InputError, match=r"several weights files \(a\.pt, b\.pth\) here; name the file"):
        load(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        load(tmp_path / "c.pth")


# ---- the model ------------------------------------------------------------------------------------------------------


def test_loaded_tensors_are_our_own(tmp_path: Path) -> None:
    """In the asked dtype, contiguous, trainable, and not a window on the file."""
    state = upstream()
    state["final_layer.linear.weight"] = state["final_layer.linear.weight"].T.contiguous().T
    torch.save(state, tmp_path / "a.pth")
    model = meta()
    load_weights(model, tmp_path / "a.pth", dtype=torch.float32)
    with (tmp_path / "a.pth").open("r+b") as stream:
        stream.write(bytes((tmp_path / "a.pth").stat().st_size))
    assert_same(dict(model.state_dict()), weights())
    assert all(tensor.is_contiguous() for tensor in model.state_dict().values())
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    assert len(list(model.parameters())) == len(state) - 1

    save_file(upstream(), tmp_path / "a.safetensors")
    half = load(tmp_path / "a.safetensors", dtype=torch.bfloat16)
    assert_same(half, {name: tensor.bfloat16() for name, tensor in weights().items()})


def test_seeded_model_is_filled_and_depends_on_the_seed_alone() -> None:
    def build(load_from: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        config = dataclasses.replace(TINY, load_from=load_from)
        model = build_model(config, device="cpu", dtype=dtype)
        assert not model.training
        assert not any(module.training for module in model.modules())
        return dict(model.state_dict())

    # Memory that nothing fills is NaN.
    torch.use_deterministic_algorithms(True)
    try:
        first = build("seeded:3")
        torch.manual_seed(99)
        assert_same(build("seeded:3"), first)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(tensor.isfinite().all() for tensor in first.values())
    assert not torch.equal(build("seeded:4")["final.linear.weight"], first["final.linear.weight"])
    assert_same(build("seeded:3", torch.bfloat16), {name: tensor.bfloat16() for name, tensor in first.items()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load_from": "seeded:x"}, "model.load_from=seeded:x: the seed must be a whole number"),
        ({"load_from": "seeded:-1"}, "the seed must be"),
        ({"load_from": "no/such.pth"}, r"the checkpoint \(model.load_from\): 'no/such.pth' not found"),
        ({"hidden_size": 50}, "^model: hidden_size 50 must be a multiple"),
        ({"model": "SanaMSVideo_2000M_P2_D21"}, "did you mean 'SanaMSVideo_2000M_P2_D20'"),
    ],
)
def test_configs_that_make_no_model(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_model(dataclasses.replace(TINY, **changes), device="cpu", dtype=torch.float32)


# ---- memory ---------------------------------------------------------------------------------------------------------

MEMORY_SCRIPT = """
import sys, threading, time
import torch
import safetensors.torch
from longsana.config import ModelConfig
from longsana.models.build import build_model

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024

config = eval(sys.argv[1])
# Warm up allocators, thread pools and imports on a model that weighs nothing.
tiny = ModelConfig(depth=1, hidden_size=48, num_heads=4, linear_head_dim=8, caption_channels=20, caption_length=7)
build_model(tiny, device="cpu", dtype=torch.bfloat16)
torch.cat([torch.zeros(1000, 1000), torch.zeros(1000, 1000)]).bfloat16()
base, peak, running = anonymous(), 0, True

def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
model = build_model(config, device="cpu", dtype=getattr(torch, sys.argv[2]))
peak = max(peak, anonymous())
running = False
thread.join()
size = sum(t.nbytes for t in model.state_dict().values())
print(peak - base, anonymous() - base, size, model.final.linear.weight.float().sum().item())
"""


def measure(config: ModelConfig, dtype: str) -> tuple[float, ...]:
    """Anonymous memory of a fresh process above its baseline: peak, after loading; bytes of the model; a checksum."""
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, repr(config), dtype],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return tuple(map(float, run.stdout.split()))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_loading_holds_one_copy(layout: Layout, tmp_path: Path) -> None:
    wide = ModelConfig(depth=3, hidden_size=1120, num_heads=10, caption_channels=64, caption_length=8)
    state = {name: torch.full(tensor.shape, 0.5) for name, tensor in meta(wide).state_dict().items()}
    path = tmp_path / PATHS[layout]
    # The network that is not asked for must not be read.
    others = {"critic": {name: tensor + 1 for name, tensor in state.items()}} if layout == "trainer" else None
    save_checkpoint(state, path, layout, wide, others=others)
    file = sum(tensor.nbytes for tensor in state.values())
    assert 250e6 < file < 450e6
    peak, after, size, checksum = measure(dataclasses.replace(wide, load_from=str(path)), "float32")
    assert checksum == state["final.linear.weight"].sum().item()
    assert 0.9 * size < after  # the measure sees the model: nothing of it is still in the file
    assert peak < 1.3 * file


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_loading_the_2b_network_holds_one_copy(tmp_path: Path) -> None:
    config = ModelConfig()
    state = {
        name: torch.full(tensor.shape, 0.5, dtype=torch.bfloat16) for name, tensor in meta(config).state_dict().items()
    }
    checksum = state["final.linear.weight"].float().sum().item()
    path = tmp_path / "model.pth"
    save_checkpoint(state, path, "upstream", config)
    del state
    peak, after, size, loaded = measure(dataclasses.replace(config, load_from=str(path)), "bfloat16")
    assert path.stat().st_size > 4.1e9
    assert loaded == checksum
    assert 0.9 * size < after
    assert peak < 1.3 * path.stat().st_size
