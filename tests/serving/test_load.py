"""Viewers that measure a server: their figures obey laws, and everyone of them is counted."""

from __future__ import annotations

import json
import math
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from websockets.sync.server import ServerConnection, serve

from longsana.commands import load as command
from longsana.runtime.errors import InputError
from longsana.serving.guard import API_KEY
from longsana.serving.load import Load, draw_changes, measure, read_metrics, spread, table
from longsana.serving.load_plot import STALL, buffer, draw, stalls
from longsana.serving.values import Limits, Order
from tests.serving.fake import FPS, FRAMES, FakeSession, FakeStudio, Point
from tests.serving.server import Running
from tests.serving.test_live import until
from tests.test_architecture import ROOT

Run = Callable[..., Running]
CHUNK = FRAMES / FPS
QUICK = Load("", viewers=1, seconds=2.0, changes_per_minute=0, spacing=0.05, prompts=("red", "green", "blue"), lead=1.0)


class LateSession(FakeSession):
    """Whose chunks come so many seconds after the viewer has run dry, by number; others as they are due."""

    late: Mapping[int, float] = {}

    @property
    def due(self) -> float | None:
        usual = super().due
        if usual is None or self.zero is None or self.sent not in self.late:
            return usual
        stood = sum(seconds for number, seconds in self.late.items() if number <= self.sent)
        return max(0.0, self.zero + self.frames / self.fps + stood - time.monotonic())


class LateStudio(FakeStudio):
    def __init__(self, late: Mapping[int, float]) -> None:
        super().__init__()
        self.late = late

    def start(self, order: Order) -> FakeSession:
        session = LateSession(self, order, Point(order.prompt or "", 0))
        session.late = self.late
        return self.add(session)


def loaded(server: Running, key: str | None = None, **changes: Any) -> dict[str, Any]:
    """Measure, and check what holds of any report."""
    load = replace(QUICK, url=server.url, **changes)
    report = measure(load, key)
    assert json.loads(json.dumps(report, allow_nan=False)) == {
        **report,
        "settings": {**report["settings"], "prompts": list(load.prompts)},
    }
    everyone, viewers = report["all"], report["viewers"]
    assert [viewer["viewer"] for viewer in viewers] == list(range(load.viewers))
    outcomes = [viewer["outcome"] for viewer in viewers]
    assert {name: everyone[name] for name in ("watched", "waited", "refused", "failed")} == {
        name: outcomes.count(name) for name in ("watched", "waited", "refused", "failed")
    }
    for name in ("chunks", "bytes", "underruns", "stall_seconds"):
        assert math.isclose(everyone[name], sum(viewer[name] for viewer in viewers)), name
    for viewer in viewers:
        assert len(viewer["shown"]) == viewer["chunks"]
        assert viewer["inter_arrival_seconds"]["count"] == max(0, viewer["chunks"] - 1)
        for name in ("making", "coding", "coming"):
            assert viewer[f"{name}_seconds"]["count"] == viewer["chunks"]
            assert all(0 <= one[name] <= one["at"] for one in viewer["shown"])
        changes_of = viewer["changes"]
        assert changes_of["asked"] == len(viewer["asked"]) == sum(changes_of.values()) - changes_of["asked"]
        assert changes_of["seen"] == viewer["change_seconds"]["count"]
        stood = stalls(viewer)
        assert len(stood) == viewer["underruns"]
        assert math.isclose(sum(end - start for start, end in stood), viewer["stall_seconds"], abs_tol=1e-6)
        for (at, ahead), (then, left) in pairwise(buffer(viewer)):  # it rises at once, and falls with the clock
            assert then >= at - 1e-9 and left >= -1e-9
            assert then - at < 1e-9 or math.isclose(ahead - left, min(ahead, then - at), abs_tol=1e-6)
    marks = [one for one in ElementTree.fromstring(draw(report)).iter() if one.get("fill") == STALL]
    assert len(marks) == 1 + sum(len(stalls(viewer)) for viewer in viewers)  # one is the legend's
    assert len(table(report).splitlines()) == load.viewers + 2
    return report


def test_a_server_that_sends_in_time_gives_no_underruns(running: Run) -> None:
    server = running()
    report = loaded(server, viewers=3, seconds=2.0, changes_per_minute=60, seed=3)
    everyone = report["all"]
    assert everyone["watched"] == 3 and everyone["underruns"] == everyone["stall_seconds"] == 0
    assert everyone["in_time_share"] == 1 and everyone["changes"]["refused"] == 0
    for number, viewer in enumerate(report["viewers"]):
        shown = viewer["shown"]
        assert [one["pts"] for one in shown] == [CHUNK * place for place in range(len(shown))]
        assert max(one["ahead"] for one in shown) <= 1.0 + CHUNK + 0.1  # the lead, and the chunk that has just come
        planned = draw_changes(replace(QUICK, viewers=3, seconds=2.0, changes_per_minute=60, seed=3), number)
        asked = viewer["asked"]
        assert [one["prompt"] for one in asked] == [change.prompt for change in planned][: len(asked)]
        # A change comes with a chunk that leaves after it, so that its first picture is a lead away at least.
        assert all(one["seconds"] > 1.0 - 0.05 for one in asked if one["outcome"] == "seen")
    assert everyone["changes"]["seen"] > 0
    metrics = report["server"]["metrics"]
    assert abs(metrics["longsana_chunks_sent_total"] - everyone["chunks"]) <= 3
    assert report["server"]["models"]["data"][0]["id"] == "fake"
    until(lambda: not server.studio.sessions)  # nobody is left behind


