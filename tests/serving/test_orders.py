"""What an order asks for is read before anything is made."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import reduce
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from longsana.commands.serve import served_by
from longsana.config import InferenceConfig
from longsana.runtime.errors import InputError
from longsana.sampling.continuation import Continuation
from longsana.serving import orders
from longsana.serving.protocol import (
    LATER,
    Interaction,
    Served,
    Start,
    named,
    read_later,
    read_start,
    read_video,
    state_value,
)
from longsana.serving.values import Limits, Order
from longsana.state import CausalState
from tests.serving.test_protocol import data_url, png


def test_few_pictures_are_decoded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    data, lock, now = io.BytesIO(), threading.Lock(), [0, 0]
    Image.new("RGB", (8, 8)).save(data, "PNG")

    def slowly(*arguments: Any, **more: Any) -> np.ndarray:
        with lock:
            now[0] += 1
            now[1] = max(now)
        time.sleep(0.02)
        with lock:
            now[0] -= 1
        return np.zeros((8, 8, 3), np.uint8)

    monkeypatch.setattr(orders, "fit_picture", slowly)
    with ThreadPoolExecutor(6) as pool:
        made = [pool.submit(orders._picture, data.getvalue(), (8, 8), InferenceConfig()) for _ in range(6)]
    assert all(one.result().shape == (8, 8, 3) for one in made) and now == [0, orders.DECODING]


BAD: dict[str, list[Any]] = {
    "prompt": [
        "",
        " ",
        3,
        "x" * 30_000,
        "a\0",
        "a<image>b.png",
        "a[9s] | b",
        "a | [cut] |",
        "[cut] a | b[1s]",
        " | ".join(["a[0.1s]"] * 99),
    ],
    "model": [7, "other", {}],
    "height": [0, 33, "x", 20_000],
    "width": [0, 33, 1.5, 20_000],
    "size": ["0x32", "33x32", "48x33", "9600x9600", "99999x99999", "big", 5, [], {}],
    "fps": [0, 1e9, "fast", True],
    "num_frames": [0, 18, 10**9, "many"],
    "seconds": [0, -1, 1e6, "long"],
    "seed": [2**63, 0.5, 2.0**60, 10**400, "x", True],
    "num_inference_steps": [0, 50],
    "guidance_scale": [7, "x"],
    "flow_shift": [99, []],
    "image_reference": [
        "/a",
        5,
        {"file_id": "x"},
        "data:image/png;base64,%",
        data_url(b"x"),
        data_url(png(1, 200_000)),
    ],
    "input_reference": [{"image_url": "http://127.0.0.1/a.png"}, data_url(png()[:45])],
}
EXTRA: dict[str, list[Any]] = {
    "pace_to_media_time": [3, "x", {}],
    "pacing_lead_seconds": [-1, 99, "x"],
    "pacing_max_lag_seconds": [0, 2],
    "chunk_frames": [0, 1, 21, 999, 10**20],
    "session_id": ["../x", 3],
    "continuation_state": [3, {}, {"kind": "pickle"}, {"kind": "longsana.v1"}, state_value("../x")],
}
LATER_BAD: dict[str, list[Any]] = {
    "interaction": [None, 3, {}],
    "interaction.event_id": [3, "a b", "x" * 129],
    "interaction.transition_chunks": [-1, "x", 1001],
    "interaction.event": [3, []],
    "interaction.event.prompt": [None, "", 3, "x" * 30_000, "[cut]", "[recache=9] a", "[recahe=1] a", "a<image>b.png"],
    "interaction.event.policy": [3, "recache=9", "recahe=1", "x" * 99],
}


@pytest.fixture(scope="module")
def served(config: InferenceConfig) -> Served:
    return served_by(config, "small", Limits(), 2)


def says(name: str, error: InputError) -> None:
    """Hold that a client is told in one line which of its fields is wrong, and nothing that is the server's alone."""
    text = str(error)
    assert text.startswith((f"{name}:", f"{name}=", f"{name}.")), (name, text)
    assert len(text.splitlines()) == 1 and len(text) < 400
    for own in (
        "--",
        "studio",
        "image:",
        "first_chunk_frames",
        "image_fit",
        "None",
        "prompt_change",
        "True or",
        "not a ",
    ):
        assert own not in text, (name, text)


