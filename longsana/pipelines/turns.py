"""Turns of a stream: what each chunk is told, its caption and what becomes of the past before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice, repeat
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from longsana.chunks import ChunkPlan
from longsana.data.story import Change, Mark, Outline, check_lengths, read_part
from longsana.encoders.geometry import VAEGeometry
from longsana.pipelines.images import PictureLike, is_same, places_of
from longsana.pipelines.prompts import Item, in_turn, only_words, parts_of
from longsana.runtime.errors import InputError
from longsana.sampling.continuation import Continuation, Telling
from longsana.sampling.transition import Shown, shown_in


class Turn(NamedTuple):
    """The part of a prompt that a chunk of a stream is told, and how.

    prompt: that the chunk's noise is a function of, and that its state says.
    words: its caption.
    change: of the past, before the chunk.
    before, share: the caption that becomes this one, and the share of this one, above 0; 1 is this one alone.
    faded: chunks of such a transition up to this one; 0 in a story, whose plan says it.
    later: False: no change of the past comes after it.
    begins: the number of the story's part that the chunk begins; -1: none.
    picture: (H, W, 3), uint8, that a prompt brings which is taken by itself.
    """

    prompt: str
    words: str
    change: Change = Change()
    before: str = ""
    share: float = 1.0
    faded: int = 0
    later: bool = True
    begins: int = -1
    picture: np.ndarray | None = None


def story_turns(text: str, parts: Sequence[str], outline: Outline, transition_chunks: int) -> Iterator[Turn]:
    """Turns of a story, whose last part goes on without an end.

    text: all of it, parts: its parts' words. transition_chunks: see `shown_in`.
    """
    last, changes = len(parts) - 1, outline.changes
    begins = {part.chunk: number for number, part in enumerate(outline.parts)}
    shown = chain(shown_in(outline, max(outline.chunks, 1), transition_chunks), repeat(Shown(last, last, 1.0)))
    for chunk, one in enumerate(shown):
        change, later = changes.get(chunk, Change()), any(chunk < other for other in changes)
        told = Turn(text, parts[one.part], change, parts[one.before], one.share, later=later)
        yield told._replace(begins=begins.get(chunk, -1))


class Said(NamedTuple):
    """A prompt that a stream is given for a chunk: its noise's, its caption, its own change, and its picture."""

    prompt: str
    words: str
    change: Change | None = None
    image: PictureLike | None = None


class Before(NamedTuple):
    """The past of a stream's first prompt.

    last: the turn of the chunk before; None: there was none. film: a film was.
    """

    last: Turn | None = None
    film: bool = False


Read = Callable[[PictureLike], np.ndarray]
"""Reads a picture that a user gave: (H, W, 3), uint8, of the video's size."""


def prompt_turns(
    said: Iterable[Said], before: Before, change: Change, read: Read, transition_chunks: int = 0
) -> Iterator[Turn]:
    """Turns of prompts that are taken one by one, as chunks begin.

    After a change of prompt the share of the new one rises evenly over `transition_chunks` chunks, as in a story; a
    prompt that changes before that has ended is the one that the next transition begins with. A prompt changes with its
    words, or with its picture.

    change: of the past, where a prompt does not say it itself.

    Raises:
        InputError: a prompt asks for a change that has nothing to change, or that reaches back farther than `change`;
            or it brings a picture, and neither cuts nor begins the video.
    """
    last, shown = before.last, None
    for number, one in enumerate(said):
        prompt, words, own, image = one
        if not number and last is not None and words == last.words:
            shown = image  # the state was cut to it
        _check_change(own, last, change)
        new = image is not None and (last is None or words != last.words or not is_same(image, shown))
        if last is None or (words == last.words and not new):
            told, earlier, faded = Change(), "" if last is None else last.before, 0 if last is None else last.faded
        else:
            told = change if own is None else own
            earlier, faded = "" if told.kind == "cut" else last.words, 0
        picture = None
        if new and image is not None:
            _check_picture(before.film if last is None else told.kind != "cut")
            picture, shown = read(image), image
        if earlier and faded < transition_chunks:
            faded += 1
            last = Turn(prompt, words, told, earlier, faded / (transition_chunks + 1), faded)
        else:
            last = Turn(prompt, words, told)
        yield last._replace(picture=picture)