def test_late_chunks_are_stalls_of_their_sum(running: Run) -> None:
    late = {1: 0.3, 2: 0.4, 4: 0.3}
    report = loaded(running(LateStudio(late)), seconds=3.3)
    viewer = report["viewers"][0]
    assert viewer["outcome"] == "watched" and viewer["chunks"] > 5
    assert viewer["underruns"] == len(late)
    assert sum(late.values()) - 0.15 < viewer["stall_seconds"] < sum(late.values()) + 0.5
    assert [place for place, one in enumerate(viewer["shown"]) if one["late"] > 0.1] == list(late)
    assert math.isclose(viewer["in_time_share"], 1 - len(late) / (viewer["chunks"] - 1))


def test_a_chunk_that_never_comes_is_a_stall_until_the_end(running: Run) -> None:
    viewer = loaded(running(LateStudio({1: 1e6})), seconds=1.5)["viewers"][0]
    dry = viewer["shown"][0]["at"] + CHUNK
    assert viewer["chunks"] == viewer["underruns"] == 1
    assert math.isclose(viewer["stall_seconds"], viewer["ended_at"] - dry, abs_tol=1e-6)
    assert viewer["stall_seconds"] > 0.8


def test_who_waits_or_is_refused_is_counted(running: Run) -> None:
    server = running(FakeStudio(Limits(sessions=1, queue=1, most_events=0)))
    report = loaded(server, viewers=3, seconds=1.0, spacing=0.2, changes_per_minute=300)
    first, second, third = report["viewers"]
    assert [one["outcome"] for one in (first, second, third)] == ["watched", "waited", "refused"]
    assert first["changes"]["refused"] == first["changes"]["asked"] > 0  # and goes on
    assert [one["position"] for one in second["queue_positions"]] == [1] and second["most_queue_position"] == 1
    assert third["code"] == "no_capacity" and "try again later" in third["error"]


def test_a_video_that_fails_is_counted_and_others_go_on(running: Run) -> None:
    report = loaded(running(), viewers=2, seconds=1.0, prompts=("red", "fail"))
    assert [one["outcome"] for one in report["viewers"]] == ["watched", "failed"]
    assert report["viewers"][1]["error"] == "made to fail" and report["viewers"][1]["code"] == "failed"


