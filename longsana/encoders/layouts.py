"""Names and shapes of what VAEs and text encoders hold, from their config.json: their libraries take seconds to import.

Tests compare them with those libraries' networks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

Shape: TypeAlias = tuple[int, ...]
Tensors: TypeAlias = Iterator[tuple[str, Shape]]

WAN_CLASS, LTX2_CLASS = "AutoencoderKLWan", "AutoencoderKLLTX2Video"
WAN_WIDTH = 96
"""base_dim of the published VAE."""
WAN_DEFAULTS: Mapping[str, Any] = {
    "base_dim": WAN_WIDTH,
    "decoder_base_dim": None,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "is_residual": False,
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": None,
}
LTX2_DEFAULTS: Mapping[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 128,
    "block_out_channels": [256, 512, 1024, 2048],
    "decoder_block_out_channels": [256, 512, 1024],
    "layers_per_block": [4, 6, 6, 2, 2],
    "decoder_layers_per_block": [5, 5, 5, 5],
    "spatio_temporal_scaling": [True, True, True, True],
    "decoder_spatio_temporal_scaling": [True, True, True],
    "decoder_inject_noise": [False, False, False, False],
    "downsample_type": ["spatial", "temporal", "spatiotemporal", "spatiotemporal"],
    "upsample_type": ["spatiotemporal", "spatiotemporal", "spatiotemporal"],
    "upsample_factor": [2, 2, 2],
    "timestep_conditioning": False,
    "patch_size": 4,
    "patch_size_t": 1,
    "encoder_causal": True,
}
GEMMA_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}
MOST_LAYERS = 999
"""A network of more is none; a number in a config.json must not take minutes to be refused."""
STRIDES = {"spatial": (1, 2), "temporal": (2, 1), "spatiotemporal": (2, 2), "conv": (2, 2)}
"""Strides of LTX-2's samplers, in time and in space."""


def gemma_tensors(config: Mapping[str, Any]) -> dict[str, Shape]:
    """The decoder of a Gemma 2, without its language head.

    Raises:
        ValueError: a size is none.
    """
    config = {**GEMMA_DEFAULTS, **{name: config[name] for name in GEMMA_DEFAULTS if name in config}}
    for name, size in config.items():
        if type(size) is not int or size < 1 or (name == "num_hidden_layers" and size > MOST_LAYERS):
            raise ValueError(f"{name}={size}")
    width, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    layer = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
        **{
            f"{place}_layernorm": (width,)
            for place in ("input", "post_attention", "pre_feedforward", "post_feedforward")
        },
    }
    return {
        "embed_tokens.weight": (config["vocab_size"], width),
        **{
            f"layers.{number}.{name}.weight": shape
            for number in range(config["num_hidden_layers"])
            for name, shape in layer.items()
        },
        "norm.weight": (width,),
    }


def wan_tensors(config: Mapping[str, Any]) -> dict[str, Shape] | None:
    """A Wan 2.1 VAE under diffusers' names; None where the config is of a kind that has other layers.

    Raises:
        ValueError, TypeError, IndexError, KeyError: the config makes no network.
    """
    config = {**WAN_DEFAULTS, **config}
    _check_layers(config["num_res_blocks"])
    if config["is_residual"] or config["attn_scales"]:
        return None
    latents, width = config["z_dim"], config["base_dim"]
    return {
        **dict(_wan_encoder(config, [width * times for times in (1, *config["dim_mult"])])),
        **dict(_convolution("quant_conv", 2 * latents, 2 * latents, (1, 1, 1))),
        **dict(_convolution("post_quant_conv", latents, latents, (1, 1, 1))),
        **dict(_wan_decoder(config, config["decoder_base_dim"] or width)),
    }


