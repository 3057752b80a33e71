"""Orders, read and checked before anything is made, and the videos that they are."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from longsana.chunks import ChunkPlan
from longsana.config import InferenceConfig
from longsana.data.pictures import FORMATS, check_header, fit_picture, told
from longsana.data.story import Change, Outline, place_parts, read_part
from longsana.encoders.geometry import geometry
from longsana.pipelines.films import Film
from longsana.pipelines.turns import Begun, NotHeld, lengths_of, told_by
from longsana.runtime.arguments import TEXT, Flag, Number, OneOf, Rule, Whole
from longsana.runtime.errors import InputError
from longsana.runtime.settings import check_bounds
from longsana.sampling.checks import check_first_chunk, check_size
from longsana.sampling.continuation import SEED, Continuation, Telling
from longsana.serving.making import Event, Video, no_picture
from longsana.serving.values import FPS, Limits, Order, Words

_FIELDS = frozenset({field.name for field in fields(Order)} | {"policy"})
"""What errors of orders and of changes of prompt begin with."""


def video_of(order: Order, config: InferenceConfig, limits: Limits, state: Continuation | None) -> Video:
    """Read an order. state: of its snapshot.

    Raises:
        InputError: no such video can be made; one line, which begins with the field.
    """
    sampling, usual = config.sampling, Telling(*(getattr(config.sampling, name) for name in Telling._fields))
    if state is not None:
        usual = state.telling or usual
    order = _settled(order, limits)
    told = {name: value for name in Telling._fields if (value := getattr(order, name, None)) is not None}
    telling = usual._replace(**told).settled("order")
    if order.first_chunk_frames is None and telling.first_chunk_frames > telling.chunk_frames + 1:
        raise InputError(
            f"chunk_frames={telling.chunk_frames}: must be at least {telling.first_chunk_frames - 1} with this model's "
            f"first chunk of {telling.first_chunk_frames}"
        )
    check_first_chunk(telling.first_chunk_frames, telling.chunk_frames, ("first_chunk_frames", "chunk_frames"))
    size = (order.height or sampling.height, order.width or sampling.width)
    if state is not None:
        for name, asked, has in zip(("height", "width"), (order.height, order.width), state.size, strict=True):
            if asked not in (None, has):
                raise InputError(f"{name}={asked}: the snapshot's video has {has}; leave it out")
        size = state.size
    if size[0] * size[1] > limits.most_pixels:
        name, side = ("height", size[0]) if order.width is None else ("width", size[1])
        raise InputError(
            f"{name}={side}: {size[1]}x{size[0]} is too large; width times height must be at most "
            f"{limits.most_pixels:,}"
        )
    check_bounds(replace(sampling, height=size[0], width=size[1]))
    check_size(config, *size)
    begins = state is None and order.film is None
    if not begins and order.image is not None:
        raise InputError("image: a video that goes on begins with no picture; leave it out")
    if state is not None and order.film is not None:
        raise InputError("film: a video goes on from a film or from a snapshot; leave one of them out")
    pictures = {} if order.image is None else {0: _picture(order.image, size, config)}
    film = None if order.film is None else _film(order, telling.fps, size)
    if order.prompt is None and state is None:
        raise InputError("prompt: missing; without a snapshot there is none to go on with")
    text = None if order.prompt is None else Words(limits.most_prompt).settle("prompt", order.prompt)
    shape = geometry(config.vae)

    def lengths() -> Any:
        return lengths_of(order.num_frames, telling, shape, begins=begins, picture=bool(pictures))

    change = Change.parse(telling.prompt_change)

    def place(parts: int, marks: Any, plan: ChunkPlan) -> Outline:
        return Outline(place_parts(parts, marks, plan, shape, telling.fps, change), len(plan))

    steps = telling.transition_chunks
    own: dict[str, Any] = {"film": film is not None, "pictures": pictures, "read": no_picture}
    with _about("snapshot" if text is None else "prompt"):
        script = told_by(text, state, lengths(), place, change, steps, **own)
        known = tuple(islice(script.turns, max(1, len(script.plan) - script.done) + 1 if script.plan else 1))
        if state is not None:
            for chunk, turn in enumerate(known):
                state.recent.check(turn.change, chunk)
    return Video(
        size,
        telling.fps,
        order.seed if order.seed is not None else sampling.seed if state is None else state.seed,
        endless=order.num_frames is None,
        lengths=tuple(islice(lengths(), 3)) if order.num_frames is None else tuple(lengths()),
        telling=telling,
        turn=known[0],
        story=known if script.plan else (),
        last=None if state is None else Begun.of(state, place).last,
        begun=("", 0) if state is None else (state.prompt, state.repetition),
        done=script.done,
        plan=script.plan,
        pictures=script.pictures,
        film=film,
        kept=max(limits.kept, change.chunks),
        saved=None if state is None else _saved(state),
    )


def event_of(
    prompt: str, id: str, policy: str | None, transition_chunks: int | None, video: Video, done: int, limits: Limits
) -> Event:
    """Read a change of prompt of a video after so many chunks.

    Raises:
        InputError: it is none, or reaches farther back than anything is held.
    """
    text = Words(limits.most_prompt).settle("prompt", prompt)
    with _about("prompt"):
        words, own = read_part(text)
    if own is not None:
        told, where = own, f"prompt: [{own}]"
    elif policy is None:
        told = Change.parse(video.telling.prompt_change)
        where = f"prompt: {told}, as this session changes its prompts,"
    else:
        with _about("policy"):
            told, where = Change.parse(TEXT.settle("policy", policy)), f"policy={policy}:"
    if not video.reaches(told, done):
        raise InputError(f"{where} reaches back to chunks that are not kept; at most {video.kept} are")
    steps = video.telling.transition_chunks if transition_chunks is None else transition_chunks
    return Event(id, words, told, Whole(0, 1000).settle("transition_chunks", steps))


@contextmanager
def _about(field: str) -> Iterator[None]:
    """Say a field of the order first, in errors that begin with none."""
    try:
        yield
    except NotHeld as error:
        where = "the snapshot does not hold; write [cut], or leave the bracket out"
        raise InputError(f"{field}: [{error.change}] reaches back to what {where}") from error
    except InputError as error:
        found = re.match(r"(\w+)[:=]", str(error))
        if found is not None and found[1] in _FIELDS:
            raise
        raise InputError(f"{field}: {error}") from error


def _settled(order: Order, limits: Limits) -> Order:
    rules: Mapping[str, Rule] = {
        "num_frames": Whole(1, limits.most_frames),
        "seed": SEED,
        "height": Whole(1),
        "width": Whole(1),
        "fps": FPS,
        "chunk_frames": Whole(1, limits.most_chunk_frames),
        "first_chunk_frames": Whole(0, limits.most_chunk_frames + 1),
        "prompt_change": TEXT,
        "transition_chunks": Whole(0, 1000),
        "lead": Number(least=0, most=limits.most_lead),
        "pace": Flag(),
        "media": OneOf(("mp4", "pixels")),
        "snapshot_every": Whole(0),
    }
    given = {name: getattr(order, name) for name in rules}
    order = replace(
        order, **{name: rules[name].settle(name, value) for name, value in given.items() if value is not None}
    )
    if order.prompt_change is not None:
        with _about("prompt_change"):
            change = Change.parse(order.prompt_change)
        if change.chunks > limits.kept:
            raise InputError(
                f"prompt_change={change}: reaches back farther than the {limits.kept} chunks that are kept"
            )
    return order


DECODING = 2
"""Pictures that are decoded at a time, each of up to some 300 MB, however many clients send one."""
_decoding = threading.BoundedSemaphore(DECODING)


def _picture(data: bytes, size: tuple[int, int], config: InferenceConfig) -> np.ndarray:
    with _decoding, told("image"):
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            check_header(picture)
            return fit_picture(picture, *size, config.sampling.image_fit, remedy="crop it")


def _film(order: Order, fps: float, size: tuple[int, int]) -> Film:
    assert order.film is not None
    try:
        return Film.of(order.film, fps, size)
    except InputError as error:
        # The name of a file of the server's is nobody's business.
        said = str(error).removeprefix("video: ").replace(f"{order.film}: ", "").replace(str(order.film), "the file")
        raise InputError(f"film: {said}") from error


def _saved(state: Continuation) -> tuple[int, int, bool]:
    chunks = state.recent.chunks
    states = next((count for count, kept in enumerate(reversed(chunks)) if kept.before is None), len(chunks))
    return len(chunks), states, state.recent.reach > len(chunks)
