"""The WebSocket of a server, over a studio without a network: what passes over it, and faults of clients."""

from __future__ import annotations

import gc
import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from longsana.serving.client import LiveVideo, Refused
from longsana.serving.live import FORKS
from longsana.serving.values import Limits
from tests.serving.fake import FRAMES, FakeSession, FakeStudio, served
from tests.serving.server import Running
from tests.serving.test_media import decoded

Run = Callable[..., Running]
START = json.dumps({"type": "session.start", "prompt": "red", "num_frames": None})


def ending(client: ClientConnection, timeout: float = 10.0) -> tuple[list[dict[str, Any]], int | None]:
    """Texts of a connection until its end, and the code it was closed with."""
    said: list[dict[str, Any]] = []
    try:
        while True:
            message = client.recv(timeout)
            if isinstance(message, str):
                said.append(json.loads(message))
    except ConnectionClosed as error:
        return said, error.rcvd.code if error.rcvd else None


def until(found: Callable[[], Any], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end
        time.sleep(0.005)


def hue(data: bytes) -> str:
    """The colour of the last picture of an mp4."""
    red, green, blue = decoded(data)[1][-1][-1].reshape(-1, 3).mean(axis=0)
    return "red" if red > max(green, blue) + 50 else "green" if green > blue + 50 else "blue"


def test_a_video_is_steered_and_saved(running: Run, tmp_path: Path) -> None:
    server = running()
    with LiveVideo(server.url, prompt="red", num_frames=None, extra_params={"pacing_lead_seconds": 1}) as video:
        assert video.started["mime"].startswith('video/mp4; codecs="avc1.')
        assert video.started["config"] == {"width": 48, "height": 32, "fps": 16.0} and not video.started["resumed"]
        pieces = iter(video)
        seen = [next(pieces), next(pieces)]
        event = video.change("green", transition_chunks=0)
        while event not in seen[-1].metadata["started_event_ids"]:
            seen.append(next(pieces))
        assert seen[-1].metadata["completed_event_ids"] == [event]
        assert [piece.metadata["transport_chunk_index"] for piece in seen] == list(range(len(seen)))
        assert [piece.metadata["init"] for piece in seen] == [True] + [False] * (len(seen) - 1)
        assert all(piece.metadata["byte_length"] == len(piece.data) for piece in seen)
        times, _ = decoded(b"".join(piece.data for piece in seen))
        assert times == [count / 16 for count in range(FRAMES * len(seen))]
        assert hue(b"".join(piece.data for piece in seen[:-1])) == "red"
        assert hue(b"".join(piece.data for piece in seen)) == "green"
        video.rewind(2)
        video.ping()
        numbers = [seen[-1].metadata["generation_chunk_index"]]
        while numbers[-1] == numbers[0] + len(numbers) - 1:  # what was under way comes before
            numbers.append(next(pieces).metadata["generation_chunk_index"])
        assert numbers[-1] == numbers[-2] - 1
        with pytest.raises(Refused, match=r"^chunks=1000: .* are kept"):
            video.rewind(1000)
        video.stop()
        assert video.done is not None and video.done["stopped"]
    until(lambda: not server.studio.sessions)
    with LiveVideo(server.url, prompt="blue", num_frames=24) as video:
        assert video.save(tmp_path / "a.mp4") == 3 and video.done == {**video.done, "chunks": 3, "stopped": False}
    assert hue((tmp_path / "a.mp4").read_bytes()) == "blue"
    assert len(decoded((tmp_path / "a.mp4").read_bytes())[0]) == 24


def test_a_paused_session_waits_for_its_viewer(running: Run) -> None:
    server = running()
    with LiveVideo(server.url, prompt="red", num_frames=None) as video:
        next(iter(video))
        video.pause()
        while video._pieces:
            video._pieces.popleft()
        video.ping()  # whatever was under way has come
        count = server.studio.session(video.session_id).sent
        time.sleep(0.1)
        assert server.studio.session(video.session_id).sent == count
    until(lambda: not server.studio.session(video.session_id).callback)
    with LiveVideo(server.url, session_id=video.session_id) as again:  # as a page that is loaded again
        assert again.started["resumed"] and again.started["paused"]
        again.resume()
        piece = next(iter(again))
        assert piece.metadata["init"] and len(decoded(piece.data)[1]) == FRAMES
        assert piece.metadata["transport_chunk_index"] == count


def test_a_session_without_a_viewer_waits_and_then_ends(running: Run) -> None:
    server = running(linger=0.3)
    with LiveVideo(server.url, prompt="red", num_frames=None) as video:
        next(iter(video))
    until(lambda: server.studio.session(video.session_id).state == "paused")
    with LiveVideo(server.url, session_id=video.session_id) as again:
        assert not again.started["paused"]
        next(iter(again))
    until(lambda: not server.studio.sessions)
    with pytest.raises(Refused, match="no such session any more"):
        LiveVideo(server.url, session_id=video.session_id)


def test_the_second_writer_of_a_session_has_it(running: Run) -> None:
    server = running()
    with LiveVideo(server.url, prompt="red", num_frames=None) as first:
        pieces = iter(first)
        next(pieces)
        with LiveVideo(server.url, session_id=first.session_id) as second:
            with pytest.raises(Refused, match="another connection") as refused:
                for _ in pieces:
                    pass
            assert refused.value.code == "moved"
            second.change("green")
            for piece in second:
                if piece.metadata["started_event_ids"]:
                    break
            assert list(server.studio.sessions) == [first.session_id]


def test_a_fork_is_a_session_that_waits_for_its_socket(running: Run) -> None:
    server = running()
    with LiveVideo(server.url, prompt="red", num_frames=None) as video:
        next(iter(video))
        id = video.fork()
        with LiveVideo(server.url, session_id=id) as other:
            other.change("blue")
            data = b""
            for piece in other:
                data += piece.data
                if piece.metadata["started_event_ids"]:
                    break
            assert hue(data) == "blue" and decoded(data)[0][0] == 0
        assert hue(video._pieces[-1].data if video._pieces and video._pieces[-1].metadata["init"] else data) == "blue"


def test_forks_that_nobody_takes_are_few(running: Run) -> None:
    server = running()
    with LiveVideo(server.url, prompt="red", num_frames=None) as video:
        next(iter(video))
        first = [video.fork() for _ in range(FORKS)]
        with pytest.raises(Refused, match="forks wait for a connection of their own; take one first"):
            video.fork()
        assert len(server.studio.sessions) == 1 + FORKS
        with LiveVideo(server.url, session_id=first[0]) as other:
            next(iter(other))
            assert video.fork() not in first, "one was taken"


def test_who_leaves_the_queue_is_in_it_no_more(running: Run) -> None:
    server = running(FakeStudio(limits=Limits(sessions=1)))
    with LiveVideo(server.url, prompt="red", num_frames=None) as video:
        next(iter(video))
        with connect(server.socket) as waiting:
            waiting.send(START)
            assert json.loads(waiting.recv(10))["type"] == "session.queued"
        until(lambda: list(server.studio.sessions) == [video.session_id])


def test_snapshots_are_told_and_gone_on_from(running: Run) -> None:
    server = running()
    more = {"pacing_lead_seconds": 10}
    with LiveVideo(server.url, prompt="green", num_frames=None, extra_params=more) as video:
        pieces = iter(video)
        for _ in range(4):
            next(pieces)
        assert video.state is not None  # by itself, after each second chunk
        state = video.snapshot()
        assert state == video.snapshot() or state != video.snapshot()
        video.stop()
    with LiveVideo(server.url, state=state) as again:
        piece = next(iter(again))
        assert hue(piece.data) == "green" and piece.metadata["generation_chunk_index"] >= 4
    with pytest.raises(Refused, match=r"^extra_params.continuation_state.payload.blob_id=0+: there is no such one"):
        LiveVideo(server.url, state={"kind": "longsana.v1", "payload": {"schema_version": 1, "blob_id": "0" * 32}})


def test_a_full_disk_of_snapshots_is_said_and_the_session_goes_on(running: Run) -> None:
    server = running()
    server.studio.disk = OSError(28, "No space left on device", "/secret/path")
    with LiveVideo(server.url, prompt="red", num_frames=None) as video:
        next(iter(video))
        with pytest.raises(Refused, match="disk is full") as refused:
            video.snapshot()
        assert "/secret" not in str(refused.value) and refused.value.code == "disk"
        video.change("green")
        next(iter(video))


def test_who_finds_no_place_waits_and_hears_which(running: Run) -> None:
    server = running(FakeStudio(Limits(sessions=1, queue=1)))
    with LiveVideo(server.url, prompt="red", num_frames=None) as video:
        with connect(server.socket) as waiting:
            waiting.send(START)
            queued = json.loads(waiting.recv(5))
            assert (queued["type"], queued["position"], queued["queue_depth"]) == ("session.queued", 1, 1)
            with connect(server.socket) as third:
                third.send(START)
                said, code = ending(third)
                assert said[0]["code"] == "no_capacity" and code == 1013
            video.stop()
            assert json.loads(waiting.recv(5))["type"] == "video.start"


def test_a_session_that_fails_ends_no_other(running: Run) -> None:
    server = running()
    with LiveVideo(server.url, prompt="red", num_frames=None) as video:
        with connect(server.socket) as bad:
            bad.send(START.replace("red", "fail"))
            said, code = ending(bad)
            assert said[-1]["message"] == "made to fail" and said[-1]["code"] == "failed" and code == 1011
        video.change("green")
        next(iter(video))


@pytest.mark.parametrize("rubbish", ["", "{", "[]", '{"type":1}', b"\x00\xff", '{"type":"session.stop"}', "\ud7ff" * 9])
def test_rubbish_at_first_is_an_error_and_the_end(running: Run, rubbish: str | bytes) -> None:
    with connect(running().socket) as client:
        client.send(rubbish)
        said, code = ending(client)
        assert [message["type"] for message in said] == ["error"] and code == 1008


def test_rubbish_later_is_an_error_and_not_the_end(running: Run) -> None:
    server = running()
    with LiveVideo(server.url, prompt="red", num_frames=None) as video:
        for rubbish in ("{", b"\x00", '{"type":"no"}', '{"type":"session.rewind"}', "x" * (200 << 10)):
            video._socket.send(rubbish)
            with pytest.raises(Refused):
                video._until("session.pong")
        video.ping()


@pytest.mark.parametrize(
    "wrong",
    [
        {"transition_chunks": -1},
        {"event": {"prompt": "x" * 20_001}},
        {"event": 3},
        {"event": {"prompt": "a", "policy": 1}},
    ],
)
def test_an_error_of_a_change_has_its_event_id(running: Run, wrong: dict[str, Any]) -> None:
    with connect(running().socket) as client:
        client.send(START)
        change = {"event": {"prompt": "green"}, "event_id": "p3", **wrong}
        client.send(json.dumps({"type": "session.interaction", "interaction": change}))
        while isinstance(said := client.recv(10), bytes) or json.loads(said)["type"] != "error":
            pass
        assert json.loads(said)["event_id"] == "p3" and json.loads(said)["code"] == "invalid_request"


def test_ten_megabytes_end_the_connection_unread(running: Run) -> None:
    server = running()
    with connect(server.socket) as client:
        with suppress(ConnectionClosed):
            client.send("x" * (10 << 20))
        _, code = ending(client)
        assert code in (1009, None)
    with LiveVideo(server.url, prompt="red", num_frames=8) as video:
        assert len(list(video)) == 1


def test_half_a_message_and_silence(running: Run) -> None:
    server = running(start_within=0.2)
    with connect(server.socket) as client:
        said, code = ending(client)
        assert said[0]["code"] == "timeout" and code == 1008
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
        raw.sendall(f"GET /v1/realtime/video HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
                    f"Connection: Upgrade\r\n{key}\r\n".encode())  # fmt: skip
        assert b"101" in raw.recv(1000)
        raw.sendall(b"\x81\xfe\x10\x00abcd" + b"half")  # of a text of 4096 bytes
        raw.settimeout(10)
        said = b""
        while b"\x88" not in said:  # until the server closes it
            said += raw.recv(4096)
        assert b'"timeout"' in said
    assert not server.studio.sessions


def test_a_silent_viewer_of_a_paused_session_is_given_up(running: Run) -> None:
    server = running(stall=0.3, linger=0.1)
    with connect(server.socket) as client:
        client.send(START)
        client.send('{"type":"session.pause"}')
        said, code = ending(client)
        assert said[-1]["code"] == "stalled" and code == 1008
    until(lambda: not server.studio.sessions)


def test_a_viewer_whose_chunk_takes_long_is_not_given_up(running: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server owes it, and nothing is owed by who waits."""
    take, ready = FakeSession.take, time.monotonic() + 0.8
    late = lambda session, timeout=0.0: take(session, timeout) if time.monotonic() > ready else None  # noqa: E731
    monkeypatch.setattr(FakeSession, "take", late)
    with connect(running(stall=0.2, linger=0.1).socket) as client:
        client.send(START)
        while not isinstance(said := client.recv(10), bytes):
            assert json.loads(said)["type"] != "error"
    assert time.monotonic() > ready


def test_a_slow_reader_costs_one_chunk_and_is_given_up(running: Run) -> None:
    studio = FakeStudio(padding=(1 << 20) // 8)
    server = running(studio, stall=1.0, linger=0.1)
    with connect(server.socket, max_queue=1, compression=None, close_timeout=0.1) as client:
        client.send(START.replace("}", ',"extra_params":{"pacing_lead_seconds":10}}').replace("null", "8000"))
        until(lambda: studio.sessions)
        session = next(iter(studio.sessions.values()))
        session.order = type(session.order)("red", num_frames=8000, pace=False)
        with LiveVideo(server.url, prompt="red", num_frames=None) as other:
            assert next(iter(other))  # nobody else waits for him
        until(lambda: not studio.sessions)
        assert session.sent < 20  # of 1 MiB each: what the system's buffers take, and one


def storm(server: Running, seconds: float) -> int:
    """Connect and go away 50 times a second, at each stage of a session; returns how often."""
    end, count = time.monotonic() + seconds, 0
    own = logging.Logger("clients", logging.CRITICAL)  # one whose socket is taken from it may complain, of itself
    while time.monotonic() < end:
        began = time.monotonic()
        with connect(server.socket, compression=None, logger=own) as client:
            if count % 4:
                client.send(START)
            if count % 4 > 1:
                client.recv(5)
            if count % 4 == 3:
                client.socket.shutdown(socket.SHUT_RDWR)  # without a word
        count += 1
        time.sleep(max(0.0, began + 0.02 - time.monotonic()))
    return count


@pytest.mark.parametrize("seconds", [1.0, pytest.param(20.0, marks=pytest.mark.slow)])
def test_a_storm_of_connections_leaves_nothing(running: Run, seconds: float, caplog: pytest.LogCaptureFixture) -> None:
    server = running(linger=0.05)
    threads = threading.active_count()
    assert storm(server, seconds) > 15 * seconds
    until(lambda: not server.studio.sessions)
    assert server.studio.most < 40 and threading.active_count() <= threads + 8
    with LiveVideo(server.url, prompt="red", num_frames=8) as video:
        assert len(list(video)) == 1
    gc.collect()
    assert caplog.messages == []  # nor is a log filled


def test_a_defect_ends_its_own_session(running: Run, caplog: pytest.LogCaptureFixture) -> None:
    server = running()
    with LiveVideo(server.url, prompt="red", num_frames=None) as video:
        with connect(server.socket) as bad:
            bad.send(START.replace("red", "break"))
            said, code = ending(bad)
            assert said[-1]["message"] == "an error of the server ended this video" and code == 1011
        video.change("green")
        next(iter(video))
    assert "ZeroDivisionError" in caplog.text


def test_pages_of_others_and_wrong_keys_stay_out_and_hear_why(running: Run, caplog: pytest.LogCaptureFixture) -> None:
    server = running(key="s3cret", origins=("https://studio.example",))
    bearer = {"Authorization": "Bearer s3cret"}

    def refusal(url: str = server.socket, **more: Any) -> tuple[list[dict[str, Any]], int, str]:
        with connect(url, sock=socket.create_connection(("127.0.0.1", server.port)), **more) as client:
            said, _ = ending(client)
            return said, client.close_code or 0, client.close_reason or ""

    assert refusal() == ([], 1008, "the API key is missing or wrong")
    assert refusal(subprotocols=["longsana", "longsana.key.eA"]) == refusal()  # as a page says it
    led = server.socket.replace("127.0.0.1", "evil.example")  # by somebody's DNS
    for origin, url, why in [
        ("http://evil.example", server.socket, "pages of other servers"),
        ("null", server.socket, "pages of other servers"),
        ("http://evil.example", led, "go by that name"),
    ]:
        said, code, reason = refusal(url, origin=origin, additional_headers=bearer)
        assert (said, code) == ([], 1008) and why in reason
    for origin in (f"http://127.0.0.1:{server.port}", "https://studio.example"):
        with connect(server.socket, origin=origin, additional_headers=bearer) as client:
            client.send(START)
            assert json.loads(client.recv(10))["type"] == "video.start"
    with connect(server.socket, subprotocols=["longsana", "longsana.key.czNjcmV0"]) as client:
        assert client.subprotocol == "longsana"
        client.send(START)
        assert json.loads(client.recv(10))["type"] == "video.start"
    with pytest.raises(Refused, match=r"^the server refuses: the API key is missing or wrong$"):
        LiveVideo(server.url, key="wrong", prompt="red")
    with LiveVideo(server.url, key="s3cret", prompt="red", num_frames=8) as video:
        assert len(list(video)) == 1
    assert caplog.messages == []


def test_the_client_says_in_words_why_a_connection_is_none(running: Run) -> None:
    server = running()
    for url in (
        f"127.0.0.1:{server.port}",
        "localhost",
        "",
        "http://",
        "http://[::1",
        "http://a:99999",
        "ftp://a",
        "http://a@b",
    ):
        with pytest.raises(Refused) as refused:
            LiveVideo(url, prompt="red", timeout=5)
        assert str(refused.value) == f"url={url}: must be a server's, such as http://127.0.0.1:8000"
    with pytest.raises(Refused, match=r"^the server refuses: there is no WebSocket at this path"):
        LiveVideo(f"{server.url}/v1", prompt="red")
    with LiveVideo(server.url, prompt="red", num_frames=8) as video:
        assert len(list(video)) == 1
        for late in (lambda: video.change("green"), video.pause, video.snapshot, lambda: video.rewind(1)):
            with pytest.raises(Refused, match=r"^the video has ended; begin another$"):
                late()
        video.stop()
        assert video.done is not None
    with LiveVideo(server.url, prompt="red", num_frames=None) as video:
        next(iter(video))
        server.server.should_exit = True
        with pytest.raises(Refused, match=r"^the server was stopped; "):
            for _ in video:
                pass


def test_a_chunk_comes_after_the_answer_to_what_it_shows(running: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    change = FakeSession.change

    def slowly(session: FakeSession, *told: Any) -> str:
        id = change(session, *told)
        time.sleep(0.05)  # the next chunk is there before whoever asked goes on
        return id

    monkeypatch.setattr(FakeSession, "change", slowly)
    server = running()
    with LiveVideo(server.url, prompt="red", num_frames=None, extra_params={"pacing_lead_seconds": 10}) as video:
        for number in range(4):
            video._send({"type": "session.interaction", "interaction": {"event": {"prompt": f"green {number}"}}})
            queued, shown = "", False
            while not shown:
                message = video._receive()
                queued = queued or message.get("event_id", "")
                shown = bool(message.get("started_event_ids"))
                assert not shown or message["started_event_ids"] == [queued]


def test_twenty_sessions(running: Run) -> None:
    server = running(FakeStudio(Limits(sessions=20)), served(Limits(sessions=20)))
    videos = [LiveVideo(server.url, prompt="red", num_frames=16) for _ in range(20)]
    for video in videos:
        assert len(list(video)) == 2
        video.close()
    until(lambda: not server.studio.sessions)