class NotHeld(InputError):
    """A prompt's own change reaches back to what its stream does not hold. change: that change."""

    def __init__(self, change: Change) -> None:
        super().__init__(
            f"prompt: [{change}] reaches back to what this stream does not hold; begin a stream with "
            f"prompt_change={change}, which its states then hold too"
        )
        self.change = change


def _check_change(own: Change | None, last: Turn | None, change: Change) -> None:
    """Refuse (InputError) a change `own` after the turn `last`, in a stream that holds what `change` needs."""
    if own is not None and last is None:
        raise InputError(
            f"prompt: [{own}]: the first has no past that could change; remove its bracket, or write \\[ for a "
            "plain one"
        )
    if own is not None and (own.chunks > change.chunks or (own.kind == "recache" and change.kind != own.kind)):
        raise NotHeld(own)


def _check_picture(goes_on: bool) -> None:
    """Refuse (InputError) a picture of a prompt where the past goes on."""
    if goes_on:
        raise InputError(
            "prompt: brings a picture where the past goes on, which only a cut may; begin it with [cut], or leave the "
            "picture out"
        )


class Told(NamedTuple):
    """The turns of a stream, and what its states say of them.

    turns: of its chunks, one by one. changes: all that may become of the past.
    plan, done: of its states: the chunks of a story, and those that were there before.
    pictures: that parts of a story begin with, by number: (H, W, 3), uint8, or latents (1, C, 1, h, w) of a state.
    """

    turns: Iterator[Turn]
    changes: tuple[Change, ...]
    plan: tuple[int, ...]
    done: int
    pictures: Mapping[int, np.ndarray | Tensor]

    def said(self, turn: Turn, pictures: Mapping[int, Tensor]) -> dict[str, Any]:
        """Say for the state after a turn what its captions were; of a story, whose plan says it, the pictures to come.

        pictures: (1, C, 1, h, w), latents, by the number of the part.
        """
        if self.plan:
            return {"pictures": dict(pictures)}
        return {"words": turn.words, "before": turn.before if turn.faded else "", "faded": turn.faded}


Place = Callable[[int, Sequence[Mark], ChunkPlan], Outline]
"""Places so many parts, with their marks, in a plan."""


def told_by(
    prompt: str | Iterable[str | Mapping[str, Any]] | None,
    state: Continuation | None,
    lengths: Iterable[int],
    place: Place,
    change: Change,
    transition_chunks: int,
    *,
    film: bool,
    pictures: Mapping[int, np.ndarray],
    read: Read,
) -> Told:
    """Read what a stream is told by a text, a story, or texts that are taken one by one; None: by its state's prompt.

    state: that it goes on from. film: it goes on from one. lengths: latent frames of its chunks, a tuple unless it
    never ends. pictures: (H, W, 3), uint8, that parts of the text begin with, by number. read: of those of texts.

    Raises:
        InputError: it is none of these, a story has no end or does not fit, or what it changes is not held; or a part
            cannot begin with its picture.
    """
    begun = None if state is None else Begun.of(state, place)
    plan = lengths if isinstance(lengths, tuple) else None
    text = only_words(prompt).strip() if isinstance(prompt, str) else None
    parts, marks = ((), ()) if text is None else parts_of(text)
    if begun is not None and begun.outline is not None and (prompt is None or text == begun.state.prompt):
        own = begun.state
        check_lengths(begun.outline, own.plan[own.chunk :], lengths)
        places_of(list(pictures), [begun.outline])
        turns, to_come = story_turns(own.prompt, begun.parts, begun.outline, transition_chunks), begun.outline.changes
        return Told(turns, tuple(to_come.values()), own.plan, own.chunk, {**own.pictures, **pictures})
    if len(parts) > 1:
        if plan is None:
            raise InputError(
                "prompt: a story in a stream without an end; say num_frames, or give the parts' texts one by one"
            )
        outline = place(len(parts), marks, ChunkPlan(plan))
        places_of(list(pictures), [outline])
        turns, to_come = story_turns(text or "", parts, outline, transition_chunks), outline.changes
        return Told(turns, tuple(to_come.values()), plan, 0, pictures)
    if prompt is None:
        assert begun is not None
        said: Iterable[Said] = repeat(Said(begun.state.prompt, begun.last.words))
    elif text is None:
        said = map(_read, in_turn(prompt))
    else:
        one = _read(Item(text))
        said = repeat(Said(text, parts[0]) if one.words == text else one)
    if pictures:
        _check_first(pictures, one_by_one=prompt is not None and text is None)
    last, done = (None, 0) if begun is None else (begun.last, begun.state.chunk)
    turns = prompt_turns(said, Before(last, film), change, read, transition_chunks)
    first = (turn._replace(begins=0) for turn in islice(turns, 1))
    return Told(chain(first, turns), (change,), (), done, pictures)


