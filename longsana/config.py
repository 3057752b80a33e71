"""Every setting of inference, as frozen dataclasses, and the one function that loads them.

YAML is merged over these classes once; after `load_config` nobody sees OmegaConf. A wrong key, type or value stops here
with its path and the nearest right name. Key names follow the published vocabulary; what becomes of the published keys
that are none of ours is said in `longsana.published`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from longsana.chunks import Absorb, ImageFirst
from longsana.published import INFERENCE, Context, Published, Translation
from longsana.runtime.errors import InputError, did_you_mean, did_you_mistype, mistyped_setting
from longsana.runtime.files import atomic_write_text, expanded
from longsana.runtime.hub import SEEDED, SHIPPED
from longsana.runtime.settings import PARTS, TEXT, bounded, check_bounds, parse_overrides, read_yaml

log = logging.getLogger(__name__)

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
"""`auto` is bfloat16 on a GPU and float32 on a CPU; GPUs before compute capability 8.0 take float32 for bfloat16."""


Offload = Literal["none", "encoder", "text_encoder", "all"]


@dataclass(frozen=True)
class Architecture:
    """The four numbers that tell one published network from another."""

    depth: int
    hidden_size: int
    num_heads: int  # of the cross-attention; the linear attention has hidden_size // linear_head_dim
    patch_size: tuple[int, int, int]


ARCHITECTURES = {
    "SanaMSVideo_4M_P2_D12": Architecture(12, 128, 4, (1, 2, 2)),  # the shapes world, head dimension 32
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
    depth: int | None = bounded(None, 1, 1000)
    hidden_size: int | None = bounded(None, 1, 1 << 20)
    num_heads: int | None = bounded(None, 1, 1 << 20)
    patch_size: tuple[int, int, int] | None = bounded(None, 1, 64)
    in_channels: int = bounded(16, 1, 4096)
    linear_head_dim: int = bounded(112, 2, 4096)
    mlp_ratio: float = bounded(3.0, above=0, most=100)
    caption_channels: int = bounded(2304, 1, 1 << 20)  # width of the text encoder's hidden states
    caption_length: int = bounded(300, 1, 100_000)  # tokens of a caption the network sees
    linear_attn_eps: float = bounded(1e-8, 0, 1)  # under the linear attention's denominator
    cross_norm_eps: float = bounded(1e-6, 0, 1)  # of the cross-attention's q and k RMSNorm
    num_cached_blocks: int = -1  # chunks of the past that attention sees; -1 is all of it
    # What a latent frame leaves of the past, from 0 to 1; [first, last] of the heads, spread geometrically in 1 - g; or
    # learned, for each block and head; none: 1. Half is left after a chunk of ten with 0.933. See models/past.py
    state_decay: Any = None
    num_sink_blocks: int = 0  # first chunks that stay as they are beside a window or a decay
    load_from: str = "seeded:0"  # path, hf://owner/repo/file, or seeded:N for random weights from seed N
    checkpoint_key: Literal["generator", "generator_ema", "critic"] = "generator"  # read from trainer checkpoints
    dtype: Dtype = "auto"
    # Latent frames that a block's Mix-FFN takes at a time, within each of which it works; 0: all
    feed_forward_frames: int = bounded(0, 0, 100_000)
    float8: bool = False  # inference: large matrix products in float8 with a scale a row; GPUs from 8.9 on

    def __post_init__(self) -> None:
        # OmegaConf knows no type for a number or a pair of them; what is neither, `Past.of` refuses.
        decay = self.state_decay
        decay = tuple(map(_as_float, decay)) if isinstance(decay, list | tuple) else _as_float(decay)
        object.__setattr__(self, "state_decay", decay)

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
    latents_per_call: int = bounded(1, 1, 100_000)  # latent frames decoded together; frames differ by rounding alone
    # Who decodes: the VAE itself, or a tiny network of this kind, which no file says of itself
    decoder: Literal["full", "taew2_1", "lighttaew2_1", "taeltx_2", "tae_shapes"] = "full"
    # The tiny network: a .pth or .safetensors file, hf://owner/repo/file, or seeded:N for random weights from seed N;
    # null: <decoder>.safetensors in the folder vae_pretrained
    decoder_pretrained: str | None = None
    # Who encodes pictures and films: the VAE itself, or the tiny network's own encoder
    encoder: Literal["full", "tiny"] = "full"


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
    inference_flow_shift: float = bounded(7.0, above=0, most=1000)
    # Of longlive_flow_euler; a trailing 0 is dropped
    denoising_step_list: tuple[int, ...] = (1000, 960, 889, 727)
    bf16_timesteps: bool = False  # round timesteps as published (889 -> 888, 727 -> 728); for parity only
    # Of longlive_flow_euler: the state after a chunk is that of a pass over its clean latents, or of its last step, one
    # pass less; for a network that was trained so
    absorb: Absorb = "clean"
    num_inference_steps: int = bounded(50, 1, 10_000)  # of all but longlive_flow_euler
    # chunk_flow_euler: a chunk begins when the one before has done this share of its steps
    interval_k: float = bounded(0.5, 0, 1)


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling: what is made when nothing else is said."""

    txt_file: str = "asset/samples/video_prompts_samples.txt"
    num_frames: int = bounded(81, 1, 10**9)  # pixel frames
    height: int = bounded(480, 1, 16_384)
    width: int = bounded(832, 1, 16_384)
    # Table that `--ar` inside a prompt line is looked up in; none: such a line is an error
    aspect_ratio_type: Literal["ASPECT_RATIO_VIDEO_480_MS", "ASPECT_RATIO_VIDEO_720_MS_DIV32", "none"] = "none"
    chunk_frames: int = bounded(10, 1, 100_000)  # latent frames a chunk; the remainder goes to the first chunk
    # Latent frames of a video's first chunk, at most chunk_frames + 1; then the remainder is a shorter last chunk.
    # 0: it goes to the first chunk
    first_chunk_frames: int = bounded(0, 0, 100_001)
    fps: float = bounded(16.0, above=0, most=1000)  # a fraction too: 24000/1001 on a command line
    seed: int = bounded(0, -(2**63), 2**63 - 1)
    bs: int = bounded(1, 1, 10_000)  # prompts sampled together
    unified_noise: bool = False  # the noise of every prompt is that of the empty one
    cfg_scale: float = bounded(1.0, -1000, 1000)
    negative_prompt: str | None = None  # null: the published one; '': an empty one
    # What guidance moves away from: the negative prompt, or the null caption that the checkpoint was trained with
    null_caption: Literal["negative_prompt", "learned"] = "negative_prompt"
    # Appended to every prompt; 0 or less: " high motion" or " low motion" instead; null: nothing
    motion_score: int | None = bounded(10, -1000, 1000)
    high_motion: bool = False
    cuda_graphs: bool = False  # longlive_flow_euler on a GPU: replay passes of a long video, and a tiny decoder's calls
    # GiB of the GPU that the command may have in all, by nvidia-smi, which chooses what makes it fit: see memory.py
    memory: float | None = bounded(None, 1, 10_000)
    # What waits on the host while others work on the GPU, each with those before it: nothing; the VAE's encoder, until
    # something is encoded; in a live server network and text encoder, for each other; the decoder, for these
    offload: Offload = "none"
    # What becomes of the past where a part of a prompt begins: keep, recache=K, rebuild=W or cut; see data/story.py
    prompt_change: str = "keep"
    transition_chunks: int = bounded(0, 0, 1000)  # over which one part's caption becomes the next one's
    transition: Literal["linear", "spherical"] = "linear"  # the way between the two embeddings
    # How a picture that a video begins with gets its size: scaled to cover it and cut to the middle, or stretched to it
    image_fit: Literal["cover", "stretch"] = "cover"
    # LongSANA: a picture is the first latent of its chunk in every step; or a chunk of one, absorbed before the others
    image_first: ImageFirst = "pin"

    @property
    def has_negative_prompt(self) -> bool:
        """True where guidance leads away from the negative prompt, and not from nothing or a learned null caption."""
        return self.cfg_scale != 1 and self.null_caption == "negative_prompt"


