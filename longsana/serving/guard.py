"""The door of a server: who may come in, from which pages, and with how much. It knows ASGI and no library."""

from __future__ import annotations

import base64
import hmac
import ipaddress
import json
import os
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from longsana.runtime.errors import InputError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

API_KEY = "LONGSANA_API_KEY"
"""The variable with what clients must know."""
OPEN = ("/", "/health")
"""Paths that need no key: the page, which asks for it, and whether the server lives."""
PROTOCOL, KEY = "longsana", "longsana.key."
"""Subprotocols of a WebSocket: the one that is spoken, and what stands before a key in base64url, since a page cannot
send headers."""
MOST_BODY = 24 << 20
"""Bytes of a request's body."""


def read_key() -> str | None:
    """The key in the environment; None where none is set.

    Raises:
        InputError: no header can carry it.
    """
    key = os.environ.get(API_KEY) or None
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        raise InputError(f"{API_KEY}: has characters that no header can carry; use letters, digits and signs of ASCII")
    return key


class Guard:
    """Lets requests through to `app` that have the key, come from a page of ours or no page, and are not too long.

    key: what clients must know; None: nothing. origins: of further pages that may use the server, such as
    https://example.org. local: whether only this machine reaches the server; then a name that somebody else's DNS
    leads here is no name of it.
    """

    def __init__(self, app: App, *, key: str | None, origins: tuple[str, ...] = (), local: bool = True) -> None:
        self._app, self._key, self._origins, self._local = app, key, origins, local
        self._names = {urlsplit(origin).hostname for origin in origins}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is None and scope["type"] == "http":
            length = headers.get(b"content-length", "0")
            if length.isdecimal() and int(length) <= MOST_BODY:
                await self._app(scope, _limited(receive), send)
                return
            refusal = 413, f"a body of more than {MOST_BODY} bytes"
        if refusal is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await _answer(send, *refusal)
        else:  # a page hears why of a WebSocket alone that was accepted first
            await receive()
            await send({"type": "websocket.accept", "subprotocol": spoken(scope)})
            await send({"type": "websocket.close", "code": 1008, "reason": refusal[1]})

    def _refusal(self, scope: Message, headers: dict[bytes, str]) -> tuple[int, str] | None:
        host = headers.get(b"host", "")
        if not self._is_ours(host):
            return 421, "this server does not go by that name; use localhost, or have it started with --origin"
        origin = headers.get(b"origin")
        if origin is not None and origin not in self._origins and origin.partition("://")[2].lower() != host.lower():
            return 403, "pages of other servers may not use this one, unless it is started with --origin"
        if self._key is not None and scope["path"] not in OPEN and not self._knows_key(scope, headers):
            return 401, "the API key is missing or wrong"
        return None

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if not self._local or name == "localhost" or name in self._names:
            return True
        try:
            return bool(ipaddress.ip_address(name))
        except ValueError:
            return False

    def _knows_key(self, scope: Message, headers: dict[bytes, str]) -> bool:
        kind, _, given = headers.get(b"authorization", "").partition(" ")
        found = [given] if kind.lower() == "bearer" else []
        for name in scope.get("subprotocols", ()):
            if name.startswith(KEY):
                text = name.removeprefix(KEY)
                try:
                    found.append(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode())
                except ValueError:
                    continue
        key = (self._key or "").encode()
        return any(hmac.compare_digest(one.strip().encode("utf-8", "replace"), key) for one in found)


def spoken(scope: Message) -> str | None:
    """The subprotocol to speak: a browser that names some hears nothing else."""
    return PROTOCOL if PROTOCOL in scope.get("subprotocols", ()) else None


class TooLong(Exception):
    """A body that goes on after the most that is read."""


def _limited(receive: Receive) -> Receive:
    """Receive no more than `MOST_BODY`, whatever the headers said."""
    read = 0

    async def limited() -> Message:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        if read > MOST_BODY:
            raise TooLong
        return message

    return limited


async def _answer(send: Send, status: int, message: str) -> None:
    content = json.dumps(error_value(status, message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def error_value(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """The object that tells clients of an error, as they know it from elsewhere."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 503: "overloaded_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}
