"""Checks that need no model, made before anything is loaded: of what is asked for, and of the headers of weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from longsana.chunks import ChunkPlan
from longsana.config import InferenceConfig, ModelConfig, VAEConfig, check_chi_prompt
from longsana.data.pictures import read_picture
from longsana.data.prompts import Prompt, check_words, place, read_prompts
from longsana.data.story import Change, Outline, check_cut, place_parts
from longsana.encoders.geometry import geometry
from longsana.encoders.headers import check_text_encoder, check_vae
from longsana.encoders.tiny_layouts import BESIDE, FULL, check_decoder, check_tiny, source_of
from longsana.flow.schedule import FlowSchedule
from longsana.published import DISTILLED
from longsana.runtime.errors import InputError
from longsana.runtime.hub import SCHEME, SEEDED, file_sha256, locate
from longsana.runtime.settings import check_bounds
from longsana.runtime.video import MOST_PIXELS, check_preset
from longsana.weights.build import empty_model, seed_of
from longsana.weights.files import check_digests
from longsana.weights.names import PAST
from longsana.weights.network import check_fit
from longsana.weights.what_is import PIPELINE_PART

DPM = "flow_dpm-solver"
WHOLE_CLIP = ("flow_euler", DPM)
STAGGERED = "chunk_flow_euler"
SOURCES = {"model": "load_from", "vae": "vae_pretrained", "text_encoder": "text_encoder_name"}
"""The setting of each section that says where weights come from."""
DECODER = "decoder"
"""The part beside them whose weights a tiny decoder has."""

SAMPLERS: dict[str, tuple[tuple[str, ...], str]] = {
    "scheduler.denoising_step_list": ((DISTILLED,), "it takes scheduler.num_inference_steps steps"),
    "scheduler.bf16_timesteps": ((DISTILLED,), "its timesteps are never rounded"),
    "scheduler.absorb": ((DISTILLED,), "it keeps no state of its last steps"),
    "sampling.cuda_graphs": ((DISTILLED,), "its passes are not recorded"),
    **dict.fromkeys(
        ("sampling.prompt_change", "sampling.transition_chunks", "sampling.transition"),
        ((DISTILLED,), "its prompts have one part"),
    ),
    **{f"model.{name}": ((DISTILLED, STAGGERED), "it samples a clip as one chunk") for name in PAST},
    "sampling.first_chunk_frames": ((DISTILLED, STAGGERED), "it samples a clip as one chunk"),
    "scheduler.interval_k": ((STAGGERED,), "only chunk_flow_euler's chunks are staggered"),
    "scheduler.num_inference_steps": (
        (STAGGERED, *WHOLE_CLIP),
        "it takes the steps of scheduler.denoising_step_list",
    ),
    "sampling.negative_prompt": ((STAGGERED, *WHOLE_CLIP), "it has no guidance"),
    "sampling.null_caption": ((STAGGERED, *WHOLE_CLIP), "it has no guidance"),
    "sampling.image_fit": ((DISTILLED, *WHOLE_CLIP), "its prompts have no picture"),
    "sampling.image_first": ((DISTILLED,), "a picture is pinned in its clip, or its prompts have none"),
}
"""Settings that mean something to some samplers only: to which, and why they change nothing with another."""


def meaningless(config: InferenceConfig) -> dict[str, str]:
    """Settings that decide nothing about this config's videos, and why."""
    sampling = config.sampling
    sampler = config.scheduler.sampling_algo
    found = {setting: reason for setting, (samplers, reason) in SAMPLERS.items() if sampler not in samplers}
    if sampling.cfg_scale == 1:
        reason = "with cfg_scale 1 nothing is guided away from it"
        found = {"sampling.negative_prompt": reason, "sampling.null_caption": reason} | found
    elif sampling.null_caption == "learned" and sampling.negative_prompt:
        found["sampling.negative_prompt"] = "sampling.null_caption=learned takes its place"
    if sampling.transition_chunks == 0:
        found.setdefault("sampling.transition", "sampling.transition_chunks=0 leaves no way between two captions")
    if sampling.motion_score is None or sampling.motion_score > 0:
        found["sampling.high_motion"] = f"it counts with a motion_score of 0 or less, not {sampling.motion_score}"
    return found


