"""Many sessions share one worker: none waits for one that does not read, fails, or leaves."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from longsana.config import InferenceConfig
from longsana.runtime.errors import InputError
from longsana.serving.making import Point
from longsana.serving.media import ChunkEncoder
from longsana.serving.session import Session
from longsana.serving.studio import Studio, Times
from longsana.serving.values import Chunk, End, Full, Limits
from tests.serving.viewing import OTHER, PROMPT, WAIT, order, pictures, settled, taken


@pytest.fixture(scope="module")
def narrow(config: InferenceConfig) -> Iterator[Studio]:
    """A studio with two places and room for one more in the queue."""
    with Studio(config, limits=Limits(sessions=2, queue=1, kept=2)) as studio:
        yield studio


@pytest.fixture(autouse=True)
def emptied(studio: Studio, narrow: Studio) -> Iterator[None]:
    yield
    for one in (studio, narrow):
        for session in list(one._sessions.values()):
            session.close()


def test_sessions_take_turns(studio: Studio) -> None:
    sessions = [
        studio.start(order(seed=seed, prompt=prompt)) for seed, prompt in ((1, PROMPT), (2, OTHER), (1, PROMPT))
    ]
    chunks: list[list[Chunk]] = [[], [], []]
    for _ in range(3):
        for own, session in zip(chunks, sessions, strict=True):
            own += taken(session, 1)
    alone = studio.start(order(seed=2, prompt=OTHER))
    assert np.array_equal(pictures(sessions[0], chunks[0]), pictures(sessions[2], chunks[2]))
    assert np.array_equal(pictures(sessions[1], chunks[1]), pictures(alone, taken(alone, 3)))


def test_who_runs_dry_first_is_served_first(studio: Studio) -> None:
    session = studio.start(order(pace=True, lead=9))
    taken(session, 1)
    assert session.dry() < studio.start(order()).dry()  # one without a pace waits, but not for ever
    later = studio.start(order(pace=True))
    assert later.dry() < session.dry() + 1  # nothing yet: dry since it ordered


def test_who_does_not_read_holds_nobody_up_and_grows_nothing(studio: Studio) -> None:
    silent = [studio.start(order(seed=seed, pace=pace)) for seed, pace in ((1, True), (2, False))]
    reader = studio.start(order(num_frames=49))
    assert len(taken(reader, 6)) == 6
    settled(studio)
    held = [figures.ahead_seconds for figures in studio.figures().sessions]
    made, memory = studio.figures().chunks_made, studio.figures().memory_bytes
    time.sleep(0.5)
    assert (studio.figures().chunks_made, studio.figures().memory_bytes) == (made, memory)
    assert all(len(session._unsent) <= 3 for session in silent) and max(held) < 2


def test_a_viewer_with_a_pace_gets_pieces_in_time(studio: Studio) -> None:
    session = studio.start(order(pace=True, lead=0.1))
    chunks, arrived = [], []
    for _ in range(4):
        chunks += taken(session, 1)
        arrived.append(time.monotonic())
    # Never sooner than the lead allows; how late it may be depends on the machine.
    for chunk, moment in zip(chunks[1:], arrived[1:], strict=True):
        assert moment - arrived[0] >= chunk.pts_seconds - 0.1 - 0.02


def test_pictures_do_not_wait_for_the_pass_that_absorbs_them(studio: Studio) -> None:
    video = studio.start(order()).video
    made = studio._maker.make(video, Point())
    assert len(made.pixels) == 9 and made.point.after is not None and made.point.after.made is None
    assert made.point.after().moment.network.frames == 3


def test_a_text_is_encoded_once(studio: Studio) -> None:
    session = studio.start(order(prompt="A text of its own"))
    taken(session, 1)
    before = studio._maker._caption.cache_info().misses
    for text in ("Another text of its own", "A text of its own", "Another text of its own"):
        session.change(text)
        taken(session, 2)
    assert studio._maker._caption.cache_info().misses == before + 1


def test_memory_does_not_grow_and_goes_when_a_session_leaves(narrow: Studio) -> None:
    session = narrow.start(order())
    sizes = []
    for _ in range(6):
        taken(session, 2)
        settled(narrow)
        sizes.append(narrow.figures().memory_bytes)
    assert len(set(sizes[3:])) == 1 and len(session._points) == 3
    after = session._points[-1].after
    assert after is not None
    state = weakref.ref(after().moment.network.kv)
    del after
    session.close()
    settled(narrow)
    gc.collect()
    assert narrow.figures().memory_bytes == 0 and state() is None and narrow.session(session.id) is None


def test_an_ended_session_has_no_encoder(narrow: Studio) -> None:
    """Whoever still holds the session: x264 has threads and megabytes of pictures."""
    session = narrow.start(order(media="mp4"))
    init = session.init
    taken(session, 1)
    encoder = weakref.ref(session._encoder)
    assert encoder() is not None
    session.close()
    settled(narrow)
    assert encoder() is None and session.init == init and session.mime.startswith("video/mp4")


def test_chunks_of_sessions_are_coded_at_once_and_of_one_in_order(
    config: InferenceConfig, narrow: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [chunk.data for chunk in taken(narrow.start(order(media="mp4")), 4)]
    monkeypatch.setattr("longsana.serving.studio.usable_cores", lambda: 4)
    code, both = ChunkEncoder.code, threading.Barrier(2)

    def together(encoder: ChunkEncoder, pixels: np.ndarray) -> Any:
        both.wait(WAIT)
        return code(encoder, pixels)

    with Studio(config, limits=Limits(sessions=2)) as studio:
        monkeypatch.setattr(ChunkEncoder, "code", together)
        sessions = [studio.start(order(media="mp4")) for _ in range(2)]
        for session in sessions:
            assert [taken(session, 1)[0].data] == expected[:1]
        both.abort()
        monkeypatch.setattr(ChunkEncoder, "code", code)
        sessions[1].close()
        assert [chunk.data for chunk in taken(studio.start(order(media="mp4")), 4)] == expected


def test_who_is_slow_to_code_takes_one_coder(config: InferenceConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many of its chunks wait to be coded."""
    monkeypatch.setattr("longsana.serving.studio.usable_cores", lambda: 4)
    code, go_on, slow = ChunkEncoder.code, threading.Event(), []

    def held(encoder: ChunkEncoder, pixels: np.ndarray) -> Any:
        if encoder in slow:
            assert go_on.wait(WAIT)
        return code(encoder, pixels)

    with Studio(config, limits=Limits(sessions=2)) as studio:
        monkeypatch.setattr(ChunkEncoder, "code", held)
        first = studio.start(order(media="mp4", pace=True, lead=9))
        slow.append(first._encoder)
        deadline = time.monotonic() + WAIT
        while len(first._unsent) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert len(taken(studio.start(order(media="mp4")), 3)) == 3
        go_on.set()
        assert len(taken(first, 2)) == 2


