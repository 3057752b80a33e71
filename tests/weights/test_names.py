from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from longsana.config import ModelConfig
from longsana.models.embeddings import TextEmbedding
from longsana.weights.build import build_model
from longsana.weights.names import NULL_TOKENS, diffusers_config, foreign
from longsana.weights.network import save_checkpoint
from tests.weights.checkpoints import TINY, assert_same, load, meta, weights


def test_the_2b_network_in_three_namings() -> None:
    model = meta(ModelConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_056_862_144
    assert len(list(model.parameters())) == 416
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    there = {part.name: part.shape for name, shape in shapes.items() for part in foreign(name, shape, "upstream")}
    assert len(there) == 417  # 418 in the public file, with pos_embed
    # A sample of method.md 1.7, literally.
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
