"""Messages of `/v1/realtime/video` and bodies of `/v1/videos`: what a client says is checked, what it hears is built.

No library of the web is known here. Fields that nobody knows are ignored, as clients do with ours; a field that is
known and cannot be honoured is an error. A text of a client is never a path, and its pictures come with the message.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image

from longsana.data.pictures import FORMATS, check_header, told
from longsana.runtime.arguments import TEXT, Flag, Is, Number, OneOf, Rule, Whole
from longsana.runtime.errors import InputError, did_you_mean
from longsana.runtime.foreign import parse_json
from longsana.serving.values import FPS, Chunk, End, Limits, Order, Words

MOST_START = 4 << 20
MOST_LATER = 128 << 10
"""Bytes of the first message, which may have a picture in it, and of each later one."""
START_WITHIN = 10.0
"""Seconds within which the first message comes."""
STALL = 60.0
"""Seconds of silence of a client who has paused, or with a chunk unread, after which a connection is given up."""
MOST_PICTURE_PIXELS = 1 << 25
"""Width times height of a picture that a client sends."""
STATE_KIND, STATE_VERSION = "longsana.v1", 1

DONE, INVALID, FAILED, NO_CAPACITY, TOO_BIG = 1000, 1008, 1011, 1013, 1009
"""Codes with which the server closes a WebSocket."""

_ID = re.compile(r"[0-9A-Za-z_-]{1,64}")
_EVENT_ID = re.compile(r"[!-~]{1,128}")
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,")


@dataclass(frozen=True)
class Served:
    """The model that a server serves.

    name: as in /v1/models. height, width: pixels; fps; num_frames: of a video of which nothing else is said.
    time_stride: pixel frames of a latent one. fixed: values of fields that a request can repeat and not change.
    limits: the studio's. snapshots: whether it has a folder of them. snapshot_every: chunks between two of a session.
    fleet: whether videos without a viewer are saved as well, to go on elsewhere. replicas: that it has at most.
    """

    name: str
    height: int
    width: int
    fps: float
    num_frames: int
    time_stride: int
    fixed: Mapping[str, float]
    limits: Limits
    snapshots: bool = False
    snapshot_every: int = 0
    fleet: bool = False
    replicas: int = 1

    def frames(self, seconds: float, fps: float | None) -> int:
        """Count the pixel frames of the nearest length that a video can have, at least one latent after the first."""
        return max(1, round(seconds * (fps or self.fps) / self.time_stride)) * self.time_stride + 1


class Start(NamedTuple):
    """A `session.start`, or a body of `/v1/videos`.

    names: where the client wrote what fields of the order say, for `named`.
    session_id: of the session that the client had before, and goes on with if it still is.
    """

    order: Order
    names: Mapping[str, str]
    session_id: str | None = None


class Interaction(NamedTuple):
    """A change of prompt, as `Session.change` takes it."""

    prompt: str
    event_id: str
    policy: str | None
    transition_chunks: int | None


class Rewind(NamedTuple):
    """A way back by so many chunks."""

    chunks: int


class Plain(NamedTuple):
    """A message that is its name alone: ping, stop, pause, resume, snapshot or fork."""

    name: str


Later = Interaction | Rewind | Plain
LATER = {
    "prompt": "interaction.event.prompt",
    "policy": "interaction.event.policy",
    "event_id": "interaction.event_id",
    "transition_chunks": "interaction.transition_chunks",
    "rewind": "chunks",
    "snapshot": "session.snapshot",
    "fork": "session.fork",
}
"""Where a client wrote what arguments of a session's methods say, for `named`."""
PLAIN = ("ping", "stop", "pause", "resume", "snapshot", "fork")
_TYPES = ("session.interaction", "session.rewind", *(f"session.{name}" for name in PLAIN))

_SEED = Whole(-(2**63), 2**63 - 1)
_SIDE = Whole(1, 16_384)
_OBJECT = Is(dict, "an object")
_STATE = "extra_params.continuation_state"
_FIXED: dict[str, Rule] = {"num_inference_steps": Whole(1, 10_000), "guidance_scale": Number(), "flow_shift": Number()}


