"""Sessions of a fleet outlive their replicas: each chunk once, in order, as if nothing had been."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from longsana.config import InferenceConfig
from longsana.runtime.errors import InputError
from longsana.serving.client import LiveVideo
from longsana.serving.fleet import Fleet, FleetSession
from longsana.serving.replica import Elsewhere, Replica
from longsana.serving.session import Session
from longsana.serving.studio import Studio
from longsana.serving.values import Chunk, End, Full, Limits
from tests.serving.fake import served
from tests.serving.replicas import Local
from tests.serving.server import Running
from tests.serving.viewing import OTHER, PROMPT, THIRD, WAIT, order, settled, taken

Steer = Callable[[Any], object]
CLOSE = 60.0
"""dB of the pictures after a move, at least; the decoder's memory is rebuilt from the last 12 latents."""


@pytest.fixture(scope="module")
def replicas(config: InferenceConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    replicas = Local(config, tmp_path_factory.mktemp("fleet"))
    yield replicas
    replicas.close()


@pytest.fixture
def local(replicas: Local) -> Iterator[Local]:
    replicas.reset()
    yield replicas
    replicas.reset()


@pytest.fixture
def fleet(local: Local) -> Iterator[Fleet]:
    fleet = Fleet(local, move_within=20.0)
    yield fleet
    for session in list(fleet._sessions.values()):
        session.close()
        session.join()


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = np.square(one.astype(np.float64) - other).mean()
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def pixels(chunks: list[Chunk]) -> np.ndarray:
    return np.frombuffer(b"".join(chunk.data for chunk in chunks), np.uint8)


def until(is_so: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def has_saved(session: FleetSession) -> None:
    """Wait for a snapshot that its session has saved of itself."""
    until(lambda: session._fleet.replicas.call(session.where, "hear", session.id).saved)


def transition(session: Any) -> None:
    session.change(THIRD, "third", transition_chunks=3)


# What a viewer does, and how many chunks he takes before that.
STORY: list[tuple[int, Steer]] = [
    (2, lambda session: session.change(OTHER, "other")),
    (3, lambda session: session.rewind(1)),
    (1, transition),
    (2, lambda session: session.pause()),
    (0, lambda session: session.resume()),
    (1, lambda session: session.change(PROMPT, "again", policy="cut")),
    (2, lambda session: None),
]


def told(session: Any, between: Callable[[int], object] = lambda step: None) -> list[Chunk]:
    chunks: list[Chunk] = []
    for step, (count, steer) in enumerate(STORY):
        chunks += taken(session, count)
        between(step)
        steer(session)
    return chunks


@pytest.fixture(scope="module")
def undisturbed(studio: Studio) -> list[Chunk]:
    session = studio.start(order(snapshot_every=2))
    chunks = told(session)
    session.close()
    return chunks


def same_but_snapshots(one: Chunk, other: Chunk) -> bool:
    plain: dict[str, Any] = {"data": b"", "snapshot": "", "generation_ms": 0, "encode_ms": 0}
    return replace(one, **plain) == replace(other, **plain)


@pytest.mark.parametrize(
    ("step", "every"),
    [
        # Before anything was told, in a transition and while it pauses; and where one was told as at another moment.
        *(pytest.param(step, 2, marks=pytest.mark.slow if step in (1, 5) else ()) for step in range(len(STORY) - 1)),
        (3, 0),
    ],
)
def test_a_replica_is_lost_at_any_moment(
    local: Local, fleet: Fleet, undisturbed: list[Chunk], step: int, every: int
) -> None:
    session = fleet.start(order(snapshot_every=every))

    def lose(now: int) -> None:
        if now == step:
            if every:
                has_saved(session)
            local.lose(session.where)

    chunks = told(session, lose)
    assert fleet.moves == 1 and len(local.there) == 1
    assert all(map(same_but_snapshots, chunks, undisturbed)) and len(chunks) == len(undisturbed)
    assert psnr(pixels(chunks), pixels(undisturbed)) >= CLOSE


@pytest.mark.parametrize(
    ("method", "after"),
    [
        *(("change", False), ("change", True), ("rewind", True), ("pause", False), ("resume", True)),
        # To each a call is the same, before as after.
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("rewind", False), ("pause", True), ("resume", False))
        ),
    ],
)
def test_what_was_asked_of_a_lost_replica_is_done_once(
    local: Local, fleet: Fleet, undisturbed: list[Chunk], method: str, after: bool
) -> None:
    session = fleet.start(order(snapshot_every=2))

    def lose(name: str, called: str) -> None:
        if called == method and len(local.there) == 2:
            local.lose(name)

    if after:
        local.after = lose
    else:
        local.before = lose
    chunks = told(session)
    assert fleet.moves == 1
    assert all(map(same_but_snapshots, chunks, undisturbed))
    assert psnr(pixels(chunks), pixels(undisturbed)) >= CLOSE