def test_short_memory_keeps_fewer_chunks(config: InferenceConfig) -> None:
    with Studio(config, limits=Limits(memory_bytes=1, kept=4)) as studio:
        first, second = studio.start(order()), studio.start(order())
        taken(first, 5)
        assert len(first._points) == 2 and second.position == 1  # one is always taken in
        assert [point.after is None or point.after().moment.decoder is None for point in first._points] == [True, False]


def test_earlier_chunks_go_without_the_decoders_memory_first(config: InferenceConfig) -> None:
    """Of which a rewind knows nothing but rounding."""
    with Studio(config, limits=Limits(kept=3)) as studio:
        own = studio._bytes[32, 48]
        assert own.whole > 2 * own.thin  # else it would not pay
        studio._most_bytes = 3 * own.state + 4 * own.whole + 3 * own.thin
        session = studio.start(order())
        first = taken(session, 5)
        assert [point.after().moment.decoder is None for point in session._points if point.after] == [True] * 3 + [
            False
        ]
        settled(studio)
        assert studio.figures().memory_bytes <= studio._most_bytes
        session.rewind(3)
        again = taken(session, 3)
        assert [chunk.generation_index for chunk in again] == [2, 3, 4]
        difference = pictures(session, again).astype(int) - pictures(session, first[2:])
        assert abs(difference).max() <= 2


