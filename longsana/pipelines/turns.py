"""Turns of a stream: what each chunk is told, its caption and what becomes of the past before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, repeat
from typing import Any, NamedTuple

from longsana.chunks import ChunkPlan
from longsana.data.story import Change, Mark, Outline, check_lengths, read_part
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


class Said(NamedTuple):
    """A prompt that a stream is given for a chunk: its noise's, its caption, and the change that it asks for itself."""

    prompt: str
    words: str
    change: Change | None = None


def prompt_turns(said: Iterable[Said], last: Turn | None, change: Change, transition_chunks: int = 0) -> Iterator[Turn]:
    """Turns of prompts that are taken one by one, as chunks begin.

    After a change of prompt the share of the new one rises evenly over `transition_chunks` chunks, as in a story; a
    prompt that changes before that has ended is the one that the next transition begins with.

    last: the turn of the chunk before the first; None: there was none.
    change: of the past, where a prompt does not say it itself.

    Raises:
        InputError: a prompt asks for a change that has nothing to change, or that reaches back farther than `change`.
    """
    for prompt, words, own in said:
        if own is not None and last is None:
            raise InputError(
                f"prompt: [{own}]: the first has no past that could change; remove its bracket, or write \\[ for a "
                "plain one"
            )
        if own is not None and (own.chunks > change.chunks or (own.kind == "recache" and change.kind != own.kind)):
            raise InputError(
                f"prompt: [{own}] reaches back to what this stream does not hold; begin a stream with "
                f"prompt_change={own}, which its states then hold too"
            )
        if last is None or words == last.words:
            told, before, faded = Change(), "" if last is None else last.before, 0 if last is None else last.faded
        else:
            told = change if own is None else own
            before, faded = "" if told.kind == "cut" else last.words, 0
        if before and faded < transition_chunks:
            faded += 1
            last = Turn(prompt, words, told, before, faded / (transition_chunks + 1), faded)
        else:
            last = Turn(prompt, words, told)
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

    def said(self, turn: Turn) -> dict[str, Any]:
        """Say for the state after a turn what its captions were; of a story, whose plan says it, nothing."""
        if self.plan:
            return {}
        return {"words": turn.words, "before": turn.before if turn.faded else "", "faded": turn.faded}


Place = Callable[[int, Sequence[Mark], ChunkPlan], Outline]
"""Places so many parts, with their marks, in a plan."""


def told_by(
    prompt: str | Iterable[str] | None,
    state: Continuation | None,
    lengths: Iterable[int],
    place: Place,
    change: Change,
    transition_chunks: int,
) -> Told:
    """Read what a stream is told by a text, a story, or texts that are taken one by one; None: by its state's prompt.

    state: that it goes on from. lengths: latent frames of its chunks, a tuple unless it never ends.

    Raises:
        InputError: it is none of these, a story has no end or does not fit, or what it changes is not held.
    """
    begun = None if state is None else _Begun.of(state, place)
    plan = lengths if isinstance(lengths, tuple) else None
    text = only_words(prompt).strip() if isinstance(prompt, str) else None
    parts, marks = ((), ()) if text is None else parts_of(text)
    if begun is not None and begun.outline is not None and (prompt is None or text == begun.state.prompt):
        own = begun.state
        check_lengths(begun.outline, own.plan[own.chunk :], lengths)
        turns = story_turns(own.prompt, begun.parts, begun.outline, transition_chunks)
        return Told(turns, tuple(begun.outline.changes.values()), own.plan, own.chunk)
    if len(parts) > 1:
        if plan is None:
            raise InputError(
                "prompt: a story in a stream without an end; say num_frames, or give the parts' texts one by one"
            )
        outline = place(len(parts), marks, ChunkPlan(plan))
        return Told(
            story_turns(text or "", parts, outline, transition_chunks), tuple(outline.changes.values()), plan, 0
        )
    if prompt is None:
        assert begun is not None
        said: Iterable[Said] = repeat(Said(begun.state.prompt, begun.last.words))
    elif text is None:
        said = (Said(words, words, own_change) for words, own_change in map(_read, in_turn(prompt)))
    else:
        words, own_change = _read(text)
        said = repeat(Said(text, parts[0]) if words == text else Said(words, words, own_change))
    last, done = (None, 0) if begun is None else (begun.last, begun.state.chunk)
    return Told(prompt_turns(said, last, change, transition_chunks), (change,), (), done)


class _Begun(NamedTuple):
    """A state, the parts of its prompt, the turn of its last chunk, and its story's outline from its next chunk on."""

    state: Continuation
    parts: Sequence[str]
    last: Turn
    outline: Outline | None = None

    @classmethod
    def of(cls, state: Continuation, place: Place) -> _Begun:
        if state.words:
            last = Turn(state.prompt, state.words, before=state.before, faded=state.faded)
            return cls(state, (state.words,), last)
        parts, marks = parts_of(state.prompt)
        if len(parts) == 1 or not state.plan:
            return cls(state, parts, Turn(state.prompt, parts[-1]))
        outline = place(len(parts), marks, ChunkPlan(state.plan)).after(state.chunk)
        number = max((number for number, part in enumerate(outline.parts) if part.chunk < 0), default=0)
        return cls(state, parts, Turn(state.prompt, parts[number]), outline)


def _read(text: str) -> tuple[str, Change | None]:
    try:
        return read_part(text)
    except InputError as error:
        raise InputError(f"prompt: {error}") from error