def test_both_are_lost_and_replaced(local: Local, fleet: Fleet, undisturbed: list[Chunk]) -> None:
    """A rolling update: each replica is replaced in turn, and the session is where it must be."""
    session = fleet.start(order(snapshot_every=2))

    def update(step: int) -> None:
        if session.where in local.there:
            local.there = {name: replica for name, replica in local.all.items() if name != session.where}

    chunks = told(session, update)
    assert fleet.moves >= 5 and all(map(same_but_snapshots, chunks, undisturbed))
    assert psnr(pixels(chunks), pixels(undisturbed)) >= CLOSE


def test_a_replica_that_is_replaced_answers_what_is_under_way(local: Local, fleet: Fleet) -> None:
    """Its last answers come while the session is moved already: no chunk twice, and no change that is forgotten."""
    session = fleet.start(order(pace=True, lead=0.1, snapshot_every=1))
    chunks = taken(session, 3)
    has_saved(session)
    until(lambda: session.take(0.0) is None)  # a pull waits, for a chunk that is not due
    local.drain(session.where)
    session.change(OTHER, "other")
    chunks += taken(session, 3)
    assert [chunk.index for chunk in chunks] == list(range(6)) and fleet.moves == 1
    assert [chunk.started for chunk in chunks[3:]].count(("other",)) == 1


def test_a_change_that_is_answered_while_the_session_moves_is_made_again(local: Local, fleet: Fleet) -> None:
    session = fleet.start(order(snapshot_every=1))
    taken(session, 2)
    has_saved(session)

    def leave(name: str, method: str) -> None:
        if method == "change" and name in local.there and not local.draining:
            local.drain(name)
            session._move(session._stay)  # as the puller does

    local.after = leave
    session.change(OTHER, "other")
    assert taken(session, 1)[0].started == ("other",) and fleet.moves == 1


def test_a_chunk_whose_answer_is_lost_is_made_again(local: Local, fleet: Fleet) -> None:
    """Though its replica has told of it already, in answer to something else."""
    session = fleet.start(order(snapshot_every=1))
    chunks = taken(session, 3)
    has_saved(session)
    done = threading.Event()

    def lose(name: str, method: str) -> None:
        if method == "pull" and len(local.there) == 2:
            assert done.wait(WAIT)
            local.lose(name)

    def ask() -> None:
        until(lambda: local.all[session.where].studio.session(session.id).ticket().chunks == 4)  # type: ignore[union-attr]
        session.change(OTHER, "other")
        done.set()

    local.after = lose
    asks = threading.Thread(target=ask)
    asks.start()
    chunks += taken(session, 3)
    asks.join()
    assert [chunk.index for chunk in chunks] == list(range(6)) and fleet.moves == 1
    assert [chunk.started for chunk in chunks].count(("other",)) == 1


def test_a_rewind_reaches_back_behind_the_last_snapshot(local: Local, fleet: Fleet) -> None:
    session = fleet.start(order(snapshot_every=1))
    for _ in range(4):
        taken(session, 1)
        before = session._ticket.saved
        until(lambda: fleet.replicas.call(session.where, "hear", session.id).saved != before)  # noqa: B023
    local.lose(session.where)
    session.rewind(2)
    chunk = taken(session, 1)[0]
    assert (chunk.index, chunk.generation_index, fleet.moves) == (4, 2, 1)


def test_a_transition_that_is_moved_stays_one(local: Local, fleet: Fleet, studio: Studio) -> None:
    """And changes after it are as they would have been."""

    def told(session: Any, lose: Callable[[], object]) -> list[Chunk]:
        chunks = taken(session, 2)
        session.change(OTHER, "slow", transition_chunks=3)
        chunks += taken(session, 2)
        lose()
        chunks += taken(session, 3)
        session.change(THIRD, "plain")
        return chunks + taken(session, 2)

    plain, session = studio.start(order(snapshot_every=1)), fleet.start(order(snapshot_every=1))

    def lose() -> None:
        until(lambda: fleet.replicas.call(session.where, "hear", session.id).saved[-1].index == 4)
        local.lose(session.where)

    expected, found = told(plain, lambda: None), told(session, lose)
    plain.close()
    assert all(map(same_but_snapshots, found, expected)) and fleet.moves == 1
    assert psnr(pixels(found), pixels(expected)) >= CLOSE


def test_a_replica_that_fails_to_begin_is_passed_over(local: Local, fleet: Fleet) -> None:
    session = fleet.start(order(snapshot_every=1))
    taken(session, 2)

    def fail(name: str, method: str) -> None:
        if method == "begin" and local.calls.count((name, "begin")) < 3:
            raise RuntimeError("cannot schedule new futures after shutdown")

    local.before = fail
    local.lose(session.where)
    assert taken(session, 1)[0].index == 2 and fleet.moves == 1
    assert session._puller.is_alive()


