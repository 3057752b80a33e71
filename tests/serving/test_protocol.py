"""Messages of clients: what is taken, what is refused in one line, and that no text of theirs is a path."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from longsana.runtime.errors import InputError
from longsana.serving import protocol
from longsana.serving.protocol import Interaction, Plain, Rewind, read_later, read_start, read_video
from longsana.serving.values import Chunk, Limits, Order

SERVED = protocol.Served(
    "longsana", 96, 160, 16.0, 81, 4, {"num_inference_steps": 4, "guidance_scale": 1.0}, Limits(), True, 3
)


def start(**fields: Any) -> protocol.Start:
    return read_start(json.dumps({"type": "session.start", "prompt": "a circle", **fields}), SERVED)


def refused(function: Any, *arguments: Any, **fields: Any) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments, **fields)
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and len(text) < 400
    return text


def png(height: int = 4, width: int = 6) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def test_a_start_becomes_an_order() -> None:
    assert start().order == Order("a circle", num_frames=81, snapshot_every=3)
    assert start(num_frames=None).order.num_frames is None
    full = start(
        size="320x192",
        seed=7,
        fps=8,
        seconds=2,
        sampling_params={"seed": 1, "num_inference_steps": 4},
        guidance_scale=1,
        image_reference=data_url(png()),
        extra_params={"pacing_lead_seconds": 1.5, "chunk_frames": 5, "session_id": "ab12", "other": [1]},
        unknown={"deep": []},
    )
    order = full.order
    assert (order.width, order.height, order.seed, order.fps, order.num_frames) == (320, 192, 7, 8, 17)
    assert (order.lead, order.chunk_frames, order.image, full.session_id) == (1.5, 5, png(), "ab12")
    assert start(size="320x192", width=320, height=192).order == start(size="320x192").order
    state = {"continuation_state": protocol.state_value("c0ffee")}
    gone_on = read_start(json.dumps({"type": "session.start", "extra_params": state}), SERVED).order
    assert (gone_on.snapshot, gone_on.prompt, gone_on.num_frames) == ("c0ffee", None, None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' + "9" * 5000 + "}", "not JSON: a whole number of more than 4300 digits"),
        ("[1]", "JSON object"),
        (b"\x00\x01", "binary"),
        ('{"type":"session.stop"}', "must be session.start"),
        ('{"type":"session.start"}', "prompt: is missing"),
        ('{"type":"session.start","prompt":"\\ud800"}', "half a character"),
        ('{"type":"session.start","prompt":"a","seed":NaN}', "whole number"),
        ('{"type":"session.start","prompt":"' + "x" * (4 << 20) + '"}', "bytes"),
    ],
    ids=range(11),
)
def test_rubbish_is_refused_in_one_line(text: str | bytes, said: str) -> None:
    assert said in refused(read_start, text, SERVED)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": " "}, "prompt: is empty"),
        ({"prompt": 3}, "prompt=3"),
        ({"prompt": "x" * 20_001}, "prompt: 20,001 characters"),
        ({"prompt": "a<image>/etc/passwd"}, "prompt: <image>"),
        ({"model": "other"}, "here is longsana alone"),
        ({"format": "webm"}, "format=webm"),
        ({"size": "0x5"}, "size: width=0: must be at least 1"),
        ({"size": "99999x99999"}, "size: width=99999: must be at most"),
        ({"size": "160x96", "width": 320}, "size: width=160: width is 320; leave one of them out"),
        ({"size": "160x96", "sampling_params": {"height": 32}}, "size: height=96: sampling_params.height is 32"),
        ({"size": "big"}, "must be WIDTHxHEIGHT, such as 160x96"),
        ({"sampling_params": {"size": "big"}}, "sampling_params.size=big: must be WIDTHxHEIGHT"),
        ({"seed": True}, "seed=True"),
        ({"seed": 2**64}, "seed="),
        ({"seed": 2.0**53}, "seed=9007199254740992.0: is rounded"),
        ({"fps": 1e-9}, "fps=1e-09: must be at least 1"),
        ({"num_frames": 10**9}, "num_frames=1000000000: must be at most"),
        ({"seconds": 90_000}, "seconds=90000"),
        ({"num_inference_steps": 50}, "num_inference_steps=50: must be 4"),
        ({"sampling_params": {"guidance_scale": 6}}, "guidance_scale=6: must be 1"),
        ({"extra_params": []}, "extra_params"),
        ({"extra_params": {"session_id": "../a"}}, "extra_params.session_id"),
        ({"extra_params": {"pacing_lead_seconds": 99}}, "extra_params.pacing_lead_seconds=99"),
        ({"extra_params": {"pacing_max_lag_seconds": 2}}, "pacing_max_lag_seconds: is not supported; leave it out"),
        ({"extra_params": {"continuation_state": {"kind": "pickle"}}}, "kind: must be longsana.v1"),
        ({"extra_params": {"continuation_state": protocol.state_value("../../etc/passwd")}}, "blob_id"),
        ({"image_reference": "/etc/passwd"}, "nothing is fetched"),
        ({"image_reference": "http://127.0.0.1/a.png"}, "nothing is fetched"),
        ({"image_reference": {"file_id": "x"}}, "there are no files here"),
        ({"image_reference": "data:image/png;base64,%%%"}, "is not base64"),
        ({"image_reference": data_url(b"no picture")}, "image_reference: no picture"),
    ],
    ids=range(31),
)
def test_what_cannot_be_had_is_refused_by_its_field(fields: dict[str, Any], said: str) -> None:
    assert said in refused(start, **fields)


def test_a_small_file_of_many_pixels_is_refused() -> None:
    stream = io.BytesIO()
    Image.new("1", (20_000, 4000)).save(stream, "PNG")
    assert len(stream.getvalue()) < 100_000
    assert "20000x4000 pixels" in refused(start, image_reference=data_url(stream.getvalue()))


def test_later_messages() -> None:
    def later(**fields: Any) -> protocol.Later:
        return read_later(json.dumps(fields), SERVED)

    event = {"event_id": "e1", "event": {"prompt": "[cut] a square", "more": 1}, "transition_chunks": 2}
    assert later(type="session.interaction", interaction=event) == Interaction("[cut] a square", "e1", None, 2)
    assert later(type="session.rewind", chunks=2) == Rewind(2)
    assert [later(type=f"session.{name}") for name in protocol.PLAIN] == [Plain(name) for name in protocol.PLAIN]
    assert "did you mean 'session.pause'" in refused(later, type="session.pase")
    assert "interaction: is missing" in refused(later, type="session.interaction")
    assert "prompt: is missing" in refused(later, type="session.interaction", interaction={"event": {}})
    assert "chunks=0" in refused(later, type="session.rewind", chunks=0)
    named = {"event": {"prompt": "a<image>x.png"}}
    assert "never named" in refused(later, type="session.interaction", interaction=named)
    spaced = {"event": {"prompt": "a"}, "event_id": "a\nb"}
    assert "event_id" in refused(later, type="session.interaction", interaction=spaced)
    less = dataclasses.replace(SERVED, snapshots=False)
    assert "keeps no snapshots" in refused(read_later, '{"type":"session.snapshot"}', less)
    assert "131072 bytes" in refused(read_later, '{"type":"' + "x" * (128 << 10) + '"}', SERVED)


def test_a_form_is_read_as_json_is() -> None:
    form = {"prompt": "12", "seconds": "4", "size": "160x96", "seed": "3", "extra_params": '{"chunk_frames": 5}'}
    form = {**form, "input_reference": png()}
    order = read_video(form, SERVED).order
    assert order == Order("12", 65, 3, 96, 160, chunk_frames=5, image=png(), pace=False)
    assert read_video({**form, "seconds": 4, "seed": 3, "extra_params": {"chunk_frames": 5}}, SERVED).order == order
    assert "prompt: is missing" in refused(read_video, {"seconds": "4"}, SERVED)
    for name, value in {"continuation_state": protocol.state_value("c0ffee"), "session_id": "ab12"}.items():
        fields = {"prompt": "a", "extra_params": {name: value}}
        assert refused(read_video, fields, SERVED).startswith(f"extra_params.{name}: nothing is gone on with by HTTP")
    assert "seconds='long'" in refused(read_video, {"prompt": "a", "seconds": "long"}, SERVED)


def test_what_the_server_says_is_json() -> None:
    chunk = Chunk(b"x", None, 3, 2, 40, 2.5, 2.5, ("a",), (), ("b",), 12.0, 3.0, "c0ffee")
    said = json.loads(protocol.chunk_metadata("r", chunk, 1, init=False))
    assert said["started_event_ids"] == ["a"] and said["active_event_ids"] == [] and said["pts_seconds"] == 2.5
    again = {"type": "session.start", "extra_params": {"continuation_state": said["state"]}}
    assert read_start(json.dumps(again), SERVED).order.snapshot == "c0ffee"
