"""The values that a studio and its sessions are told and give back. No library of the web is known here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from longsana.data.story import PICTURE
from longsana.runtime.arguments import TEXT, Number
from longsana.runtime.errors import InputError
from longsana.runtime.foreign import check_characters

FPS = Number(least=1, most=240)
"""Pictures a second that a live video may have."""
Media = Literal["mp4", "pixels"]
"""The form of a session's chunks: pieces of one fragmented mp4 (H.264), or plain pictures (F, H, W, 3), uint8."""


@dataclass(frozen=True)
class Words:
    """A prompt without the spaces around it: at least one character and at most `most`, and no name of a picture."""

    most: int

    def settle(self, name: str, value: Any) -> str:
        text = str(TEXT.settle(name, value)).strip()
        if not text:
            raise InputError(f"{name}: is empty; say what is to be seen")
        if len(text) > self.most:
            raise InputError(f"{name}: {len(text):,} characters; at most {self.most:,} are read")
        check_characters(text, name)
        if PICTURE in text:  # in prompt files it names a file
            raise InputError(f"{name}: {PICTURE} in it; a picture comes with the order of a video, and is never named")
        return text


class Full(InputError):
    """No session can be taken in: as many wait as may. The message is one line for whoever asked."""


@dataclass(frozen=True)
class Limits:
    """Bounds of a studio.

    sessions: that have a place at a time, paused ones included. queue: that wait for one; a further one is refused.
    kept: last chunks of a session whose states are kept, for `rewind`, `fork` and changes of the past; at least 1.
    memory_bytes: for the states and decoders' memories of all sessions; None: 80 % of what is free on the GPU when the
        studio opens, and 2 GiB on a CPU. Where it is short, earlier chunks are kept without the decoder's memory, then
        fewer of them, at least one; where that is too much as well, a session waits.
    load: share of the time that sessions at their viewers' pace may take together, by measured speed. One that takes
        more than that alone, or has no pace, is made in the time that others leave, and gives way to them between
        passes of the network and groups of the decoder.
    pass_seconds: of one pass of the network, for which all others wait; an order whose passes would take longer by
        measured speed is refused.
    most_lead: seconds that an order may ask to be ahead of its viewer, at most.
    most_pixels: height times width of a video, at most. most_chunk_frames: latent frames of a chunk, at most.
    most_frames: pixel frames of a video with an end, at most.
    most_prompt: characters of a prompt, at most. most_events: changes of prompt that wait for a chunk, at most.
    captions: texts whose embeddings are kept, for all sessions together.
    snapshots, snapshot_bytes: files that the folder of snapshots holds, at most; those of the session that has most go.
    session_snapshots: of one session, of those that are asked for, at most; the oldest go. own_snapshots: of one
        session, of those that it saves of itself (`Order.snapshot_every`).
    """

    sessions: int = 16
    queue: int = 64
    kept: int = 4
    memory_bytes: int | None = None
    load: float = 0.9
    pass_seconds: float = 3.0
    most_lead: float = 10.0
    most_pixels: int = 1280 * 720
    most_chunk_frames: int = 20
    most_frames: int = 16 * 3600 + 1  # an hour of Wan's, 4 n + 1
    most_prompt: int = 20_000
    most_events: int = 16
    captions: int = 64
    snapshots: int = 256
    snapshot_bytes: int = 64 << 30
    session_snapshots: int = 16
    own_snapshots: int = 2


