"""Settings of the published code, and what becomes of them here (docs/published.md).

A rule takes one published key: it gives settings of ours, or none where the key changes nothing here, or refuses the
value with what to write instead. Here are the rules for model YAMLs; those for training are in `training.published`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from longsana.runtime.errors import InputError

INSTRUCTION_SHA256 = "62b9ab89eebb0ac5ee4d264bf96bf19d2b81f504bc3852500efeaf5a34d638b1"
NEGATIVE_PROMPT_SHA256 = "a38af16b9506f1c9817a43315c360fdef323c7483ea3b050803c349de9e73d8d"
DISTILLED = "longlive_flow_euler"
GUIDANCE = 6.0
"""--cfg_scale of the published inference command, where neither a YAML nor the command line says another."""

Settings = dict[str, Any]


@dataclass(frozen=True)
class Context:
    """The context of a rule: what it may look at.

    given: every key of the config's files and the command line, theirs and ours, the last value of each; and below
    them the settings of the model YAMLs that a stage YAML names. layer: the keys of the file, or of the command line,
    that the rule's key stands in: between layers the later one wins, within one a rule has to say which of its keys.
    """

    given: Mapping[str, Any]
    layer: Mapping[str, Any] = field(default_factory=dict)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key; the default also for null."""
        value = self.given.get(key)
        return default if value is None else value

    def beside(self, *keys: str) -> bool:
        """Tell whether the layer gives one of these keys a value."""
        return any(self.layer.get(key) is not None for key in keys)


Rule = Callable[[str, Any, Context], Settings]
"""Makes settings of a key, its value and the context; it may raise `Refused`."""


@dataclass(frozen=True)
class Published:
    """The rules by which a config class reads keys of the published code.

    rules: what becomes of published keys. sections: those whose other keys, in a file, change nothing. references: keys
    that name model YAMLs, in the order in which they are taken, what is taken of the settings in each, and the key that
    names weights in place of its own. check: raises InputError for a config that is of another kind.
    """

    rules: Mapping[str, Rule] = field(default_factory=dict)
    sections: tuple[str, ...] = ()
    references: Mapping[str, Reference] = field(default_factory=dict)
    check: Callable[[Context], None] = lambda context: None


class Reference(NamedTuple):
    """A key that names a model YAML: what is taken of its settings, and which key names the weights instead."""

    part: Callable[[Settings], Settings]
    weights: str


class Refused(Exception):
    """A value that cannot be honoured; the message says what to write instead."""


@dataclass
class Translation:
    """The translation of a layer's keys: settings of ours, published keys that change nothing here, and complaints."""

    settings: Settings = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    _source: dict[str, str] = field(default_factory=dict)  # of each setting the key

    def take(self, rule: Rule, key: str, value: Any, context: Context) -> None:
        """Apply the rule of one key."""
        try:
            settings = rule(key, value, context)
        except Refused as refusal:
            shown = "..." if key in SECRET else value
            self.refused.append(f"{key}={shown}: {refusal}")
            return
        for setting, own in settings.items():
            self.put(setting, own, key)
        if not settings:
            self.unused.append(key)

    def put(self, setting: str, value: Any, key: str) -> None:
        """Note a setting that a key gives; two keys that give it different values are a complaint."""
        other = self._source.setdefault(setting, key)
        if other != key and self.settings[setting] != value:
            self.refused.append(f"{key} and {other} both say {setting}: leave one of them out")
        self.settings[setting] = value


SECRET = ("wandb_key",)
"""Keys whose values are never shown."""

# Kinds of rules -----------------------------------------------------------------------------------------------------


def home(*settings: str, null: bool = False) -> Rule:
    """The key's value is that of these settings; null leaves them as they are, or is a value as others (`null`)."""

    def rule(key: str, value: Any, context: Context) -> Settings:
        return {} if value is None and not null else dict.fromkeys(settings, value)

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


def unless(*keys: str, rule: Rule) -> Rule:
    """A rule that gives way to other keys of its layer."""

    def conditional(key: str, value: Any, context: Context) -> Settings:
        return {} if context.beside(*keys) else rule(key, value, context)

    return conditional


# Rules of single keys -----------------------------------------------------------------------------------------------

