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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image

from longsana.data.pictures import FORMATS, check_header, told
from longsana.data.story import PICTURE
from longsana.runtime.arguments import TEXT, Flag, Is, Number, OneOf, Rule, Whole
from longsana.runtime.errors import InputError, did_you_mean
from longsana.runtime.foreign import check_characters, parse_json
from longsana.serving.values import FPS, Chunk, End, Limits, Order

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

    def frames(self, seconds: float, fps: float | None) -> int:
        """Count the pixel frames of the nearest length that a video can have, at least one latent after the first."""
        return max(1, round(seconds * (fps or self.fps) / self.time_stride)) * self.time_stride + 1


class Start(NamedTuple):
    """A `session.start`. session_id: of the session that the client had before, and goes on with if it still is."""

    order: Order
    session_id: str | None


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
PLAIN = ("ping", "stop", "pause", "resume", "snapshot", "fork")
_TYPES = ("session.interaction", "session.rewind", *(f"session.{name}" for name in PLAIN))

_SEED = Whole(-(2**63), 2**63 - 1)
_SIDE = Whole(1, 16_384)
_OBJECT = Is(dict, "an object")
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
    order = _order(fields, extra, served, snapshot, live=True)
    if order.prompt is None and session_id is None and snapshot is None:
        raise InputError("prompt: is missing; say what is to be seen")
    return Start(order, session_id)


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
        return Plain(name)
    inner = _needed(_take(fields, "interaction", _OBJECT), "interaction")
    event = _needed(_take(inner, "event", _OBJECT, "interaction.event"), "interaction.event")
    prompt = _needed(_prompt(event, "interaction.event.prompt", served), "interaction.event.prompt")
    event_id = _take(inner, "event_id", TEXT, "interaction.event_id") or ""
    if event_id and not _EVENT_ID.fullmatch(event_id):
        raise InputError("interaction.event_id: must be 1 to 128 visible ASCII characters")
    policy = _take(event, "policy", TEXT, "interaction.event.policy")
    if policy is not None and len(policy) > 32:
        raise InputError("interaction.event.policy: must be keep, recache=K, rebuild=W or cut")
    chunks = _take(inner, "transition_chunks", Whole(0, 1000), "interaction.transition_chunks")
    return Interaction(prompt, event_id, policy, chunks)


def read_video(fields: Mapping[str, Any], picture: bytes | None, served: Served) -> Order:
    """Read the body of a request to `/v1/videos`, whose `seconds`, `size` and so on may be texts, as in a form.

    picture: bytes of the file that was sent as `input_reference`.

    Raises:
        InputError: no such video can be made; one line that begins with the field.
    """
    fields = {name: _from_form(name, value) for name, value in fields.items()}
    extra = _take(fields, "extra_params", _OBJECT) or {}
    order = _order(fields, extra, served, None, live=False, picture=picture)
    _needed(order.prompt, "prompt")
    return order


