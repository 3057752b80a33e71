"""The sidecar beside every mp4, by which a finished video is known and made once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import longsana
from longsana.config import InferenceConfig
from longsana.data.prompts import Prompt
from longsana.encoders.geometry import geometry
from longsana.encoders.text import instruction_text, negative_text, text_sha256
from longsana.encoders.tiny_layouts import FULL
from longsana.inference.beginnings import Beginning
from longsana.runtime.foreign import reason_of
from longsana.runtime.hub import file_sha256
from longsana.sampling.checks import DECODER, SOURCES, chunk_plan, sections_used, source_digest
from longsana.weights.build import resolve_dtype

log = logging.getLogger(__name__)

PARTS = ("sampling.prompt_change", "sampling.transition_chunks", "sampling.transition")
"""Settings that decide something about a prompt of several parts alone, and are told with these."""


def video_name(prompt: Prompt) -> str:
    return f"{prompt.line:05d}-{prompt.slug}.mp4"


def source_digests(config: InferenceConfig, *, encodes: bool) -> dict[str, str]:
    """Digest the weights of each part that is used, by section; see `source_digest` and `sections_used`."""
    return {section: source_digest(config, section) for section in sections_used(config, encodes=encodes)}


def resolved_settings(config: InferenceConfig, prompt: Prompt, device: torch.device) -> dict[str, dict[str, Any]]:
    """The config as it holds for one video: its own seed, size and length, dtypes instead of "auto", the negative
    prompt if it has one.

    Raises:
        InputError: the published negative prompt is wanted and not to be had.
    """
    settings = dataclasses.asdict(config)
    sampling = config.sampling
    negative = negative_text(sampling.negative_prompt) if sampling.has_negative_prompt else None
    own = {"seed": prompt.seed, "num_frames": prompt.frames}
    settings["sampling"] |= {name: value for name, value in own.items() if value is not None}
    settings["sampling"] |= {"height": prompt.height, "width": prompt.width, "negative_prompt": negative}
    for section, key in (("model", "dtype"), ("vae", "weight_dtype"), ("text_encoder", "dtype")):
        settings[section][key] = str(resolve_dtype(settings[section][key], device)).removeprefix("torch.")
    return settings


def told_parts(config: InferenceConfig, prompt: Prompt, beginning: Beginning | None = None) -> list[dict[str, Any]]:
    """Tell where each part of a prompt really begins in its video (chunk, frame, second), and what the past becomes.

    Frames and seconds are those of the mp4. With a picture it says where that was found, and the SHA-256 of the file,
    which is a state's where the state holds the picture.

    Raises:
        InputError: see `Beginning.outline`.
    """
    beginning = beginning or Beginning()
    goes_on = beginning.goes_on
    plan = chunk_plan(config, prompt.frames, goes_on=goes_on, picture=prompt.image is not None)
    starts, vae = plan.starts, geometry(config.vae)
    outline, pictures, told = beginning.outline(prompt, config), beginning.pictures_of(prompt), []
    for number, part in outline.shown(len(starts)).items():
        frame = beginning.given_frames + vae.pixel_frames(starts[part.chunk], first=not goes_on)
        second = round(frame / config.sampling.fps, 3)
        told.append(
            {
                "text": prompt.parts[number],
                "chunk": part.chunk,
                "frame": frame,
                "second": second,
                "change": str(part.change),
            }
        )
        if number in pictures and outline.parts[number].chunk >= 0:
            told[-1] |= {"image": str(pictures[number]), "image_sha256": file_sha256(pictures[number])}
    return told


PICTURES = ("image_fit", "image_first")
"""Settings of a picture that a video or a part of it begins with."""


def fingerprint(
    settings: Mapping[str, Any],
    prompt: Prompt,
    digests: Mapping[str, str],
    without: Iterable[str] = (),
    parts: Sequence[Mapping[str, Any]] = (),
    began: Mapping[str, Any] | None = None,
    picture: str | None = None,
    *,
    encodes: bool = False,
) -> str:
    """SHA-256 of all that decides what a video shows: prompt, seed, settings and weights.

    Where the weights lie, where the prompt stands and which prompts are sampled beside it decide nothing.

    without: settings that decide nothing either; see `meaningless`.
    parts: of the prompt, as `told_parts` has them. began: what the video goes on from, if anything.
    picture: SHA-256 of the picture that it begins with, which is fitted as `sampling.image_fit` says.
    encodes: something is encoded for this video; what a state holds of pictures has been.
    """
    deciding = {section: dict(values) for section, values in settings.items()}
    deciding["vae"] = _deciding_vae(settings["vae"], digests, encodes=encodes)
    for section in SOURCES.keys() - {"vae"}:
        deciding[section][SOURCES[section]] = digests[section]
    deciding["text_encoder"]["chi_prompt"] = text_sha256(instruction_text(deciding["text_encoder"]["chi_prompt"]))
    if deciding["model"]["state_decay"] == 1:
        deciding["model"]["state_decay"] = None  # one past
    sampling = deciding["sampling"]
    # A prompt of one part, and even parts that keep the past, are the videos that they were before there were others.
    story: list[Any] = [[part["chunk"], part["change"]] for part in parts]
    if len(prompt.parts) > 1 and sampling["transition_chunks"]:
        story.append([sampling["transition"], sampling["transition_chunks"]])
    elif not prompt.marks and all(part["change"] == "keep" for part in parts):
        story = []
    first: dict[str, Any] = {} if picture is None else {"image_sha256": picture}
    later = [[part["chunk"], part["image_sha256"]] for part in parts[picture is not None :] if "image_sha256" in part]
    first |= {"cut_to": later} if later else {}
    if first:
        first |= {name: sampling[name] for name in PICTURES if f"sampling.{name}" not in without}
    decides_nothing = {"sampling.bs", "sampling.cuda_graphs", "sampling.txt_file", *PARTS, *without}
    decides_nothing |= {"sampling.memory", "sampling.offload", "model.feed_forward_frames"}
    decides_nothing |= {f"sampling.{name}" for name in PICTURES}
    if not sampling["first_chunk_frames"]:  # the videos that they were before there was such a length
        decides_nothing.add("sampling.first_chunk_frames")
    if deciding["scheduler"]["absorb"] == "clean":  # likewise
        decides_nothing.add("scheduler.absorb")
    for setting in decides_nothing:
        section, _, key = setting.partition(".")
        del deciding[section][key]
    identity = [prompt.text, prompt.repetition, deciding]
    identity += [more for more in (story, dict(began or {}), first) if more]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _deciding_vae(settings: Mapping[str, Any], digests: Mapping[str, str], *, encodes: bool) -> dict[str, Any]:
    """Settings of the VAE that decide what a video shows, with digests for places.

    With its own decoder they are what they were before there were others. A tiny one leaves to the VAE what is encoded.
    encodes: whether something is, for this video.
    """
    deciding = dict(settings)
    tiny = {key: deciding.pop(key) for key in ("decoder", "decoder_pretrained", "encoder")}
    del deciding["vae_pretrained"]
    if tiny["decoder"] == FULL:
        return deciding | {"vae_pretrained": digests["vae"]}
    if encodes and tiny["encoder"] == FULL:
        deciding["vae_pretrained"] = digests["vae"]
    deciding |= {"decoder": tiny["decoder"], "decoder_pretrained": digests[DECODER]}
    return deciding | {"encoder": tiny["encoder"]} if encodes else deciding


def is_finished(video: Path, fingerprint: str, saved: Sequence[Any] | None = None) -> bool:
    """Tell whether the video is there, whole, and the one of this fingerprint.

    saved: the states that are wanted beside it, as its sidecar says; None: any or none.
    """
    try:
        record = json.loads(video.with_suffix(".json").read_text(encoding="utf-8"))
        whole = bool(record["fingerprint"] == fingerprint and record["bytes"] == video.stat().st_size)
        return whole and _has_states(video, record, saved)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _has_states(video: Path, record: Mapping[str, Any], saved: Sequence[Any] | None) -> bool:
    if saved is None:
        return True
    there = record.get("states", [])
    return record.get("saved") == list(saved) and all((video.parent / name).is_file() for name in there)


def finished_videos(folder: Path, saved: Sequence[Any] | None = None) -> dict[str, str]:
    """File names of the complete videos in a folder, and the fingerprint of each.

    saved: see `is_finished`; a video without the states counts as unfinished.

    A sidecar that does not fit the video beside it is said; other JSON files are none of inference's.
    """
    finished = {}
    for video in sorted(path for path in folder.glob("*.mp4") if not path.name.startswith(".")):
        sidecar = video.with_suffix(".json")
        try:
            record = json.loads(sidecar.read_text(encoding="utf-8"))
            size = video.stat().st_size
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            log.info("%s: cannot be read (%s); %s counts as unfinished", sidecar, reason_of(error), video.name)
            continue
        if not isinstance(record, dict) or not isinstance(record.get("fingerprint"), str):
            continue
        if size == record.get("bytes") and not _has_states(video, record, saved):
            log.info("%s: has no such states beside it; it counts as unfinished", video)
        elif size == record.get("bytes"):
            finished[video.name] = record["fingerprint"]
        else:
            log.info(
                "%s: has %d bytes, and %s in its sidecar; it counts as unfinished", video, size, record.get("bytes")
            )
    return finished


def versions() -> dict[str, str]:
    names = ("torch", "diffusers", "transformers", "av")
    return {"longsana": longsana.__version__, "python": platform.python_version()} | {n: version(n) for n in names}


def commit() -> str:
    """The commit of this package's checkout, "-dirty" if it was changed since; "unknown" outside of one."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git here
        return "unknown"
    return found.stdout.strip() or "unknown"