@dataclass(frozen=True)
class Order:
    """A video that is asked for. None: as the studio's config says, or as the snapshot says from which it goes on.

    prompt: a text, or a story (which needs `num_frames`); with a snapshot None goes on with its own.
    num_frames: pixel frames, 4 n + 1 with Wan's VAE; after a snapshot how many more, 4 n. None: endless.
    seed, height, width, fps, chunk_frames, first_chunk_frames, prompt_change, transition_chunks: see `SamplingConfig`.
    image: bytes of the picture that the video begins with, in any format that Pillow reads here.
    film: a file of the film that the video goes on from, which is not shown; the caller's, read until the first chunk.
    snapshot: id of the one from which the video goes on, with its size and seed.
    pace: chunks are given out in the time of their presentation, `lead` seconds ahead of it; False: as soon as they are
        made, for files.
    lead: seconds; None: as many as making a chunk again takes by measure, so that a change of prompt stalls no viewer.
    media: see there.
    snapshot_every: a snapshot is saved after each so many chunks that were taken; 0: only when asked for.
    """

    prompt: str | None = None
    num_frames: int | None = None
    seed: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    chunk_frames: int | None = None
    first_chunk_frames: int | None = None
    prompt_change: str | None = None
    transition_chunks: int | None = None
    image: bytes | None = None
    film: Path | None = None
    snapshot: str | None = None
    pace: bool = True
    lead: float | None = None
    media: Media = "mp4"
    snapshot_every: int = 0


@dataclass(frozen=True)
class Chunk:
    """A piece of a session's media.

    data: one moof and mdat, which begins with an IDR; of `pixels` rgb24 (frames, height, width, 3).
    init: the init segment (ftyp and moov) before the first piece; None before others. It is `Session.init` as well.
    index: of pieces that were sent, from 0, without a gap. generation_index: of the chunk in its video, which falls
        with a rewind. frames: pictures in it. pts_seconds: presentation time of its first one, which only rises.
    started: ids of the changes of prompt that take effect with it. active: of those whose transition goes on after it.
        completed: of those whose prompt it shows alone, or that another one has replaced.
    generation_ms, encode_ms: wall time of the worker, without waiting for a turn; of the encoder.
    snapshot: id of the last state that the session has saved of itself (`Order.snapshot_every`), of a chunk before; ""
        where there is none. The last `Limits.own_snapshots` are kept.
    """

    data: bytes
    init: bytes | None
    index: int
    generation_index: int
    frames: int
    pts_seconds: float
    duration_seconds: float
    started: tuple[str, ...] = ()
    active: tuple[str, ...] = ()
    completed: tuple[str, ...] = ()
    generation_ms: float = 0.0
    encode_ms: float = 0.0
    snapshot: str = ""


@dataclass(frozen=True)
class End:
    """The end of a session's media; every later `take` gives it again.

    reason: "finished" (all of its frames were taken), "closed" (somebody closed it), or "failed".
    message: of a failure, one line; "" otherwise. chunks: pieces that were taken.
    """

    reason: Literal["finished", "closed", "failed"]
    message: str
    chunks: int


@dataclass(frozen=True)
class SessionFigures:
    """Measurements of one session.

    state: "waiting" in the queue, "running", "paused", "finished", "closed" or "failed". position: in the queue from 1,
    else 0. bytes: of the states that it holds, shared ones counted. ahead_seconds: made and not taken. underruns,
    stall_seconds: times that its viewer ran dry, by the pace of media time, and for how long.
    first_chunk_seconds: from the order to the first piece; None before it.
    """

    id: str
    state: str
    position: int
    height: int
    width: int
    chunks: int
    bytes: int
    ahead_seconds: float
    underruns: int
    stall_seconds: float
    first_chunk_seconds: float | None


@dataclass(frozen=True)
class Figures:
    """Measurements of a studio, for /metrics.

    seconds_a_chunk: median wall seconds of a chunk by (height, width, latent frames), without waiting, of the last 32.
    real_time_factor: wall seconds that a second of video took, of the last chunks of all sessions; below 1 is real
        time; None before the first chunk. load: share of the time that the paced sessions take together.
    memory_bytes, most_memory_bytes: of states, held and allowed. chunks_made, chunks_dropped, failures: so far.
    replicas: of a fleet, that answered. moves: of its sessions from one to another, so far.
    """

    sessions: tuple[SessionFigures, ...]
    running: int
    waiting: int
    load: float
    memory_bytes: int
    most_memory_bytes: int
    seconds_a_chunk: dict[tuple[int, int, int], float]
    real_time_factor: float | None
    chunks_made: int
    chunks_dropped: int
    failures: int
    snapshots: int
    snapshot_bytes: int
    replicas: int = 1
    moves: int = 0