def test_the_queue(narrow: Studio) -> None:
    first, second = narrow.start(order()), narrow.start(order())
    third = narrow.start(order())
    positions: list[int] = []
    third.on_ready(lambda: positions.append(third.place))
    assert [session.position for session in (first, second, third)] == [0, 0, 1]
    assert third.state == "waiting" and third.take(0.05) is None
    with pytest.raises(Full, match="full: all places are taken, and 1 sessions wait already") as full:
        narrow.start(order())
    assert "\n" not in str(full.value) and isinstance(full.value, ValueError)
    with pytest.raises(Full):
        first.fork()
    first.close()
    assert third.position == 0 and positions[0] == 1 and positions[-1] == 0
    assert len(taken(third, 1)) == 1


def test_without_a_queue_who_finds_a_place_is_taken_in(config: InferenceConfig) -> None:
    with Studio(config, limits=Limits(sessions=1, queue=0)) as studio:
        first = studio.start(order())
        with pytest.raises(Full, match="full: all places are taken, and 0 sessions wait already"):
            studio.start(order())
        first.close()
        assert len(taken(studio.start(order()), 1)) == 1


def test_one_is_taken_in_by_measured_speed(narrow: Studio) -> None:
    key = (32, 48, 2)
    before = dict(narrow._seconds)
    try:
        with narrow.lock:  # nothing is measured meanwhile
            narrow._seconds = {key: Times(0.28)}
            first, second = narrow.start(order(pace=True)), narrow.start(order(pace=True))
            assert (first.position, second.position) == (0, 1)
            assert 0.5 < narrow.figures().load < narrow.limits.load and narrow.keeps_pace(first)
            narrow._seconds = {key: Times(0.01)}
            narrow._admit()
            assert second.position == 0
            second.close()
            # One that is slower than its pace anyway holds no place of others.
            narrow._seconds = {key: Times(0.3), (64, 96, 2): Times(10.0)}
            first.close()
            slow, third = narrow.start(order(pace=True, height=64, width=96)), narrow.start(order(pace=True))
            assert (slow.position, third.position) == (0, 0) and not narrow.keeps_pace(slow)
            assert narrow.lead(third) > 10.0 / narrow._passes
    finally:
        narrow._seconds = before


def test_passes_that_are_too_long_are_refused(narrow: Studio) -> None:
    """By measured speed, of sizes beyond the config's own; who orders hears how long one would take."""
    before = dict(narrow._seconds)
    try:
        with narrow.lock:
            narrow._seconds = {(32, 48, 2): Times(narrow._passes * 1.0)}
            narrow.check(order())
            narrow.check(order(height=48, width=48))
            with pytest.raises(InputError, match=r"^height=64, width=96: a pass of it takes about 6 s here"):
                narrow.check(order(height=64, width=96))
    finally:
        narrow._seconds = before


