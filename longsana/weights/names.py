"""One network under three sets of names: ours, those of the published checkpoints, and those of diffusers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from longsana.config import ARCHITECTURES, Architecture, ModelConfig
from longsana.runtime.errors import InputError

Naming = Literal["longsana", "upstream", "diffusers"]
NAMINGS: tuple[Naming, ...] = ("longsana", "upstream", "diffusers")

# Ours: (upstream, diffusers). Several names: the tensor is cut along its first axis there. None: it is not kept.
OUTER = {
    "patch_embed": ("x_embedder.proj", "patch_embedding"),
    "time_embed.linear_1": ("t_embedder.mlp.0", "time_embed.emb.timestep_embedder.linear_1"),
    "time_embed.linear_2": ("t_embedder.mlp.2", "time_embed.emb.timestep_embedder.linear_2"),
    "time_embed.modulation": ("t_block.1", "time_embed.linear"),
    "text_embed.linear_1": ("y_embedder.y_proj.fc1", "caption_projection.linear_1"),
    "text_embed.linear_2": ("y_embedder.y_proj.fc2", "caption_projection.linear_2"),
    "text_embed.norm": ("attention_y_norm", "caption_norm"),
    "text_embed.null_tokens": ("y_embedder.y_embedding", ""),
    "final.modulation": ("final_layer.scale_shift_table", "scale_shift_table"),
    "final.linear": ("final_layer.linear", "proj_out"),
    "decay_logit": ("decay_logit", "decay_logit"),  # ours: nobody has published one
}
BLOCK = {
    "modulation": ("scale_shift_table", "scale_shift_table"),
    "attn.qkv": ("attn.qkv", "attn1.to_q attn1.to_k attn1.to_v"),
    "attn.q_norm": ("attn.q_norm", "attn1.norm_q"),
    "attn.k_norm": ("attn.k_norm", "attn1.norm_k"),
    "attn.out": ("attn.proj", "attn1.to_out.0"),
    "cross_attn.q": ("cross_attn.q_linear", "attn2.to_q"),
    "cross_attn.kv": ("cross_attn.kv_linear", "attn2.to_k attn2.to_v"),
    "cross_attn.q_norm": ("cross_attn.q_norm", "attn2.norm_q"),
    "cross_attn.k_norm": ("cross_attn.k_norm", "attn2.norm_k"),
    "cross_attn.out": ("cross_attn.proj", "attn2.to_out.0"),
    "feed_forward.expand": ("mlp.inverted_conv.conv", "ff.conv_inverted"),
    "feed_forward.depthwise": ("mlp.depth_conv.conv", "ff.conv_depth"),
    "feed_forward.project": ("mlp.point_conv.conv", "ff.conv_point"),
    "feed_forward.temporal": ("mlp.t_conv", "ff.conv_temp"),
}
BLOCKS: dict[Naming, str] = {"upstream": "blocks", "diffusers": "transformer_blocks"}
# Linear layers that are 1x1 convolutions elsewhere.
POINTWISE = ("feed_forward.expand.weight", "feed_forward.project.weight")
NULL_TOKENS, DECAY_LOGIT = "text_embed.null_tokens", "decay_logit"
OPTIONAL = (NULL_TOKENS, DECAY_LOGIT)
"""Tensors that a file may lack: they are zeros."""
BASE_CLASS, CAUSAL_CLASS = "SanaVideoTransformer3DModel", "SanaVideoCausalTransformer3DModel"
# Keys of a diffusers config that make no other network, or one that has no such part here.
INFORMATIVE = ("_class_name", "sample_size", "rope_max_seq_len")
# What a network keeps of its past, a matter of choice: in a diffusers config only where it is not as published.
PAST = ("num_cached_blocks", "state_decay", "num_sink_blocks")
ABSENT = {"dropout": 0, "guidance_embeds": False}


class Foreign(NamedTuple):
    """A tensor, or a part of one, as another naming has it."""

    name: str
    shape: tuple[int, ...]


def foreign(name: str, shape: tuple[int, ...], naming: Naming) -> list[Foreign]:
    """Name the parts elsewhere of our tensor `name`; stacked along the first axis and reshaped, they are it.

    Raises:
        KeyError: the network has no tensor of this name.
    """
    if naming == "longsana":
        return [Foreign(name, shape)]
    column = 0 if naming == "upstream" else 1
    found = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+?)(\.weight|\.bias)?", name)
    assert found is not None
    block, module, leaf = found[1], found[2], found[3] or ""
    modules = (OUTER if block is None else BLOCK)[module][column].split()
    prefix = "" if block is None else f"{BLOCKS[naming]}.{block}."
    if name.endswith(POINTWISE):
        shape = (*shape, 1, 1)
    return [Foreign(f"{prefix}{part}{leaf}", (shape[0] // len(modules), *shape[1:])) for part in modules]


def diffusers_config(config: ModelConfig, *, causal: bool = False) -> dict[str, Any]:
    """The `config.json` of a network as a diffusers `SanaVideoTransformer3DModel`.

    It has keys that diffusers does not know, those of PAST, only for a network that does not keep all of its past.

    causal: as the class that the published LongSANA repository names, of which diffusers has none.
    """
    size = config.architecture()
    return {
        "_class_name": CAUSAL_CLASS if causal else BASE_CLASS,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "num_attention_heads": size.hidden_size // config.linear_head_dim,
        "attention_head_dim": config.linear_head_dim,
        "num_layers": size.depth,
        "num_cross_attention_heads": size.num_heads,
        "cross_attention_head_dim": size.hidden_size // size.num_heads,
        "cross_attention_dim": size.hidden_size,
        "caption_channels": config.caption_channels,
        "mlp_ratio": config.mlp_ratio,
        "attention_bias": False,
        "sample_size": 30 if size.patch_size[1] == 2 else 22,
        "patch_size": list(size.patch_size),
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
    } | chosen_past(config)


def chosen_past(config: ModelConfig) -> dict[str, Any]:
    """The settings of PAST that are not the published ones, as JSON has them; a decay of 1 is none."""
    published, own = ModelConfig(), {name: getattr(config, name) for name in PAST}
    if own["state_decay"] == 1:
        own["state_decay"] = published.state_decay
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in own.items()
        if value != getattr(published, name)
    }


def written_past(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of PAST that a diffusers `config.json` has."""
    return {name: values[name] for name in PAST if values.get(name) is not None}


