"""Snapshots: whole or not there, by ids that are no paths, a bounded number; a restarted studio goes on from one."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longsana.config import InferenceConfig
from longsana.pipelines.video import LongSanaVideoPipeline
from longsana.sampling.continuation import Continuation
from longsana.serving.session import Session
from longsana.serving.snapshots import Snapshots
from longsana.serving.studio import Studio
from tests.serving.viewing import OTHER, PROMPT, THIRD, WAIT, order, pictures, streamed, taken

ROOT = Path(__file__).parents[2]


def saved_up(session: Session) -> None:
    """Wait until a session has saved what it saves of itself."""
    end = time.monotonic() + WAIT
    while session.saving:
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_snapshot_of_what_was_rewound_is_none_to_go_on_from(studio: Studio) -> None:
    session = studio.start(order(snapshot_every=1))
    for _ in range(3):
        taken(session, 1)
        saved_up(session)
    before = session.ticket().saved
    assert [saved.index for saved in before] == [2, 3]
    session.rewind(1)
    assert session.ticket().saved == before[:1]
    for _ in range(2):
        taken(session, 1)
        saved_up(session)
    assert taken(session, 1)[0].snapshot not in {saved.id for saved in before}
    assert not {saved.id for saved in before} & {file.id for file in studio._snapshots._files()}
    session.close()


def test_a_restarted_studio_goes_on(
    config: InferenceConfig, studio: Studio, pipe: LongSanaVideoPipeline, tmp_path: Path
) -> None:
    session = studio.start(order(prompt_change="recache=1", transition_chunks=2))
    taken(session, 2)
    session.change(OTHER)
    taken(session, 1)
    id = session.snapshot()
    rest = pictures(session, taken(session, 3))
    session.change(THIRD)
    rest = np.concatenate([rest, pictures(session, taken(session, 1))])
    latents = session._points[-1].after().moment.latents  # type: ignore[misc]
    session.close()
    assert re.fullmatch("[0-9a-f]{32}", id) and studio._snapshots is not None
    kept = studio._snapshots.folder / f"{id}.safetensors"
    folder = tmp_path / "snapshots"
    folder.mkdir()
    os.link(kept, folder / kept.name)
    with Studio(config, snapshots=folder) as again:
        going = again.start(order(prompt=None, seed=None, snapshot=id, chunk_frames=None))
        chunks = taken(going, 3)
        assert chunks[0].generation_index == 3 and chunks[0].index == 0 and chunks[0].pts_seconds == 0
        with pytest.raises(ValueError, match="policy=recache=4"):
            again.start(order(prompt=None, snapshot=id)).change(THIRD, policy="recache=4")
        going.change(THIRD)
        chunks += taken(going, 1)
        assert torch.equal(going._points[-1].after().moment.latents, latents)  # type: ignore[misc]
        # The decoder's memory is rebuilt from the last latents: rounding apart.
        shown = pictures(going, chunks).astype(int)
        assert np.abs(shown - rest).max() <= 1
        # Two that go on from one snapshot are two sessions, and neither writes what the other has.
        other, another = (again.start(order(prompt=None, snapshot=id, seed=None)) for _ in range(2))
        assert other.id != another.id and not other.ticket().saved and not another.ticket().saved
        with pytest.raises(ValueError, match="snapshot: nothing was taken"):
            again.start(order()).snapshot()
    # The file is one that the pipeline goes on from, too.
    stream = streamed(pipe, 1, None, state=kept)
    assert np.abs(stream.astype(int) - rest[: len(stream)]).max() <= 1


def test_a_story_goes_on_as_planned(studio: Studio) -> None:
    story = f"{PROMPT}[0.5s] | [rebuild=1] {OTHER}[0.5s] | [cut] {THIRD}"
    session = studio.start(order(prompt=story, num_frames=41))
    taken(session, 1)
    id = session.snapshot()
    rest = pictures(session, taken(session, 4))
    going = studio.start(order(prompt=None, num_frames=32, snapshot=id, seed=None))
    assert np.abs(pictures(going, taken(going, 4)).astype(int) - rest).max() <= 1
    session.close()
    going.close()


def test_snapshots_of_itself(studio: Studio) -> None:
    assert studio._snapshots is not None
    before = len(studio._snapshots.sizes())
    session = studio.start(order(snapshot_every=1))
    known = set()
    for _ in range(5):
        known.add(taken(session, 1)[0].snapshot)
        saved_up(session)
    assert len(known) == 5 and len(studio._snapshots.sizes()) == before + 2  # a viewer may know the last but one
    state = studio._snapshots.load(session.ticket().saved[-1].id)
    assert state.prompt == PROMPT and state.chunk == 5
    session.close()


def test_the_disk_is_full(studio: Studio, limited: Any) -> None:
    assert studio._snapshots is not None
    session = studio.start(order(snapshot_every=2))
    taken(session, 1)
    before = sorted(path.name for path in studio._snapshots.folder.iterdir())
    with limited(1000):
        with pytest.raises(OSError, match="File too large"):
            session.snapshot()
        taken(session, 1)  # one that is saved of itself
        saved_up(session)
    assert sorted(path.name for path in studio._snapshots.folder.iterdir()) == before
    assert session.state == "running" and session.snapshot() and len(taken(session, 1)) == 1
    session.close()


@pytest.mark.parametrize("id", ["", "x", "../" + "0" * 29, "0" * 31, "0" * 33, "A" * 32, "0" * 32 + "\n", None, 7])
def test_ids_are_no_paths(tmp_path: Path, id: Any) -> None:
    folder = Snapshots(tmp_path, 3, 10**9)
    for method in (folder.load, folder.remove):
        with pytest.raises(ValueError, match="must be the id of one") as error:
            method(id)
        assert "\n" not in str(error.value)


def state_of(studio: Studio) -> Continuation:
    session = studio.start(order())
    taken(session, 1)
    state = studio._maker.state(session.video, session._points[-1])
    session.close()
    return state


class OfHundredBytes:
    """A state of which the file's size alone counts."""

    def save(self, path: Path, memory: str) -> None:
        path.write_bytes(bytes(100))


