"""Who may ask, and how much may be sent: plain ASGI, so that who leaves is seen to have left.

Keys are compared by their digests, all of them, in a time that tells nothing of where they differ;
they are in no message and no log.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from .errors import ApiError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
_CLOSED = "/v1"  # what keys are for
_IN_VAIN = 1 << 26  # bytes of what is refused


class Guard:
    """What stands before an application.

    Args:
        app: it. keys: that may ask; anybody where there are none. most: bytes of a body.
        refused: called with the status of what is refused.
    """

    def __init__(
        self, app: App, keys: Sequence[str], most: int, refused: Callable[[int], None]
    ) -> None:
        self._app, self._most, self._refused = app, most, refused
        self._keys = [_digest(key.encode("utf-8", "surrogateescape")) for key in keys]

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        path, method = scope["path"], scope["method"]
        closed = path == _CLOSED or path.startswith(f"{_CLOSED}/")
        if closed and method != "OPTIONS" and not self._may(headers.get(b"authorization", b"")):
            await self._body(receive, 0)
            await self._refuse(send, ApiError("the API key is missing, or none of ours", 401))
            return
        body = await self._body(receive, self._most)
        if body is None:
            text = f"the body is larger than the {self._most:,} bytes that are taken"
            await self._refuse(send, ApiError(text, 413))
            return
        await self._app(scope, _Given(body, receive), send)

    def _may(self, given: bytes) -> bool:
        if not self._keys:
            return True
        kind, _, key = given.partition(b" ")
        digest = _digest(key.strip())
        fits = [hmac.compare_digest(digest, own) for own in self._keys]
        return any(fits) and kind.lower() == b"bearer"

    async def _refuse(self, send: Send, error: ApiError) -> None:
        self._refused(error.status)
        await refuse(send, error)

    async def _body(self, receive: Receive, most: int) -> bytes | None:
        """All of it; None where it is more than `most`.

        That is read as well, to no use, up to a limit: who is still sending sees no answer.
        """
        found, count, more = bytearray(), 0, True
        while more and count <= most + _IN_VAIN:
            message = await receive()
            if message["type"] != "http.request":
                return b""
            piece = message.get("body", b"")
            count += len(piece)
            if count <= most:
                found += piece
            more = message.get("more_body", False)
        return bytes(found) if count <= most else None


class _Given:
    """A body that was received, and what comes behind it."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        return await self._receive()


async def refuse(send: Send, error: ApiError) -> None:
    """Send an error."""
    body = json.dumps(error.body).encode()
    headers = [(k.lower().encode(), v.encode()) for k, v in error.headers.items()]
    headers += [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