def chunk_plan(
    config: InferenceConfig, num_frames: int | None = None, *, goes_on: bool = False, picture: bool = False
) -> ChunkPlan:
    """The chunks of a video; the bidirectional base model samples its clip as one.

    num_frames: pixel frames of a video whose prompt says so; None: as many as the config says.
    goes_on: of what is added to a video, one latent less: it lacks the single picture that opens a video.
    picture: it begins with one, which may be a chunk by itself; see `sampling.image_first`.

    Raises:
        InputError: no whole number of latents has so many frames.
    """
    frames = geometry(config.vae).latent_frames(config.sampling.num_frames if num_frames is None else num_frames)
    sampler, sampling = config.scheduler.sampling_algo, config.sampling
    size, first_chunk = sampling.chunk_frames, sampling.first_chunk_frames
    if sampler in WHOLE_CLIP:
        return ChunkPlan.split(frames - goes_on, frames)
    if goes_on:
        return ChunkPlan.going_on(frames - 1, size, first_chunk)
    if picture and sampler == DISTILLED:
        return ChunkPlan.with_picture(frames, size, sampling.image_first, first_chunk)
    return ChunkPlan.split(frames, size, first_chunk)


def check_first_chunk(first: int, size: int, names: tuple[str, str]) -> None:
    """Refuse (InputError) a first chunk of `first` latent frames where chunks have `size`; 0: it has no own length.

    names: of the two settings. One more than a chunk's is what published videos begin with: 1 + 10 latents.
    """
    if first > size + 1:
        raise InputError(
            f"{names[0]}={first}: must be at most {size + 1}, {names[1]} + 1; a longer first chunk would be later, and "
            "longer than any that the model was trained with"
        )


def check_no_memory(config: InferenceConfig) -> None:
    """Refuse (InputError) what makes videos fit into a small GPU where networks learn, which need a large one."""
    for name, plain in (("memory", None), ("offload", "none")):
        if (value := getattr(config.sampling, name)) != plain:
            raise InputError(
                f"sampling.{name}={value}: has no meaning for training, whose networks stay on the GPU; leave it to "
                "inference"
            )


def check_no_first_chunk(config: InferenceConfig) -> None:
    """Refuse (InputError) a first chunk of its own length where networks learn, whose clips are cut as published."""
    if first := config.sampling.first_chunk_frames:
        raise InputError(
            f"sampling.first_chunk_frames={first}: has no meaning for training, whose clips are equal chunks with the "
            "remainder in the first, and whose validation shows such; leave it to inference"
        )


def check_division(config: InferenceConfig) -> None:
    """Refuse (InputError) to divide videos among processes whose chunks overlap while they are made."""
    if config.scheduler.sampling_algo not in (DISTILLED, *WHOLE_CLIP):
        raise InputError(
            f"scheduler.sampling_algo={config.scheduler.sampling_algo}: its chunks overlap, and are not divided among "
            "GPUs; use one GPU for a video"
        )


def check_config(config: InferenceConfig) -> None:
    """Refuse settings that no video can be made with, before anything is loaded.

    Raises:
        InputError: the first one found, by name, with what would be right.
    """
    sampling, scheduler = config.sampling, config.scheduler
    check_bounds(config)
    if int(config.model.mlp_ratio * config.model.architecture().hidden_size) < 1:
        raise InputError(f"model.mlp_ratio={config.model.mlp_ratio}: leaves the Mix-FFN no channel; must be larger")
    check_chi_prompt(config.text_encoder.chi_prompt)
    check_words(config.text_encoder.chi_prompt, "text_encoder.chi_prompt")
    check_words(sampling.negative_prompt or "", "sampling.negative_prompt")
    default_change(config)
    if sampling.offload in ("text_encoder", "all") and sampling.cuda_graphs:
        raise InputError(
            f"sampling.offload={sampling.offload}: weights come and go, and sampling.cuda_graphs=true replays passes "
            "over weights that stay; use one of them"
        )
    check_first_chunk(
        sampling.first_chunk_frames, sampling.chunk_frames, ("sampling.first_chunk_frames", "sampling.chunk_frames")
    )
    if scheduler.sampling_algo == DISTILLED and sampling.cfg_scale != 1:
        raise InputError(
            f"cfg_scale={sampling.cfg_scale:g}: the distilled model ({DISTILLED}) was trained without guidance; "
            f"use --cfg_scale=1, or a base model with --sampling_algo={', '.join(WHOLE_CLIP)} or {STAGGERED}"
        )
    try:
        FlowSchedule.from_config(scheduler)
    except ValueError as error:
        raise InputError(f"scheduler: {error}") from error
    empty_model(config.model)
    check_preset(config.video.preset)
    vae = geometry(config.vae)
    vae.latent_frames(sampling.num_frames)
    if config.model.in_channels != vae.channels:
        raise InputError(
            f"model.in_channels={config.model.in_channels}: the latents of {config.vae.vae_type} have {vae.channels}"
        )
    check_decoder(config.vae)
    check_size(config, sampling.height, sampling.width)


