"""Videos in the memory of a small GPU: what they need, counted from sizes, and the settings with which they fit.

`sampling.memory` is in GiB, of the whole process as nvidia-smi counts it. What is chosen for it leaves videos as they
are but for rounding. Float8 and tiny decoders are other videos, which a user asks for.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from longsana.chunks import ChunkPlan
from longsana.config import Dtype, InferenceConfig, ModelConfig, Offload
from longsana.data.prompts import Prompt
from longsana.encoders.geometry import geometry
from longsana.encoders.headers import CLASSES, check_text_folder, open_vae
from longsana.encoders.layouts import WAN_WIDTH, Shape, gemma_tensors, ltx2_tensors, wan_tensors
from longsana.encoders.tiny_layouts import FULL, TINY, fitting, tiny_tensors
from longsana.models.float8 import CAPABILITY, PRODUCTS
from longsana.ops import backend
from longsana.runtime.errors import InputError
from longsana.runtime.gpu_memory import CONTEXT, GIB, hold_memory
from longsana.runtime.hub import SEEDED, locate
from longsana.sampling.checks import STAGGERED, chunk_plan, default_change, uses_vae
from longsana.weights.build import empty_model, resolve_dtype

log = logging.getLogger(__name__)

GPU = torch.device("cuda")
MARGIN = 1.05
"""Factor on what is counted beside weights, for what lies between tensors that come and go."""
WORKSPACE = 128 << 20
"""Bytes of the libraries' products."""
TEXTS = "encoding the text"
"""A moment whose memory does not depend on the videos."""
ENCODING_TEXT = 300 << 20
"""Bytes beside a text encoder's weights while it works."""
CAPTIONS, RECORDINGS, POINTS = 4, 4, 4
"""Captions that a live server has ready on the GPU, kinds of passes that it records, and moments of a session that it
holds with the decoder's memory, beside one without; see `serving.making` and `serving.studio`."""
ATTENTION, PLAIN = 9.1, 22.1
"""Activations of a block at its fullest, in tensors of all tokens: of linear attention by fused operations, and of
everything by plain ones. The fused Mix-FFN has 3, and what it expands."""


class Decoder(NamedTuple):
    """Numbers for a pixel of a frame: what a decoder remembers, and has at its fullest beside that.

    fused, plain: of a call, (any, each latent of it), by the operations. picture, film: of encoding one, or 11 latents.
    """

    cache: float
    fused: tuple[float, float]
    plain: tuple[float, float]
    picture: float = 0
    film: float = 0


VAES = {
    "WanVAE": Decoder(2364.5, (193, 1155), (193, 3467), 1170, 3844),
    "LTX2VAE_diffusers": Decoder(330.25, (17, 257.5), (17, 578.5), 94, 3758),
}
"""Decoders of the VAEs as they are published."""
TINY_DECODERS = {
    "taew2_1": Decoder(84, (100, 608), (84, 1568)),
    "lighttaew2_1": Decoder(84, (100, 608), (84, 1568)),
    "taeltx_2": Decoder(5.25, (5.25, 188), (5.25, 196)),
    "tae_shapes": Decoder(84, (100, 608), (84, 1568)),  # no more than these
}


class Parts(NamedTuple):
    """The sizes that a config does not say: how many numbers the VAE and the text encoder have.

    encoder: of the VAE's. width: of the VAE, against the published one.
    """

    vae: int
    encoder: int
    text_encoder: int
    width: float = 1.0


class Work(NamedTuple):
    """The largest videos that are made.

    size: height and width in pixels. frames: latent frames of the longest chunk, or of a clip. reach: states that are
    held for changes of the past. encodes: pictures or films are encoded. films: and films are. saves: states are.
    live: a server makes them, which keeps the text encoder and moments to go on from. goes_on: from a state or film.
    """

    size: tuple[int, int]
    frames: int
    reach: int = 0
    encodes: bool = False
    films: bool = False
    saves: bool = False
    live: bool = False
    goes_on: bool = False


