"""Chunks of live videos, one at a time: what is told of a video, its state as a value, and who makes the next chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longsana.chunks import ChunkPlan
from longsana.data.prompts import Prompt
from longsana.data.story import Change
from longsana.encoders.text import CompactEmbedding
from longsana.flow.noise import PromptNoise
from longsana.flow.schedule import FlowSchedule
from longsana.models.embeddings import Text
from longsana.pipelines.films import Film
from longsana.pipelines.images import PictureLike
from longsana.pipelines.turns import Before, Said, Turn, prompt_turns
from longsana.runtime.errors import InputError
from longsana.runtime.later import Later
from longsana.sampling.captions import Caption, CaptionEncoder, stacked
from longsana.sampling.continuation import Continuation, Moment, Telling, mark_of, restored, vae_mark_of
from longsana.sampling.engine import Decoding, Engine, joined, stretches
from longsana.sampling.films import absorb_film, film_latents
from longsana.sampling.graphs import ReplayedNetwork
from longsana.sampling.recent import Held
from longsana.sampling.sampler import Network, StepEnd, generate, go_on
from longsana.sampling.transition import Way, blend
from longsana.serving.past import SharedPast

RECORDINGS = 4
"""Kinds of passes that are kept as CUDA graphs, of lengths and sizes: each has two states of the network's."""
TEXTS = 4
"""Captions whose keys and values stay on the device, for all sessions: 54 MB each with the published network."""


class Event(NamedTuple):
    """A change of prompt that somebody asked for. transition_chunks: see `Order`."""

    id: str
    words: str
    change: Change
    transition_chunks: int


@dataclass(frozen=True)
class Video:
    """A video as it is decided before its first chunk.

    size: height and width in pixels. fps: pictures a second. lengths: latent frames of each chunk; of an endless one of
    the first chunks, of which the last goes on. telling: by which prompts become captions; see there.
    turn: that the first chunk is told. story: turns of a story's chunks, the last of which goes on; or none.
    last: the turn of the chunk before them, in a state that the video goes on from. begun: prompt and repetition of
    that state. done, plan: chunks before it, and those that a story was planned in, for the states to come.
    pictures: (H, W, 3), uint8, or latents (1, C, 1, h, w), by the part of the story that begins with it; see `Turn`.
    film: that it goes on from. kept: last chunks that are held, that changes may reach back to. saved: how many of
    them the state has, of how many the state before, and whether that is all that there were; None: there is no state.
    """

    size: tuple[int, int]
    fps: float
    seed: int
    endless: bool
    lengths: tuple[int, ...]
    telling: Telling
    turn: Turn
    story: tuple[Turn, ...] = ()
    last: Turn | None = None
    begun: tuple[str, int] = ("", 0)
    done: int = 0
    plan: tuple[int, ...] = ()
    pictures: Mapping[int, np.ndarray | Tensor] = field(default_factory=dict)
    film: Film | None = None
    kept: int = 1
    saved: tuple[int, int, bool] | None = None

    def reaches(self, change: Change, done: int) -> bool:
        """Tell whether a change can be made after so many chunks of this video."""
        if self.saved is None or change.kind in ("keep", "cut"):
            return change.chunks <= self.kept
        chunks, states, whole = self.saved
        again = min(change.chunks, done + chunks) if whole else change.chunks
        return change.chunks <= self.kept and again <= done + (states if change.kind == "recache" else chunks)

    def length(self, chunk: int) -> int:
        """Count the latent frames of a chunk; 0 after the last one."""
        if self.endless:
            return self.lengths[min(chunk, len(self.lengths) - 1)]
        return self.lengths[chunk] if chunk < len(self.lengths) else 0

    def told(self, point: Point, event: Event | None) -> tuple[Turn, int]:
        """The turn of the chunk after a point, and the chunks of its transition. event: the last that came since.

        Raises:
            InputError: the event's change reaches farther back than anything is held.
        """
        if event is None and not point.steered:
            if self.story:
                return self.story[min(point.chunk, len(self.story) - 1)], self.telling.transition_chunks
            if point.turn is None:
                return self.turn, self.telling.transition_chunks
        last, steps = point.turn or self.last, point.transition_chunks
        if event is not None:  # where nothing was before, there is no past that it could change
            said = Said(event.words, event.words, None if last is None else event.change)
            steps = event.transition_chunks
        else:
            assert last is not None
            said = Said(last.prompt, last.words)
        held = Change("recache", self.kept)
        return next(prompt_turns([said], Before(last, self.film is not None), held, no_picture, steps)), steps