STRIDES = {"WanVAE": (4, 8), "LTX2VAE_diffusers": (8, 32)}
"""Pixel frames, and pixels of a side, for a latent."""
BASE_SIZES = {480: (480, 832), 720: (704, 1280)}
"""data.image_size to height and width."""
ATTENTIONS = {
    "LiteLAReLURope": "flow_dpm-solver",
    "chunkcausal": "chunk_flow_euler",
    "cachedcausal": "longlive_flow_euler",
}
"""Attentions, and the sampler that each is made for."""
CAUSAL = ("cachedcausal", "chunkcausal")
SAMPLERS = {
    DISTILLED: DISTILLED,
    "self_forcing_flow_euler": DISTILLED,  # its name in the trainers
    "flow_dpm-solver": "flow_dpm-solver",
    "flow_euler": "flow_euler",
    "flow_euler_ltx": "flow_euler",  # with a picture first, which a prompt says here
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


def chosen_sampler(context: Context) -> str | None:
    """The sampler that the context asks for, under our name; None if it asks for none."""
    for key in ("scheduler.sampling_algo", "sampling_algo", "scheduler.vis_sampler"):
        if (name := context.get(key)) is not None:
            return SAMPLERS.get(str(name))
    return None


def clip_frames(key: str, value: Any, context: Context) -> Settings:
    """The key data.num_frames: the pixel frames of a chunk with a causal attention, else those of the video.

    Without attn_type, as in our own YAMLs, the sampler tells.
    """
    if value is None or value == -1:
        return {}
    _whole(value)
    stride, _ = strides(context)
    attention = context.get("model.attn_type")
    causal = attention in CAUSAL if attention else chosen_sampler(context) in (DISTILLED, "chunk_flow_euler")
    # A block-causal YAML that names its chunks (chunk_index) says here how long the clip is.
    if causal and not (context.get("model.chunk_index") and value % stride == 1):
        if value < stride:
            raise Refused(f"with a causal attn_type these are the frames of a chunk, at least {stride}")
        return {"sampling.chunk_frames": value // stride}
    return {"sampling.num_frames": value}


def attention(key: str, value: Any, context: Context) -> Settings:
    """The key model.attn_type, which names the sampler where nothing else does."""
    if value is None:
        return {}
    if not isinstance(value, str) or value not in ATTENTIONS:
        raise Refused(f"{ONE_NETWORK}, with ReLU linear attention (LiteLAReLURope)")
    return {} if chosen_sampler(context) else _sampler_settings(ATTENTIONS[value], context)


def sampler(key: str, value: Any, context: Context) -> Settings:
    """The keys scheduler.vis_sampler and, which wins, sampling_algo."""
    if value is None:
        return {}
    if not isinstance(value, str) or value not in SAMPLERS:
        raise Refused(f"the samplers here are {', '.join(sorted(set(SAMPLERS.values())))}")
    return _sampler_settings("flow_euler" if context.get("task") == "ltx" else SAMPLERS[value], context)


def task(key: str, value: Any, context: Context) -> Settings:
    """The key task: t2v, or ltx, which is Euler's sampler whatever else is said; pictures are named by prompts."""
    if value not in (None, "t2v", "ltx"):
        raise Refused("t2v, or ltx for prompts that name a picture")
    return _sampler_settings("flow_euler", context) if value == "ltx" else {}


def _sampler_settings(name: str, context: Context) -> Settings:
    """A sampler's name, and the guidance that the published command gives a base model where nobody says another."""
    settings: Settings = {"scheduler.sampling_algo": name}
    guided = context.get("cfg_scale") is not None or context.get("sampling.cfg_scale") is not None
    if not guided and DISTILLED not in (name, chosen_sampler(context)):
        settings["sampling.cfg_scale"] = GUIDANCE
    return settings


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
            f"chunks of {', '.join(map(str, lengths))} latents; write sampling.chunk_frames, which all have but the "
            "first, to which the rest goes"
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


def window(key: str, value: Any, context: Context) -> Settings:
    """The key num_cached_blocks: 0 and below is everything."""
    if value is None:
        return {}
    _whole(value)
    return {"model.num_cached_blocks": max(value, 0) or -1}


def weights(setting: str) -> Rule:
    """A checkpoint; null has to be filled by another key."""

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
        raise Refused(f"must be a whole number, not {value!r}")


# Model YAMLs ----------------------------------------------------------------------------------------------------------

OF_TRAINING = (
    *("auto_lr", "chunk_sampling_strategy", "deterministic_validation", "ema_rate", "eval_metric_step"),
    *("eval_sampling_steps", "grad_checkpointing", "gradient_accumulation_steps", "gradient_clip"),
    *("joint_training_interval", "local_save_vis", "log_interval", "lr_schedule", "lr_schedule_args.num_warmup_steps"),
    *("ltx_image_condition_prob", "noise_multiplier", "num_epochs", "num_warmup_steps", "num_workers"),
    *("online_metric", "online_metric_dir", "optimizer.betas", "optimizer.eps", "optimizer.lr", "optimizer.type"),
    *("optimizer.weight_decay", "same_timestep_prob", "save_model_epochs", "save_model_steps", "seed"),
    *("train_batch_size", "train_batch_size_image", "use_fsdp", "validation_prompts", "visualize", "work_dir"),
)
"""Keys of a model YAML's section train."""
OF_DATA = (
    *("caption_proportion", "caption_selection_type", "clip_thr", "clip_thr_temperature", "data_dir"),
    *("del_img_clip_thr", "external_caption_suffixes", "external_data_filter", "load_text_feat", "load_vae_feat"),
    *("motion_score_cal_type", "motion_score_file_thres", "resample_fps", "shuffle_dataset", "sort_dataset"),
    *("target_fps", "transform", "type"),
)
"""Keys of its sections data and image_data."""

MODEL_YAML: dict[str, Rule] = {
    "task": task,
    "sampling_algo": sampler,
    "cfg_scale": home("sampling.cfg_scale"),
    "flow_shift": home("scheduler.inference_flow_shift"),
    "num_cached_blocks": window,
    "data.num_frames": clip_frames,
    "data.image_size": picture_size,
    "data.aspect_ratio_type": one_of(
        "sampling.aspect_ratio_type",
        {name: name for name in ("ASPECT_RATIO_VIDEO_480_MS", "ASPECT_RATIO_VIDEO_720_MS_DIV32", "none")},
        instead="write none, or ASPECT_RATIO_VIDEO_480_MS or ASPECT_RATIO_VIDEO_720_MS_DIV32",
    ),
    **dict.fromkeys((f"data.{key}" for key in OF_DATA), unused),
    **dict.fromkeys((f"image_data.{key}" for key in (*OF_DATA, "aspect_ratio_type", "image_size")), unused),
    **dict.fromkeys((f"train.{key}" for key in OF_TRAINING), unused),
    "model.image_size": unused,
    "model.aspect_ratio_type": unused,
    "model.attn_type": attention,
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
    **dict.fromkeys(
        ("model.qk_norm", "model.cross_norm", "model.use_pe"),
        only(True, instead="checkpoints without these norms do not load here"),
    ),
    "vae.vae_type": one_of("vae.vae_type", {name: name for name in STRIDES}, instead=" or ".join(STRIDES)),
    "vae.vae_pretrained": short_name({"Lightricks/LTX-2": "hf://Lightricks/LTX-2/vae"}),
    "vae.weight_dtype": one_of(
        "vae.weight_dtype", {**DTYPES, "auto": "auto"}, instead="auto, bfloat16, float16 or float32"
    ),
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
    "scheduler.vis_sampler": unless("sampling_algo", rule=sampler),
    # The first of these that a YAML has is the shift of sampling; the last is that of training too.
    "scheduler.inference_flow_shift": unless("flow_shift", rule=home("scheduler.inference_flow_shift")),
    "scheduler.flow_shift": unless(
        "flow_shift", "scheduler.inference_flow_shift", rule=home("scheduler.inference_flow_shift")
    ),
    "scheduler.predict_flow_v": only(True, instead="the network predicts velocity"),
    "scheduler.noise_schedule": only("linear_flow", instead="noise is added along straight lines (linear_flow)"),
    "scheduler.pred_sigma": only(False, instead="the network predicts velocity alone"),
    "scheduler.weighting_scheme": unused,
    "scheduler.logit_mean": unused,
    "scheduler.logit_std": unused,
    "scheduler.timestep_norm_scale_factor": only(1, 1.0, instead="timesteps are whole numbers of 0 to 1000"),
}
"""What becomes of a model YAML's keys in inference."""


def _is_no_stage(context: Context) -> None:
    if context.get("trainer") is not None or context.get("distribution_loss") is not None:
        raise InputError(
            f"a config of training (trainer: {context.get('trainer')}); it goes to train_video_scripts/"
            "train_longsana.py --config_path"
        )


INFERENCE = Published(MODEL_YAML, sections=("data", "image_data", "train"), check=_is_no_stage)
