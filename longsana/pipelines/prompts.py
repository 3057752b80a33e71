"""Prompts as a diffusers pipeline takes them: one or several, for videos or for the chunks of a stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longsana.data.prompts import check_words
from longsana.data.story import PICTURE, SPLIT, Mark, read_parts
from longsana.encoders.text import CompactEmbedding, compact, negative_text
from longsana.models.embeddings import TextEmbedding
from longsana.pipelines.arguments import FLOATS, check_numbers
from longsana.pipelines.images import PictureLike
from longsana.runtime.errors import InputError

NO_PROMPT = "prompt: there was none in what should have given them"
LARGEST = 1e6
"""A number of an embedding that is given. Gemma's are some hundreds at most."""


def one_for_each(prompt: str | list[str] | None, embeds: Tensor | None, copies: int) -> list[str]:
    """The prompt of each video; empty where there are only embeddings (B, L, C).

    Raises:
        InputError: there are neither prompts nor embeddings, or prompts are no texts, or name a picture.
    """
    if prompt is None and embeds is None:
        raise InputError("prompt: missing; give it, or prompt_embeds")
    if prompt is None:
        assert embeds is not None
        prompt = [""] * len(embeds)
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list | tuple) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise InputError("prompt: must be a text or a list of texts")
    return [only_words(text).strip() for text in prompts for _ in range(copies)]


def negative_texts(prompt: str | Sequence[str | None] | None, count: int) -> list[str]:
    """The negative prompt of each of `count` prompts; None is the published one, alone or in a list.

    Raises:
        InputError: it is neither a text nor a list of `count` texts, or one has no words, or the published text is not
            to be had.
    """
    prompts: Sequence[str | None] = [prompt] * count if prompt is None or isinstance(prompt, str) else prompt
    if not isinstance(prompts, list | tuple) or not all(text is None or isinstance(text, str) for text in prompts):
        raise InputError("negative_prompt: must be a text, a list of texts, or None, which is the published one")
    if len(prompts) != count:
        raise InputError(f"negative_prompt: {len(prompts)} for {count} prompts")
    for text in prompts:
        check_words(text or "", "negative_prompt")
    return [negative_text(text) for text in prompts]


def given_embeddings(
    name: str, embeds: Tensor, mask: Tensor | None, *, channels: int, count: int, copies: int, device: torch.device
) -> list[CompactEmbedding]:
    """Embeddings that a user gives, of one caption each, for each of `count` prompts, `copies` times.

    name: prompt or negative_prompt. embeds: (count, L, channels). mask: (count, L), true where the network may look.

    Raises:
        InputError: shapes or dtypes are others, there is no mask or it lets nothing be seen, or what is seen is not
            finite, or too large.
    """
    if embeds.dim() != 3 or embeds.shape[2] != channels or len(embeds) != count:
        raise InputError(f"{name}_embeds has shape {tuple(embeds.shape)}: need ({count}, length, {channels})")
    if embeds.dtype not in FLOATS:  # before they are masked
        check_numbers(f"{name}_embeds", embeds, LARGEST)
    if mask is None:
        raise InputError(
            f"{name}_attention_mask: missing; {name}_embeds come with a mask, as from encode_prompt, or padding would "
            "be attended to; one of ones lets all be seen"
        )
    if mask.shape != embeds.shape[:2]:
        raise InputError(
            f"{name}_attention_mask has shape {tuple(mask.shape)}: the embeddings need {tuple(embeds.shape[:2])}"
        )
    seen = mask.to(device).bool()
    # A mask to be added to scores has 0 where this one has 1.
    if bool((mask.to(device) != seen).any()) or not bool(seen.any(1).all()):
        raise InputError(f"{name}_attention_mask: must be 1 where a token is seen, as one must be, and 0 elsewhere")
    # What is not seen must not be NaN either, as nothing times it is.
    tokens = embeds.to(device).masked_fill(~seen[..., None], 0)
    check_numbers(f"{name}_embeds", tokens, LARGEST)
    rows = [compact(TextEmbedding(tokens[row : row + 1], seen[row : row + 1])) for row in range(count)]
    return [row for row in rows for _ in range(copies)]


def parts_of(text: str) -> tuple[tuple[str, ...], tuple[Mark, ...]]:
    """The parts of a prompt of the distilled model; see `read_parts`.

    Raises:
        InputError: one is empty, or says what it cannot mean.
    """
    try:
        return read_parts(text)
    except InputError as error:
        raise InputError(f"prompt: {error}") from error


def only_words(text: str) -> str:
    """A prompt, as it is; InputError where it names a picture or has no words."""
    if PICTURE in text:
        raise InputError(f"prompt: '{PICTURE}' names a picture to begin with; give it as image")
    check_words(text, "prompt")
    return text


class Item(NamedTuple):
    """A prompt of one part that a stream is given for a chunk, and the picture that it begins with, if any."""

    text: str
    image: PictureLike | None = None


def in_turn(prompt: str | Iterable[str | Mapping[str, Any]]) -> Iterator[Item]:
    """The prompt of each chunk; the last of several stays.

    Raises:
        InputError: there is none, or one is neither a text without parts nor `{"prompt": text, "image": picture}`; of a
            list at once, else when it is taken.
    """
    if isinstance(prompt, str):
        return repeat(_item(prompt))
    if not isinstance(prompt, Iterable) or isinstance(prompt, bytes | Mapping) or hasattr(prompt, "shape"):
        raise InputError(f"prompt: a {type(prompt).__name__}; must be a text, or texts one after another")
    if isinstance(prompt, list | tuple):
        items = list(map(_item, prompt))
        if not items:
            raise InputError(NO_PROMPT)
        return chain(items, repeat(items[-1]))
    return _until_told(prompt)


def _until_told(prompts: Iterable[str | Mapping[str, Any]]) -> Iterator[Item]:
    latest: Item | None = None
    for latest in map(_item, prompts):
        yield latest
    if latest is None:
        raise InputError(NO_PROMPT)
    yield from repeat(latest)


def _item(given: str | Mapping[str, Any]) -> Item:
    if not isinstance(given, Mapping):
        return Item(whole(given))
    if "prompt" not in given or (others := [name for name in given if name not in ("prompt", "image")]):
        what = "without a prompt" if "prompt" not in given else f"with {others[0]!r:.40}"
        raise InputError(f"prompt: a mapping {what}; must be {{'prompt': text, 'image': picture}}")
    return Item(whole(given["prompt"]), given.get("image"))


def whole(text: str) -> str:
    """A prompt that has no parts.

    Raises:
        InputError: it has some, or is no text, or names a picture.
    """
    if not isinstance(text, str):
        raise InputError(f"prompt: a {type(text).__name__} where a text is needed")
    words, marks = parts_of(only_words(text).strip())
    if len(words) > 1:
        raise InputError(
            f"prompt: parts between '{' | ' if marks else SPLIT}' are for a video of the distilled model; a stream "
            "takes several prompts as they are, encode_prompt each part by itself"
        )
    return words[0]