@pytest.mark.parametrize("policy", [None, "recache=4"])
def test_what_no_replica_could_go_on_with_ends_at_once(local: Local, fleet: Fleet, policy: str | None) -> None:
    session = fleet.start(order(snapshot_every=0 if policy is None else 2))
    taken(session, 6)
    if policy is not None:
        has_saved(session)
        session.change(OTHER, policy=policy)
        taken(session, 1)
    ticket = session._ticket  # as after many chunks
    session._ticket = session._had = replace(ticket, base=None, saved=ticket.saved[-1:])
    begun = local.calls.count(("a", "begin")) + local.calls.count(("b", "begin"))
    local.lose(session.where)
    until(lambda: isinstance(session.take(WAIT), End))
    end = session.take(0.0)
    why = "no state of it was saved" if policy is None else r"session: cannot go on elsewhere: [recache=4] reaches back"
    assert isinstance(end, End) and why in end.message
    tried = local.calls.count(("a", "begin")) + local.calls.count(("b", "begin")) - begun
    assert tried == len(session._ticket.saved) and fleet.figures().failures >= 1


def test_a_session_that_is_closed_while_it_moves_is_nowhere(local: Local, fleet: Fleet) -> None:
    session = fleet.start(order(snapshot_every=1))
    taken(session, 2)

    def close(name: str, method: str) -> None:
        if method == "begin":
            session.close()

    local.before = close
    local.lose(session.where)
    with suppress(InputError):
        session.pause()
    session.join()
    assert not any(replica.studio.session(session.id) for replica in local.there.values())
    assert fleet.figures().failures == 0


def test_a_file_that_was_moved_is_one_video(local: Local, fleet: Fleet) -> None:
    session = fleet.start(order(media="mp4", num_frames=49, snapshot_every=1))
    chunks = taken(session, 3)
    has_saved(session)
    local.lose(session.where)
    while isinstance(piece := session.take(WAIT), Chunk):
        chunks.append(piece)
    assert piece == End("finished", "", len(chunks))
    with av.open(io.BytesIO(session.init + b"".join(chunk.data for chunk in chunks))) as file:
        times = [frame.pts * frame.time_base for frame in file.decode(video=0)]
    assert [round(time * 16) for time in times] == list(range(49))
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert all(local.calls.count((name, "begin")) == 1 for name in "ab")


def test_a_viewer_with_a_pace_is_behind_by_the_move_alone(local: Local, fleet: Fleet) -> None:
    session = fleet.start(order(pace=True, lead=0.2, snapshot_every=1))
    taken(session, 4)
    has_saved(session)
    local.lose(session.where)
    taken(session, 1)
    began = time.monotonic()
    taken(session, 2)  # of half a second each: not before their time
    assert time.monotonic() - began > 0.7


def test_sessions_go_where_there_is_most_room(local: Local, fleet: Fleet) -> None:
    sessions = [fleet.start(order(seed=seed)) for seed in range(4)]  # which load nothing: by their number
    assert sorted(session.where for session in sessions) == ["a", "a", "b", "b"]
    gone = next(session for session in sessions if session.where == "a")
    gone.close()
    gone.join()
    assert fleet.start(order()).where == "a" and fleet.session(gone.id) is None
    assert fleet.figures().running == 4 and fleet.figures().replicas == 2


def test_where_all_are_full(config: InferenceConfig, tmp_path: Path) -> None:
    local = Local(config, tmp_path, limits=Limits(sessions=1, queue=1))
    fleet = Fleet(local)
    sessions = [fleet.start(order()) for _ in range(4)]
    with pytest.raises(Full, match=r"^full: "):
        fleet.start(order())
    assert sorted(session.position for session in sessions) == [0, 0, 1, 1]
    waiting = next(session for session in sessions if session.position)
    for session in sessions:
        if session.where == waiting.where and session is not waiting:
            session.close()
    taken(waiting, 1)
    assert waiting.position == 0
    # Who had a place goes to the head of the queue of the one that is left.
    local.lose(waiting.where)
    other = next(session for session in sessions if session.where != waiting.where and not session.position)
    threading.Timer(0.5, other.close).start()
    taken(waiting, 1)
    fleet.close()


def test_for_who_does_not_read_nothing_is_pulled(local: Local, fleet: Fleet) -> None:
    session = fleet.start(order(snapshot_every=1))
    taken(session, 2)
    settled(local.all[session.where].studio)
    pulls, made = local.calls.count((session.where, "pull")), fleet.figures().chunks_made
    time.sleep(0.5)
    assert local.calls.count((session.where, "pull")) == pulls and session._piece is None
    assert fleet.figures().chunks_made == made