def check_size(config: InferenceConfig, height: int, width: int) -> None:
    """Refuse (InputError) a size that the VAE, the network or the mp4's encoder does not take."""
    if height * width > MOST_PIXELS:
        raise InputError(f"{height}x{width}: too large; height times width must be at most {MOST_PIXELS:,}")
    patch = config.model.architecture().patch_size
    geometry(config.vae).check_size(height, width, patch[1:])


def select_prompts(
    config: InferenceConfig,
    start_index: int,
    end_index: int | None,
    sample_nums: int | None = None,
    *,
    pictures: bool = False,
    image: Path | None = None,
    goes_on: bool = False,
) -> list[Prompt]:
    """Prompts [start_index, end_index) of the config's file, counted from 0, all fit to be sampled.

    sample_nums: prompts of the file that count, from its top; None: all. pictures: whether they may begin with one.
    image: the picture of prompts that begin with none. goes_on: the videos go on from others, among which their parts
        are still to be placed.

    Raises:
        InputError: the file, the range, or a prompt's size, length, parts or picture are wrong.
    """
    sampling = config.sampling
    path = locate(sampling.txt_file, "the prompt file")
    prompts = read_prompts(
        path,
        height=sampling.height,
        width=sampling.width,
        aspect_ratio_type=sampling.aspect_ratio_type,
        seed=sampling.seed,
        frames=sampling.num_frames,
        pictures=pictures,
        image=image,
    )
    if sample_nums is not None and sample_nums < 1:
        raise InputError(f"--sample_nums {sample_nums}: must be at least 1")
    prompts = prompts[:sample_nums]
    selected = prompts[start_index:end_index]
    if start_index < 0 or (end_index is not None and end_index < 0) or not selected:
        raise InputError(
            f"--start_index {start_index} --end_index {end_index}: selects none of the {len(prompts)} prompts in {path}"
        )
    checked: set[tuple[Path, int, int]] = set()  # a picture of many prompts is read once
    for prompt in selected:
        seed = sampling.seed if prompt.seed is None else prompt.seed
        frames = sampling.num_frames if prompt.frames is None else prompt.frames
        own = dataclasses.replace(sampling, height=prompt.height, width=prompt.width, seed=seed, num_frames=frames)
        try:
            check_bounds(own)
            check_size(config, prompt.height, prompt.width)
            if not goes_on:
                placed_parts(config, prompt)
            check_pictures(config, prompt, frames, checked)
        except InputError as error:
            raise InputError(f"{place(path, prompt.line)}: {error}") from error
    return selected


def check_pictures(config: InferenceConfig, prompt: Prompt, frames: int, checked: set[tuple[Path, int, int]]) -> None:
    """Refuse the pictures of a prompt, whose video has `frames` frames, where it cannot have them; all of each is read.

    checked: pictures and sizes that were read before; these are added.

    Raises:
        InputError: the sampler takes none, the video is as short as its picture, a part that begins with one is no cut,
            or the file is none that is read.
    """
    for number, path in prompt.pictures.items():
        check_picture_sampler(config)
        if frames == 1:
            raise InputError("num_frames=1: shows the picture that it begins with alone; it must be longer")
        check_cut((prompt.marks[number].change if number else None) or default_change(config), number)
        fitted = path, prompt.height, prompt.width
        if fitted not in checked:
            read_picture(*fitted, config.sampling.image_fit)
            checked.add(fitted)


def check_picture_sampler(config: InferenceConfig) -> None:
    """Refuse (InputError) a picture to begin with where the sampler takes none."""
    sampler = config.scheduler.sampling_algo
    if sampler not in (DISTILLED, *WHOLE_CLIP):
        raise InputError(
            f"a picture to begin with needs LongSANA ({DISTILLED}) or the bidirectional base model "
            f"({', '.join(WHOLE_CLIP)}), not {sampler}"
        )


def placed_parts(config: InferenceConfig, prompt: Prompt, *, goes_on: bool = False) -> Outline:
    """Place the parts of a prompt in its video. goes_on: see `chunk_plan`.

    Raises:
        InputError: they do not fit into it, or the sampler takes none.
    """
    if len(prompt.parts) > 1 and config.scheduler.sampling_algo != DISTILLED:
        between = " | " if prompt.marks else "<split>"
        raise InputError(f"parts between '{between}' need the streaming sampler ({DISTILLED})")
    plan = chunk_plan(config, prompt.frames, goes_on=goes_on, picture=prompt.image is not None)
    change = default_change(config)
    shape, fps = geometry(config.vae), config.sampling.fps
    return Outline(place_parts(len(prompt.parts), prompt.marks, plan, shape, fps, change), len(plan))


def default_change(config: InferenceConfig) -> Change:
    """Read what becomes of the past where a part begins that does not say it itself; InputError for what is none."""
    try:
        return Change.parse(config.sampling.prompt_change)
    except InputError as error:
        raise InputError(f"sampling.prompt_change: {error}") from error


