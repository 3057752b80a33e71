"""A session gives, to the bit, what a stream gives that was told the same from the start."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from longsana.config import InferenceConfig, Offload
from longsana.pipelines.video import LongSanaVideoPipeline
from longsana.serving.session import Session
from longsana.serving.studio import Studio
from longsana.serving.values import End
from tests.pipelines.repository import around
from tests.sampling.test_ltx2 import small_720p
from tests.serving.viewing import (
    OTHER,
    PROMPT,
    THIRD,
    WAIT,
    followed,
    order,
    pictures,
    shown,
    streamed,
    taken,
)

POLICIES = ("keep", "recache=1", "recache=2", "rebuild=1", "rebuild=3", "cut")


@pytest.fixture
def ordered(studio: Studio) -> Iterator[Any]:
    begun: list[Session] = []

    def start(**changes: Any) -> Session:
        begun.append(studio.start(order(**changes)))
        return begun[-1]

    yield start
    for session in [*begun, *studio._sessions.values()]:
        session.close()


def latents_of(session: Session) -> torch.Tensor:
    """The last latents (1, C, T, h, w) at the point after the chunk that was taken last."""
    after = session._points[-1].after
    assert after is not None
    found = after().moment.latents
    assert found is not None
    return found


@pytest.mark.parametrize("own", [{}, {"first_chunk_frames": 1}, {"num_frames": 25}])
def test_it_is_a_stream(ordered: Any, pipe: LongSanaVideoPipeline, own: dict[str, Any]) -> None:
    session = ordered(**own)
    chunks = taken(session, 3)
    stream = followed(pipe, 3, **own)
    assert np.array_equal(pictures(session, chunks), shown(stream))
    assert torch.equal(latents_of(session), stream[-1].state.latents)
    assert [chunk.index for chunk in chunks] == [chunk.generation_index for chunk in chunks] == [0, 1, 2]
    frames = [chunk.frames for chunk in chunks]
    assert [chunk.pts_seconds for chunk in chunks] == [sum(frames[:n]) / 16 for n in range(3)]
    if "num_frames" in own:
        assert session.take(WAIT) == session.take(WAIT) == End("finished", "", 3)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_change_counts_from_the_last_chunk_that_was_taken(
    ordered: Any, studio: Studio, pipe: LongSanaVideoPipeline, policy: str
) -> None:
    session = ordered()
    first = taken(session, 2)
    while session.due is None:  # what is ready now is dropped
        time.sleep(0.005)
    dropped = studio.figures().chunks_dropped
    id = session.change(OTHER, "mine", policy)
    rest = taken(session, 2)
    assert studio.figures().chunks_dropped > dropped
    told = [PROMPT, PROMPT, f"[{policy}] {OTHER}"]
    kept = "recache=4" if policy != "rebuild=3" else policy
    stream = followed(pipe, 4, told, prompt_change=kept)
    assert np.array_equal(pictures(session, first + rest), shown(stream))
    assert torch.equal(latents_of(session), stream[-1].state.latents)
    assert id == "mine" and [chunk.started for chunk in first + rest] == [(), (), ("mine",), ()]
    assert [chunk.completed for chunk in rest] == [("mine",), ()] and not rest[0].active


def test_transitions_interrupt_each_other(ordered: Any, pipe: LongSanaVideoPipeline) -> None:
    session = ordered(transition_chunks=2)
    chunks = taken(session, 2)
    a = session.change(OTHER)
    chunks += taken(session, 1)
    session.change(THIRD, "never shown")
    b = session.change(THIRD, "b")
    chunks += taken(session, 3)
    told = [PROMPT, PROMPT, OTHER, THIRD]
    assert np.array_equal(pictures(session, chunks), streamed(pipe, 6, told, transition_chunks=2))
    assert [chunk.started for chunk in chunks] == [(), (), (a,), ("never shown", b), (), ()]
    assert [chunk.active for chunk in chunks] == [(), (), (a,), (b,), (b,), ()]
    assert [chunk.completed for chunk in chunks] == [(), (), (), (a, "never shown"), (), (b,)]


def test_changes_before_the_first_chunk(ordered: Any, pipe: LongSanaVideoPipeline) -> None:
    session = ordered()
    session.change(OTHER, policy="cut")
    assert np.array_equal(pictures(session, taken(session, 2)), streamed(pipe, 2, OTHER))


def test_a_story_and_what_interrupts_it(ordered: Any, pipe: LongSanaVideoPipeline) -> None:
    story = f"{PROMPT}[0.5s] | [rebuild=1] {OTHER}[0.5s] | [cut] {THIRD}"
    own: dict[str, Any] = {"num_frames": 41, "prompt_change": "rebuild=1"}
    session = ordered(prompt=story, **own)
    chunks = taken(session, 5)
    stream = followed(pipe, 5, story, **own)
    assert np.array_equal(pictures(session, chunks), shown(stream))
    again = ordered(prompt=story, **own)
    taken(again, 2)
    again.change(THIRD)
    rest = taken(again, 2)
    told = streamed(pipe, 2, [THIRD], state=stream[1].state, num_frames=16)
    assert np.array_equal(pictures(again, rest), told)


def test_a_fork_goes_on_as_the_original_and_shares_its_states(ordered: Any, studio: Studio) -> None:
    session = ordered()
    taken(session, 2)
    before = studio.figures().memory_bytes
    fork = session.fork()
    assert fork.id != session.id and fork.state == "running"
    fork.pause()
    assert studio.figures().memory_bytes < 2 * before
    fork.resume()
    branch = session.fork()
    branch.change(OTHER, policy="cut")
    own, others, branched = taken(session, 3), taken(fork, 3), taken(branch, 2)
    assert np.array_equal(pictures(session, own), pictures(fork, others))
    assert not np.array_equal(pictures(session, own[:2]), pictures(branch, branched))
    assert [chunk.index for chunk in others] == [0, 1, 2] and [chunk.generation_index for chunk in others] == [2, 3, 4]
    waiting = session.fork()
    session.change(THIRD)
    heir = session.fork()
    assert np.array_equal(pictures(session, taken(session, 1)), pictures(heir, taken(heir, 1)))
    assert not np.array_equal(pictures(waiting, taken(waiting, 1)), pictures(heir, taken(heir.fork(), 1)))


def test_a_rewind_makes_the_same_chunk_again(ordered: Any) -> None:
    session = ordered(media="mp4")
    plain = ordered()
    chunks = taken(session, 4)
    session.rewind(2)
    chunks += taken(session, 1)
    session.change(OTHER)
    chunks += taken(session, 1)
    assert [chunk.generation_index for chunk in chunks] == [0, 1, 2, 3, 2, 3]
    assert [chunk.index for chunk in chunks] == list(range(6)) and chunks[0].init == session.init
    with av.open(io.BytesIO(session.init + b"".join(chunk.data for chunk in chunks)), format="mp4") as film:
        frames = list(film.decode(video=0))
    assert [frame.pts * frame.time_base for frame in frames if frame.pts is not None] == [
        Fraction(k, 16) for k in range(9 + 8 * 5)
    ]
    shown = np.stack([frame.to_ndarray(format="rgb24") for frame in frames]).astype(int)
    assert np.abs(shown[17:25] - pictures(plain, taken(plain, 3))[17:]).mean() < 8
    assert np.abs(shown[17:25] - shown[33:41]).mean() < 2  # the same pictures, coded a second time
    with pytest.raises(ValueError, match="rewind=9: 4 chunks are kept"):
        session.rewind(9)


def test_a_rewind_goes_back_to_the_prompt_that_was_there(ordered: Any) -> None:
    session = ordered()
    chunks = taken(session, 2)
    session.change(OTHER, policy="cut")
    chunks += taken(session, 1)
    session.rewind(2)
    assert np.array_equal(pictures(session, taken(session, 1)), pictures(session, chunks[1:2]))
    ended = ordered(num_frames=17)
    last = taken(ended, 2)[1:]
    assert isinstance(ended.take(WAIT), End) and ended.state == "finished"
    ended.rewind(1)
    assert np.array_equal(pictures(ended, taken(ended, 1)), pictures(ended, last))


def test_a_pause_changes_nothing(ordered: Any) -> None:
    session, other = ordered(), ordered()
    first = taken(session, 1)
    session.pause()
    assert session.take(0.3) is None and session.state == "paused" and session.due is None
    made = len(session._unsent)
    session.resume()
    assert made <= 2
    assert np.array_equal(pictures(session, first + taken(session, 2)), pictures(other, taken(other, 3)))


def test_a_picture_first(ordered: Any, pipe: LongSanaVideoPipeline) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    data = io.BytesIO()
    picture.save(data, "PNG")
    session = ordered(image=data.getvalue())
    assert np.array_equal(pictures(session, taken(session, 2)), streamed(pipe, 2, image=picture))


def test_a_film_first(ordered: Any, pipe: LongSanaVideoPipeline, tmp_path: Any) -> None:
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as film:
        stream = film.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for k in range(17):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 10 * k, np.uint8), format="rgb24")
            film.mux(stream.encode(frame))
        film.mux(stream.encode(None))
    session = ordered(film=path)
    own: dict[str, Any] = {"video": path, "new_frames_only": True}
    assert np.array_equal(pictures(session, taken(session, 2)), streamed(pipe, 2, **own))


def test_what_cannot_be_is_refused(ordered: Any) -> None:
    session = ordered()
    for arguments, said in [
        (("  ",), "prompt: is empty"),
        (("x" * 30_000,), "prompt: 30,000 characters"),
        ((OTHER, "", "recache=9"), "policy=recache=9: reaches back"),
        ((OTHER, "", "recahe=1"), "recahe=1' is no change of the past"),
        ((OTHER, "", None, -1), "transition_chunks=-1"),
        (("[cut]",), "without words"),
    ]:
        with pytest.raises(ValueError, match=said) as error:
            session.change(*arguments)
        assert "\n" not in str(error.value)
    for _ in range(16):
        session.change(OTHER)
    with pytest.raises(ValueError, match="16 changes wait"):
        session.change(OTHER)
    session.close()
    session.close()
    assert session.take(None) == End("closed", "", 0) and session.state == "closed"
    for method in (session.pause, session.resume, session.fork, session.snapshot, lambda: session.change(OTHER)):
        with pytest.raises(ValueError, match="session: has ended"):
            method()


def test_an_id_names_one_change(ordered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longsana.serving.session.KNOWN_IDS", 3)
    session = ordered()
    taken(session, 1)
    session.change(OTHER, "mine")
    fork = session.fork()
    for heir in (session, fork):  # in which it waits too
        with pytest.raises(ValueError, match="event_id=mine: names an earlier change"):
            heir.change(THIRD, "mine")
    assert [chunk.started for one in (session, fork) for chunk in taken(one, 2)] == [("mine",), ()] * 2
    session.rewind(1)
    with pytest.raises(ValueError, match="event_id=mine"):
        session.change(THIRD, "mine")
    with pytest.raises(ValueError, match="no change of the past"):
        session.change(THIRD, "again", "recahe=1")
    assert session.change(THIRD, "again") == "again"  # what was refused named nothing
    for _ in range(3):
        session.change(THIRD)
    assert session.change(THIRD, "mine") == "mine", "an old one is forgotten"


@pytest.mark.parametrize("offload", ["text_encoder", "all"])
def test_what_waits_on_the_host_changes_no_bit(config: InferenceConfig, studio: Studio, offload: Offload) -> None:
    """Text encoder, network and decoder take turns, at each change of prompt and in each chunk."""

    def made(own: Studio) -> np.ndarray:
        session = own.start(order())
        chunks = taken(session, 1)
        for words in (OTHER, THIRD):
            session.change(words, words)
            chunks += taken(session, 1)
        session.close()
        return pictures(session, chunks)

    with Studio(replace(config, sampling=replace(config.sampling, offload=offload))) as waiting:
        turns = waiting._maker.engine.turns
        assert turns is not None and len(turns) == {"text_encoder": 2, "all": 3}[offload]
        given = made(waiting)
    assert np.array_equal(given, made(studio))


def test_a_decoder_that_looks_ahead(tmp_path: Path) -> None:
    config = small_720p(tmp_path, decoder_causal=False)
    with Studio(config) as studio:
        text = studio._maker._encode.encoder
        pipe = around(studio._maker.network, studio._maker.decoder, text.tokenizer, text.model, tmp_path)
        size = {"height": config.sampling.height, "width": config.sampling.width}
        own = {"num_frames": 97, "chunk_frames": 3, "first_chunk_frames": 2}
        session = studio.start(order(**own))
        session.change(OTHER, "first")
        chunks = []
        while not isinstance(piece := session.take(WAIT), End):
            assert piece is not None
            chunks.append(piece)
        stream = shown(list(pipe.stream(OTHER, generator=torch.Generator().manual_seed(11), **own, **size)))
    assert np.array_equal(pictures(session, chunks), stream) and len(stream) == 97
    assert (
        len(chunks) < 5
        and chunks[0].started == ("first",)
        and [chunk.index for chunk in chunks] == [*range(len(chunks))]
    )
