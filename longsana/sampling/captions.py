"""Prompts to captions: what the text encoder makes of a prompt's parts, and of what guidance leads away from."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple

import torch

from longsana.config import InferenceConfig, SamplingConfig
from longsana.data.prompts import Prompt
from longsana.encoders.text import CompactEmbedding, GemmaTextEncoder, compact, expand, negative_text, with_motion
from longsana.models.embeddings import TextEmbedding
from longsana.runtime.offload import Turns
from longsana.sampling.checks import blame
from longsana.weights.build import resolve_dtype


class Caption(NamedTuple):
    """The embeddings of one video's prompt, on the host.

    parts: one for each part of the prompt, in the order in which they are shown.
    negative: the negative prompt's; None without guidance, and where the checkpoint's own null caption takes its place.
    """

    parts: tuple[CompactEmbedding, ...]
    negative: CompactEmbedding | None = None


@contextmanager
def text_encoder(
    config: InferenceConfig, device: torch.device, turns: Turns | None = None
) -> Iterator[GemmaTextEncoder]:
    """Load the text encoder, for as long as it is needed: its memory is free after the block, whoever still holds it.

    turns: it takes part in them, with those that are on the device meanwhile; None: it stays where it works.

    Raises:
        InputError: it is missing, or does not fit the network; the message names the setting.
    """
    model, text = config.model, config.text_encoder
    with blame("text_encoder.text_encoder_name"):
        encoder = GemmaTextEncoder.load(
            text,
            caption_length=model.caption_length,
            caption_channels=model.caption_channels,
            device=device,
            dtype=resolve_dtype(text.dtype, device),
        )
    if turns is not None:
        encoder.there = turns.add(encoder.model).there
    try:
        yield encoder
    finally:
        del encoder.model  # callers, who hold the encoder, hold no weights
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def caption_encoder(
    config: InferenceConfig, device: torch.device, turns: Turns | None = None
) -> Iterator[CaptionEncoder]:
    """Load the text encoder, for as long as it is needed, to encode prompts with. turns, Raises: see `text_encoder`."""
    with text_encoder(config, device, turns) as encoder:
        yield CaptionEncoder(encoder, config.sampling)


class CaptionEncoder:
    """Encodes prompts as a config says: with the instruction, the motion score, and beside the negative prompt.

    One text at a time: an embedding never depends on its neighbours.
    """

    def __init__(self, encoder: GemmaTextEncoder, sampling: SamplingConfig) -> None:
        self.encoder, self._sampling = encoder, sampling

    def __call__(self, prompt: Prompt) -> Caption:
        """Encode a prompt.

        Raises:
            FloatingPointError: an embedding is not finite.
        """
        parts = tuple(compact(self.encoder.encode(self._words(part))) for part in prompt.parts)
        return Caption(parts, self._negative if self._sampling.has_negative_prompt else None)

    def overflow(self, prompt: Prompt) -> list[int]:
        """Count the tokens of each part that are too many and will be cut off."""
        return [self.encoder.overflow(self._words(part)) for part in prompt.parts]

    @cached_property
    def _negative(self) -> CompactEmbedding:
        text = negative_text(self._sampling.negative_prompt)
        return compact(self.encoder.encode(text, instruction=False))

    def _words(self, part: str) -> str:
        return with_motion(part, self._sampling.motion_score, high=self._sampling.high_motion)


def stacked(embeddings: Sequence[CompactEmbedding], device: torch.device | str) -> TextEmbedding:
    """Expand embeddings of one caption each to a batch on `device`: tokens (B, L, C), mask (B, L)."""
    expanded = [expand(embedding, device) for embedding in embeddings]
    return TextEmbedding(*(torch.cat(parts) for parts in zip(*expanded, strict=True)))