def read_start(text: str | bytes, served: Served) -> Start:
    """Read the first message of a WebSocket.

    Raises:
        InputError: it is none, or asks for what there is not; one line that begins with the field.
    """
    fields = _fields(text, MOST_START)
    kind = _take(fields, "type", TEXT)
    if kind != "session.start":
        raise InputError(f"type={_short(kind)}: the first message must be session.start")
    _take(fields, "format", OneOf(("m4s",)))
    extra = _take(fields, "extra_params", _OBJECT) or {}
    session_id = _take_id(extra, "session_id", "extra_params.session_id")
    snapshot = _snapshot(extra, served)
    start = _order(fields, extra, served, snapshot, live=True)
    if start.order.prompt is None and session_id is None and snapshot is None:
        raise InputError("prompt: is missing; say what is to be seen")
    return start._replace(session_id=session_id)


def read_later(text: str | bytes, served: Served) -> Later:
    """Read a message after the first one.

    Raises:
        InputError: it is none of those that there are; one line that begins with the field.
    """
    fields = _fields(text, MOST_LATER)
    kind = _take(fields, "type", TEXT)
    if kind is None:
        raise InputError("type: is missing")
    if kind == "session.rewind":
        return Rewind(_needed(_take(fields, "chunks", Whole(1, 1_000_000)), "chunks"))
    if kind != "session.interaction":
        name = kind.removeprefix("session.")
        if kind not in _TYPES:
            raise InputError(f"type={_short(kind)}: there is no such message{did_you_mean(kind[:60], _TYPES)}")
        if name == "snapshot" and not served.snapshots:
            raise InputError(f"type={kind}: this server keeps no snapshots; session.fork goes on from here as well")
        return Plain(name)
    inner = _needed(_take(fields, "interaction", _OBJECT), "interaction")
    event = _needed(_take(inner, "event", _OBJECT, "interaction.event"), "interaction.event")
    prompt = _take(event, "prompt", Words(served.limits.most_prompt), "interaction.event.prompt")
    prompt = _needed(prompt, "interaction.event.prompt")
    event_id = _take(inner, "event_id", TEXT, "interaction.event_id") or ""
    if event_id and not _EVENT_ID.fullmatch(event_id):
        raise InputError("interaction.event_id: must be 1 to 128 visible ASCII characters")
    policy = _take(event, "policy", TEXT, "interaction.event.policy")
    if policy is not None and len(policy) > 32:
        raise InputError("interaction.event.policy: must be keep, recache=K, rebuild=W or cut")
    chunks = _take(inner, "transition_chunks", Whole(0, 1000), "interaction.transition_chunks")
    return Interaction(prompt, event_id, policy, chunks)


def event_id_of(text: str | bytes) -> str:
    """The `event_id` of a change of prompt in which something else may be wrong; "" where there is none that can be."""
    try:
        inner = _fields(text, MOST_LATER).get("interaction")
    except InputError:
        return ""
    event_id = inner.get("event_id") if isinstance(inner, dict) else None
    return event_id if isinstance(event_id, str) and _EVENT_ID.fullmatch(event_id) else ""


def read_video(fields: Mapping[str, Any], served: Served) -> Start:
    """Read the body of a request to `/v1/videos`, whose `seconds`, `size` and so on may be texts, as in a form.

    A file of a form is its bytes.

    Raises:
        InputError: no such video can be made; one line that begins with the field.
    """
    fields = {name: _from_form(name, value) for name, value in fields.items()}
    extra = _take(fields, "extra_params", _OBJECT) or {}
    for name in ("session_id", "continuation_state"):
        if extra.get(name) is not None:
            raise InputError(f"extra_params.{name}: nothing is gone on with by HTTP; do so over /v1/realtime/video")
    start = _order(fields, extra, served, None, live=False)
    _needed(start.order.prompt, "prompt")
    return start


@contextmanager
def named(names: Mapping[str, str]) -> Iterator[None]:
    """Have errors of a studio or a session, which begin with its name for a field, begin with the client's."""
    try:
        yield
    except InputError as error:
        own = re.match(r"\w+(?=[:=])", str(error))
        if own is None or own[0] not in names:
            raise
        raise type(error)(names[own[0]] + str(error)[own.end() :]) from error


