"""Every setting of inference, as frozen dataclasses, and the one function that loads them.

YAML is merged over these classes once; after `load_config` nobody sees OmegaConf. A wrong key, type or value stops here
with its path and the nearest right name. Key names follow the published vocabulary; keys that one network and one
sampler made meaningless are listed in `RETIRED` with what took their place.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from longsana.runtime.errors import InputError, did_you_mean
from longsana.runtime.files import atomic_write_text

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
"""`auto` is bfloat16 on a GPU and float32 on a CPU."""


@dataclass(frozen=True)
class Architecture:
    """The four numbers that tell one published network from another."""

    depth: int
    hidden_size: int
    num_heads: int  # of the cross-attention; the linear attention has hidden_size // linear_head_dim
    patch_size: tuple[int, int, int]


ARCHITECTURES = {
    "SanaMSVideo_3M_P2_D8": Architecture(8, 128, 4, (1, 2, 2)),  # the shapes world, head dimension 32
    "SanaMSVideo_600M_P1_D28": Architecture(28, 1152, 16, (1, 1, 1)),
    "SanaMSVideo_600M_P2_D28": Architecture(28, 1152, 16, (1, 2, 2)),
    "SanaMSVideo_2000M_P1_D20": Architecture(20, 2240, 20, (1, 1, 1)),
    "SanaMSVideo_2000M_P2_D20": Architecture(20, 2240, 20, (1, 2, 2)),
    "SanaMSVideo_4000M_P2_D28": Architecture(28, 2560, 20, (1, 2, 2)),
    "SanaMSVideo_4800M_P1_D60": Architecture(60, 2240, 20, (1, 1, 1)),
    "SanaMSVideo_4800M_P2_D60": Architecture(60, 2240, 20, (1, 2, 2)),
}


@dataclass(frozen=True)
class ModelConfig:
    """The network: `model` names an architecture; a size that is given replaces the named one's."""

    model: str = "SanaMSVideo_2000M_P2_D20"
    depth: int | None = None
    hidden_size: int | None = None
    num_heads: int | None = None
    patch_size: tuple[int, int, int] | None = None
    in_channels: int = 16
    linear_head_dim: int = 112
    mlp_ratio: float = 3.0
    caption_channels: int = 2304  # width of the text encoder's hidden states
    caption_length: int = 300  # tokens of a caption the network sees
    linear_attn_eps: float = 1e-8  # under the linear attention's denominator
    cross_norm_eps: float = 1e-6  # of the cross-attention's q and k RMSNorm
    num_cached_blocks: int = -1  # chunks of the past that attention sees; -1 is all of it
    load_from: str = "seeded:0"  # path, hf://owner/repo/file, or seeded:N for random weights from seed N
    checkpoint_key: Literal["generator", "generator_ema", "critic"] = "generator"  # read from trainer checkpoints
    dtype: Dtype = "auto"
    float8: bool = False  # inference: large matrix products in float8 with a scale a row, for GPUs from Hopper on

    def architecture(self) -> Architecture:
        """The named architecture with this config's own sizes put over it."""
        if self.model not in ARCHITECTURES:
            raise InputError(
                f"model.model: no architecture '{self.model}'{did_you_mean(self.model, ARCHITECTURES)}; "
                f"known: {', '.join(ARCHITECTURES)}"
            )
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(Architecture)}
        return dataclasses.replace(ARCHITECTURES[self.model], **{k: v for k, v in own.items() if v is not None})


@dataclass(frozen=True)
class VAEConfig:
    vae_type: Literal["WanVAE", "LTX2VAE_diffusers"] = "WanVAE"
    # A Wan .pth, a diffusers folder (for LTX-2 the only layout), hf://..., or seeded:FOLDER for random weights in the
    # shape of FOLDER/config.json
    vae_pretrained: str = "hf://Efficient-Large-Model/SANA-Video_2B_480p/vae/Wan2.1_VAE.pth"
    weight_dtype: Dtype = "auto"
    latents_per_call: int = 1  # latent frames decoded together; frames differ by rounding alone


@dataclass(frozen=True)
class TextEncoderConfig:
    # A transformers folder, hf://owner/repo, or seeded:FOLDER for random weights in the shape of FOLDER/config.json
    text_encoder_name: str = "hf://Efficient-Large-Model/gemma-2-2b-it"
    # The instruction put before every prompt: sana (the published one), none, or the text itself
    chi_prompt: str = "sana"
    # Cap the attention's logits, as Gemma 2 was trained; the published networks' captions were encoded without
    softcap: bool = False
    dtype: Dtype = "auto"