def _wan_encoder(config: Mapping[str, Any], widths: Sequence[int]) -> Tensors:
    yield from _convolution("encoder.conv_in", config["in_channels"], widths[0])
    place, last = 0, len(widths) - 2
    for level, (width, out) in enumerate(pairwise(widths)):
        for _ in range(config["num_res_blocks"]):
            yield from _wan_block(f"encoder.down_blocks.{place}", width, out)
            width, place = out, place + 1
        if level < last:
            yield from _convolution(f"encoder.down_blocks.{place}.resample.1", out, out, (3, 3))
            if config["temperal_downsample"][level]:
                yield from _convolution(f"encoder.down_blocks.{place}.time_conv", out, out, (3, 1, 1))
            place += 1
    yield from _wan_end("encoder", widths[-1], 2 * config["z_dim"])


def _wan_decoder(config: Mapping[str, Any], base: int) -> Tensors:
    times = config["dim_mult"]
    widths = [base * factor for factor in (times[-1], *reversed(times))]
    yield from _convolution("decoder.conv_in", config["z_dim"], widths[0])
    upsampled = [*reversed(config["temperal_downsample"])]
    for level, (width, out) in enumerate(pairwise(widths)):
        block = f"decoder.up_blocks.{level}"
        width = width // 2 if level else width  # the upsampler before halves it
        for number in range(config["num_res_blocks"] + 1):
            yield from _wan_block(f"{block}.resnets.{number}", width, out)
            width = out
        if level < len(times) - 1:
            yield from _convolution(f"{block}.upsamplers.0.resample.1", out, out // 2, (3, 3))
            if upsampled[level]:
                yield from _convolution(f"{block}.upsamplers.0.time_conv", out, 2 * out, (3, 1, 1))
    yield from _wan_end("decoder", widths[-1], config["out_channels"], middle=widths[0])


def _wan_end(half: str, width: int, out: int, middle: int | None = None) -> Tensors:
    """Layers of an encoder or decoder: its middle, and what comes last."""
    middle = middle or width
    for number in range(2):
        yield from _wan_block(f"{half}.mid_block.resnets.{number}", middle, middle)
    yield f"{half}.mid_block.attentions.0.norm.gamma", (middle, 1, 1)
    yield from _convolution(f"{half}.mid_block.attentions.0.to_qkv", middle, 3 * middle, (1, 1))
    yield from _convolution(f"{half}.mid_block.attentions.0.proj", middle, middle, (1, 1))
    yield f"{half}.norm_out.gamma", (width, 1, 1, 1)
    yield from _convolution(f"{half}.conv_out", width, out)


def _wan_block(name: str, width: int, out: int) -> Tensors:
    yield f"{name}.norm1.gamma", (width, 1, 1, 1)
    yield from _convolution(f"{name}.conv1", width, out)
    yield f"{name}.norm2.gamma", (out, 1, 1, 1)
    yield from _convolution(f"{name}.conv2", out, out)
    if width != out:
        yield from _convolution(f"{name}.conv_shortcut", width, out, (1, 1, 1))


def _convolution(name: str, width: int, out: int, kernel: Shape = (3, 3, 3)) -> Tensors:
    yield f"{name}.weight", (out, width, *kernel)
    yield f"{name}.bias", (out,)


def ltx2_tensors(config: Mapping[str, Any]) -> dict[str, Shape] | None:
    """An LTX-2 VAE under diffusers' names; None where the config is of a kind that has other layers.

    Raises:
        ValueError, TypeError, IndexError, KeyError: the config makes no network.
    """
    config = {**LTX2_DEFAULTS, **config}
    _check_layers(*config["layers_per_block"], *config["decoder_layers_per_block"])
    noise = config["decoder_inject_noise"]
    if config["timestep_conditioning"] or (any(noise) if isinstance(noise, list | tuple) else noise):
        return None
    latents = config["latent_channels"]
    return {
        "latents_mean": (latents,),
        "latents_std": (latents,),
        **dict(_ltx2_encoder(config, latents)),
        **dict(_ltx2_decoder(config, latents)),
    }


def _ltx2_encoder(config: Mapping[str, Any], latents: int) -> Tensors:
    yield from _convolution("encoder.conv_in.conv", config["in_channels"] * config["patch_size"] ** 2, latents)
    outs, layers, out = config["block_out_channels"], config["layers_per_block"], latents
    scaled = _each(config["spatio_temporal_scaling"], len(layers) - 1)
    for level, (width, out) in enumerate(zip((latents, *outs), outs, strict=False)):
        block = f"encoder.down_blocks.{level}"
        yield from _ltx2_blocks(block, width, layers[level])
        if scaled[level]:
            kind = config["downsample_type"][level]
            time, space = STRIDES[kind]
            sampler = f"{block}.downsamplers.0{'' if kind == 'conv' else '.conv'}.conv"
            yield from _convolution(sampler, width, width if kind == "conv" else out // (time * space**2))
    yield from _ltx2_blocks("encoder.mid_block", out, layers[-1])
    yield from _convolution("encoder.conv_out.conv", out, latents + 1)


def _ltx2_decoder(config: Mapping[str, Any], latents: int) -> Tensors:
    outs, layers, factors = (
        [*reversed(config[name])]
        for name in ("decoder_block_out_channels", "decoder_layers_per_block", "upsample_factor")
    )
    scaled = [*reversed(_each(config["decoder_spatio_temporal_scaling"], len(layers) - 1))]
    before = outs[0]
    yield from _convolution("decoder.conv_in.conv", latents, before)
    yield from _ltx2_blocks("decoder.mid_block", before, layers[0])
    for level, (out, factor) in enumerate(zip(outs, factors, strict=False)):
        block, width, out = f"decoder.up_blocks.{level}", before // factor, out // factor
        if width != out:
            yield f"{block}.conv_in.norm3.weight", (width,)
            yield f"{block}.conv_in.norm3.bias", (width,)
            yield from _convolution(f"{block}.conv_in.conv1.conv", width, out)
            yield from _convolution(f"{block}.conv_in.conv2.conv", out, out)
            yield from _convolution(f"{block}.conv_in.conv_shortcut", width, out, (1, 1, 1))
        if scaled[level]:
            time, space = STRIDES[config["upsample_type"][level]]
            whole = out * factor
            yield from _convolution(f"{block}.upsamplers.0.conv.conv", whole, whole * time * space**2 // factor)
        yield from _ltx2_blocks(block, out, layers[level + 1])
        before = out
    yield from _convolution("decoder.conv_out.conv", before, config["out_channels"] * config["patch_size"] ** 2)


def _ltx2_blocks(name: str, width: int, count: int) -> Tensors:
    for number in range(count):
        for convolution in ("conv1", "conv2"):
            yield from _convolution(f"{name}.resnets.{number}.{convolution}.conv", width, width)


def _check_layers(*counts: int) -> None:
    for count in counts:
        if not 0 <= count <= MOST_LAYERS:
            raise ValueError(f"{count} layers in one block")


def _each(value: Any, count: int) -> Sequence[Any]:
    return [value] * count if isinstance(value, bool) else value


_RENAMES = [  # diffusers -> original, applied in order
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"\.conv_in\.", ".conv1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.down_blocks\.", ".downsamples."),
]
_RENAMES_OF_RESIDUAL_BLOCKS = [
    (r"\.norm1\.", ".residual.0."),
    (r"\.conv1\.", ".residual.2."),
    (r"\.norm2\.", ".residual.3."),
    (r"\.conv2\.", ".residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
]


def wan_original_name(name: str) -> str:
    """The name in `Wan2.1_VAE.pth` of a tensor that diffusers calls `name`."""
    # The decoder numbers its three residual blocks and the upsampler after them in one list.
    name = re.sub(
        r"\.up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers\.0)\.",
        lambda found: f".upsamples.{4 * int(found[1]) + int(found[2] or 3)}.",
        name,
    )
    for pattern, replacement in _RENAMES_OF_RESIDUAL_BLOCKS + _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name
