"""A story: a prompt whose parts follow each other in one video, how long each lasts, and what becomes of the past.

    a harbour at dawn[5s] | the same harbour in a storm[10s] | [cut] a lighthouse at night

A part may end in its length in seconds, and begin with what becomes of the past where it begins (see `Change`). ` | `
divides only where at least one of the parts has such a mark, and at least two are there; any other text is one part,
as it is. Where it would divide, a backslash before a bar or a bracket makes it a plain one. `<split>` divides too, into
parts without marks.

A part may name the picture that it begins with, behind its words and before its length: the first one any, a later one
where it cuts.

    a harbour<image>a.jpg[5s] | [cut] a lighthouse<image>b.jpg[5s]
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from itertools import accumulate, islice
from typing import Literal, NamedTuple, cast, get_args

from longsana.chunks import ChunkPlan
from longsana.encoders.geometry import VAEGeometry
from longsana.runtime.errors import InputError, did_you_mean

SPLIT = "<split>"
PICTURE = "<image>"
"""What stands between the words of a prompt, or of a part of one, and the path of the picture that it begins with."""
Kind = Literal["keep", "recache", "rebuild", "cut"]
KINDS: tuple[str, ...] = get_args(Kind)
MOST_CHUNKS = 1000
"""The farthest that a change may reach back: what is held grows with it."""
FORMS = "keep, recache=K, rebuild=W or cut"

_BAR = re.compile(r"(?:^|(?<=\s))\|(?=\s|$)")
_CHANGE = re.compile(r"(keep|cut)|(recache|rebuild)=([0-9]{1,9})")
_LENGTH = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)s")
_FIRST = re.compile(r"\[([^\[\]]*)\]")
_LAST = re.compile(r"(?<!\\)\[([^\[\]]*)\]$")
_MEANT = re.compile(r"(\w+)(\s*=.*)?")
_ESCAPED = re.compile(r"\\([|\[])")


class Change(NamedTuple):
    """A change of the past where a part of a prompt begins.

    keep: it stays as it is.
    recache: the state from before the last `chunks` chunks absorbs these again, under the new part.
    rebuild: an empty state absorbs the last `chunks` chunks under the new part, at their positions.
    cut: nothing is left of it.

    None of them reaches back beyond a cut, or farther than the video does.
    """

    kind: Kind = "keep"
    chunks: int = 0

    @classmethod
    def parse(cls, text: str) -> Change:
        """Read a change as it is written: keep, recache=K, rebuild=W or cut.

        Raises:
            InputError: it is none; the message does not say where.
        """
        found = _CHANGE.fullmatch(text)
        if found is None:
            word = text.partition("=")[0].strip().lower()
            guess = "" if text.startswith(KINDS) else did_you_mean(word, KINDS)
            raise InputError(f"'{text:.40}' is no change of the past{guess}; write {FORMS}, K and W in chunks")
        kind, chunks = found[1] or found[2], int(found[3] or 0)
        if found[3] is not None and not 1 <= chunks <= MOST_CHUNKS:
            raise InputError(f"{text}: must reach back from 1 to {MOST_CHUNKS} chunks")
        return cls(cast(Kind, kind), chunks)

    def __str__(self) -> str:
        return f"{self.kind}={self.chunks}" if self.chunks else self.kind


class Mark(NamedTuple):
    """The marks of a part of a story, beside its words.

    seconds: its length; None: an even share of what the others leave.
    change: of the past; None: what the settings say.
    """

    seconds: float | None = None
    change: Change | None = None


class Placed(NamedTuple):
    """The place in a video where a part of its prompt begins, and what becomes of the past there."""

    chunk: int
    change: Change = Change()


class Outline(NamedTuple):
    """The parts of a prompt over the chunks of its video.

    chunks: that the parts were placed for; after them the last one goes on.
    """

    parts: tuple[Placed, ...]
    chunks: int

    def after(self, done: int) -> Outline:
        """The outline counted from chunk `done` on: parts that began before it have negative places."""
        parts = tuple(part._replace(chunk=part.chunk - done) for part in self.parts)
        return Outline(parts, self.chunks - done)

    @property
    def changes(self) -> dict[int, Change]:
        """The changes of the past from chunk 0 on, without those that keep it, by the chunk that they precede."""
        return {part.chunk: part.change for part in self.parts if part.chunk >= 0 and part.change.kind != "keep"}

    def shown(self, chunks: int) -> dict[int, Placed]:
        """The parts that chunks 0 to `chunks` - 1 show, by number, and where each begins of them.

        One that began before has nothing left to change.
        """
        stops = [part.chunk for part in self.parts[1:]]
        begun = {n: part for n, part in enumerate(self.parts) if part.chunk < chunks and (stops[n:] or [1])[0] > 0}
        return {n: part if part.chunk >= 0 else Placed(0) for n, part in begun.items()}


def read_parts(text: str) -> tuple[tuple[str, ...], tuple[Mark, ...]]:
    """The words of each part of a prompt, and the marks of each if it is a story; none if it is not.

    Raises:
        InputError: a part is empty, a mark is wrong, or both notations are used; the message does not say where.
    """
    plain = _ESCAPED.sub(r"\1", text)
    told = _divided(plain)
    if SPLIT in text:
        if told:
            raise InputError(f"parts between '{SPLIT}' and parts between ' | ' in one prompt; use one of them")
        parts = tuple(part.strip() for part in text.split(SPLIT))
        if not all(parts):
            raise InputError(f"a part beside '{SPLIT}' is empty")
        return parts, ()
    if not told:
        return (text,), ()
    pieces = _divided(text)
    if not pieces:  # all that would divide it is escaped
        return (plain,), ()
    if _FIRST.match(pieces[0]) and _mark(pieces[0])[1].change is not None:
        raise InputError(f"{pieces[0]:.40}: the first part has no past that could change; remove its bracket")
    words, marks = zip(*map(_mark, pieces), strict=True)
    return tuple(_ESCAPED.sub(r"\1", part) for part in words), marks


def take_pictures(text: str) -> tuple[str, dict[int, str]]:
    """A prompt without the pictures that it names, and the path of each, by the number of its part from 0.

    Of parts between `<split>` the first alone has one, wherever it stands.

    Raises:
        InputError: a part has two, or one without a path, or behind its length; the message does not say where.
    """
    if PICTURE not in text:
        return text, {}
    story = SPLIT not in text and bool(_divided(text))
    pieces, paths = _BAR.split(text) if story else [text], dict[int, str]()
    for number, piece in enumerate(pieces):
        words, *given = piece.split(PICTURE)
        if not given:
            continue
        if len(given) > 1:
            where, whole = (f"part {number + 1}", "a part") if story else ("it", "a video")
            raise InputError(f"'{PICTURE}' stands {len(given)} times in {where}; {whole} begins with one picture")
        path, length = given[0].strip(), ""
        if story and _ends_in_length(words):
            raise InputError(f"{piece.strip():.60}: a length stands at the end of its part, behind its picture")
        if story and (last := _LAST.search(path)) is not None:
            path, length = path[: last.start()].rstrip(), last[0]
        if not path:
            raise InputError(f"no path after '{PICTURE}'; write the picture's file there")
        paths[number] = _ESCAPED.sub(r"\1", path) if story else path
        pieces[number] = words.rstrip() + length + piece[len(piece.rstrip()) :]
    return "|".join(pieces).strip(), paths


def check_cut(change: Change, part: int) -> None:
    """Refuse (InputError) a picture of part `part`, from 0, that begins with another change of the past than a cut."""
    if part and change.kind != "cut":
        raise InputError(
            f"part {part + 1} has a picture and begins with {change}: a later part may bring one only where the past "
            "is cut; begin it with [cut], or remove its picture"
        )


def read_part(text: str) -> tuple[str, Change | None]:
    """The words of a prompt that is given by itself, after others, and the change of the past that it begins with.

    As in a story: `[cut] a lighthouse`; a backslash before the bracket makes it a plain one.

    Raises:
        InputError: its mark is wrong, or it has no words; the message does not say where.
    """
    plain = text.startswith("\\[")
    first = _FIRST.match(text[plain:])
    meant = first is not None and _MEANT.fullmatch(first[1])
    if first is None or not meant or not difflib.get_close_matches(meant[1], KINDS, 1, 0.75 if meant[2] else 1.0):
        return text, None
    if plain:
        return text[1:], None
    words = text[first.end() :].strip()
    if not words:
        raise InputError(f"{text:.40}: a change of the past without words")
    try:
        return words, Change.parse(first[1])
    except InputError as error:
        raise InputError(f"{error}; or \\[ for a plain bracket") from error


def place_parts(
    parts: int, marks: Sequence[Mark], plan: ChunkPlan, geometry: VAEGeometry, fps: float, change: Change
) -> tuple[Placed, ...]:
    """Place each part of a prompt in a video.

    Without lengths the parts have even stretches of chunks. With lengths a part begins with the chunk whose first
    picture is nearest to its time, the earlier of two; but each part has at least one chunk. The last goes on to the
    end.

    marks: of each part of a story; empty for a prompt that is none.
    change: of the past, of parts that do not say it themselves.

    Raises:
        InputError: there are more parts than chunks, or the lengths do not fit into the video.
    """
    chunks = len(plan)
    if parts > chunks:
        between = " | " if marks else SPLIT
        raise InputError(
            f"{parts} parts between '{between}' for a video of {chunks} chunk{'s' if chunks != 1 else ''}: "
            "each part needs a chunk; use fewer parts or more frames"
        )
    firsts = [-(-part * chunks // parts) for part in range(parts)]
    if any(mark.seconds is not None for mark in marks):
        pictures = [geometry.pixel_frames(start) for start in plan.starts]
        times = _times(marks, geometry.pixel_frames(plan.frames) / fps, geometry.pixel_frames(plan.lengths[-1]) / fps)
        for part, time in enumerate(times[1:], start=1):
            possible = range(firsts[part - 1] + 1, chunks - (parts - part) + 1)
            firsts[part] = min(possible, key=lambda chunk: abs(pictures[chunk] / fps - time))
    own = [mark.change or change for mark in marks or [Mark()] * parts]
    return tuple(map(Placed, firsts, [Change(), *own[1:]]))


def check_lengths(outline: Outline, planned: Sequence[int], lengths: Iterable[int]) -> None:
    """Refuse (InputError) chunks of other lengths than a story was planned in, where one of its parts is still to come.

    outline: from the first of these chunks on. planned, lengths: their latent frames, by the plan and now.
    """
    own = list(islice(lengths, len(planned)))
    if any(part.chunk >= 0 for part in outline.parts) and own != list(planned[: len(own)]):
        raise InputError(
            f"chunks of {', '.join(map(str, own[:3]))} latents, where the state's story was planned in chunks of "
            f"{', '.join(map(str, planned[:3]))}; use its chunk_frames, and as many frames as whole chunks have"
        )


def shared_changes(videos: Sequence[Outline]) -> dict[int, Change]:
    """The changes of the past of videos that are sampled together: they have one state, and so one history.

    Raises:
        InputError: they differ.
    """
    first, *others = (video.changes for video in videos)
    if any(changes != first for changes in others):
        raise InputError(
            "stories whose past changes at different places, or in different ways, cannot be sampled together; give "
            "them one by one, or keep the past"
        )
    return first


def _divided(text: str) -> list[str]:
    """The parts of a story, stripped; none if the text is no story."""
    pieces = [piece.strip() for piece in _BAR.split(text)]
    return pieces if len(pieces) > 1 and any(_is_marked(piece) for piece in pieces) else []


def _is_marked(part: str) -> bool:
    """Tell whether a part has a mark, or what can only be meant as one."""
    first = _FIRST.match(part)
    if first is not None and _word(first) in KINDS:
        return True
    return _ends_in_length(part) or _ends_in_length(part.partition(PICTURE)[0])


def _ends_in_length(part: str) -> bool:
    last = _LAST.search(part.rstrip())
    return last is not None and _LENGTH.fullmatch(last[1]) is not None


def _word(bracket: re.Match[str]) -> str:
    return re.split(r"\W", bracket[1].strip().lower(), maxsplit=1)[0]


def _mark(part: str) -> tuple[str, Mark]:
    """The words of a part, and its marks; InputError for brackets that are nearly marks."""
    change, seconds = None, None
    first = _FIRST.match(part)
    if first is not None and _LENGTH.fullmatch(first[1]):
        raise InputError(f"{part:.40}: a length stands at the end of its part, as in 'a harbour[5s]'")
    if first is not None and difflib.get_close_matches(_word(first), KINDS, n=1, cutoff=0.75):
        change, part = Change.parse(first[1]), part[first.end() :].strip()
    last = _LAST.search(part)
    if last is not None and _CHANGE.fullmatch(last[1]):
        raise InputError(f"{part:.40}: what becomes of the past stands at the beginning of its part")
    if last is not None and last[1].strip().lstrip("+-.")[:1].isdigit():
        length = _LENGTH.fullmatch(last[1])
        if length is None or float(length[1]) == 0:
            raise InputError(f"[{last[1]:.40}]: no length; write seconds above 0, as in [5s] or [2.5s]")
        seconds, part = float(length[1]), part[: last.start()].strip()
    if not part:
        raise InputError("a part beside ' | ' has no words")
    return part, Mark(seconds, change)


def _times(marks: Sequence[Mark], whole: float, chunk: float) -> list[float]:
    """Seconds at which the parts would begin in a video of `whole` seconds, where lengths may miss by half a chunk."""
    given = sum(mark.seconds or 0 for mark in marks)
    shares = sum(mark.seconds is None for mark in marks)
    if given > whole + chunk / 2 or (shares and given >= whole):
        left = " and leave nothing to the parts without a length" if shares else ""
        raise InputError(
            f"its parts last {given:g} s{left}; the video has {whole:.4g} s: make it longer, or the parts shorter"
        )
    share = (whole - given) / shares if shares else 0.0
    return list(accumulate((share if mark.seconds is None else mark.seconds for mark in marks[:-1]), initial=0.0))