class _Network(NamedTuple):
    """Bytes of the network: its weights as they are loaded and as they stay, a state, and what a pass has.

    token: a tensor of all tokens. passing: a pass at its fullest, with the state that it makes. text: captions.
    """

    loaded: int
    weights: int
    state: int
    token: int
    passing: float
    text: int


class _Decoding(NamedTuple):
    """Bytes of what decodes: weights, and those of a VAE that encodes beside it; its memory; a call at its fullest.

    waiting: weights that come to encode. pictures: 8-bit ones of a stretch. floats: of a call.
    """

    weights: int
    encoder: int
    waiting: int
    cache: float
    call: float
    pictures: int
    floats: int


def needed(config: InferenceConfig, parts: Parts, work: Work, *, fused: bool = True) -> dict[str, float]:
    """GiB of a GPU that the whole process has at each of its fullest moments. fused: see `ops.backend`."""
    network, decoder = _network(config, work, fused=fused), _decoding(config, parts, work, fused=fused)
    offload, live, saves = config.sampling.offload, work.live, work.saves
    alone = offload == "all" and config.vae.decoder == FULL  # network and decoder are never together
    text = parts.text_encoder * _itemsize(config.text_encoder.dtype)
    together = offload in ("none", "encoder")
    stays = decoder.encoder + (text if live and together else 0)
    beside_pass, beside_call = (0, 0) if alone else (decoder.weights, network.weights)
    graphs = 0.0
    if config.sampling.cuda_graphs:
        graphs += network.passing + 2 * network.state * (RECORDINGS if live else 2) + network.text
        graphs += 0 if config.vae.decoder == FULL else decoder.call + decoder.cache
    # Of what a video goes on from, and of a live session's moments.
    others = (work.goes_on + POINTS * live) * (network.state + decoder.cache) + network.state * live
    lasting = network.state * (1 + work.reach) + decoder.cache + network.text + graphs + others
    # A moment that is saved holds the decoder's memory, and the next call makes another.
    calling = lasting + (decoder.cache if saves or live else 0)
    frames = max(decoder.call + decoder.pictures, 2 * decoder.pictures + 2 * decoder.floats)
    moments = {
        TEXTS: (text, ENCODING_TEXT),
        "loading the network": (network.loaded + stays, 0),
        "a pass": (stays + network.weights + beside_pass, lasting + network.passing),
        "decoding": (stays + decoder.weights + beside_call, calling + frames),
    }
    if live:
        there = beside_pass + (network.weights if together else 0)
        moments[TEXTS] = (text + there, lasting + ENCODING_TEXT)
    if work.encodes:
        of_vae = VAES[config.vae.vae_type]
        encoding = parts.width * _pixel(config, work) * (of_vae.film if work.films else of_vae.picture)
        moments["encoding pictures"] = (stays + decoder.weights + decoder.waiting + beside_call, lasting + encoding)
    fixed = WORKSPACE + CONTEXT
    return {name: (weights + MARGIN * other + fixed) / GIB for name, (weights, other) in moments.items()}


def _network(config: InferenceConfig, work: Work, *, fused: bool) -> _Network:
    model, size, videos = config.model, config.model.architecture(), config.sampling.bs
    loaded, rounded, itemsize, state = _sizes(
        replace(model, float8=False, feed_forward_frames=0), videos, geometry(config.vae).latent_size(*work.size)
    )
    patches = math.prod(geometry(config.vae).latent_size(*work.size)) // math.prod(size.patch_size)
    row = videos * itemsize * size.hidden_size
    cut = 0 < model.feed_forward_frames < work.frames
    share = model.feed_forward_frames / work.frames if cut else 1.0
    feed_forward = 3.1 + 3 * share * model.mlp_ratio + (1 - share)
    activations = max(feed_forward, ATTENTION) if fused else PLAIN * max(1, model.mlp_ratio / 3)
    token = patches * work.frames * row
    # What a pass makes of the state block by block, and both while it becomes one value.
    passing = max(activations * token + state, 2 * token + 2 * state)
    captions = CAPTIONS if work.live else 2
    return _Network(
        loaded,
        loaded - rounded * (itemsize - 1) if model.float8 else loaded,
        state,
        token,
        passing,
        captions * 2 * size.depth * model.caption_length * row,
    )


