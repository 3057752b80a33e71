"""`longsana serve`: what it refuses, and that clients go on after it was killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

from longsana.commands import serve
from longsana.config import InferenceConfig
from longsana.serving.client import LiveVideo, Piece, Refused
from longsana.serving.studio import Studio
from longsana.serving.values import Limits
from tests.forks import Fork, Forks, free_port
from tests.serving.server import Running
from tests.serving.test_media import decoded

BASE = "configs/sana_video_config/Sana_2000M_480px_AdamW_fsdp.yaml"
SMALL = ["sampling.height=32", "sampling.width=48", "sampling.chunk_frames=2", "sampling.first_chunk_frames=2"]
KEY = {"Authorization": "Bearer s3cret"}
PROMPT = "a small red circle moves slowly to the right on a black background"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", BASE], "makes whole clips"),
        (["--port", "70000"], "--port 70000: must be from 0 to 65535"),
        (["--host", "no.such.host.invalid"], "cannot listen there"),
        (["--origin", "example.org"], "--origin example.org: must be http://"),
        (["--origin", "https://example.org/page"], "no path"),
        (["--sessions", "0"], "--sessions 0: must be from 1"),
        (["--snapshot_every", "-2"], "--snapshot_every -2"),
        (["--work_dir", "/dev/null/x"], "choose another --work_dir"),
        (["--prot", "1"], "unknown option --prot"),
        (["--load", "0"], "--load 0.0: must be from 0.01"),
        (["--replicas", "0"], "--replicas 0: must be from 1"),
        (["--replicas", "3", "--most_replicas", "2"], "--most_replicas 2: must be from 3"),
        (["--replicas", "2", "--viewers_per_replica", "0"], "--viewers_per_replica 0: must be from 1"),
        (["--replicas", "2", "--cpus_per_replica", "-1"], "--cpus_per_replica -1.0: must be from 0"),
        (["--replicas", "2", "--snapshot_every", "0"], "--snapshot_every 0: with --replicas"),
        (["--ray", "auto"], "--ray: is of replicas; say how many: --replicas 2"),
        (["--gpus_per_replica", "1"], "--gpus_per_replica: is of replicas"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    given = arguments if "--work_dir" in arguments else [*arguments, "--work_dir", str(tmp_path)]
    assert serve.main(given) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


def test_a_port_in_use_and_a_missing_extra(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert serve.main(["--port", str(port), "--work_dir", str(tmp_path)]) == 2
        assert f"--port {port}: cannot listen there (Address already in use)" in capsys.readouterr().err
    monkeypatch.setitem(serve.NEEDED, "no_such_module", "no-such-package")
    assert serve.main(["--work_dir", str(tmp_path)]) == 2
    assert "needs no-such-package: pip install -e '.[serve]'" in capsys.readouterr().err
    monkeypatch.delitem(serve.NEEDED, "no_such_module")
    monkeypatch.setitem(serve.NEEDED_BY_A_FLEET, "no_such_module", "no-such-package")
    assert serve.main(["--replicas", "2", "--work_dir", str(tmp_path)]) == 2
    assert "no-such-package: pip install -e '.[serve,ray]'" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["ключ", "two words", "a\tb"])
def test_a_key_that_no_header_carries_is_refused(
    key: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(serve.API_KEY, key)
    assert serve.main(["--port", "0", "--work_dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{serve.API_KEY}: has characters that no header can carry" in error and key not in error


def test_only_loopback_is_local() -> None:
    local = ["127.0.0.1", "127.8.8.8", "::1", "localhost"]
    assert [serve.is_local(host) for host in [*local, "0.0.0.0", "::", "10.0.0.1", "example.org"]] == [True] * 4 + [
        False
    ] * 4


def test_forty_chunks_of_the_network_are_steered_through_the_socket(
    running: Callable[..., Running], config: InferenceConfig, tmp_path: Path
) -> None:
    studio = Studio(config, limits=Limits(load=100.0), snapshots=tmp_path / "snapshots")
    server = running(studio, serve.served_by(config, "small", studio.limits, 4))
    pieces: list[Piece] = []
    with LiveVideo(server.url, prompt=PROMPT, num_frames=None, extra_params={"pace_to_media_time": False}) as video:
        events, shown = {}, []
        for piece in video:
            pieces.append(piece)
            shown += piece.metadata["started_event_ids"]
            if len(pieces) in (5, 6, 20):
                events[video.change(f"a big blue square stays still on a gray background, {len(pieces)}")] = len(pieces)
            if len(pieces) == 12:
                with pytest.raises(Refused, match=r"^interaction\.event\.prompt: \[recache=9\] reaches back"):
                    video.change(f"[recache=9] {PROMPT}")
                with pytest.raises(Refused, match=r"^chunks=99: 4 chunks are kept"):
                    video.rewind(99)
                video.rewind(2)
            if len(pieces) == 15:
                fork = video.fork()
            if len(pieces) == 40:
                break
        assert shown == list(events)  # each once, in its order
        with LiveVideo(server.url, session_id=fork) as other:
            first = next(iter(other))
            assert first.metadata["pts_seconds"] == 0 and len(decoded(first.data)[0]) == first.metadata["num_frames"]
            other.stop()
    told = [piece.metadata for piece in pieces]
    times, _ = decoded(b"".join(piece.data for piece in pieces))
    assert [one["transport_chunk_index"] for one in told] == list(range(40))
    assert times == [count / 16 for count in range(sum(one["num_frames"] for one in told))]
    steps = [after["generation_chunk_index"] - one["generation_chunk_index"] for one, after in pairwise(told)]
    assert sorted(set(steps)) == [-1, 1] and steps.count(-1) == 1
    wrong = httpx.post(f"{server.url}/v1/videos", json={"prompt": PROMPT, "size": "48x33"}).json()["error"]
    assert wrong["param"] == "size" and wrong["message"].startswith("size: height=33: must be a multiple of 16")
    assert video.state is not None
    with pytest.raises(Refused, match=r"^width=64: the snapshot's video has 48; leave it out"):
        LiveVideo(server.url, state=video.state, width=64)
    with LiveVideo(server.url, state=video.state) as again:
        assert next(iter(again)).metadata["generation_chunk_index"] > 20


def up(forks: Forks, port: int, folder: Path) -> Fork:
    """A server that answers."""
    fork = forks.start(
        "serve",
        ["--port", port, "--work_dir", folder, "--snapshot_every", "1", "--threads", "1", *SMALL],
        LONGSANA_API_KEY="s3cret",
    )
    end = time.monotonic() + 60
    while True:
        with suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return fork
        assert fork.returncode is None and time.monotonic() < end, fork.output.read()
        time.sleep(0.05)


def test_clients_go_on_after_the_server_was_killed(forks: Forks, tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = up(forks, port, tmp_path)
    made = httpx.post(f"{url}/v1/videos/sync", json={"prompt": PROMPT, "num_frames": 9}, timeout=60, headers=KEY)
    assert len(decoded(made.content)[0]) == 9
    httpx.post(
        f"{url}/v1/videos", json={"prompt": PROMPT, "num_frames": 401}, headers=KEY
    )  # of which a part is written
    with LiveVideo(url, key="s3cret", prompt=PROMPT, num_frames=None) as video:
        last = -1
        for piece in video:
            last = piece.metadata["generation_chunk_index"]
            if video.state is not None and last > 2:
                break
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises((Refused, OSError)):
            for _ in video:
                pass
    assert server.wait() == -signal.SIGKILL
    server = up(forks, port, tmp_path)
    assert list((tmp_path / "videos").glob("*.mp4")) == list((tmp_path / "videos").glob(".*.mp4")) == []
    with LiveVideo(url, key="s3cret", session_id=video.session_id, state=video.state) as again:
        piece = next(iter(again))
        assert 0 < piece.metadata["generation_chunk_index"] <= last + 1 and len(decoded(piece.data)[0]) > 0
    server.terminate()
    with suppress(subprocess.TimeoutExpired):
        assert server.wait(60) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; sessions go on" in server.output.read()