@pytest.mark.parametrize("name", [*BAD, *(f"extra_params.{name}" for name in EXTRA)])
def test_what_is_wrong_has_the_name_that_the_client_wrote(config: InferenceConfig, served: Served, name: str) -> None:
    if name == "extra_params.chunk_frames":
        config = replace(config, sampling=replace(config.sampling, chunk_frames=4, first_chunk_frames=4))

    def ordered(read: Callable[..., Start], fields: Any) -> None:
        start = read(fields, served)
        with named(start.names):
            orders.video_of(start.order, config, Limits(), None)

    outer, _, last = name.rpartition(".")
    for value in EXTRA[last] if outer else BAD[last]:
        wrong = {outer: {last: value}} if outer else {last: value}
        whole = {"type": "session.start", "prompt": "a circle", "num_frames": None, **wrong}
        with pytest.raises(InputError) as told:
            ordered(read_start, json.dumps(whole))
        says(name, told.value)
        if not outer:
            with pytest.raises(InputError) as told:
                ordered(read_video, {"prompt": "a circle", **wrong})
            says(name, told.value)
        if not outer and last not in ("prompt", "num_frames"):
            del whole[last]
            with pytest.raises(InputError) as told:
                ordered(read_start, json.dumps({**whole, "sampling_params": wrong}))
            says(f"sampling_params.{name}", told.value)


def test_a_file_is_a_picture_alone(served: Served) -> None:
    for name in sorted(BAD.keys() - {"image_reference", "input_reference"}):
        with pytest.raises(InputError) as told:
            read_video({"prompt": "a circle", name: b"root:x:0:0"}, served)
        says(name, told.value)
        assert "root" not in str(told.value)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"image_reference": data_url(png(32, 48))}, "image_reference"),
        ({"sampling_params": {"input_reference": data_url(png(32, 48))}}, "sampling_params.input_reference"),
        ({"prompt": "[recache=1] a square"}, "prompt"),
        ({"prompt": "[rebuild=2] a square"}, "prompt"),
        ({"num_frames": 7}, "num_frames"),
        ({"width": 64}, "width"),
        ({"size": "64x32"}, "size"),
        ({"extra_params": {"chunk_frames": 21}}, "extra_params.chunk_frames"),
    ],
)
def test_what_is_wrong_after_a_snapshot_has_it_too(
    config: InferenceConfig, served: Served, wrong: dict[str, Any], name: str
) -> None:
    state = Continuation(CausalState(*torch.zeros(3, 1), 4), None, 0, "a circle", (32, 48))
    extra = {"continuation_state": state_value("c0ffee"), **wrong.get("extra_params", {})}
    start = {"type": "session.start", "num_frames": None, **wrong, "extra_params": extra}

    def ordered(fields: dict[str, Any]) -> None:
        read = read_start(json.dumps(fields), served)
        with named(read.names):
            orders.video_of(read.order, config, Limits(), state)

    ordered({"type": "session.start", "extra_params": {"continuation_state": state_value("c0ffee")}})
    with pytest.raises(InputError) as told:
        ordered(start)
    says(name, told.value)


@pytest.mark.parametrize("path", LATER_BAD)
def test_what_is_wrong_later_has_it_too(config: InferenceConfig, served: Served, path: str) -> None:
    video = orders.video_of(Order("a circle"), config, Limits(), None)

    def changed(message: str) -> None:
        with named(LATER):
            said = read_later(message, served)
            assert isinstance(said, Interaction)
            orders.event_of(said.prompt, "e", said.policy, said.transition_chunks, video, 9, Limits())

    for value in LATER_BAD[path]:
        message: dict[str, Any] = {"type": "session.interaction", "interaction": {"event": {"prompt": "a square"}}}
        *outer, last = path.split(".")
        reduce(dict.__getitem__, outer, message)[last] = value
        with pytest.raises(InputError) as told:
            changed(json.dumps(message))
        says(path, told.value)