@lru_cache
def _sizes(model: ModelConfig, videos: int, latent_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Bytes of the weights; how many numbers float8 rounds, and bytes of each as it is; and bytes of a state."""
    empty = empty_model(model).to(resolve_dtype(model.dtype, GPU))
    products = tuple(f".{product}.weight" for product in PRODUCTS)
    rounded = sum(weight.numel() for name, weight in empty.named_parameters() if name.endswith(products))
    state = sum(part.nbytes for part in empty.empty_state(videos, *latent_size)[:3])
    return sum(weight.nbytes for weight in empty.parameters()), rounded, empty.dtype.itemsize, state


def _decoding(config: InferenceConfig, parts: Parts, work: Work, *, fused: bool) -> _Decoding:
    vae, pixel, shape = config.vae, _pixel(config, work), geometry(config.vae)
    weights, encoder, own = parts.vae * _itemsize(vae.weight_dtype), 0, VAES[vae.vae_type]
    waiting = 0 if config.sampling.offload == "none" else parts.encoder * _itemsize(vae.weight_dtype)
    if vae.decoder == FULL:
        weights -= waiting
    else:
        waiting = 0
        encoder, own = weights if work.encodes and vae.encoder == FULL else 0, TINY_DECODERS[vae.decoder]
        # Beside the network's own there are those that are laid out for it.
        weights = 2 * _itemsize(vae.weight_dtype) * _numbers(tiny_tensors(TINY[vae.decoder]))
    scaled = pixel * (parts.width if vae.decoder == FULL else 1.0)
    constant, each = own.fused if fused else own.plain
    frame = 3 * config.sampling.bs * math.prod(work.size)
    pictures = frame * shape.time_stride * min(config.sampling.chunk_frames + 1, work.frames)
    floats = 4 * frame * shape.time_stride * vae.latents_per_call
    call = scaled * (constant + each * vae.latents_per_call)
    return _Decoding(weights, encoder, waiting, scaled * own.cache, call, pictures, floats)


def _pixel(config: InferenceConfig, work: Work) -> int:
    """Bytes of a number for each pixel of a frame."""
    return config.sampling.bs * _itemsize(config.vae.weight_dtype) * math.prod(work.size)


def _itemsize(dtype: Dtype) -> int:
    return resolve_dtype(dtype, GPU).itemsize


def candidates(config: InferenceConfig, work: Work) -> Iterator[InferenceConfig]:
    """The config with other settings of memory, the fastest first; each is the same video but for rounding."""
    model, vae, sampling = config.model, config.vae, config.sampling
    # A tiny decoder is no reason for the network to leave, and has a VAE beside it only to encode.
    levels: list[Offload] = ["none"]
    levels += ["encoder"] if vae.decoder == FULL else []
    levels += ["text_encoder"] if work.live else []
    levels += ["all"] if vae.decoder == FULL else []
    # What the config lets wait, and more.
    allowed = levels[levels.index(sampling.offload) :] if sampling.offload in levels else [sampling.offload]
    cuts, half = [model.feed_forward_frames], -(-work.frames // 2)
    cuts += [half] if not 0 < model.feed_forward_frames <= half else []
    for offload in allowed:
        recordings = [True, False] if sampling.cuda_graphs and offload in ("none", "encoder") else [False]
        free = offload == "none" and "encoder" in allowed and not work.encodes  # the next level costs nothing
        for recorded in recordings[:1] if free else recordings:
            for latents in [vae.latents_per_call] if free else range(vae.latents_per_call, 0, -1):
                for frames in cuts[:1] if free else cuts:
                    yield replace(
                        config,
                        model=replace(model, feed_forward_frames=frames),
                        vae=replace(vae, latents_per_call=latents),
                        sampling=replace(sampling, offload=offload, cuda_graphs=recorded),
                    )


def choose(
    config: InferenceConfig, parts: Parts, work: Work, *, fused: bool = True, float8: bool = True
) -> InferenceConfig:
    """The config with the first of `candidates` that fits into `sampling.memory`. float8: whether this GPU has it.

    Raises:
        InputError: none does; the message says what would.
    """
    memory = config.sampling.memory
    assert memory is not None
    for candidate in candidates(config, work):
        if max(needed(candidate, parts, work, fused=fused).values()) <= memory:
            return candidate
    raise InputError(_refusal(config, parts, work, fused=fused, float8=float8))


def least(config: InferenceConfig, parts: Parts, work: Work, *, fused: bool = True) -> tuple[float, str]:
    """The least GiB that a config fits into, and the moment that needs it."""
    all_needed = [needed(candidate, parts, work, fused=fused) for candidate in candidates(config, work)]
    return min((max(need.values()), max(need, key=lambda name: need[name])) for need in all_needed)


def _refusal(config: InferenceConfig, parts: Parts, work: Work, *, fused: bool, float8: bool) -> str:
    memory, (height, width) = config.sampling.memory, work.size
    gib, moment = least(config, parts, work, fused=fused)
    ways: dict[str, InferenceConfig] = {}
    if config.sampling.bs > 1:
        ways["sampling.bs=1"] = replace(config, sampling=replace(config.sampling, bs=1))
    if float8 and not config.model.float8:
        ways["model.float8=true"] = _in_float8(config)
    if config.vae.decoder == FULL:
        decoder: Any = fitting(config.vae.vae_type)[0]
        tiny = replace(config, vae=replace(config.vae, decoder=decoder))
        ways[f"vae.decoder={decoder}"] = tiny
        if float8 and not config.model.float8:
            ways[f"vae.decoder={decoder} model.float8=true"] = _in_float8(tiny)
    assert memory is not None
    fits = [name for name, way in ways.items() if least(way, parts, work, fused=fused)[0] <= memory]
    instead = f", or make other videos, with {' or '.join(fits)}" if fits else ""
    if not fits and moment != TEXTS:  # of which the videos' size is no matter
        instead = ", or make smaller videos"
    return f"sampling.memory={memory:g}: {height}x{width} needs {_up(gib):.1f} GiB for {moment}; give that{instead}"


def _in_float8(config: InferenceConfig) -> InferenceConfig:
    return replace(config, model=replace(config.model, float8=True))


def _up(gib: float) -> float:
    """Round up to a tenth, so that what a message says fits."""
    return math.ceil(10 * gib) / 10


def fit_memory(config: InferenceConfig, device: torch.device, work: Work) -> InferenceConfig:
    """Hold this process to `sampling.memory`; returns the config with settings that fit, which one line tells.

    The config is unchanged where it is not set. Before anything is on the GPU. Weights on the hub are fetched, whose
    headers say how large they are.

    Raises:
        InputError: nothing fits, or the weights are not there or none.
    """
    memory = config.sampling.memory
    if memory is None:
        return config
    if device.type != "cuda":
        log.info("sampling.memory=%g changes nothing on a CPU", memory)
        return config
    total = torch.cuda.get_device_properties(device).total_memory / GIB
    if memory > total:
        log.info("sampling.memory=%g is more than this GPU has, %.1f GiB, which count", memory, total)
        config = replace(config, sampling=replace(config.sampling, memory=total))
    fused = backend() == "triton"
    float8 = torch.cuda.get_device_capability(device) >= CAPABILITY
    parts = parts_of(config, encodes=work.encodes)
    chosen = choose(config, parts, work, fused=fused, float8=float8)
    need = needed(chosen, parts, work, fused=fused)
    moment = max(need, key=lambda name: need[name])
    log.info("sampling.memory=%g: %s; %.1f GiB by count (%s)", memory, told(chosen), need[moment], moment)
    hold_memory(min(memory, total), device)
    return chosen


def told(config: InferenceConfig) -> str:
    """The settings that `sampling.memory` chooses, as they would be typed."""
    chosen = {
        "vae.latents_per_call": config.vae.latents_per_call,
        "model.feed_forward_frames": config.model.feed_forward_frames,
        "sampling.cuda_graphs": str(config.sampling.cuda_graphs).lower(),
        "sampling.offload": config.sampling.offload,
    }
    return " ".join(f"{name}={value}" for name, value in chosen.items())


def parts_of(config: InferenceConfig, *, encodes: bool) -> Parts:
    """Read what headers say of the VAE and of the text encoder that a config names. encodes: see `uses_vae`.

    Raises:
        InputError: they are not there, or none; or the decoder looks ahead, so that a video's end is not bounded.
    """
    source, class_name = config.vae.vae_pretrained, CLASSES[config.vae.vae_type]
    vae, encoder, width = 0, 0, 1.0
    if uses_vae(config.vae, encodes=encodes):
        path = locate(source.removeprefix(SEEDED), "vae.vae_pretrained", "vae")
        files = open_vae(source, path, class_name, headers_only=True)
        wan = config.vae.vae_type == "WanVAE"
        tensors = (wan_tensors if wan else ltx2_tensors)(files.config) or {}
        vae = _numbers(tensors)
        encoder = _numbers({name: shape for name, shape in tensors.items() if name.startswith("encoder.")})
        width = files.config.get("base_dim", WAN_WIDTH) / WAN_WIDTH if wan else 1.0
        if not wan and config.vae.decoder == FULL and not files.config.get("decoder_causal", True):
            raise InputError(
                f"sampling.memory={config.sampling.memory}: the decoder of {source} looks ahead, and gives the end of "
                "a video in one call, which nothing here makes smaller; leave it out"
            )
    folder = locate(config.text_encoder.text_encoder_name.removeprefix(SEEDED), "text_encoder.text_encoder_name")
    text_encoder = _numbers(gemma_tensors(check_text_folder(folder, config.model.caption_channels)))
    return Parts(vae, encoder, text_encoder, width)


def _numbers(tensors: Mapping[str, Shape]) -> int:
    return sum(math.prod(shape) for shape in tensors.values())


def work_of(config: InferenceConfig, prompts: Sequence[Prompt] = (), *, goes_on: bool = False, **known: Any) -> Work:
    """The largest that a config and prompts ask for. goes_on: they go on from others; known: other fields of `Work`."""
    sampling = config.sampling
    sizes = [(prompt.height, prompt.width) for prompt in prompts] or [(sampling.height, sampling.width)]
    lengths = dict.fromkeys([prompt.frames for prompt in prompts] or [None])
    plans = [chunk_plan(config, frames, goes_on=goes_on) for frames in lengths]
    changes = [default_change(config), *(mark.change for prompt in prompts for mark in prompt.marks if mark.change)]
    reach = max(change.chunks if change.kind == "recache" else 0 for change in changes)
    frames = max(_together(config, plan) for plan in plans)
    return Work(max(sizes, key=math.prod), frames, reach, goes_on=goes_on, **known)


def _together(config: InferenceConfig, plan: ChunkPlan) -> int:
    """Latent frames of a pass at most."""
    if config.scheduler.sampling_algo != STAGGERED:
        return max(plan.lengths)
    most = math.ceil(1 / max(config.scheduler.interval_k, 1 / len(plan))) + 1
    return min(most * max(plan.lengths), plan.frames)