def test_their_number_is_bounded(studio: Studio, tmp_path: Path) -> None:
    state = state_of(studio)
    (tmp_path / f".{'0' * 32}.partial.safetensors").write_bytes(b"of a process that was killed")
    (tmp_path / "notes.safetensors").write_bytes(b"somebody's")
    with Snapshots.opened(tmp_path, 3, 10**9) as folder:
        ids = [folder.save(state, "a") for _ in range(5)]
        assert sorted(path.stem for path in tmp_path.glob("*.safetensors")) == sorted([*ids[2:], "notes"])
        with pytest.raises(ValueError, match="there is none of this id"):
            folder.load(ids[0])
        with pytest.raises(ValueError, match="in use by another"), Snapshots.opened(tmp_path, 3, 10**9):
            pass
    assert not list(tmp_path.glob(".*"))
    size = (tmp_path / f"{ids[-1]}.safetensors").stat().st_size
    folder = Snapshots(tmp_path, 9, 2 * size)
    last = [folder.save(state, session) for session in "abc"]
    assert sorted(path.stem for path in tmp_path.glob("*.safetensors")) == sorted([*last[1:], "notes"])
    assert Snapshots(tmp_path, 9, 1).save(state, "a")  # the newest stays, whatever its size
    damaged = tmp_path / f"{'1' * 32}.safetensors"
    damaged.write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match=r"^snapshot=1+: a PyTorch file, or another pickle") as error:
        Snapshots(tmp_path, 9, 10**9).load("1" * 32)
    assert str(tmp_path) not in str(error.value)