@dataclass(frozen=True)
class VideoConfig:
    """The mp4."""

    # x264's quality: lower is better and larger; 0 is lossless. 20 is what 18 is with its macroblock tree, which is off
    crf: int = bounded(20, 0, 51)
    preset: str = "veryfast"
    # The encoder's; with as many, equal pixels make equal files. More than there are cores cost memory alone
    threads: int = bounded(16, 1, 128)


@dataclass(frozen=True)
class InferenceConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    video: VideoConfig = field(default_factory=VideoConfig)

    PUBLISHED: ClassVar[Published] = INFERENCE


def check_chi_prompt(chi_prompt: str) -> None:
    """Refuse a single word that names no instruction: it is one misspelt, and no instruction of its own.

    Raises:
        InputError: it is one.
    """
    if chi_prompt not in ("sana", "none") and " " not in chi_prompt.strip():
        raise InputError(f"text_encoder.chi_prompt={chi_prompt}: must be sana, none, or an instruction in full")


Schema = TypeVar("Schema")
COMMAND_LINE = "the command line"
FILES = (
    *("model.load_from", "real_score.load_from", "fake_score.load_from", "vae.vae_pretrained"),
    *("text_encoder.text_encoder_name", "sampling.txt_file", "data.data_path", "validation.val_data_path"),
    *("vae.decoder_pretrained", "streaming.switch_prompt_path"),
)
"""Settings that name a file or a folder, which may lie beside the YAML that names it."""
PATHS = (*FILES, "pairs.out", "shape")
"""Settings in which `~` at the start is the home folder."""


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    schema: type[Schema] = InferenceConfig,  # type: ignore[assignment]
) -> Schema:
    """Read a YAML file (and the one it names as `base:`), put `a.b=value` overrides over it, check it all.

    YAMLs of the published code are read too, by the rules of the schema's `PUBLISHED`: their keys become settings, or
    change nothing here, which is logged in one line.

    Raises:
        InputError: the file is missing or not YAML, a key is unknown, or a value has the wrong type; the message names
            the key's path and the nearest right name. Or values of published keys cannot be honoured: it names all.
    """
    command = _Layer(COMMAND_LINE, parse_overrides(overrides, _kinds(schema)))
    merged = pickle.loads(_defaults(schema))  # type: ignore[arg-type]
    typed: dict[str, str] = {}  # texts of the command line, in which OmegaConf would see placeholders
    for source, settings in _translated(_layers(Path(path), schema, command), schema, str(path)):
        _check_values(settings, leaf_keys(schema), source)
        if source == COMMAND_LINE:
            typed = {key: settings.pop(key) for key, value in list(settings.items()) if _looks_special(value)}
        try:
            merged = OmegaConf.unsafe_merge(merged, _nested(settings))
        except OmegaConfBaseException:
            _blame_key(merged, settings, source)
            raise
    try:
        result: Schema = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:  # ${...} that leads nowhere, or ???
        raise InputError(f"{path}: {error.full_key}: {_reason(error)}") from error
    for key, text in typed.items():
        result = _replaced(result, key, text)
    result = _at_home(result, schema)
    check_bounds(result)
    return result


