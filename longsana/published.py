"""Settings of the published code, and what becomes of them here (facts 7 and 9).

A rule takes one published key: it gives settings of ours, or none where the key changes nothing here, or refuses the
value with what to write instead. Here are the rules for model YAMLs; those for training are in `training.published`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

INSTRUCTION_SHA256 = "62b9ab89eebb0ac5ee4d264bf96bf19d2b81f504bc3852500efeaf5a34d638b1"
NEGATIVE_PROMPT_SHA256 = "a38af16b9506f1c9817a43315c360fdef323c7483ea3b050803c349de9e73d8d"
DISTILLED = "longlive_flow_euler"
GUIDANCE = 6.0
"""--cfg_scale of the published inference command, where neither a YAML nor the command line says another."""

Settings = dict[str, Any]
Context = Mapping[str, Any]
"""Every key that the config's files and the command line give, theirs and ours, the last value of each."""
Rule = Callable[[str, Any, Context], Settings]
"""Makes settings of a key, its value and the context; it may raise `Refused`."""


@dataclass(frozen=True)
class Published:
    """What a config class knows of the published code.

    rules: what becomes of published keys. sections: those whose other keys change nothing. references: keys that name
    model YAMLs, in the order in which they are taken, and what is taken of the settings in each.
    """

    rules: Mapping[str, Rule] = field(default_factory=dict)
    sections: tuple[str, ...] = ()
    references: Mapping[str, Callable[[Settings], Settings]] = field(default_factory=dict)


class Refused(Exception):
    """A value that cannot be honoured; the message says what to write instead."""


@dataclass
class Translation:
    """What became of published keys: settings of ours, keys that change nothing here, and complaints."""

    settings: Settings = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def take(self, rule: Rule, key: str, value: Any, context: Context) -> None:
        """Apply the rule of one key."""
        try:
            settings = rule(key, value, context)
        except Refused as refusal:
            self.refused.append(f"{key}={value}: {refusal}")
        else:
            self.settings |= settings
            if not settings:
                self.unused.append(key)


# Kinds of rules -----------------------------------------------------------------------------------------------------


def home(*settings: str) -> Rule:
    """The key's value is that of these settings."""

    def rule(key: str, value: Any, context: Context) -> Settings:
        return dict.fromkeys(settings, value)

    return rule


def unused(key: str, value: Any, context: Context) -> Settings:
    """Change nothing."""
    return {}


def only(*values: Any, instead: str) -> Rule:
    """Nothing changes with one of these values or null; another one is refused."""

    def rule(key: str, value: Any, context: Context) -> Settings:
        if value is not None and value not in values:
            raise Refused(instead)
        return {}

    return rule


def one_of(setting: str, names: Mapping[Any, Any], instead: str) -> Rule:
    """The setting takes another name for each of the key's values; null leaves it as it is."""

    def rule(key: str, value: Any, context: Context) -> Settings:
        if value is None:
            return {}
        if isinstance(value, list | dict) or value not in names:
            raise Refused(instead)
        return {setting: names[value]}

    return rule


# Rules of single keys -----------------------------------------------------------------------------------------------

STRIDES = {"WanVAE": (4, 8), "LTX2VAE_diffusers": (8, 32)}
"""Pixel frames, and pixels of a side, for a latent."""
BASE_SIZES = {480: (480, 832), 720: (704, 1280)}
"""data.image_size to height and width."""
CAUSAL = ("cachedcausal", "chunkcausal")
SAMPLERS = {
    DISTILLED: DISTILLED,
    "self_forcing_flow_euler": DISTILLED,  # its name in the trainers
    "flow_dpm-solver": "flow_dpm-solver",
    "flow_euler": "flow_euler",
    "chunk_flow_euler": "chunk_flow_euler",
}
DTYPES = {
    **dict.fromkeys(("bf16", "bfloat16"), "bfloat16"),
    **dict.fromkeys(("fp16", "float16"), "float16"),
    **dict.fromkeys(("no", "fp32", "float32"), "float32"),
}
ONE_NETWORK = "one network serves every role"


def strides(context: Context) -> tuple[int, int]:
    """Pixel frames, and pixels of a side, for a latent of the VAE that the context names."""
    return STRIDES.get(str(context.get("vae.vae_type")), STRIDES["WanVAE"])


