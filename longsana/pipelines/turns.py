"""Turns of a stream: what each chunk is told, its caption and what becomes of the past before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, repeat
from typing import NamedTuple

from longsana.chunks import ChunkPlan
from longsana.data.story import Change, Mark, Outline, read_part
from longsana.pipelines.prompts import in_turn, only_words, parts_of
from longsana.runtime.errors import InputError
from longsana.sampling.continuation import Continuation
from longsana.sampling.transition import Shown, shown_in


class Turn(NamedTuple):
    """The part of a prompt that a chunk of a stream is told, and how.

    prompt: that the chunk's noise is a function of, and that its state says.
    words: its caption.
    change: of the past, before the chunk.
    before, share: the caption that becomes this one, and the share of this one, above 0; 1 is this one alone.
    faded: chunks of such a transition up to this one; 0 in a story, whose plan says it.
    later: False: no change of the past comes after it.
    """

    prompt: str
    words: str
    change: Change = Change()
    before: str = ""
    share: float = 1.0
    faded: int = 0
    later: bool = True


def story_turns(text: str, parts: Sequence[str], outline: Outline, transition_chunks: int) -> Iterator[Turn]:
    """Turns of a story, whose last part goes on without an end.

    text: all of it, parts: its parts' words. transition_chunks: see `shown_in`.
    """
    last, changes = len(parts) - 1, outline.changes
    shown = chain(shown_in(outline, max(outline.chunks, 1), transition_chunks), repeat(Shown(last, last, 1.0)))
    for chunk, one in enumerate(shown):
        change, later = changes.get(chunk, Change()), any(chunk < other for other in changes)
        yield Turn(text, parts[one.part], change, parts[one.before], one.share, later=later)


def prompt_turns(
    prompts: Iterable[str], last: Turn | None, change: Change, transition_chunks: int = 0
) -> Iterator[Turn]:
    """Turns of prompts that are taken one by one, as chunks begin.

    After a change of prompt the share of the new one rises evenly over `transition_chunks` chunks, as in a story; a
    prompt that changes before that has ended is the one that the next transition begins with.

    last: the turn of the chunk before the first; None: there was none.
    change: of the past, where a prompt does not say it itself.

    Raises:
        InputError: a prompt asks for a change that is none, that has nothing to change, or that reaches back farther
            than `change` does.
    """
    for text in prompts:
        try:
            words, own = read_part(text)
        except InputError as error:
            raise InputError(f"prompt: {error}") from error
        if own is not None and last is None:
            raise InputError(f"prompt: [{own}]: the first has no past that could change; remove its bracket")
        if own is not None and (own.chunks > change.chunks or (own.kind == "recache" and change.kind != own.kind)):
            raise InputError(
                f"prompt: [{own}] reaches back to what this stream does not hold; ask for it with prompt_change={own}"
            )
        if last is None or words == last.words:
            told, before, faded = Change(), "" if last is None else last.before, 0 if last is None else last.faded
        else:
            told = change if own is None else own
            before, faded = "" if told.kind == "cut" else last.words, 0
        if before and faded < transition_chunks:
            faded += 1
            last = Turn(words, words, told, before, faded / (transition_chunks + 1), faded)
        else:
            last = Turn(words, words, told)
        yield last


class Told(NamedTuple):
    """The turns of a stream, and what its states say of them.

    turns: of its chunks, one by one. changes: all that may become of the past.
    plan, done: of its states: the chunks of a story, and those that were there before.
    """

    turns: Iterator[Turn]
    changes: tuple[Change, ...]
    plan: tuple[int, ...]
    done: int


Place = Callable[[int, Sequence[Mark], ChunkPlan], Outline]
"""Places so many parts, with their marks, in a plan."""


def told_by(
    prompt: str | Iterable[str],
    state: Continuation | None,
    plan: tuple[int, ...] | None,
    place: Place,
    change: Change,
    transition_chunks: int,
) -> Told:
    """Read what a stream is told by a text, a story, or texts that are taken one by one.

    state: that it goes on from. plan: latent frames of its chunks; None: it never ends.

    Raises:
        InputError: it is none of these, a story has no end or does not fit, or what it changes is not held.
    """
    own = None if state is None else _outlined(state, place)
    text = only_words(prompt).strip() if isinstance(prompt, str) else None
    if text is not None and len((story := parts_of(text))[0]) > 1:
        if state is not None and own is not None and text == state.prompt:
            turns = story_turns(text, story[0], own, transition_chunks)
            return Told(turns, tuple(own.changes.values()), state.plan, state.chunk)
        if plan is None:
            raise InputError(
                "prompt: a story in a stream without an end; say num_frames, or give the parts' texts one by one"
            )
        outline = place(len(story[0]), story[1], ChunkPlan(plan))
        return Told(story_turns(text, story[0], outline, transition_chunks), tuple(outline.changes.values()), plan, 0)
    last, done = (None, 0) if state is None else (_last(state, own), state.chunk)
    return Told(prompt_turns(in_turn(prompt), last, change, transition_chunks), (change,), (), done)


def _outlined(state: Continuation, place: Place) -> Outline | None:
    """A state's own story from its next chunk on, if its prompt is one."""
    parts, marks = parts_of(state.prompt)
    if len(parts) == 1 or not state.plan:
        return None
    return place(len(parts), marks, ChunkPlan(state.plan)).after(state.chunk)


def _last(state: Continuation, outline: Outline | None) -> Turn:
    """The turn of the chunk after which a state was made."""
    if outline is None:
        return Turn(state.prompt, state.prompt, before=state.before, faded=state.faded)
    number = max((number for number, part in enumerate(outline.parts) if part.chunk < 0), default=0)
    return Turn(state.prompt, parts_of(state.prompt)[0][number])