@dataclass(frozen=True)
class SchedulerConfig:
    # Few steps, chunk by chunk (distilled); many, on the clip at once (base: DPM-Solver++, as published, or Euler);
    # many Euler steps, chunk by chunk (block-causal base)
    sampling_algo: Literal["longlive_flow_euler", "flow_dpm-solver", "flow_euler", "chunk_flow_euler"] = (
        "longlive_flow_euler"
    )
    inference_flow_shift: float = 7.0
    # Of longlive_flow_euler; a trailing 0 is dropped
    denoising_step_list: tuple[int, ...] = (1000, 960, 889, 727)
    bf16_timesteps: bool = False  # round timesteps as published (889 -> 888, 727 -> 728); for parity only
    num_inference_steps: int = 50  # of all but longlive_flow_euler
    interval_k: float = 0.5  # chunk_flow_euler: a chunk begins when the one before has done this share of its steps


@dataclass(frozen=True)
class SamplingConfig:
    """What is sampled, when nothing else is said."""

    txt_file: str = "asset/samples/video_prompts_samples.txt"
    num_frames: int = 81  # pixel frames
    height: int = 480
    width: int = 832
    # Table that `--ar` inside a prompt line is looked up in; none: such a line is an error
    aspect_ratio_type: Literal["ASPECT_RATIO_VIDEO_480_MS", "ASPECT_RATIO_VIDEO_720_MS_DIV32", "none"] = "none"
    chunk_frames: int = 10  # latent frames a chunk; the remainder goes to the first chunk
    fps: int = 16
    seed: int = 0
    bs: int = 1  # prompts sampled together
    cfg_scale: float = 1.0
    negative_prompt: str | None = None  # null: the published one; '': an empty one
    # What guidance moves away from: the negative prompt, or the null caption that the checkpoint was trained with
    null_caption: Literal["negative_prompt", "learned"] = "negative_prompt"
    motion_score: int = 10  # appended to every prompt; 0 or less: nothing is appended
    cuda_graphs: bool = False  # longlive_flow_euler on a GPU: record a pass of a long video and replay it

    @property
    def has_negative_prompt(self) -> bool:
        """Whether guidance moves away from the negative prompt: not from nothing, nor from a learned null caption."""
        return self.cfg_scale != 1 and self.null_caption == "negative_prompt"


@dataclass(frozen=True)
class VideoConfig:
    """The mp4."""

    crf: int = 18  # x264 quality: lower is better and larger
    preset: str = "veryfast"


@dataclass(frozen=True)
class InferenceConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    video: VideoConfig = field(default_factory=VideoConfig)


def check_chi_prompt(chi_prompt: str) -> None:
    """Refuse a single word that names no instruction: it is one misspelt, and no instruction of its own.

    Raises:
        InputError: it is one.
    """
    if chi_prompt not in ("sana", "none") and " " not in chi_prompt.strip():
        raise InputError(f"text_encoder.chi_prompt={chi_prompt}: must be sana, none, or an instruction in full")


RETIRED = {
    "sampling_algo": "scheduler.sampling_algo",
    "scheduler.vis_sampler": "scheduler.sampling_algo",
    "data.num_frames": "sampling.num_frames (pixel frames) and sampling.chunk_frames (latent frames a chunk)",
    "data.image_size": "sampling.height and sampling.width",
    "data.aspect_ratio_type": "sampling.aspect_ratio_type",
    "model.attn_type": "nothing: one network serves every role; the state and the chunk plan are arguments",
    "model.ffn_type": "nothing: one network serves every role; the state and the chunk plan are arguments",
    "model.pos_embed_type": "nothing: positions are always absolute",
    "model.chunk_index": "sampling.chunk_frames",
    "model.mixed_precision": "model.dtype",
    "model.fp32_attention": "nothing: the attention state and its products are always float32",
    "text_encoder.model_max_length": "model.caption_length",
}

