"""A client of live sessions: it plays, steers and saves one, with the package `websockets` alone."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI
from websockets.sync.client import connect
from websockets.uri import parse_uri

from longsana.runtime.errors import InputError
from longsana.runtime.files import whole_file

MOST_PIECE = 256 << 20
"""Bytes of a message of the server's."""
_CLOSED = {
    1000: "the connection has ended",
    1001: "the server has gone",
    1009: "the server takes no message so long",
    1012: "the server was stopped; sessions go on from their last snapshots when it is there again",
}
"""What the codes say with which a connection was closed without a word."""


class Refused(InputError):
    """The server refuses, or has failed. code: its word for why, such as "no_capacity"."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class Piece(NamedTuple):
    """A chunk. metadata: its `video.chunk_metadata`. data: a piece of an mp4; all of a video's, joined, are one."""

    metadata: dict[str, Any]
    data: bytes


class LiveVideo:
    """A session of a server, from the order on; closing it leaves the session to whoever has its id for a while.

        with LiveVideo("http://127.0.0.1:8000", prompt="a harbour at dawn", num_frames=None) as video:
            for piece in video:
                if piece.metadata["transport_chunk_index"] == 3:
                    video.change("a harbour in a storm")

    url: of the server. key: its API key. timeout: seconds to wait for any message. start: fields of `session.start`,
    see docs/live.md; with `session_id` or `state` (`continuation_state`) the video goes on from there.

    Raises:
        Refused: the server does not want the client, or the order; or the url is none.
        OSError: nobody answers.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        timeout: float = 60.0,
        session_id: str | None = None,
        state: dict[str, Any] | None = None,
        **start: Any,
    ) -> None:
        self._timeout = timeout
        self._pieces: deque[Piece] = deque()
        self._ended = False
        self.done: dict[str, Any] | None = None
        """The `session.done`, once there was one."""
        self.state = state
        """The newest snapshot, a `continuation_state`."""
        self._open = ExitStack()
        try:
            self._socket = self._open.enter_context(
                connect(socket_url(url), open_timeout=timeout, **socket_options(key))
            )
        except InvalidHandshake as error:
            raise Refused(f"{url}: the server refuses the connection ({error})") from error
        extra = {**start.pop("extra_params", {})}
        extra |= {} if session_id is None else {"session_id": session_id}
        extra |= {} if state is None else {"continuation_state": state}
        try:
            asked = {"type": "session.start", "format": "m4s", "extra_params": extra, **start}
            with suppress(ConnectionClosed):  # its reason is still to be read
                self._socket.send(json.dumps(asked))
            self.started = self._until("video.start")
        except BaseException:
            self._open.close()
            raise

    @property
    def session_id(self) -> str:
        """The id under which another connection can go on with the session."""
        return str(self.started["session_id"])

    def __iter__(self) -> Iterator[Piece]:
        """Give the pieces as they come, until the video ends.

        Raises:
            Refused: it failed, or another connection has taken the session.
            TimeoutError: nothing came.
        """
        while True:
            while not self._pieces:
                if self._ended:
                    return
                self._receive()
            yield self._pieces.popleft()

    def change(self, prompt: str, transition_chunks: int | None = None) -> str:
        """Change the prompt; returns the id of the event, which comes back with the first chunk that shows it."""
        interaction: dict[str, Any] = {"event": {"prompt": prompt}}
        if transition_chunks is not None:
            interaction["transition_chunks"] = transition_chunks
        self._send({"type": "session.interaction", "interaction": interaction})
        return str(self._until("session.interaction.queued")["event_id"])

    def pause(self) -> None:
        """Stop media time; within a minute of silence the server gives up, so that `ping` has to be called."""
        self._ask("pause", "paused")

    def resume(self) -> None:
        """Go on after `pause`."""
        self._ask("resume", "resumed")

    def ping(self) -> None:
        """Say that somebody is there."""
        self._ask("ping", "pong")

    def rewind(self, chunks: int) -> None:
        """Go back by so many chunks of those that the server keeps."""
        self._send({"type": "session.rewind", "chunks": chunks})
        self._until("session.rewound")

    def snapshot(self) -> dict[str, Any]:
        """Have the state after the last chunk saved; returns the `continuation_state` to go on from it."""
        self.state = self._ask("snapshot", "snapshot.created")["state"]
        return self.state

    def fork(self) -> str:
        """Begin a session that goes on from the last chunk as well; returns its id, for a `LiveVideo` of its own."""
        return str(self._ask("fork", "forked")["session_id"])

    def stop(self) -> None:
        """End the session; `done` says how many chunks there were. One that has ended stays as it is."""
        if not self._ended:
            self._send({"type": "session.stop"})
        while not self._ended:
            self._receive()
            self._pieces.clear()

    def save(self, path: str | Path, chunks: int | None = None) -> int:
        """Write the pieces that come, at most so many, to an mp4, whole or not at all; returns how many there were."""
        count = 0
        with whole_file(path) as partial, partial.open("wb") as stream:
            if chunks != 0:
                for piece in self:
                    stream.write(piece.data)
                    count += 1
                    if count == chunks:
                        break
            stream.flush()
        return count

    def close(self) -> None:
        """Close the connection."""
        self._ended = True
        self._open.close()

    def __enter__(self) -> LiveVideo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, name: str, answer: str) -> dict[str, Any]:
        self._send({"type": f"session.{name}"})
        return self._until(f"session.{answer}")

    def _send(self, message: dict[str, Any]) -> None:
        if self._ended:  # whether the server has closed the connection already is a matter of chance
            raise Refused("the video has ended; begin another")
        try:
            self._socket.send(json.dumps(message))
        except ConnectionClosed as error:
            raise why_closed(error) from error

    def _until(self, kind: str) -> dict[str, Any]:
        while True:
            if self._ended:
                raise Refused(f"the video ended before {kind} came")
            message = self._receive()
            if message["type"] == kind:
                return message

    def _receive(self) -> dict[str, Any]:
        """Receive a message; a chunk's two are one."""
        try:
            message: dict[str, Any] = json.loads(self._socket.recv(self._timeout))
            if message["type"] == "video.chunk_metadata":
                data = self._socket.recv(self._timeout)
                assert isinstance(data, bytes)
                self._pieces.append(Piece(message, data))
                self.state = message.get("state", self.state)
        except ConnectionClosed as error:
            self._ended = True
            raise why_closed(error) from error
        if message["type"] == "error":
            raise Refused(message["message"], message.get("code", ""))
        if message["type"] == "session.moved":
            self._ended = True
            raise Refused("another connection goes on with this session", "moved")
        if message["type"] == "session.done":
            self._ended, self.done = True, message
        return message


def socket_url(url: str) -> str:
    """The URL of the WebSocket of a server, whose own is http://...

    Raises:
        Refused: that is none.
    """
    try:
        parts = urlsplit(url)
        scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
        target = urlunsplit((scheme, parts.netloc, parts.path.rstrip("/") + "/v1/realtime/video", "", ""))
        parse_uri(target)
    except (InvalidURI, ValueError) as error:
        raise Refused(f"url={url}: must be a server's, such as http://127.0.0.1:8000") from error
    return target


def socket_options(key: str | None) -> dict[str, Any]:
    """Options with which websockets connects there: the key, long messages, and no compression of media."""
    headers = None if key is None else {"Authorization": f"Bearer {key}"}
    return {"additional_headers": headers, "max_size": MOST_PIECE, "compression": None}


def why_closed(error: ConnectionClosed) -> Refused:
    """Say of a connection that is closed why, in the server's words where it said any."""
    if error.rcvd is None:
        return Refused("the connection was lost")
    if error.rcvd.reason:
        return Refused(f"the server refuses: {error.rcvd.reason}")
    return Refused(_CLOSED.get(error.rcvd.code, f"the server has closed the connection ({error.rcvd.code})"))