@pytest.mark.parametrize(
    ("says", "code"),
    [
        ([], "lost"),
        (['{"type": "video.start", "session_id": "1", "config": {}}'], "lost"),
        (['{"type": "video.chunk_metadata"}', b""], "unreadable"),
        (["none"], "unreadable"),
        (["[]"], "unreadable"),
    ],
)
def test_a_server_that_breaks_off_or_talks_nonsense_is_a_failure(says: list[str | bytes], code: str) -> None:
    def answer(connection: ServerConnection) -> None:
        connection.recv()
        for message in says:
            connection.send(message)
        connection.socket.shutdown(socket.SHUT_RDWR)

    with serve(answer, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        report = measure(replace(QUICK, url=f"http://127.0.0.1:{server.socket.getsockname()[1]}", seconds=5.0))
        server.shutdown()
        thread.join(10)
    viewer = report["viewers"][0]
    assert (viewer["outcome"], viewer["code"]) == ("failed", code) and viewer["error"]
    assert report["seconds"] < 4 and report["server"]["error"]  # it does not wait for who is not there


def test_the_same_seed_draws_the_same_changes() -> None:
    load = replace(QUICK, viewers=2, seconds=36_000, changes_per_minute=2.0)
    first = draw_changes(load, 0)
    assert first == draw_changes(load, 0) != draw_changes(load, 1)
    assert first != draw_changes(replace(load, seed=1), 0)
    assert abs(len(first) - 1200) < 4 * math.sqrt(1200)
    assert all(one.at < after.at and one.prompt != after.prompt for one, after in pairwise(first))
    assert first[0].prompt != load.prompts[0] and first[-1].at <= load.stay(0)
    gaps = np.diff([change.at for change in first])
    assert abs(gaps.std() / gaps.mean() - 1) < 0.1  # as of moments that know nothing of each other
    assert draw_changes(QUICK, 0) == []
    with pytest.raises(InputError, match="two prompts that differ"):
        replace(load, prompts=("red", "red"))


def test_percentiles_are_numpys() -> None:
    values = np.random.default_rng(0).exponential(size=37)
    for some in (values, values[:1], values[:2]):
        found = spread(some.tolist())
        for name, share in {"p50": 50, "p95": 95, "p99": 99, "most": 100}.items():
            assert found[name] == pytest.approx(np.percentile(some, share)), name
    assert spread([]) == {"count": 0, "p50": None, "p95": None, "p99": None, "most": None}


def test_metrics_are_read_with_their_labels() -> None:
    text = '# HELP a_b text of 3\na_b{c="d e",le="+Inf"} 3.0\na_b_total 1e-05\n\n'
    assert read_metrics(text) == {'a_b{c="d e",le="+Inf"}': 3.0, "a_b_total": 1e-05}


def test_the_command_writes_a_report_and_a_plot(
    running: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, out, prompts = running(key="s3cret"), tmp_path / "new" / "load.json", tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\na blue square\n")
    arguments = [server.url, "--viewers", "2", "--seconds", "1", "--spacing", "0.1", "--txt_file", str(prompts)]
    arguments += ["--size", "64x48", "--lead", "0.5", "--seed", "7", "--out", str(out)]
    monkeypatch.delenv(API_KEY, raising=False)
    assert command.main(arguments) == 1
    assert f"nobody watched {server.url}" in capsys.readouterr().err
    report = json.loads(out.read_text())
    assert report["all"]["refused"] == 2 and "401" in report["server"]["error"]
    monkeypatch.setenv(API_KEY, "s3cret")
    assert command.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "2 of 2 watched" in shown
    report = json.loads(out.read_text())
    assert report["settings"]["prompts"] == ["a red circle", "a blue square"]
    assert [one["config"]["width"] for one in report["viewers"]] == [64, 64]
    assert "s3cret" not in out.read_text() + shown
    ElementTree.parse(out.with_suffix(".svg"))
    assert sorted(path.name for path in out.parent.iterdir()) == ["load.json", "load.svg"]


def test_nobody_answers(tmp_path: Path) -> None:
    """In a process of its own, which needs no torch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"  # bound, and not listening
        arguments = ["load", url, "--viewers", "2", "--seconds", "1", "--out", str(tmp_path / "load.json")]
        code = f"import sys\nsys.argv[1:] = {arguments!r}\nfrom longsana.commands import main\nstatus = main()\n"
        code += "assert not {'torch', 'numpy', 'diffusers', 'fastapi'} & set(sys.modules)\nsys.exit(status)"
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1, run.stderr
    assert "nobody watched" in run.stderr and "Traceback" not in run.stderr
    report = json.loads((tmp_path / "load.json").read_text())
    assert report["all"]["failed"] == 2 and report["server"]["models"] is None and report["seconds"] < 10


def test_a_signal_ends_it_and_nothing_is_written(running: Run, tmp_path: Path) -> None:
    server = running()
    program = [sys.executable, "-c", "import sys\nfrom longsana.commands import main\nsys.exit(main())"]
    arguments = ["load", server.url, "--seconds", "60", "--out", str(tmp_path / "load.json")]
    with subprocess.Popen([*program, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: server.studio.sessions, 30)
        process.terminate()
        _, error = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM, error
    assert error.splitlines()[-1] == "stopped by SIGTERM; nothing is written"
    assert list(tmp_path.glob("load.*")) == []
    until(lambda: not server.studio.sessions)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["127.0.0.1:8000"], "must be http://HOST:PORT"),
        (["http://a/?x=1"], "must be http://HOST:PORT"),
        (["http://[::1"], "must be http://HOST:PORT"),
        (["http://a:99999"], "must be http://HOST:PORT"),
        (["http://user:secret@a"], "must be http://HOST:PORT"),
        (["http://a", "--out", "{folder}/a.json"], "a.json is a folder"),
        (["http://a", "--out", "{folder}/b.json"], "b.svg is a folder"),
        (["http://a", "--viewers", "0"], "--viewers 0: must be from 1 to 1000"),
        (["http://a", "--seconds", "0.5"], "--seconds 0.5: must be from 1"),
        (["http://a", "--lead", "nan"], "nan: must be a number"),
        (["http://a", "--size", "832"], "--size 832: must be WIDTHxHEIGHT"),
        (["http://a", "--out", "load.svg"], "--out load.svg: must end in .json"),
        (["http://a", "--out", "/dev/null/load.json"], "choose another --out"),
        (["http://a", "--txt_file", "no_such.txt"], "no_such.txt"),
        (["http://a", "--no_such", "1"], "--no_such"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.json", "b.svg"):
        (tmp_path / name).mkdir()
    assert command.main([word.replace("{folder}", str(tmp_path)) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("one.txt", "red\n", "two prompts that differ"),
        ("story.txt", "red\na harbour[5s] | a lighthouse\n", "line 2: a story"),
        ("seed.jsonl", '{"prompt": "red", "seed": 3}\n', "line 1: seed, length and size"),
    ],
)
def test_prompts_that_a_live_session_cannot_be_told(
    name: str, text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(text)
    assert command.main(["http://a", "--txt_file", str(tmp_path / name), "--out", str(tmp_path / "load.json")]) == 2
    assert said in capsys.readouterr().err