@functools.cache
def _defaults(schema: type) -> bytes:
    """The defaults of a config class as OmegaConf has them: to be copied, which takes a fraction of making them.

    Pickled, which copies them in a sixth of the time that `copy.deepcopy` takes.
    """
    return pickle.dumps(OmegaConf.structured(schema))


def _check_values(settings: Mapping[str, Any], kinds: Mapping[str, str], source: str) -> None:
    """Refuse values that OmegaConf would take for something else than they are.

    Raises:
        InputError: it names the first.
    """
    for key, value in settings.items():
        kind, wanted = kinds.get(key, ""), ""
        if isinstance(value, dict):
            wanted = "a value, not a mapping"
        elif kind == "bool" and not isinstance(value, str) and value not in (True, False, 0, 1, None):
            wanted = "true or false"
        elif source == COMMAND_LINE and _looks_special(value) and kind not in TEXT:
            wanted = f"a value of the type {kind}"
        elif source == COMMAND_LINE and key in PATHS and value == "":
            wanted = "a path, and it is empty; the current folder is ."
        if wanted:
            raise InputError(f"{source}: {key}={value}: must be {wanted}")


def _looks_special(value: Any) -> bool:
    return isinstance(value, str) and ("${" in value or value == "???")


def _at_home(config: Schema, schema: type) -> Schema:
    """The config with the home folder for `~` in the settings that are paths."""
    for key in leaf_keys(schema).keys() & set(PATHS):
        value = functools.reduce(getattr, key.split("."), config)
        seeded = SEEDED if str(value).startswith(SEEDED) else ""
        path = str(value).removeprefix(SEEDED)
        if path.startswith("~"):
            try:
                config = _replaced(config, key, f"{seeded}{expanded(path)}")
            except InputError as error:
                raise InputError(f"{key}: {error}") from error
    return config


def _replaced(config: Any, key: str, value: Any) -> Any:
    """The config with one setting changed."""
    section, _, rest = key.partition(".")
    return dataclasses.replace(config, **{section: _replaced(getattr(config, section), rest, value) if rest else value})


