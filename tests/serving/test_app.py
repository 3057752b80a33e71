"""HTTP of a server: videos, the openai client, models, measurements, who is let in and how much is read."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from longsana.serving import guard
from longsana.serving.client import LiveVideo
from longsana.serving.jobs import Jobs
from longsana.serving.values import Limits, Order
from tests.serving.fake import FakeStudio, folder_of, served
from tests.serving.server import Running
from tests.serving.test_live import hue, until
from tests.serving.test_media import decoded
from tests.serving.test_protocol import data_url, png

Run = Callable[..., Running]
PAGE = Path(__file__).parents[2] / "longsana/serving/page.html"


def finished(client: httpx.Client, video: dict[str, Any]) -> dict[str, Any]:
    end = time.monotonic() + 20
    while video["status"] in ("queued", "in_progress"):
        assert time.monotonic() < end
        time.sleep(0.01)
        video = client.get(f"/v1/videos/{video['id']}").json()
    return video


def test_a_video_is_made_shown_listed_and_deleted(running: Run) -> None:
    server = running()
    with httpx.Client(base_url=server.url) as client:
        made = client.post("/v1/videos", json={"prompt": "green", "seconds": "1", "size": "64x48", "seed": 3}).json()
        assert re.fullmatch(r"video_[0-9a-f]{32}", made["id"]) and made["object"] == "video"
        assert (made["size"], made["seconds"], made["model"]) == ("64x48", "1.062", "fake")
        video = finished(client, made)
        assert video["status"] == "completed" and video["progress"] == 100 and video["expires_at"] > video["created_at"]
        content = client.get(f"/v1/videos/{made['id']}/content")
        assert content.headers["content-type"] == "video/mp4" and hue(content.content) == "green"
        assert decoded(content.content)[1].shape[1:] == (48, 64, 3)
        assert folder_of(server.folder) == [f"{made['id']}.mp4"]
        other = client.post("/v1/videos", data={"prompt": "red", "num_frames": "9"}, files={"a": b""}).json()
        listed = client.get("/v1/videos", params={"limit": 1}).json()
        assert [one["id"] for one in listed["data"]] == [other["id"]] and listed["has_more"]
        rest = client.get("/v1/videos", params={"after": listed["last_id"]}).json()
        assert [one["id"] for one in rest["data"]] == [made["id"]] and not rest["has_more"]
        assert client.delete(f"/v1/videos/{made['id']}").json() == {
            "id": made["id"], "object": "video.deleted", "deleted": True
        }  # fmt: skip
        assert client.get(f"/v1/videos/{made['id']}").status_code == 404
        assert client.get(f"/v1/videos/{made['id']}/content").status_code == 404
        finished(client, other)
        assert folder_of(server.folder) == [f"{other['id']}.mp4"]
        sync = client.post("/v1/videos/sync", data={"prompt": "blue"}, files={"input_reference": ("a.png", png())})
        assert sync.headers["content-type"] == "video/mp4" and hue(sync.content) == "blue"
        until(lambda: folder_of(server.folder) == [f"{other['id']}.mp4"])
    assert not server.studio.sessions


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": "a", "sampling_params": {"size": "33x33"}}, "sampling_params.size"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a", "size": "9999x9999"}, "size"),
        ({"prompt": "a", "model": "sora-2"}, "model"),
        ({"prompt": "a", "height": 33}, "height"),
        ({"prompt": "a", "input_reference": {"image_url": "http://127.0.0.1/a.png"}}, "input_reference"),
        ({"prompt": "a<image>/etc/passwd"}, "prompt"),
    ],
)
def test_what_cannot_be_made_is_said_at_once(running: Run, body: dict[str, Any], field: str) -> None:
    server = running()
    answer = httpx.post(f"{server.url}/v1/videos", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error" and error["param"] == field
    assert folder_of(server.folder) == [] and not server.studio.sessions


def test_that_is_said_at_once_too_where_others_wait(running: Run) -> None:
    server = running(jobs={"most": 2})
    with httpx.Client(base_url=server.url) as client:
        done = finished(client, client.post("/v1/videos", json={"prompt": "red", "num_frames": 8}).json())
        for _ in range(9):  # none takes the place of the one that is finished
            assert client.post("/v1/videos", json={"prompt": "a", "height": 33}).status_code == 400
        endless = {"prompt": "red", "num_frames": 50_000}
        waiting = [client.post("/v1/videos", json=endless).json()["id"] for _ in range(2)]
        assert client.get(f"/v1/videos/{done['id']}").status_code == 404
        wrong = client.post("/v1/videos", json={"prompt": "a", "size": "48x33"})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "size")
        assert client.post("/v1/videos", json={"prompt": "a"}).status_code == 503
        for id in waiting:
            client.delete(f"/v1/videos/{id}")
    until(lambda: not server.studio.sessions)


def test_a_query_that_is_none_is_one_line(running: Run) -> None:
    server = running()
    for name, value in {"limit": "abc", "order": "up"}.items():
        answer = httpx.get(f"{server.url}/v1/videos", params={name: value})
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["param"] == name and error["message"].startswith(f"{name}: ")


def test_a_picture_may_be_a_field_of_a_form(running: Run) -> None:
    form = {"prompt": "red", "input_reference[image_url]": data_url(png())}
    answer = httpx.post(f"{running().url}/v1/videos", files={name: (None, value) for name, value in form.items()})
    assert answer.status_code == 200, answer.text


def test_bodies_that_are_none_or_too_long(running: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MOST_BODY", 100_000)
    url = running().url + "/v1/videos"

    def status(**more: Any) -> int:
        return httpx.post(url, **more).status_code

    assert status(content=b"{", headers={"content-type": "application/json"}) == 400
    assert status(content=b"[" * 50_000, headers={"content-type": "application/json"}) == 400
    assert status(content=b"x", headers={"content-type": "text/plain"}) == 400
    assert status(content=b"x", headers={"content-type": "multipart/form-data; boundary=a"}) == 400
    assert status(data={f"f{n}": "x" for n in range(100)}, files={"a": b"x"}) == 400
    assert status(content=b"x" * 200_000) == 413

    def pieces() -> Any:  # whose length no header says
        for _ in range(100):
            yield b"x" * 10_000

    assert status(content=pieces(), headers={"content-type": "application/json"}) == 413


def test_rubbish_fills_no_log(running: Run, caplog: pytest.LogCaptureFixture) -> None:
    server = running()
    form = {"content-type": "multipart/form-data; boundary=--a"}
    assert httpx.post(f"{server.url}/v1/videos", content=b"--abc\r\n\r\nx", headers=form).status_code == 400
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        raw.sendall(b"no request\r\n\r\n")
        assert b"400 Bad Request" in raw.recv(1000)
    assert caplog.messages == []


def test_files_are_few_and_go(tmp_path: Path) -> None:
    studio, order = FakeStudio(), Order("red", num_frames=16, pace=False)
    (tmp_path / "video_of_one_that_was_killed.mp4").write_bytes(b"x")
    (tmp_path / ".video_of_one_that_was_killed.partial.mp4").write_bytes(b"x")
    jobs = Jobs(studio, served(), tmp_path, most=3, lifetime=3600)  # type: ignore[arg-type]
    assert folder_of(tmp_path) == []
    made = []
    for _ in range(5):
        made.append(jobs.create(order))
        made[-1].ended.result(10)
    assert folder_of(tmp_path) == sorted(f"{job.id}.mp4" for job in made[2:])
    made[3].expires = 0
    assert jobs.get(made[3].id) is None and len(folder_of(tmp_path)) == 2
    jobs._most_bytes = made[2].bytes * 2 + 1  # room for two
    jobs.create(order).ended.result(10)
    assert len(folder_of(tmp_path)) == 2 and jobs.get(made[2].id) is None
    jobs._most_bytes = 10
    large = jobs.create(order)
    large.ended.result(10)
    assert large.status == "failed" and "does not keep" in large.error
    failed = jobs.create(Order("fail", num_frames=16, pace=False))
    failed.ended.result(10)
    assert failed.value("m")["error"] == {"code": "failed", "message": "made to fail"}
    jobs._most_bytes = 1 << 20
    endless = jobs.create(Order("red", num_frames=1 << 30, pace=True))
    until(lambda: endless.frames)
    assert jobs.delete(endless.id) and not jobs.delete("../x")
    endless.ended.result(10)
    jobs.close()
    assert folder_of(tmp_path) == [] and not studio.sessions


def test_a_full_disk_fails_a_video_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limited: Callable[[int], Any]
) -> None:
    jobs = Jobs(FakeStudio(), served(), tmp_path)  # type: ignore[arg-type]
    with limited(1000):
        job = jobs.create(Order("red", num_frames=160, pace=False))
        job.ended.result(10)
    assert job.status == "failed" and job.error == "the server's disk is full or broken" and folder_of(tmp_path) == []
    again = jobs.create(Order("red", num_frames=16, pace=False))
    again.ended.result(10)
    assert again.status == "completed"
    jobs.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its inventor has closed the service
def test_the_openai_client_makes_videos(running: Run, tmp_path: Path) -> None:
    openai = pytest.importorskip("openai")
    server = running(key="s3cret")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="s3cret")
    assert [model.id for model in client.models.list()] == ["fake"]
    video = client.videos.create_and_poll(prompt="blue", model="fake", seconds="4", size="48x32", poll_interval_ms=20)
    assert video.status == "completed" and video.size == "48x32" and float(video.seconds) == pytest.approx(4, abs=0.1)
    client.videos.download_content(video.id).write_to_file(tmp_path / "a.mp4")
    assert hue((tmp_path / "a.mp4").read_bytes()) == "blue"
    assert [one.id for one in client.videos.list()] == [video.id]
    picture = client.videos.create(prompt="red", input_reference=("a.png", png()))
    assert client.videos.retrieve(picture.id).object == "video"
    assert all(client.videos.delete(one.id).deleted for one in (video, picture))
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)
    with pytest.raises(openai.BadRequestError, match="here is fake alone"):
        client.videos.create(prompt="red", model="sora-2")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong").models.list()


def test_measurements(running: Run) -> None:
    server = running(FakeStudio(Limits(sessions=2)))
    with LiveVideo(server.url, prompt="red", num_frames=None, extra_params={"pacing_lead_seconds": 2}) as video:
        pieces = iter(video)
        next(pieces)
        event = video.change("green")
        while event not in next(pieces).metadata["started_event_ids"]:
            pass
        httpx.post(f"{server.url}/v1/videos", json={"prompt": ""})
        text = httpx.get(f"{server.url}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    for name, least in {
        "longsana_chunks_sent_total": 2, "longsana_chunks_in_time_total": 2, "longsana_sent_bytes_total": 100,
        "longsana_first_chunk_seconds_count": 1, "longsana_inter_arrival_seconds_count": 1,
        "longsana_interaction_seconds_count": 1, 'longsana_refused_total{code="400"}': 1, "longsana_running": 1,
        'longsana_sessions{state="running"}': 1, "longsana_real_time_factor": 0.5, "longsana_memory_bytes": 5,
        'longsana_chunk_seconds{latents="2",size="48x32"}': 0.01,
    }.items():  # fmt: skip
        assert float(values[name]) >= least, name
    assert video.session_id not in text


def test_the_door(running: Run) -> None:
    server = running(key="s3cret")

    def status(path: str, **headers: str) -> int:
        return httpx.get(server.url + path, headers=headers).status_code

    assert status("/") == status("/health") == 200
    key = {"authorization": "Bearer s3cret"}
    for path in ("/metrics", "/v1/models", "/v1/videos", "/openapi.json", "/v1/videos/x"):
        assert (
            status(path) == status(path, authorization="Bearer x") == status(path, authorization="Basic s3cret") == 401
        )
    assert status("/v1/models", **key) == 200
    assert status("/v1/models", **key, origin="http://evil.example") == 403
    assert status("/v1/models", **key, origin=server.url) == 200
    assert status("/", host="evil.example") == 421 and status("/", host="localhost:1") == 200
    assert status("/openapi.json", **key) == 200
    for path in ("/v1/videos/..%2f..%2fetc%2fpasswd", "/v1/videos/../../etc/passwd/content", "/../etc/passwd", "/no"):
        assert status(path, **key) == 404


def test_head_is_get_without_its_body(running: Run) -> None:
    server = running(key="s3cret")
    with httpx.Client(base_url=server.url, headers={"authorization": "Bearer s3cret"}) as client:
        video = finished(client, client.post("/v1/videos", json={"prompt": "red", "num_frames": 16}).json())
        paths = [route.path for route in server.app.routes if "GET" in getattr(route, "methods", ())]
        assert {"/", "/health", "/metrics", "/v1/models", "/v1/videos/{id}/content"} <= set(paths)
        for path in (*(path.format(id=video["id"]) for path in paths), "/v1/videos/no", "/no"):
            whole, head = client.get(path), client.head(path)
            assert (head.status_code, head.content) == (whole.status_code, b""), path
            if path != "/metrics":  # which have changed
                del whole.headers["date"], head.headers["date"]
                assert head.headers == whole.headers, path
    assert httpx.head(server.url + "/v1/models").status_code == 401


def test_a_page_that_is_named_may_ask(running: Run) -> None:
    url = running(key="s3cret", origins=("https://studio.example",)).url + "/v1/videos"
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    for origin, allowed in [("https://studio.example", True), ("https://evil.example", False)]:
        answer = httpx.options(url, headers={"origin": origin, **asks})
        assert (answer.headers.get("access-control-allow-origin") == origin) == allowed
    more = {"origin": "https://studio.example", "authorization": "Bearer s3cret"}
    assert httpx.get(url, headers=more).headers["access-control-allow-origin"] == "https://studio.example"


def test_the_page_is_one_small_file_under_a_strict_policy(running: Run) -> None:
    assert len(PAGE.read_bytes()) <= 25_000
    text = PAGE.read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=[\"']?(?:https?:)?//", text) and " style=" not in text
    answer = httpx.get(running().url)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
