"""Checks of what films may be cut into that need no network, and the cutting."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from longsana.data.aspect import ASPECT_RATIOS, nearest_size
from longsana.data.clips import KIND
from longsana.data.shards import MANIFEST, Contents, read_manifest
from longsana.data.sources import Source
from longsana.data.survey import Facts, Span, spans
from longsana.encoders.geometry import geometry
from longsana.encoders.tiny_layouts import FULL
from longsana.runtime.errors import InputError
from longsana.sampling.checks import check_config
from longsana.training.config import TrainingConfig

Size = tuple[int, int]
RULES = {
    "cut": "from the first frame on, one after another, the rest left out",
    "frames": "frame k is the picture shown at k / fps seconds, upright, with square pixels",
    "fit": "the largest middle part of the clip's shape, bicubic",
    "colours": "by the matrix that the film names, else BT.709's from 720 lines on and BT.601's below",
}
"""What is done to every film, for the manifest."""
OTHER_OUT = "choose another --out"


class Sized(NamedTuple):
    """A clip, and its (height, width) in pixels."""

    span: Span
    size: Size


def check_encoding(config: TrainingConfig) -> None:
    """Refuse settings that no clip can be encoded with.

    Raises:
        InputError: the first one found, by name, with what would be right.
    """
    check_config(config)
    if config.vae.encoder != FULL:
        raise InputError(f"vae.encoder={config.vae.encoder}: clips are encoded with the VAE itself; leave it out")
    for size in _sizes(config):
        try:
            geometry(config.vae).latent_size(*size)
        except InputError as error:
            raise InputError(f"sampling.aspect_ratio_type={config.sampling.aspect_ratio_type}: {error}") from error


def with_whole_vae(config: TrainingConfig) -> TrainingConfig:
    """Leave out a tiny decoder, which encodes nothing."""
    return dataclasses.replace(config, vae=dataclasses.replace(config.vae, decoder=FULL, decoder_pretrained=None))


def clip_frames(config: TrainingConfig) -> int:
    """Count the pixel frames of a clip that this config trains on."""
    return geometry(config.vae).pixel_frames(config.rollout.num_training_frames)


def cut_and_sized(config: TrainingConfig, sources: Sequence[Source], found: Sequence[Facts]) -> list[Sized]:
    """Cut films into clips of the config's length; each has its size, or that of its table nearest to the film's."""
    sampling = config.sampling
    sized = []
    for facts, span in spans(sources, found, clip_frames(config)):
        size = sampling.height, sampling.width
        if sampling.aspect_ratio_type != "none":
            size = nearest_size(sampling.aspect_ratio_type, facts.height / facts.width)
        sized.append(Sized(span, size))
    return sized


def by_folder(clips: Sequence[Sized], out: Path) -> dict[Path, list[Sized]]:
    """The clips of each size, in order, by the folder of `out` that they belong in: HEIGHTxWIDTH."""
    folders: dict[Size, list[Sized]] = defaultdict(list)
    for clip in clips:
        folders[clip.size].append(clip)
    return {out / f"{height}x{width}": folders[height, width] for height, width in sorted(folders)}


def decides_pictures(config: TrainingConfig, clips: Sequence[Sized]) -> dict[str, Any]:
    """List all that decides the pictures of clips of one size, for their manifest, by the settings' names."""
    told = [[span.source.name, span.sha256, span.first, span.source.caption] for span, _ in clips]
    return {
        **_decides_cutting(config),
        "height": clips[0].size[0],
        "width": clips[0].size[1],
        "clips_sha256": hashlib.sha256(json.dumps(told).encode()).hexdigest(),
    }


def _decides_cutting(config: TrainingConfig) -> dict[str, Any]:
    return {
        **RULES,
        "pixel_frames": clip_frames(config),
        "sampling.fps": config.sampling.fps,
        "sampling.aspect_ratio_type": config.sampling.aspect_ratio_type,
    }


def refuse_other_cutting(config: TrainingConfig, out: Path) -> None:
    """Refuse a folder with shards of films that were cut otherwise, which can be told before a film is read.

    Raises:
        InputError: it is one.
    """
    for folder in shard_folders(out):
        there = _contents(folder)
        made_by = {**there.made_by, **_decides_cutting(config)}
        dataclasses.replace(there, made_by=made_by).refuse_other(there, folder, OTHER_OUT)


def refuse_other_clips(config: TrainingConfig, clips: Sequence[Sized], out: Path) -> None:
    """Refuse a folder with shards of other clips, which what describes them there would no longer fit.

    Raises:
        InputError: the folder of a size has others, or there is one of a size that none of these has.
    """
    folders = by_folder(clips, out)
    for folder in shard_folders(out):
        if folder not in folders:
            raise InputError(f"{folder}: holds clips of a size that none of these has; {OTHER_OUT}")
        there, own = _contents(folder), folders[folder]
        made_by = {**there.made_by, **decides_pictures(config, own)}
        dataclasses.replace(there, kind=KIND, made_by=made_by, count=len(own)).refuse_other(there, folder, OTHER_OUT)


def shard_folders(out: Path) -> list[Path]:
    """The folders of `out` in which shards of clips of a size are, or were begun."""
    return sorted(manifest.parent for manifest in out.glob(f"[0-9]*x[0-9]*/{MANIFEST}"))


def _contents(folder: Path) -> Contents:
    try:
        return read_manifest(folder)[0]
    except InputError as error:
        raise InputError(f"{error}; remove it, or {OTHER_OUT}") from error


def _sizes(config: TrainingConfig) -> list[Size]:
    sampling = config.sampling
    if sampling.aspect_ratio_type == "none":
        return [(sampling.height, sampling.width)]
    return list(ASPECT_RATIOS[sampling.aspect_ratio_type].values())