@dataclass(frozen=True)
class _Layer:
    """Values by dotted key, where they come from, and the folder of that file.

    reference: the key that names this model YAML; only a part of its settings is taken.
    """

    source: str
    values: dict[str, Any]
    folder: Path | None = None
    reference: str | None = None


def _layers(path: Path, schema: type, command: _Layer) -> list[_Layer]:
    """List the layers of settings, the weakest first: those of a YAML, of files it refers to, of the command line."""
    kinds = _kinds(schema)
    own = _Layer(str(path), read_yaml(path, kinds), path.parent)
    files = [own, command]
    if (name := own.values.pop("base", None)) is not None:
        base_path = _referred(path, "base", name)
        base = _Layer(str(base_path), read_yaml(base_path, kinds), base_path.parent)
        if "base" in base.values:
            raise InputError(f"{base_path}: a base may not have a base itself; only one level is allowed")
        files.insert(0, base)
    layers = []
    for position, file in enumerate(files):
        for key in _published(schema).references:
            name = file.values.pop(key, None)
            if name is None or any(key in later.values for later in files[position + 1 :]):
                continue
            referred = _referred(Path(file.source if file.folder else path), key, name)
            log.info("%s: %s", key, referred)
            parts = _layers(referred, InferenceConfig, _Layer(COMMAND_LINE, {}))[:-1]
            layers += [dataclasses.replace(part, reference=key) for part in parts]
        layers.append(file)
    return layers


def _translated(layers: Sequence[_Layer], schema: type, path: str) -> list[tuple[str, dict[str, Any]]]:
    """The layers as settings of the schema, each with its source.

    Raises:
        InputError: a key is unknown, or what cannot be honoured of the published code, all of it.
    """
    published = _published(schema)
    own = {key: value for layer in layers if layer.reference is None for key, value in layer.values.items()}
    found: list[tuple[_Layer, Translation]] = []
    below: dict[str, Any] = {}
    for layer in layers:
        if layer.reference is None:
            continue
        reference = published.references[layer.reference]
        given = _merged(other.values for other in layers if other.reference == layer.reference)
        named = next((own[key] for key in (reference.weights, "model.load_from") if own.get(key) is not None), None)
        context = Context({**given, "model.load_from": given.get("model.load_from") or named}, layer.values)
        _check_kind(INFERENCE, context, layer.source)
        translation = _translate(layer, context, InferenceConfig)
        below |= {key: value for key, value in translation.settings.items() if not key.endswith(".load_from")}
        translation.settings = reference.part(translation.settings)
        found.append((layer, translation))
    context = Context({**below, **own})
    _check_kind(published, context, path)
    for layer in (layer for layer in layers if layer.reference is None):
        found.append((layer, _translate(layer, dataclasses.replace(context, layer=layer.values), schema)))
    refused = [f"{layer.source}: {'; '.join(done.refused)}" for layer, done in found if done.refused]
    if refused:
        raise InputError("; ".join(refused))
    if unused := [key for _, done in found for key in done.unused]:
        given = _merged(layer.values for layer in layers)
        log.info("%s: these published settings change nothing here: %s", path, _shortened(unused, given))
    order = {id(layer): position for position, layer in enumerate(layers)}
    found.sort(key=lambda pair: order[id(pair[0])])
    return [(layer.source, done.settings) for layer, done in found]


def _check_kind(published: Published, context: Context, path: str) -> None:
    try:
        published.check(context)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _translate(layer: _Layer, context: Context, schema: type) -> Translation:
    """One layer's values as settings of the schema."""
    published, known, found = _published(schema), leaf_keys(schema), Translation()
    for key, value in layer.values.items():
        value = _found_beside(layer.folder, key, value)
        section = key.partition(".")[0]
        names = [*known, *published.rules]
        if key in published.rules:
            found.take(published.rules[key], key, value, context)
        elif key in known:
            found.put(key, value, key)
        elif layer.folder is not None and section in published.sections and not mistyped_setting(key, names):
            found.unused.append(key)
        elif value == {} and any(name.startswith(f"{key}.") for name in known):
            pass  # an empty section
        else:
            found.refused.append(_unknown(key, known, names))
    found.settings = {key: _found_beside(layer.folder, key, value) for key, value in found.settings.items()}
    return found