Schema = TypeVar("Schema")


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    schema: type[Schema] = InferenceConfig,  # type: ignore[assignment]
    retired: Mapping[str, str] = RETIRED,
) -> Schema:
    """Read a YAML file (and the one it names as `base:`), put `a.b=value` overrides over it, check it all.

    retired: keys of other code that are refused with what took their place.

    Raises:
        InputError: the file is missing or not YAML, a key is unknown, or a value has the wrong type; the message names
            the key's path and the nearest right name.
    """
    known = leaf_keys(schema)
    own, base = _read_yaml(Path(path))
    layers = [(str(path), own), ("the command line", _parse_overrides(overrides, known))]
    if base is not None:
        base_path = Path(path).parent / base
        base_values, deeper = _read_yaml(base_path)
        if deeper is not None:
            raise InputError(f"{base_path}: a base may not have a base itself; only one level is allowed")
        layers.insert(0, (str(base_path), base_values))

    merged = OmegaConf.structured(schema)
    for source, layer in layers:
        leaves = dict(_leaves(layer))
        for key in leaves:
            _check_key(key, known, retired, source)
        try:
            merged = OmegaConf.merge(merged, *(OmegaConf.create(_nested(*leaf)) for leaf in leaves.items()))
        except OmegaConfBaseException:
            _blame_key(merged, leaves, source)
            raise
    try:
        result: Schema = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:  # ${...} that leads nowhere, or ???
        raise InputError(f"{path}: {error.full_key}: {_reason(error)}") from error
    return result


def render_config(config: Any) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal object."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def save_config(config: Any, path: str | Path) -> None:
    """Write `render_config`, whole or not at all."""
    atomic_write_text(path, render_config(config))


def leaf_keys(schema: type) -> dict[str, str]:
    """Dotted name of every setting of a config class, and its type as it stands in the source."""
    leaves: dict[str, str] = {}
    types = get_type_hints(schema)
    for item in dataclasses.fields(schema):
        section = types[item.name]
        if dataclasses.is_dataclass(section):
            leaves |= {f"{item.name}.{key}": kind for key, kind in leaf_keys(section).items()}  # type: ignore[arg-type]
        else:
            leaves[item.name] = str(item.type)
    return leaves


def _read_yaml(path: Path) -> tuple[dict[str, Any], str | None]:
    """The mapping in a YAML file without its `base:` entry, and that entry."""
    if not path.is_file():
        raise InputError(f"{path}: no such config file")
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # yaml's error classes are not part of omegaconf's interface
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        raise InputError(f"{path}: expected a mapping of settings, found a {type(loaded).__name__}")
    values: dict[str, Any] = {str(key): value for key, value in loaded.items()}
    base = values.pop("base", None)
    if not isinstance(base, str | None):
        raise InputError(f"{path}: base={base}: expected the name of a config file")
    return values, base


def _parse_overrides(overrides: Sequence[str], known: Mapping[str, str]) -> dict[str, Any]:
    """`section.key=value` items, flat; a text stays as it was typed, other values are read as YAML."""
    values: dict[str, Any] = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not re.fullmatch(r"[\w.]+", key):
            raise InputError(f"'{item}': a setting has the form section.key=value")
        try:
            values[key] = text if _is_text(known.get(key), text) else yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"the command line: {key}={text}: {' '.join(str(error).split())}") from error
    return values


def _is_text(kind: str | None, text: str) -> bool:
    """Whether a setting of this type takes these characters as they are."""
    return kind == "str" or (kind == "str | None" and text != "null")


def _blame_key(merged: Any, leaves: Mapping[str, Any], source: str) -> None:
    """Find the setting that does not fit by merging one after the other.

    Raises:
        InputError: it names the setting and says why.
    """
    for key, value in leaves.items():
        try:
            merged = OmegaConf.merge(merged, OmegaConf.create(_nested(key, value)))
        except OmegaConfBaseException as error:
            # OmegaConf leaves its placeholders unfilled for items of a list.
            reason = _reason(error).replace("$VALUE_TYPE", type(value).__name__).replace("$VALUE", str(value))
            raise InputError(f"{source}: {key}={value}: {reason}") from error


def _reason(error: OmegaConfBaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _check_key(key: str, known: Mapping[str, str], retired: Mapping[str, str], source: str) -> None:
    if key in known:
        return
    # A retired section, such as model_kwargs, is retired with all that is in it.
    if old := next((name for name in (key, key.rpartition(".")[0]) if name in retired), None):
        raise InputError(f"{source}: {key} is not a setting here; instead: {retired[old]}")
    inside = sorted(name for name in known if name.startswith(f"{key}."))
    if inside:
        raise InputError(f"{source}: {key} is a section; set one of {', '.join(inside)}")
    raise InputError(f"{source}: unknown key {key}{did_you_mean(key, sorted(known))}")
