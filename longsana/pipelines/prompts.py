"""Prompts as a diffusers pipeline takes them: one or several, for videos or for the chunks of a stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, repeat

from torch import Tensor

from longsana.data.prompts import SPLIT, check_words
from longsana.runtime.errors import InputError

NO_PROMPT = "prompt: there was none in what should have given them"


def one_for_each(prompt: str | list[str] | None, embeds: Tensor | None, copies: int) -> list[str]:
    """The prompt of each video; empty where there are only embeddings.

    Raises:
        InputError: there are neither prompts nor embeddings, prompts are no texts or ask for a picture, or `copies`
            is below 1.
    """
    if copies < 1:
        raise InputError(f"num_videos_per_prompt={copies}: must be at least 1")
    if prompt is None and embeds is None:
        raise InputError("prompt: missing; give it, or prompt_embeds")
    if prompt is None:
        assert embeds is not None
        prompt = [""] * len(embeds)
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list | tuple) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise InputError("prompt: must be a text or a list of texts")
    for text in prompts:
        check_words(text, "prompt")
    return [text.strip() for text in prompts for _ in range(copies)]


def in_turn(prompt: str | Iterable[str]) -> Iterator[str]:
    """The prompt of each chunk; the last of several stays.

    Raises:
        InputError: there is none, or one is no text or has parts; of a list at once, else when it is taken.
    """
    if isinstance(prompt, str):
        return repeat(whole(prompt))
    if not isinstance(prompt, Iterable):
        raise InputError(f"prompt: a {type(prompt).__name__}; must be a text, or texts one after another")
    if isinstance(prompt, list | tuple):
        prompts = [whole(text) for text in prompt]
        if not prompts:
            raise InputError(NO_PROMPT)
        return chain(prompts, repeat(prompts[-1]))
    return _until_told(prompt)


def _until_told(prompts: Iterable[str]) -> Iterator[str]:
    latest: str | None = None
    for latest in map(whole, prompts):
        yield latest
    if latest is None:
        raise InputError(NO_PROMPT)
    yield from repeat(latest)


def whole(text: str) -> str:
    """A prompt that has no parts.

    Raises:
        InputError: it has some, is no text, or asks for a picture.
    """
    if not isinstance(text, str):
        raise InputError(f"prompt: a {type(text).__name__} where a text is needed")
    check_words(text, "prompt")
    if SPLIT in text:
        raise InputError(
            f"prompt: parts between '{SPLIT}' are for a video of the distilled model; a stream takes several "
            "prompts as they are, encode_prompt each part by itself"
        )
    return text.strip()