class Memory(NamedTuple):
    """The memory of a video: the network's and the decoder's. whole: see `SharedPast`.

    hidden: frames to come that are not shown, since they are of what was before; a decoder that looks ahead has them.
    """

    moment: Moment
    whole: bool = True
    hidden: int = 0


@dataclass(frozen=True)
class Point:
    """A live video between two of its chunks: a value, which rewinds, forks and snapshots share.

    chunk: chunks before it. after: makes what is remembered; None: nothing was before.
    turn: of the last chunk; None: the next one is the first. steered: an event has taken the place of what the video
    was told at first. transition_chunks, active: of the last change, and its event's id while it lasts.
    """

    chunk: int = 0
    after: Later[Memory] | None = None
    turn: Turn | None = None
    steered: bool = False
    transition_chunks: int = 0
    active: tuple[str, ...] = ()


def nbytes(points: Iterable[Point]) -> int:
    """Bytes that points hold alive, each counted once; of those whose memory nobody has asked for yet none."""
    storages: dict[int, int] = {}

    def count(tensor: Tensor, batch: int) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    for point in points:
        if point.after is not None and (memory := point.after.made) is not None:
            memory.moment.each(count)
    return sum(storages.values())


class Bytes(NamedTuple):
    """The memory of a point: the network's state; and all beside last chunks that are held, and that of the decoder."""

    state: int
    whole: int
    decoder: int

    @classmethod
    def of(cls, memory: Memory) -> Bytes:
        """Measure."""
        decoder, own = memory.moment.decoder, memory._replace(moment=memory.moment._replace(recent=Held()))
        return cls(
            memory.moment.network.nbytes,
            nbytes([Point(after=Later.of(own))]),
            0 if decoder is None else decoder.nbytes,
        )

    def times(self, factor: float) -> Bytes:
        """The memory of a size of so many times the pixels."""
        return Bytes(*(int(part * factor) for part in self))

    @property
    def thin(self) -> int:
        """Bytes without the decoder's; see `thinned`."""
        return self.whole - self.decoder


def thinned(point: Point) -> Point:
    """A point without the decoder's memory, which is rebuilt from the last latents where somebody goes on from it.

    Its frames then differ by less than a step of 8 bits (docs/usage.md, states).
    """
    memory = None if point.after is None else point.after.made
    if memory is None or memory.moment.decoder is None or memory.moment.latents is None:
        return point
    return replace(point, after=Later.of(memory._replace(moment=memory.moment._replace(decoder=None))))


class Made(NamedTuple):
    """A chunk that is made: its pictures (F, H, W, 3), uint8, the point after it, and what became of events."""

    pixels: np.ndarray
    point: Point
    started: tuple[str, ...]
    completed: tuple[str, ...]


def no_picture(picture: PictureLike) -> np.ndarray:
    """Refuse a picture that a change of prompt brings: sessions take none."""
    raise InputError("prompt: brings a picture, which a live change cannot; begin another session with it")