def _order(fields: dict[str, Any], extra: dict[str, Any], served: Served, snapshot: str | None, *, live: bool) -> Start:
    """Read what a WebSocket and a request have in common."""
    inner = _take(fields, "sampling_params", _OBJECT) or {}
    outer, fields = fields, {**inner, **fields}

    def where(name: str) -> str:
        return f"sampling_params.{name}" if name in inner and name not in outer else name

    def take(name: str, rule: Rule) -> Any:
        return _take(fields, name, rule, where(name))

    model = take("model", TEXT)
    if model not in (None, "", served.name):
        raise InputError(f"{where('model')}={_short(model)}: here is {served.name} alone")
    for name, rule in _FIXED.items():
        value = take(name, rule)
        if value is not None and name in served.fixed and value != served.fixed[name]:
            raise InputError(f"{where(name)}={value:g}: must be {served.fixed[name]:g}, as this model was trained")
    names = {name: where(name) for name in ("prompt", "num_frames", "seed", "height", "width", "fps")}
    names |= {"chunk_frames": "extra_params.chunk_frames", "lead": "extra_params.pacing_lead_seconds"}
    names["snapshot"] = f"{_STATE}.payload.blob_id"
    height, width = take("height", _SIDE), take("width", _SIDE)
    size = take("size", TEXT)
    if size is not None:
        if not (found := _SIZE.fullmatch(size)):
            usual = f"{served.width}x{served.height}"
            raise InputError(f"{where('size')}={_short(size)}: must be WIDTHxHEIGHT, such as {usual}")
        for side, own, digits in zip(("width", "height"), (width, height), found.groups(), strict=True):
            names[side] = f"{where('size')}: {side}"
            if own not in (None, _SIDE.settle(names[side], int(digits))):
                raise InputError(f"{names[side]}={digits}: {where(side)} is {own}; leave one of them out")
        width, height = (int(digits) for digits in found.groups())
    fps = take("fps", FPS)
    # An absent length is the model's usual one, as it is elsewhere; null, and going on, is a video without an end.
    endless = live and ("num_frames" in fields or snapshot is not None)
    num_frames = take("num_frames", Whole(1, served.limits.most_frames))
    seconds = take("seconds", Number(above=0, most=1e6))
    if num_frames is None and seconds is not None:
        num_frames = served.frames(seconds, fps) - (snapshot is not None)  # the first latent was in the past
    elif num_frames is None and not endless:
        num_frames = served.num_frames
    if num_frames is not None and num_frames > served.limits.most_frames:
        most = f"at most {served.limits.most_frames} are made here"
        raise InputError(f"{where('seconds')}={seconds:g}: {num_frames} frames; {most}")
    pace = _take(extra, "pace_to_media_time", Flag("true or false"), "extra_params.pace_to_media_time")
    lead = Number(0, served.limits.most_lead)
    if extra.get("pacing_max_lag_seconds") is not None:
        raise InputError(
            "extra_params.pacing_max_lag_seconds: is not supported; leave it out. Media time waits for a viewer who "
            "falls behind, and no chunk is left out"
        )
    picture = "input_reference" if "image_reference" not in fields else "image_reference"
    names["image"] = where(picture)
    order = Order(
        prompt=take("prompt", Words(served.limits.most_prompt)),
        num_frames=num_frames,
        seed=take("seed", _SEED),
        height=height,
        width=width,
        fps=fps,
        chunk_frames=_take(
            extra, "chunk_frames", Whole(1, served.limits.most_chunk_frames), "extra_params.chunk_frames"
        ),
        image=_picture(names["image"], fields.get(picture)),
        snapshot=snapshot,
        pace=live if pace is None else pace and live,
        lead=_take(extra, "pacing_lead_seconds", lead, "extra_params.pacing_lead_seconds"),
        snapshot_every=served.snapshot_every if (live or served.fleet) and served.snapshots else 0,
    )
    return Start(order, names)


def _fields(text: str | bytes, most: int) -> dict[str, Any]:
    """Read the object that a message is."""
    if isinstance(text, bytes):
        raise InputError("a message must be text, and this one is binary")
    if len(text) > most or len(text.encode("utf-8", "replace")) > most:
        raise InputError(f"a message of more than {most} bytes")
    try:
        fields = parse_json(text)
    except ValueError as error:
        raise InputError(f"a message that is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InputError("a message must be a JSON object")
    return fields


def _take(fields: Mapping[str, Any], name: str, rule: Rule, shown: str = "") -> Any:
    value = fields.get(name)
    if isinstance(value, bytes):
        raise InputError(f"{shown or name}: is a file; only the picture may be one")
    return None if value is None else rule.settle(shown or name, value)


def _needed(value: Any, name: str) -> Any:
    if value is None:
        raise InputError(f"{name}: is missing")
    return value


def _short(text: str | None) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in (text or "")[:60])