def clip_frames(key: str, value: Any, context: Context) -> Settings:
    """The key data.num_frames: the pixel frames of a chunk with a causal attention, else those of the video."""
    if value is None or value == -1:
        return {}
    _whole(value)
    stride, _ = strides(context)
    # A block-causal YAML that names its chunks (chunk_index) says here how long the clip is.
    if context.get("model.attn_type") in CAUSAL and not (context.get("model.chunk_index") and value % stride == 1):
        if value < stride:
            raise Refused(f"with a causal attn_type these are the frames of a chunk, at least {stride}")
        return {"sampling.chunk_frames": value // stride}
    return {"sampling.num_frames": value}


def chunk_starts(key: str, value: Any, context: Context) -> Settings:
    """The key model.chunk_index: first latents of the chunks, of which all but the first are equally long."""
    if value is None:
        return {}
    if not isinstance(value, list) or not value or value[0] != 0 or not all(isinstance(start, int) for start in value):
        raise Refused("a list of the chunks' first latents, from 0")
    frames, (stride, _) = context.get("data.num_frames"), strides(context)
    ends = [*value[1:], 1 + (frames - 1) // stride] if isinstance(frames, int) and frames % stride == 1 else value[1:]
    lengths = [end - start for start, end in zip(value, ends, strict=False)]
    if len(value) == 1:
        return {"sampling.chunk_frames": lengths[0]} if lengths else {}
    later = lengths[1:]
    if not later:  # the clip's length is not known; the first chunk has one latent more, as a rule
        return {"sampling.chunk_frames": max(lengths[0] - 1, 1)}
    if len(set(later)) > 1 or not later[0] <= lengths[0] < 2 * later[0]:
        raise Refused(
            f"chunks of {', '.join(map(str, lengths))} latents; here all have sampling.chunk_frames, and what remains "
            "goes to the first"
        )
    return {"sampling.chunk_frames": later[0]}


def picture_size(key: str, value: Any, context: Context) -> Settings:
    """The key data.image_size: a name for a height and a width."""
    if value is None:
        return {}
    if not isinstance(value, int) or value not in BASE_SIZES:
        raise Refused("write sampling.height and sampling.width")
    height, width = BASE_SIZES[value]
    return {"sampling.height": height, "sampling.width": width}


def height_and_width(key: str, value: Any, context: Context) -> Settings:
    """The flag custom_height_width: [height, width]."""
    if value is None:
        return {}
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(isinstance(side, int) for side in value):
        raise Refused("two whole numbers, [height, width]")
    return {"sampling.height": value[0], "sampling.width": value[1]}


def instruction(key: str, value: Any, context: Context) -> Settings:
    """The key text_encoder.chi_prompt: our names, a text, or a list of parts, each on its own line."""
    if value is None or value == []:
        return {key: "none"}
    if isinstance(value, list):
        if not all(isinstance(part, str) for part in value):
            raise Refused("a list of texts")
        value = "\n".join(value)
    return {key: "sana" if _is_published(value, INSTRUCTION_SHA256) else value}


def negative_prompt(key: str, value: Any, context: Context) -> Settings:
    """A text to move away from; the published one is our null."""
    return {"sampling.negative_prompt": None if _is_published(value, NEGATIVE_PROMPT_SHA256) else value}


def shifted(key: str, value: Any, context: Context) -> Settings:
    """The key scheduler.flow_shift: of training; of sampling too where nothing else says that."""
    others = ("scheduler.inference_flow_shift", "flow_shift")
    if value is None or any(context.get(other) is not None for other in others):
        return {}
    return {"scheduler.inference_flow_shift": value}


def sampler(key: str, value: Any, context: Context) -> Settings:
    """The keys scheduler.vis_sampler and, which wins, sampling_algo; a base model has the published guidance."""
    if value is None or (key == "scheduler.vis_sampler" and context.get("sampling_algo") is not None):
        return {}
    if not isinstance(value, str) or value not in SAMPLERS:
        raise Refused(f"the samplers here are {', '.join(sorted(set(SAMPLERS.values())))}")
    settings: Settings = {"scheduler.sampling_algo": SAMPLERS[value]}
    if SAMPLERS[value] != DISTILLED and "cfg_scale" not in context and "sampling.cfg_scale" not in context:
        settings["sampling.cfg_scale"] = GUIDANCE
    return settings


def weights(setting: str) -> Rule:
    """A checkpoint; null has to be filled on the command line."""

    def rule(key: str, value: Any, context: Context) -> Settings:
        if value is not None:
            return {setting: value}
        if context.get(setting) is None:
            raise Refused(f"there are no weights; give {setting}, in inference as --model_path")
        return {}

    return rule


def short_name(names: Mapping[str, str]) -> Rule:
    """A key of ours that may also hold a short name for a repository."""

    def rule(key: str, value: Any, context: Context) -> Settings:
        return {key: names.get(value, value) if isinstance(value, str) else value}

    return rule


def agreeing(what: str, expected: Callable[[Context], Any]) -> Rule:
    """A number that follows from others here; one that does not is refused."""

    def rule(key: str, value: Any, context: Context) -> Settings:
        right = expected(context)
        if value is not None and value != right:
            raise Refused(f"{what} {right}; leave it out")
        return {}

    return rule


def _is_published(text: Any, sha256: str) -> bool:
    return isinstance(text, str) and hashlib.sha256(text.encode()).hexdigest() == sha256


def _whole(value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise Refused("a whole number")


def _fixed(keys: Iterable[str], value: Any, instead: str) -> dict[str, Rule]:
    return dict.fromkeys(keys, only(value, instead=instead))


# Model YAMLs ----------------------------------------------------------------------------------------------------------

MODEL_YAML: dict[str, Rule] = {
    "task": only("t2v", instead="text to video only"),
    "sampling_algo": sampler,
    "cfg_scale": home("sampling.cfg_scale"),
    "flow_shift": home("scheduler.inference_flow_shift"),
    "data.num_frames": clip_frames,
    "data.image_size": picture_size,
    "data.aspect_ratio_type": home("sampling.aspect_ratio_type"),
    "model.image_size": unused,
    "model.aspect_ratio_type": unused,
    "model.attn_type": only(
        "LiteLAReLURope", *CAUSAL, instead=f"{ONE_NETWORK}, with ReLU linear attention (LiteLAReLURope)"
    ),
    "model.ffn_type": only(
        "GLUMBConvTemp", "ChunkGLUMBConvTemp", "CachedGLUMBConvTemp", instead=f"{ONE_NETWORK} (GLUMBConvTemp)"
    ),
    "model.pos_embed_type": only("wan_rope", "casual_wan_rope", instead="positions are rotary (wan_rope)"),
    "model.chunk_index": chunk_starts,
    "model.load_from": weights("model.load_from"),
    "model.mixed_precision": one_of("model.dtype", DTYPES, instead="model.dtype: bfloat16, float16 or float32"),
    "model.fp32_attention": unused,
    "model.class_dropout_prob": unused,
    "model.multi_scale": unused,
    "model.mlp_acts": only(["silu", "silu", None], instead="the Mix-FFN's gate is SiLU: [silu, silu, null]"),
    "model.t_kernel_size": only(3, instead="the temporal convolution spans 3 frames"),
    "model.rope_fhw_dim": only(instead="the rotary split follows from model.linear_head_dim"),
    "model.remove_state_dict_keys": only(
        [], instead="a checkpoint is loaded whole; convert it first (python -m longsana.convert)"
    ),
    **_fixed(
        ("model.qk_norm", "model.cross_norm", "model.use_pe"), True, "checkpoints without these norms do not load here"
    ),
    "vae.vae_pretrained": short_name({"Lightricks/LTX-2": "hf://Lightricks/LTX-2/vae"}),
    "vae.vae_latent_dim": home("model.in_channels"),
    "vae.vae_stride": agreeing(
        "for this vae.vae_type it is", lambda context: [strides(context)[0], *[strides(context)[1]] * 2]
    ),
    "vae.vae_downsample_rate": agreeing("for this vae.vae_type it is", lambda context: strides(context)[1]),
    "vae.if_cache": unused,
    "text_encoder.text_encoder_name": short_name({"gemma-2-2b-it": "hf://Efficient-Large-Model/gemma-2-2b-it"}),
    "text_encoder.chi_prompt": instruction,
    "text_encoder.model_max_length": home("model.caption_length"),
    "text_encoder.y_norm": only(True, instead="captions are normalised always"),
    "text_encoder.y_norm_scale_factor": unused,
    "scheduler.vis_sampler": sampler,
    "scheduler.flow_shift": shifted,
    "scheduler.predict_flow_v": only(True, instead="the network predicts velocity"),
    "scheduler.noise_schedule": only("linear_flow", instead="noise is added along straight lines (linear_flow)"),
    "scheduler.pred_sigma": only(False, instead="the network predicts velocity alone"),
    "scheduler.weighting_scheme": unused,
    "scheduler.logit_mean": unused,
    "scheduler.logit_std": unused,
    "scheduler.timestep_norm_scale_factor": only(1, 1.0, instead="timesteps are whole numbers of 0 to 1000"),
}
"""What becomes of a model YAML's keys in inference."""

INFERENCE = Published(MODEL_YAML, sections=("data", "image_data", "train"))