class Maker:
    """Holds the networks that all sessions share, and makes chunks, as `LongSanaVideoPipeline.stream` does.

    encode: of prompts, for as long as this is used. captions: texts whose embeddings are kept.
    """

    def __init__(self, engine: Engine, encode: CaptionEncoder, captions: int) -> None:
        self.engine, self.network, self.decoder = engine, *engine.load()
        self.marks = mark_of(self.network), vae_mark_of(self.decoder)
        self._passes: Network = ReplayedNetwork(self.network, RECORDINGS) if engine.recorded else self.network
        self._sampling = engine.config.sampling
        self._schedule = FlowSchedule.from_config(engine.config.scheduler)
        self._encode = encode
        self._caption = lru_cache(captions)(self._embed)
        self._text = lru_cache(TEXTS)(self._cache)

    def opening(self, video: Video) -> Iterator[Point | None]:
        """Absorb the film that a video goes on from, chunk by chunk; gives the point after it in the end, None before.

        Raises:
            FloatingPointError: latents or decoded frames are not finite.
        """
        assert video.film is not None
        past, caption = SharedPast(Held(), video.kept), Caption((self._caption(video.turn.words),))
        latents = film_latents(self.decoder, video.film.pictures(), chunk_frames=video.telling.chunk_frames)
        absorbing = absorb_film(self.network, self.decoder, [caption], latents, past)
        shown = used = 0
        while True:
            try:
                frames = next(absorbing)
            except StopIteration as end:
                moment: Moment = end.value
                break
            shown, used = shown + frames.pixels.shape[1], used + frames.latents.shape[2]
            yield None
        hidden = self.decoder.geometry.pixel_frames(used) - shown  # of a decoder that looks ahead
        yield Point(after=Later.of(Memory(moment._replace(waiting=hidden), past.whole, hidden)), turn=video.turn)

    @torch.no_grad()
    def make(
        self,
        video: Video,
        point: Point,
        events: Sequence[Event] = (),
        on_step: StepEnd = go_on,
        between: Callable[[], object] | None = None,
    ) -> Made:
        """Make the chunk after a point, without absorbing it: that waits until somebody asks for `point.after`.

        events: that came since. on_step: see `StepEnd`; it may raise, which leaves nothing behind. between: is called
        between the decoder's groups, which then are decoded one by one, to the same frames; it may raise, too.

        Raises:
            InputError: the change of prompt reaches back to what is not held.
            FloatingPointError: latents or decoded frames are not finite.
        """
        turn, steps = video.told(point, events[-1] if events else None)
        before = None if point.after is None else point.after()
        moment = None if before is None else restored(before.moment, self.decoder)
        name = f"chunk {point.chunk}"
        past = SharedPast(
            Held() if before is None else before.moment.recent, video.kept, whole=not before or before.whole
        )
        chunk = next(
            generate(
                self._passes,
                self._schedule,
                [self._text(turn.before, turn.words, turn.share, video.telling.transition)],
                ChunkPlan((video.length(point.chunk),)),
                shape=(self.engine.geometry.channels, *self.engine.geometry.latent_size(*video.size)),
                rng=self._noise(video, turn),
                device=self.engine.device,
                state=None if moment is None else moment.network,
                changes={0: turn.change},
                recent=past,
                first=self._picture(video, 0 if point.chunk == 0 and moment is None else turn.begins),
                apart=video.telling.image_first == "absorb",
                on_step=on_step,
            )
        )
        decoding = Decoding(self.decoder, moment, 0 if before is None else before.hidden)
        more = video.length(point.chunk + 1) > 0
        pieces = list(stretches(chunk.latents, chunk.start, video.telling.chunk_frames))
        if between is not None:
            starts = accumulate([piece.shape[2] for piece in pieces[:-1]], initial=chunk.start)
            both = zip(pieces, starts, strict=True)
            pieces = [part for piece, start in both for part in self.decoder.grouped(piece, start)]
        shown = []
        for piece in pieces[:-1]:
            shown.append(decoding(piece, name, more=True))
            if between is not None:
                between()
        shown.append(decoding(pieces[-1], name, more=more, keep=True))

        def absorbed() -> Memory:
            assert chunk.state is not None
            return Memory(decoding.moment(chunk.state, past.copy()), past.whole, decoding.hidden)

        ids = tuple(event.id for event in events)
        known = (*point.active, *ids)
        active = known[-1:] if turn.share < 1 else ()
        steered = point.steered or bool(events)
        after = Point(point.chunk + 1, Later(absorbed), turn._replace(picture=None), steered, steps, active)
        completed = tuple(id for id in known if id not in active)
        return Made(joined(shown)[0].numpy(), after, ids, completed)

    def state(self, video: Video, point: Point) -> Continuation:
        """The state at a point, as `LongSanaVideoPipeline.stream` and the batch command go on from it.

        It holds the states before chunks as far back as the video's own `prompt_change` recaches.
        """
        turn = point.turn
        assert point.after is not None and turn is not None
        (network, decoder, latents, waiting, recent, _), whole, _ = point.after()
        change = Change.parse(video.telling.prompt_change)
        states = change.chunks if change.kind == "recache" else 0
        first = len(recent.chunks) - states
        chunks = tuple(
            kept if number >= first else kept._replace(before=None) for number, kept in enumerate(recent.chunks)
        )
        story = bool(video.plan) and not point.steered
        begun = {one.begins for one in video.story[: point.chunk]}
        to_come = {part: own for part, own in video.pictures.items() if story and part not in begun}
        return Continuation(
            network,
            decoder,
            video.seed,
            turn.prompt,
            video.size,
            latents,
            self._repetition(video, turn),
            video.done + point.chunk,
            video.plan if story else (),
            waiting,
            self.marks,
            self.network.past,
            Held(video.kept if whole else len(chunks), chunks),
            words="" if story else turn.words,
            before=turn.before if turn.faded and not story else "",
            faded=0 if story else turn.faded,
            # A transition goes on as it began; the format has one number for it and for changes to come.
            telling=video.telling._replace(transition_chunks=point.transition_chunks) if turn.faded else video.telling,
            pictures={part: self._latents_of(picture) for part, picture in to_come.items()},
        )

    def point(self, state: Continuation, turn: Turn | None) -> Point:
        """The point that a saved state is. turn: of its last chunk.

        Raises:
            InputError: the state is of another network, VAE or dtype.
        """
        name, needed = "snapshot", self.network.empty_state(1, *self.engine.geometry.latent_size(*state.size))
        state = state.fitted(*self.marks, name)
        given = state.network
        if (given.tail.dtype, given.tail.shape, given.kv.shape) != (
            needed.tail.dtype,
            needed.tail.shape,
            needed.kv.shape,
        ):
            raise InputError(f"{name}: of a network in {given.tail.dtype}, or of other shapes, than this one has")
        if state.decoder is not None and state.decoder.ended:
            raise InputError(f"{name}: its video has ended, as its decoder was told; go on from an earlier one")

        def after() -> Memory:
            moment = restored(state.moment.to(self.engine.device), self.decoder)
            return Memory(moment, state.recent.reach > len(state.recent.chunks), moment.waiting)

        steps = 0 if state.telling is None else state.telling.transition_chunks
        return Point(after=Later(after), turn=turn, transition_chunks=steps)

    def _embed(self, words: str) -> CompactEmbedding:
        return self._encode(Prompt(1, words, (words,), 0, *self._size)).parts[0]

    @property
    def _size(self) -> tuple[int, int]:
        return self._sampling.height, self._sampling.width

    @torch.no_grad()
    def _cache(self, before: str, words: str, share: float, way: Way) -> Text:
        own = self._caption(words)
        shown = own if share == 1 else blend(self._caption(before), own, share, way)
        return self.network.cache_caption(stacked([shown], self.engine.device))

    def _repetition(self, video: Video, turn: Turn) -> int:
        return video.begun[1] if turn.prompt == video.begun[0] else 0

    def _noise(self, video: Video, turn: Turn) -> PromptNoise:
        key = ("", 0) if self._sampling.unified_noise else (turn.prompt, self._repetition(video, turn))
        return PromptNoise(video.seed, [key])

    def _picture(self, video: Video, part: int) -> Tensor | None:
        return None if (found := video.pictures.get(part)) is None else self._latents_of(found)

    def _latents_of(self, picture: np.ndarray | Tensor) -> Tensor:
        if isinstance(picture, Tensor):
            return picture.to(self.engine.device)
        return self.decoder.encode_pictures([picture])