def from_diffusers_config(values: Mapping[str, Any]) -> ModelConfig:
    """The network that a diffusers `config.json` describes: the inverse of `diffusers_config`.

    Raises:
        InputError: it describes one of another kind.
    """
    heads, head_dim = values["num_attention_heads"], values["attention_head_dim"]
    patch = values["patch_size"]
    size = Architecture(
        values["num_layers"], heads * head_dim, values["num_cross_attention_heads"] or heads, (patch[0], *patch[1:])
    )
    config = ModelConfig(
        model=next((name for name, known in ARCHITECTURES.items() if known == size), ModelConfig.model),
        depth=size.depth,
        hidden_size=size.hidden_size,
        num_heads=size.num_heads,
        patch_size=size.patch_size,
        in_channels=values["in_channels"],
        linear_head_dim=head_dim,
        mlp_ratio=values["mlp_ratio"],
        caption_channels=values["caption_channels"],
        **written_past(values),
    )
    wrong = differences(values, config)
    wrong += [f"{name} {values[name]}" for name, plain in ABSENT.items() if values.get(name, plain) != plain]
    if wrong:
        raise InputError(f"the transformer's config.json: not a network that is known here: {', '.join(wrong)}")
    return config


def differences(written: Mapping[str, Any], config: ModelConfig) -> list[str]:
    """List what a diffusers `config.json` says of a network that is not so of this one."""
    return [
        f"{name} {written[name]} (needed: {value})"
        for name, value in diffusers_config(config).items()
        if name not in (*INFORMATIVE, *PAST) and written.get(name) is not None and _plain(written[name]) != value
    ]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
