"""Checks of what films may be cut into that need no network, and the cutting."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from longsana.data.aspect import ASPECT_RATIOS, nearest_size
from longsana.data.sources import Source
from longsana.data.survey import Facts, Span, spans
from longsana.encoders.geometry import geometry
from longsana.encoders.tiny_layouts import FULL
from longsana.runtime.errors import InputError
from longsana.sampling.checks import check_config
from longsana.training.config import TrainingConfig

Size = tuple[int, int]


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


def _sizes(config: TrainingConfig) -> list[Size]:
    sampling = config.sampling
    if sampling.aspect_ratio_type == "none":
        return [(sampling.height, sampling.width)]
    return list(ASPECT_RATIOS[sampling.aspect_ratio_type].values())