def _order(
    fields: dict[str, Any],
    extra: dict[str, Any],
    served: Served,
    snapshot: str | None,
    *,
    live: bool,
    picture: bytes | None = None,
) -> Order:
    """Read what a WebSocket and a request have in common."""
    fields = {**(_take(fields, "sampling_params", _OBJECT) or {}), **fields}
    model = _take(fields, "model", TEXT)
    if model not in (None, "", served.name):
        raise InputError(f"model={_short(model)}: here is {served.name} alone")
    for name, rule in _FIXED.items():
        value = _take(fields, name, rule)
        if value is not None and name in served.fixed and value != served.fixed[name]:
            raise InputError(f"{name}={value:g}: must be {served.fixed[name]:g}, as this model was trained")
    height, width = _size(fields, served)
    fps = _take(fields, "fps", FPS)
    # An absent length is the model's usual one, as it is elsewhere; null, and going on, is a video without an end.
    endless = live and ("num_frames" in fields or snapshot is not None)
    num_frames = _take(fields, "num_frames", Whole(1, served.limits.most_frames))
    seconds = _take(fields, "seconds", Number(above=0, most=1e6))
    if num_frames is None and seconds is not None:
        num_frames = served.frames(seconds, fps) - (snapshot is not None)  # the first latent was in the past
    elif num_frames is None and not endless:
        num_frames = served.num_frames
    if num_frames is not None and num_frames > served.limits.most_frames:
        raise InputError(f"seconds={seconds:g}: {num_frames} frames; at most {served.limits.most_frames} are made here")
    pace = _take(extra, "pace_to_media_time", Flag(), "extra_params.pace_to_media_time")
    lead = Number(0, served.limits.most_lead)
    # A viewer who falls behind by more than this is left to it: media time waits for him here.
    _take(extra, "pacing_max_lag_seconds", Number(0), "extra_params.pacing_max_lag_seconds")
    return Order(
        prompt=_prompt(fields, "prompt", served),
        num_frames=num_frames,
        seed=_take(fields, "seed", _SEED),
        height=height,
        width=width,
        fps=fps,
        chunk_frames=_take(extra, "chunk_frames", Whole(1, 1000), "extra_params.chunk_frames"),
        image=_picture(fields, picture),
        snapshot=snapshot,
        pace=live if pace is None else pace and live,
        lead=_take(extra, "pacing_lead_seconds", lead, "extra_params.pacing_lead_seconds"),
        snapshot_every=served.snapshot_every if live and served.snapshots else 0,
    )


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
    shown = "extra_params.continuation_state"
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


def _prompt(fields: Mapping[str, Any], shown: str, served: Served) -> str | None:
    prompt = _take(fields, "prompt", TEXT, shown)
    if prompt is None:
        return None
    if not prompt.strip():
        raise InputError(f"{shown}: is empty; say what is to be seen")
    if len(prompt) > served.limits.most_prompt:
        raise InputError(f"{shown}: {len(prompt)} characters; at most {served.limits.most_prompt} are read")
    check_characters(prompt, shown)
    if PICTURE in prompt:  # in prompt files it names a file
        raise InputError(f"{shown}: {PICTURE} in it; a picture is sent as image_reference, never named")
    return str(prompt)


def _size(fields: Mapping[str, Any], served: Served) -> tuple[int | None, int | None]:
    """Read height and width: fields of their own, or `size`."""
    height, width = _take(fields, "height", _SIDE), _take(fields, "width", _SIDE)
    size = _take(fields, "size", TEXT)
    if size is not None and height is None and width is None:
        if not (found := _SIZE.fullmatch(size)):
            raise InputError(f"size={_short(size)}: must be WIDTHxHEIGHT, such as {served.width}x{served.height}")
        width, height = (_SIDE.settle("size", int(side)) for side in found.groups())
    pixels = (height or served.height) * (width or served.width)
    if pixels > served.limits.most_pixels:
        raise InputError(f"size: {pixels} pixels a picture; at most {served.limits.most_pixels} are made here")
    return height, width


def _picture(fields: Mapping[str, Any], sent: bytes | None) -> bytes | None:
    """The bytes of the picture to begin with, checked by their head; nothing is fetched from anywhere."""
    name = "input_reference" if "image_reference" not in fields else "image_reference"
    reference = fields.get(name)
    if sent is None and reference is not None:
        if isinstance(reference, dict):
            if reference.get("file_id") is not None:
                raise InputError(f"{name}.file_id: there are no files here; send the picture")
            reference = reference.get("image_url")
        text = reference if isinstance(reference, str) else ""
        if (found := _DATA_URL.match(text)) is None:
            raise InputError(f"{name}: must be a data URL, data:image/png;base64,...; nothing is fetched")
        try:
            sent = base64.b64decode(text[found.end() :], validate=True)
        except (binascii.Error, ValueError) as error:
            raise InputError(f"{name}: is not base64") from error
    if sent is None:
        return None
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