@pytest.mark.parametrize("bounds", [(12, 10**9), (10**9, 1200)])
def test_none_goes_for_a_session_that_has_more(tmp_path: Path, bounds: tuple[int, int]) -> None:
    folder, rng = Snapshots(tmp_path, *bounds, most_asked=5), random.Random(3)
    held: dict[str, tuple[str, bool]] = {}  # whose they are, the oldest first
    lost = Counter[str]()
    for moment in range(300):
        session, asked = rng.choice("aaaabbcd"), rng.random() < 0.7
        before = dict(held)
        held[folder.save(OfHundredBytes(), session, asked=asked)] = session, asked  # type: ignore[arg-type]
        *_, new = held
        os.utime(tmp_path / f"{new}.safetensors", ns=(moment, moment))  # as a clock would that is fine enough
        left = {path.stem for path in tmp_path.iterdir()}
        gone = [held.pop(id) for id in before if id not in left]
        assert new in left and len(left) <= 12 and len(gone) <= 1
        assert max(Counter(owner for owner in held.values() if owner[1]).values(), default=0) <= 5
        for owner, _ in gone:
            has = [one for one, _ in before.values()].count(owner)
            assert owner == session or has >= [one for one, _ in held.values()].count(session)
            own = [(id, known[1]) for id, known in before.items() if known[0] == owner]
            first = next((id for id, known in own if known), own[0][0])
            assert first not in left, "the oldest that was asked for goes first"
            lost[owner] += owner != session
    assert lost["a"] > 0 and len(left) == 12
    again = Snapshots(tmp_path, 4, 10**9)  # those of another process are one session's
    assert {path.stem for path in tmp_path.iterdir()} == set(list(held)[-4:])
    mine = again.save(OfHundredBytes(), "a")  # type: ignore[arg-type]
    for _ in range(3):
        again.save(OfHundredBytes(), "b", asked=False)  # type: ignore[arg-type]
    assert mine in {path.stem for path in tmp_path.iterdir()}


def test_another_network_is_refused(config: InferenceConfig, studio: Studio) -> None:
    assert studio._snapshots is not None
    state = state_of(studio)
    other = studio._snapshots.save(state._replace(marks=("0" * 64, state.marks[1])), "a")
    with pytest.raises(ValueError, match="snapshot: of another network"):
        studio.start(order(prompt=None, snapshot=other))
    with pytest.raises(ValueError, match="the snapshot's video has"):
        studio.start(order(prompt=None, snapshot=studio._snapshots.save(state, "a"), height=48))


KILLED = """
import sys, time
from pathlib import Path
from tests.pipelines.repository import shapes_config
from longsana.serving.studio import Studio
from tests.serving.viewing import order
config = shapes_config(**{"vae.decoder": "full", "vae.latents_per_call": 2, "sampling.chunk_frames": 2})
studio = Studio(config, snapshots=Path(sys.argv[1]))
session = studio.start(order(snapshot_every=1))
while True:
    print(session.take(None).snapshot, flush=True)
"""


@pytest.mark.slow
def test_a_studio_that_was_killed(config: InferenceConfig, studio: Studio, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    known = [process.stdout.readline().strip() for _ in range(6)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with Studio(config, snapshots=tmp_path) as again:
        assert again._snapshots is not None
        files = [path for path in tmp_path.iterdir() if path.suffix == ".safetensors"]
        assert 2 <= len(files) <= 3 and not list(tmp_path.glob(".*.partial*"))
        assert known[-1] in [path.stem for path in files]  # what a viewer knew last can be gone on from
        state = again._snapshots.load(max(files, key=lambda path: path.stat().st_mtime_ns).stem)
        going = again.start(order(prompt=None, seed=None, snapshot=files[0].stem))
        first = taken(going, 1)[0].generation_index
        taken(going, 1)
        session = studio.start(order())
        taken(session, first + 2)
        assert state.chunk and torch.equal(
            going._points[-1].after().moment.latents,  # type: ignore[misc]
            session._points[-1].after().moment.latents,  # type: ignore[misc]
        )