def lengths_of(
    num_frames: int | None, telling: Telling, geometry: VAEGeometry, *, begins: bool, picture: bool = False
) -> Iterable[int]:
    """Latent frames of each chunk of a video, or of what is added to one: a tuple, or without an end for None.

    begins: nothing comes before. picture: it begins with one.

    Raises:
        InputError: no whole number of latents has so many pixel frames, or the picture is all of the video.
    """
    size, apart = telling.chunk_frames, picture and telling.image_first == "absorb"
    first = telling.first_chunk_frames
    if num_frames is None:
        opening = [1, *[first] * (first > 0)] if apart else [first or size + 1]
        return chain(opening if begins else [], repeat(size))
    if picture and num_frames == 1:
        raise InputError("num_frames=1: shows the picture that it begins with alone; it must be longer")
    if not begins:
        return ChunkPlan.going_on(latents_more(num_frames, geometry), size, first).lengths
    latents = geometry.latent_frames(num_frames)
    return (ChunkPlan.after_picture if apart else ChunkPlan.split)(latents, size, first).lengths


def latents_more(num_frames: int, geometry: VAEGeometry) -> int:
    """Count the latents of so many more pixel frames; InputError where no whole number has them."""
    latents, rest = divmod(num_frames, geometry.time_stride)
    if rest or latents < 1:
        raise InputError(f"num_frames={num_frames}: a video that goes on grows by multiples of {geometry.time_stride}")
    return latents


def _check_first(pictures: Iterable[int], *, one_by_one: bool) -> None:
    """Refuse (InputError) pictures of parts of a prompt that has none, or whose texts bring their own."""
    if one_by_one:
        raise InputError("image: beside prompts one by one, which bring their own: {'prompt': text, 'image': picture}")
    if later := [part for part in pictures if part]:
        raise InputError(f"image: for part {later[0]}, where the prompt has 1, counted from 0; give it to that")


class Begun(NamedTuple):
    """A state, the parts of its prompt, the turn of its last chunk, and its story's outline from its next chunk on."""

    state: Continuation
    parts: Sequence[str]
    last: Turn
    outline: Outline | None = None

    @classmethod
    def of(cls, state: Continuation, place: Place) -> Begun:
        if state.words:
            last = Turn(state.prompt, state.words, before=state.before, faded=state.faded)
            return cls(state, (state.words,), last)
        parts, marks = parts_of(state.prompt)
        if len(parts) == 1 or not state.plan:
            return cls(state, parts, Turn(state.prompt, parts[-1]))
        outline = place(len(parts), marks, ChunkPlan(state.plan)).after(state.chunk)
        number = max((number for number, part in enumerate(outline.parts) if part.chunk < 0), default=0)
        return cls(state, parts, Turn(state.prompt, parts[number]), outline)


def _read(item: Item) -> Said:
    try:
        words, own = read_part(item.text)
    except InputError as error:
        raise InputError(f"prompt: {error}") from error
    return Said(words, words, own, item.image)
