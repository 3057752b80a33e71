"""A fleet on Ray Serve, with processes that are killed, replaced and taken away: about two minutes on two cores."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

import av
import numpy as np
import psutil
import pytest

from longsana.config import InferenceConfig
from longsana.runtime.errors import InputError
from longsana.serving.client import LiveVideo, Piece, Refused
from longsana.serving.fleet import Fleet
from longsana.serving.values import Limits
from tests.serving.fake import served
from tests.serving.server import Running
from tests.serving.test_fleet import CLOSE, psnr
from tests.serving.viewing import OTHER, PROMPT, WAIT

on_ray = pytest.importorskip("longsana.serving.on_ray", exc_type=ImportError)
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray"), pytest.mark.timeout(600)]
CHUNKS = 12


@pytest.fixture(scope="module")
def wanted(config: InferenceConfig, tmp_path_factory: pytest.TempPathFactory) -> on_ray.Wanted:
    folder = tmp_path_factory.mktemp("snapshots")
    return on_ray.Wanted(config, Limits(own_snapshots=4), folder, 2, 2, 4, cpus=0.5, gpus=0, threads=1)


@pytest.fixture(scope="module")
def fleet(wanted: on_ray.Wanted) -> Iterator[Fleet]:
    with on_ray.replicas(wanted, None) as replicas:
        yield Fleet(replicas)


@pytest.fixture
def server(fleet: Fleet, running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> Running:
    monkeypatch.setattr(Fleet, "close", lambda fleet: None)  # which other tests go on with
    return running(fleet, replace(served(), height=32, width=48))


def start(server: Running, seed: int = 3) -> LiveVideo:
    extra = {"chunk_frames": 2, "pace_to_media_time": True}
    return LiveVideo(server.url, prompt=PROMPT, num_frames=None, seed=seed, extra_params=extra, timeout=WAIT)


def watched(video: LiveVideo, do: dict[int, Callable[[], object]]) -> list[Piece]:
    """Watch so many chunks, and do things before some of them."""
    pieces = []
    for piece in video:
        pieces.append(piece)
        do.get(len(pieces), lambda: None)()
        if len(pieces) == CHUNKS:
            break
    return pieces


def frames(pieces: list[Piece]) -> np.ndarray:
    with av.open(io.BytesIO(b"".join(piece.data for piece in pieces))) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


@pytest.fixture(scope="module")
def undisturbed(fleet: Fleet) -> list[np.ndarray]:
    return []


def check(pieces: list[Piece], undisturbed: list[np.ndarray]) -> None:
    assert [piece.metadata["transport_chunk_index"] for piece in pieces] == list(range(CHUNKS))
    assert [piece.metadata["generation_chunk_index"] for piece in pieces] == list(range(CHUNKS))
    ends = [piece.metadata["pts_seconds"] + piece.metadata["duration_seconds"] for piece in pieces]
    assert ends[:-1] == pytest.approx([piece.metadata["pts_seconds"] for piece in pieces[1:]])
    shown = frames(pieces)
    if not undisturbed:
        undisturbed.append(shown)
    assert psnr(shown, undisturbed[0]) >= CLOSE, psnr(shown, undisturbed[0])


def processes() -> dict[int, psutil.Process]:
    found = {}
    for process in psutil.Process().children(recursive=True):
        if any("ServeReplica" in part for part in process.cmdline()[:1]):
            found[process.pid] = process
    return found


def where(fleet: Fleet, video: LiveVideo) -> str:
    session = fleet.session(video.session_id)
    assert session is not None
    return session.where


def pid_of(fleet: Fleet, name: str) -> int:
    return int(fleet.replicas.call(name, "pid"))


def until(is_so: Callable[[], object], within: float = 120.0) -> None:
    end = time.monotonic() + within
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_process_is_killed_in_mid_stream(server: Running, fleet: Fleet, undisturbed: list[np.ndarray]) -> None:
    with start(server) as video:
        pieces = watched(video, {4: lambda: video.change(OTHER)})
    check(pieces, undisturbed)
    moves = fleet.moves
    with start(server) as video:

        def kill() -> None:
            os.kill(pid_of(fleet, where(fleet, video)), signal.SIGKILL)

        pieces = watched(video, {4: lambda: video.change(OTHER), 7: kill})
    check(pieces, undisturbed)
    assert fleet.moves == moves + 1
    until(lambda: fleet.figures().replicas == 2)  # Serve has started another one


def test_a_rolling_update_and_a_downscale_end_no_session(
    server: Running, fleet: Fleet, wanted: on_ray.Wanted, undisturbed: list[np.ndarray]
) -> None:
    before = set(fleet.replicas.figures())
    videos = [start(server, seed) for seed in (3, 4)]
    assert {where(fleet, video) for video in videos} == before
    newer = replace(wanted, limits=replace(wanted.limits, captions=65))
    update = threading.Thread(target=on_ray.deploy, args=[newer])
    seen: list[list[Piece]] = [[], []]

    def watch(number: int) -> None:
        with suppress(Refused):  # of the test's own end
            for piece in videos[number]:
                seen[number].append(piece)
                if len(seen[number]) == 4:
                    videos[number].change(OTHER)

    viewers = [threading.Thread(target=watch, args=[number], daemon=True) for number in range(2)]
    for viewer in viewers:
        viewer.start()
    until(lambda: all(len(pieces) > 4 for pieces in seen))
    update.start()
    update.join()
    until(lambda: len(fleet.replicas.figures()) == 2 and not before & set(fleet.replicas.figures()))
    moves = fleet.moves
    assert moves >= 2
    on_ray.deploy(replace(newer, replicas=1, most=1))
    until(lambda: len(fleet.replicas.figures()) == 1)
    counts = [len(pieces) for pieces in seen]
    until(lambda: all(len(pieces) > count + 2 for pieces, count in zip(seen, counts, strict=True)))
    assert {where(fleet, video) for video in videos} == set(fleet.replicas.figures())
    for video in videos:
        video.close()
    on_ray.deploy(newer)
    until(lambda: len(fleet.replicas.figures()) == 2)
    for pieces in seen:
        indices = [piece.metadata["transport_chunk_index"] for piece in pieces]
        assert indices == list(range(len(indices)))
    check(seen[0][:CHUNKS], undisturbed)


def test_a_client_that_does_not_read_grows_nothing(server: Running, fleet: Fleet) -> None:
    silent = start(server, 5)  # it is asked for nothing, and reads nothing
    with start(server, 6) as video:
        pieces = iter(video)
        for _ in range(10):
            next(pieces)
        those = [psutil.Process(), *processes().values()]
        before = [process.memory_info().rss for process in those]
        for _ in range(40):
            next(pieces)
        grown = [process.memory_info().rss - size for process, size in zip(those, before, strict=True)]
    assert max(grown) < 32 << 20, grown
    assert fleet.session(silent.session_id) is not None
    silent.close()


def test_a_second_front_is_refused(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_ray, "REACH", 1.0)
    with pytest.raises(InputError, match=rf"another front is there, process {os.getpid()} on .*; stop it, or choose"):
        on_ray._stand("auto")


def test_a_cluster_without_room(wanted: on_ray.Wanted) -> None:
    with pytest.raises(InputError, match=r"^--replicas 2: each needs 0.5 CPU, and the cluster has 0; choose fewer"):
        on_ray.fitted(wanted, {})
    with pytest.raises(InputError, match=r"^--replicas 2: each needs 1 GPU, and the cluster has 1; .*gpus_per_replica"):
        on_ray.fitted(replace(wanted, gpus=None), {"CPU": 2, "GPU": 1})
    assert on_ray.fitted(replace(wanted, gpus=None), {"CPU": 2}).gpus == 0