def _merged(layers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {key: value for layer in layers for key, value in layer.items()}


TEXTS = ("negative_prompt", "negative_prompt_real")
"""Published keys that hold a text."""


def _kinds(schema: type) -> dict[str, str]:
    """The types of settings, and of published keys that are texts."""
    return leaf_keys(schema) | dict.fromkeys(TEXTS, "str | None") | {"text_encoder.chi_prompt": PARTS}


def _published(schema: type) -> Published:
    found: Published = getattr(schema, "PUBLISHED", Published())
    return found


def _shortened(keys: Sequence[str], given: Iterable[str]) -> str:
    """Keys to two levels; a section as a whole where all that is given of it is among them."""
    names = []
    for key in keys:
        section, _, rest = key.partition(".")
        whole = rest and all(other in keys for other in given if other.startswith(f"{section}."))
        names.append(f"{section}.*" if whole else ".".join(key.split(".")[:2]))
    return ", ".join(dict.fromkeys(names))


def _referred(path: Path, key: str, name: Any) -> Path:
    """The file that a key of a YAML names: beside it, in the working directory, or in the repository.

    Raises:
        InputError: the name is no text, or there is no such file.
    """
    if not isinstance(name, str):
        raise InputError(f"{path}: {key}={name}: expected the name of a config file")
    try:
        given = expanded(name)
    except InputError as error:
        raise InputError(f"{path}: {key}: {error}") from error
    candidates = (path.parent / given, given, SHIPPED / given)
    if (found := next((candidate for candidate in candidates if candidate.is_file()), None)) is not None:
        return found
    places = ", ".join(dict.fromkeys(str(candidate) for candidate in candidates))
    raise InputError(f"{path}: {key}={name}: no such config file ({places})")


def _found_beside(folder: Path | None, key: str, value: Any) -> Any:
    """The value of a setting, or its path where it names something in the folder of its YAML."""
    if folder is None or key not in FILES or not isinstance(value, str) or not value or not (folder / value).exists():
        return value
    return os.path.abspath(folder / value)


def render_config(config: Any) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal object."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def save_config(config: Any, path: str | Path) -> None:
    """Write `render_config`, whole or not at all."""
    atomic_write_text(path, render_config(config))


def _as_float(value: Any) -> Any:
    """Make a float of a whole number, or of one that YAML takes for a text, such as 1e-3; leave all else as it is."""
    if isinstance(value, bool):
        return value
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def leaf_keys(schema: type) -> dict[str, str]:
    """Dotted name of every setting of a config class, and its type as it stands in the source."""
    return dict(_leaf_keys(schema))


@functools.cache
def _leaf_keys(schema: type) -> dict[str, str]:
    leaves: dict[str, str] = {}
    types = get_type_hints(schema)
    for item in dataclasses.fields(schema):
        section = types[item.name]
        if dataclasses.is_dataclass(section):
            leaves |= {f"{item.name}.{key}": kind for key, kind in _leaf_keys(section).items()}  # type: ignore[arg-type]
        else:
            leaves[item.name] = str(item.type)
    return leaves


def _blame_key(merged: Any, leaves: Mapping[str, Any], source: str) -> None:
    """Find the setting that does not fit by merging one after the other.

    Raises:
        InputError: it names the setting and says why.
    """
    for key, value in leaves.items():
        try:
            merged = OmegaConf.unsafe_merge(merged, _nested({key: value}))
        except OmegaConfBaseException as error:
            # OmegaConf leaves its placeholders unfilled for items of a list.
            reason = _reason(error).replace("$VALUE_TYPE", type(value).__name__).replace("$VALUE", str(value))
            if "ListConfig" in reason and isinstance(value, str | int | float):
                reason = f"must be a list, as in [{value}]"
            raise InputError(f"{source}: {key}={value}: {reason}") from error


def _reason(error: OmegaConfBaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _nested(settings: Mapping[str, Any]) -> Any:
    """Make OmegaConf's sections of settings by dotted name."""
    root: dict[str, Any] = {}
    for key, value in settings.items():
        *sections, name = key.split(".")
        functools.reduce(lambda inner, section: inner.setdefault(section, {}), sections, root)[name] = value
    return OmegaConf.create(root)


def _unknown(key: str, known: Iterable[str], names: Iterable[str]) -> str:
    """Say that a key is none, and what may have been meant."""
    inside = sorted(name for name in known if name.startswith(f"{key}."))
    if inside:
        return f"{key} is a section; set one of {', '.join(inside)}"
    return f"unknown key {key}{did_you_mistype(key, names)}"