def source_digest(config: InferenceConfig, section: str) -> str:
    """Digest the weights of a part: SHA-256 of the file or folder, or the seed they are drawn from.

    section: of SOURCES, or DECODER.

    Raises:
        InputError: they are not there.
    """
    if section == DECODER:
        source = source_of(config.vae)
        return source if source.startswith(SEEDED) else file_sha256(locate(source, "vae.decoder_pretrained"))
    key = SOURCES[section]
    uri: str = getattr(getattr(config, section), key)
    without = BESIDE if section == "vae" else ()
    if not uri.startswith(SEEDED):
        path = locate(uri, f"{section}.{key}", part=PIPELINE_PART if section == "model" else "")
        if section == "model":
            check_digests(path)  # the digest of a run's checkpoint is its manifest's, which must be true
        return file_sha256(path, without)
    if section == "model":
        return uri
    return SEEDED + file_sha256(locate(uri.removeprefix(SEEDED), f"{section}.{key}"), without)


def sections_used(config: InferenceConfig, *, encodes: bool) -> list[str]:
    """The parts whose weights decide something: of SOURCES, and DECODER.

    encodes: whether pictures or films are encoded, without which a tiny decoder leaves nothing for the VAE to do.
    """
    used = [section for section in SOURCES if section != "vae" or uses_vae(config.vae, encodes=encodes)]
    return used if config.vae.decoder == FULL else [*used, DECODER]


def uses_vae(config: VAEConfig, *, encodes: bool) -> bool:
    """Tell whether the weights of the VAE itself are used; encodes: see `sections_used`."""
    return config.decoder == FULL or (encodes and config.encoder == FULL)


def seeded_sources(config: InferenceConfig) -> list[str]:
    """The settings, as `section.key=value`, that ask for random weights."""
    settings = {f"{section}.{key}": getattr(getattr(config, section), key) for section, key in SOURCES.items()}
    if config.vae.decoder != FULL:
        settings["vae.decoder_pretrained"] = source_of(config.vae)
    return [f"{name}={uri}" for name, uri in settings.items() if uri.startswith(SEEDED)]


def check_weights(
    config: InferenceConfig,
    *,
    fetch: bool = False,
    sections: Sequence[str] = ("model", "vae", "text_encoder"),
    encodes: bool = True,
) -> None:
    """Refuse weights of which headers and config.json tell that they are of another kind, or not whole.

    Neither diffusers nor transformers is imported, and no tensor is read: it takes a fraction of a second at full size.

    fetch: also of files on the hub, which are fetched now.
    sections: those whose weights will be used. encodes: see `sections_used`.

    Raises:
        InputError: the first that is wrong, by the setting that names it.
    """
    if "model" in sections:
        check_network(config.model, "model.load_from", fetch=fetch)
    if "vae" in sections and config.vae.decoder != FULL and not (source := source_of(config.vae)).startswith(SEEDED):
        with blame(setting := "vae.decoder_pretrained"):
            if (path := _here(source, setting, "", fetch)) is not None:
                check_tiny(config.vae, path)
    if "vae" in sections and uses_vae(config.vae, encodes=encodes):
        setting, uri = _named("vae"), config.vae.vae_pretrained
        with blame(setting):
            if (path := _here(uri, setting, "vae", fetch)) is not None:
                check_vae(config.vae, path)
    if "text_encoder" in sections:
        setting, uri = _named("text_encoder"), config.text_encoder.text_encoder_name
        with blame(setting):
            if (path := _here(uri, setting, "", fetch)) is not None:
                check_text_encoder(path, config.model.caption_channels, seeded=uri.startswith(SEEDED))


def check_network(config: ModelConfig, setting: str, *, fetch: bool = False) -> None:
    """Refuse the weights of one network, which `setting` names; see `check_weights`.

    Raises:
        InputError: they are of another kind, or not whole.
    """
    if config.load_from.startswith(SEEDED):
        seed_of(config.load_from)
        return
    with blame(setting):
        if (path := _here(config.load_from, setting, PIPELINE_PART, fetch)) is not None:
            check_fit(path, config, key=config.checkpoint_key)


@contextmanager
def blame(setting: str) -> Iterator[None]:
    """Name the setting that an error's file came from."""
    try:
        yield
    except InputError as error:
        known = str(error).startswith(setting)
        raise error if known else InputError(f"{setting}: {error}") from error


def _named(section: str) -> str:
    return f"{section}.{SOURCES[section]}"


def _here(uri: str, setting: str, part: str, fetch: bool) -> Path | None:
    """Find the file or folder; None where it is on the hub and not to be fetched."""
    uri = uri.removeprefix(SEEDED)
    return None if uri.startswith(SCHEME) and not fetch else locate(uri, setting, part)