def test_what_nobody_waits_for_gives_way(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    """A viewer who comes while a file is made gets his chunks between its passes; no bit of either changes."""
    alone = studio.start(order(num_frames=17, height=64, width=96, seed=3))
    file = pictures(alone, taken(alone, 2))
    other = studio.start(order(seed=5))
    video = pictures(other, taken(other, 2))
    for one in (alone, other):
        one.close()
    settled(studio)
    give, make = studio._give_way, studio._maker.make
    viewers: list[Session] = []
    done: list[int] = []

    def give_way(session: Session, epoch: int) -> None:
        if not viewers:
            viewers.append(studio.start(order(pace=True, lead=9.0, seed=5)))
        give(session, epoch)

    def making(video: Any, *arguments: Any) -> Any:
        made = make(video, *arguments)
        done.append(video.seed)
        return made

    monkeypatch.setattr(studio, "_give_way", give_way)
    monkeypatch.setattr(studio._maker, "make", making)
    job = studio.start(order(num_frames=17, height=64, width=96, seed=3))
    assert np.array_equal(pictures(job, taken(job, 2)), file)
    assert np.array_equal(pictures(viewers[0], taken(viewers[0], 2)), video)
    assert done.index(5) < done.index(3)


def test_a_chunk_that_gives_way_ends_with_its_session(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    give, made = studio._give_way, studio.figures().chunks_made

    def give_way(session: Session, epoch: int) -> None:
        session.close()
        give(session, epoch)

    monkeypatch.setattr(studio, "_give_way", give_way)
    job = studio.start(order())
    end = job.take(WAIT)
    assert isinstance(end, End) and end.reason == "closed"
    settled(studio)
    assert studio.figures().chunks_made == made


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FloatingPointError("chunk 1: latents are not finite"), "chunk 1: latents are not finite"),
        (torch.OutOfMemoryError("CUDA out of memory\nTried"), "out of memory on the GPU"),
        (RuntimeError("broken\nmore"), "an error of the server ended this video"),
    ],
)
def test_a_failure_ends_its_own_session(
    studio: Studio, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    healthy = studio.start(order(seed=1))
    make = studio._maker.make

    def failing(video: Any, *arguments: Any) -> Any:
        if video.seed == 13 and arguments[0].chunk == 1:
            raise error
        return make(video, *arguments)

    monkeypatch.setattr(studio._maker, "make", failing)
    ill = studio.start(order(seed=13))
    while not isinstance(piece := ill.take(WAIT), End):
        assert piece is not None
    assert piece.reason == "failed" and piece.message.startswith(said) and "\n" not in piece.message
    assert ill.state == "failed" and not ill._points and studio.session(ill.id) is None
    assert len(taken(healthy, 2)) == 2 and healthy.state == "running"


def test_a_film_that_breaks_ends_its_own_session(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(video: Any) -> Iterator[None]:
        yield None
        raise OSError(5, "Input/output error")

    ill = studio.start(order())
    ill.close()
    session = Session(studio, order(), ill.video, [], broken(None))
    with studio.lock:
        studio._take_in(session)
    assert session.take(WAIT) == End("failed", "an error of the server ended this video", 0)
    assert len(taken(studio.start(order()), 1)) == 1


def test_an_event_loop_is_woken(studio: Studio) -> None:
    async def watch() -> list[Chunk]:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        session = studio.start(order(num_frames=25))
        session.on_ready(lambda: loop.call_soon_threadsafe(ready.set))
        found: list[Chunk] = []
        while True:
            ready.clear()
            piece = session.take()
            if isinstance(piece, End):
                return found
            if piece is None:
                await asyncio.wait_for(ready.wait(), session.due or WAIT)
            else:
                found.append(piece)

    chunks = asyncio.run(watch())
    assert [chunk.frames for chunk in chunks] == [9, 8, 8]


def test_threads_steer_at_once(studio: Studio) -> None:
    session = studio.start(order(pace=False))
    failed: list[BaseException] = []

    def steer(number: int) -> None:
        try:
            for step in range(8):
                session.change(f"{PROMPT} {number} {step}", policy=("keep", "rebuild=1", "recache=1", "cut")[step % 4])
                session.pause()
                session.resume()
                time.sleep(0.02)
        except ValueError as error:
            if "changes wait" not in str(error):
                failed.append(error)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=steer, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    chunks = taken(session, 4)
    for thread in threads:
        thread.join()
    chunks += taken(session, 2)
    assert not failed and [chunk.index for chunk in chunks] == list(range(6))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": None}, "prompt: missing"),
        ({"prompt": " "}, "prompt: is empty"),
        ({"prompt": f"[cut] {PROMPT}"}, "the first has no past"),
        ({"prompt": "a<image>/etc/passwd"}, "prompt: <image> in it; a picture comes with the order"),
        ({"prompt": f"{PROMPT}[1s] | {OTHER}"}, "prompt: a story in a stream without an end"),
        ({"num_frames": 24}, "num_frames=24: must be 4n\\+1"),
        ({"num_frames": 10**9}, "num_frames="),
        ({"height": 40}, "height=40: must be a multiple of 16"),
        ({"height": 16 * 1000, "width": 16 * 1000}, "too large"),
        ({"width": "48"}, "width='48': must be a whole number"),
        ({"fps": 0}, "fps=0"),
        ({"fps": float("nan")}, "fps=nan"),
        ({"seed": 2**70}, "seed="),
        ({"chunk_frames": 1000}, "chunk_frames=1000"),
        ({"first_chunk_frames": 4}, "first_chunk_frames=4: must be at most 3"),
        ({"prompt_change": "recahe=1"}, "prompt_change: 'recahe=1'"),
        ({"prompt_change": "recache=5"}, "prompt_change=recache=5: reaches back farther"),
        ({"image": b"no picture"}, "image: no picture of a kind"),
        ({"film": Path("/nowhere.mp4")}, "film: "),
        ({"snapshot": "../../etc/passwd"}, "snapshot='../../etc/passwd': must be the id"),
        ({"snapshot": "0" * 32}, "snapshot=0+: there is none"),
        ({"lead": -1.0}, "lead=-1"),
        ({"media": "gif"}, "media=gif: must be one of"),
    ],
)
def test_orders_that_cannot_be_made_are_refused(studio: Studio, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        studio.start(order(**changes))
    assert "\n" not in str(error.value) and not studio.figures().sessions


def test_the_figures(studio: Studio) -> None:
    session = studio.start(replace(order(), media="mp4"))
    chunk = taken(session, 1)[0]
    settled(studio)  # a chunk can be had before it is absorbed, and measured
    figures = studio.figures()
    own = figures.sessions[0]
    assert (own.id, own.state, own.chunks, own.position) == (session.id, "running", 1, 0)
    assert own.first_chunk_seconds is not None and chunk.generation_ms > 0 and chunk.encode_ms > 0
    assert (32, 48, 3) in figures.seconds_a_chunk and figures.real_time_factor and figures.running == 1
    assert session.mime.startswith('video/mp4; codecs="avc1.') and chunk.init == session.init


def test_a_closed_studio(config: InferenceConfig) -> None:
    studio = Studio(config)
    session = studio.start(order())
    waiting: list[Any] = []
    thread = threading.Thread(target=lambda: waiting.extend(iter(lambda: session.take(None), End("closed", "", 0))))
    thread.start()
    studio.close()
    studio.close()
    thread.join(WAIT)
    assert not thread.is_alive() or waiting
    assert session.state == "closed" and not studio._worker.is_alive()
    with pytest.raises(ValueError, match="studio: is closed"):
        studio.start(order())


@pytest.mark.slow
def test_a_thousand_chunks_take_no_more_memory(config: InferenceConfig) -> None:
    """Of one viewer, and then 200 who come, steer and go: the process is as large as after the first."""
    process = psutil.Process()
    with Studio(config, limits=Limits(sessions=4)) as studio:
        session = studio.start(order(media="mp4"))
        sizes = []
        for _ in range(10):
            taken(session, 100)
            settled(studio)
            sizes.append((process.memory_info().rss, studio.figures().memory_bytes))
        assert len({held for _, held in sizes}) == 1
        assert sizes[-1][0] < sizes[1][0] + (32 << 20), sizes
        threads = threading.active_count()
        for number in range(200):
            viewer = studio.start(order(seed=number, media="mp4"))
            taken(viewer, 1)
            viewer.change(OTHER)
            taken(viewer, 1)
            viewer.close()
        settled(studio)
        assert process.memory_info().rss < sizes[-1][0] + (32 << 20)
        assert threading.active_count() <= threads + 2
        assert len(studio.figures().sessions) == 1