def _take_id(fields: Mapping[str, Any], name: str, shown: str) -> str | None:
    value = _take(fields, name, TEXT, shown)
    if value is not None and not _ID.fullmatch(value):
        raise InputError(f"{shown}: must be an id that this server gave")
    return None if value is None else str(value)


def _snapshot(extra: dict[str, Any], served: Served) -> str | None:
    """Read `continuation_state`: the id of a snapshot."""
    shown = _STATE
    state = _take(extra, "continuation_state", _OBJECT, shown)
    if state is None:
        return None
    if state.get("kind") != STATE_KIND:
        raise InputError(f"{shown}.kind: must be {STATE_KIND}")
    payload = _needed(_take(state, "payload", _OBJECT, f"{shown}.payload"), f"{shown}.payload")
    if payload.get("schema_version") != STATE_VERSION:
        raise InputError(f"{shown}.payload.schema_version: must be {STATE_VERSION}")
    if not served.snapshots:
        raise InputError(f"{shown}: this server keeps no snapshots")
    shown += ".payload.blob_id"
    return str(_needed(_take_id(payload, "blob_id", shown), shown))


def _picture(name: str, sent: Any) -> bytes | None:
    """The bytes of the picture to begin with, checked by their head; nothing is fetched from anywhere."""
    if sent is None:
        return None
    if isinstance(sent, dict):
        if sent.get("file_id") is not None:
            raise InputError(f"{name}.file_id: there are no files here; send the picture")
        sent = sent.get("image_url")
    if not isinstance(sent, bytes):
        text = sent if isinstance(sent, str) else ""
        if (found := _DATA_URL.match(text)) is None:
            raise InputError(f"{name}: must be a data URL, data:image/png;base64,...; nothing is fetched")
        try:
            sent = base64.b64decode(text[found.end() :], validate=True)
        except (binascii.Error, ValueError) as error:
            raise InputError(f"{name}: is not base64") from error
    with told(name), Image.open(io.BytesIO(sent), formats=FORMATS) as picture:
        if picture.width * picture.height > MOST_PICTURE_PIXELS:
            raise InputError(f"{name}: {picture.width}x{picture.height} pixels; at most {MOST_PICTURE_PIXELS} in all")
        check_header(picture)
    return sent


def _from_form(name: str, value: Any) -> Any:
    """The value that a field of a form stands for: forms know nothing but texts."""
    if not isinstance(value, str) or name in ("prompt", "model", "size"):
        return value
    try:
        return parse_json(value)
    except ValueError:
        return value


# What the server says.


def encode(message: Mapping[str, Any]) -> str:
    """Write a message as JSON on one line."""
    return json.dumps(message, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def state_value(snapshot: str) -> dict[str, Any]:
    """The `continuation_state` that goes on from a snapshot."""
    return {"kind": STATE_KIND, "payload": {"schema_version": STATE_VERSION, "blob_id": snapshot}}


def chunk_metadata(request_id: str, chunk: Chunk, length: int, *, init: bool) -> str:
    """The message before a chunk's binary frame.

    length: bytes of the frame. init: whether it begins with the init segment.
    """
    message: dict[str, Any] = {
        "type": "video.chunk_metadata",
        "request_id": request_id,
        "kind": "media",
        "transport_chunk_index": chunk.index,
        "generation_chunk_index": chunk.generation_index,
        "num_frames": chunk.frames,
        "byte_length": length,
        "started_event_ids": chunk.started,
        "active_event_ids": chunk.active,
        "completed_event_ids": chunk.completed,
        "init": init,
        "pts_seconds": chunk.pts_seconds,
        "duration_seconds": chunk.duration_seconds,
        "generation_ms": round(chunk.generation_ms, 3),
        "encode_ms": round(chunk.encode_ms, 3),
    }
    if chunk.snapshot:
        message["state"] = state_value(chunk.snapshot)
    return encode(message)


def done(request_id: str, end: End) -> str:
    """The message at the end of a video that did not fail."""
    return encode(
        {
            "type": "session.done",
            "request_id": request_id,
            "chunks": end.chunks,
            "stopped": end.reason == "closed",
        }
    )


def failure(message: str, code: str, **ids: str) -> str:
    """An error's message; `ids` are request_id and event_id, where there are any."""
    return encode({"type": "error", "message": message, "code": code, **{k: v for k, v in ids.items() if v}})