def test_a_session_that_fails_is_not_moved(local: Local, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    session = fleet.start(order())
    taken(session, 1)
    for replica in local.there.values():
        monkeypatch.setattr(replica.studio._maker, "make", lambda *_, **__: 1 / 0)
    until(lambda: isinstance(session.take(WAIT), End))
    assert session.take(0.0) == End("failed", "an error of the server ended this video", session._ticket.chunks)
    assert session.state == "failed" and fleet.moves == 0


def test_no_replica_is_left(config: InferenceConfig, tmp_path: Path) -> None:
    local = Local(config, tmp_path, "a")
    fleet = Fleet(local, move_within=0.3)
    session = fleet.start(order())
    taken(session, 1)
    local.lose("a")
    until(lambda: isinstance(session.take(WAIT), End))
    end = session.take(0.0)
    assert isinstance(end, End) and end.message == (
        "session: the machine that made this video is gone, and no other could go on (no replica is there)"
    )
    with pytest.raises(InputError, match=r"^fleet: no replica is there; try again later$"):
        fleet.start(order())
    with pytest.raises(InputError, match=r"^fleet: no replica is there; try again later$"):
        fleet.check(order())
    with pytest.raises(InputError, match=r"^a fleet without a replica that answers"):
        Fleet(local)
    fleet.close()


def test_a_fork_outlives_its_replica_too(local: Local, fleet: Fleet) -> None:
    session = fleet.start(order(snapshot_every=2))
    taken(session, 3)
    fork = session.fork()
    fork.change(OTHER)
    both = [taken(one, 1)[0] for one in (session, fork)]
    local.lose(session.where)
    both += [taken(one, 1)[0] for one in (session, fork)]
    assert [chunk.index for chunk in both] == [3, 0, 4, 1] and fork.id != session.id
    assert [chunk.generation_index for chunk in both] == [3, 3, 4, 4]
    assert psnr(pixels(both[2:3]), pixels(both[3:])) < 40


def test_a_session_that_nobody_asks_for_ends(studio: Studio) -> None:
    with Replica(studio, abandoned=0.2) as replica:
        begun, wanted = replica.begin(order()), replica.begin(order())

        def is_gone() -> bool:
            replica.hear(wanted.id)
            return studio.session(begun.id) is None

        until(is_gone)
        with pytest.raises(Elsewhere):
            replica.pull(begun.id, 0.0)
        assert isinstance(studio.session(wanted.id), Session)
        replica.close(wanted.id)


def test_a_new_replica_inherits_what_a_gone_one_has_saved(config: InferenceConfig, tmp_path: Path) -> None:
    with Studio(config, snapshots=tmp_path) as alone:  # what one process had saved counts, too
        viewed = alone.start(order())
        taken(viewed, 1)
        before = viewed.snapshot()
    local = Local(config, tmp_path, "a")
    fleet = Fleet(local)
    assert taken(fleet.start(order(prompt=None, snapshot=before, seed=None)), 1)
    session = fleet.start(order())
    taken(session, 2)
    state = session.snapshot()
    local.end("a")
    local.there = {"c": local.add("c")}
    assert not (tmp_path / "a").exists() and (tmp_path / "c" / f"{state}.safetensors").is_file()
    assert taken(fleet.start(order(prompt=None, snapshot=state, seed=None)), 1)
    fleet.close()
    with Studio(config, snapshots=tmp_path) as alone:
        assert taken(alone.start(order(prompt=None, snapshot=state, seed=None)), 1)
    assert not (tmp_path / "c").exists() and (tmp_path / f"{before}.safetensors").is_file()


def test_a_fleet_behind_the_server(local: Local, fleet: Fleet, running: Callable[..., Running]) -> None:
    server = running(fleet, replace(served(), height=32, width=48))
    with LiveVideo(server.url, prompt=PROMPT, num_frames=None, extra_params={"chunk_frames": 2}) as video:
        pieces = iter(video)
        indices = [next(pieces).metadata["transport_chunk_index"] for _ in range(3)]
        video.change(OTHER)
        video.pause()
        local.lose(next(iter(fleet._sessions.values())).where)
        video.resume()
        video.rewind(1)
        more = [next(pieces).metadata for _ in range(3)]
        assert [*indices, *(one["transport_chunk_index"] for one in more)] == list(range(6))
        assert video.fork() != video.session_id
        assert more[0]["started_event_ids"] == [] and video.snapshot()
        text = server_text(server)
        assert "longsana_replicas 1.0" in text and "longsana_moves_total 1.0" in text
        video.stop()
    until(lambda: not [session for session in fleet._sessions.values() if session.id == video.session_id])


def server_text(server: Running) -> str:
    import urllib.request

    with urllib.request.urlopen(f"{server.url}/metrics", timeout=WAIT) as answer:
        return str(answer.read().decode())
