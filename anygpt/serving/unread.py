"""Middleware that closes a connection if its request is answered before the body has been read."""

from __future__ import annotations

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Unread:
    """ASGI middleware.

    uvicorn would read and discard the rest of a body without limit. Here such an answer has `Connection: close`. Some
    of the body is still read, since a client that sends everything before it reads the answer would otherwise lose it.

    Args:
        app: the wrapped application.
        more_bytes, more_seconds: limits of the data read and discarded after the answer.
    """

    def __init__(self, app: ASGIApp, more_bytes: int = 64 * 1024**2, more_seconds: float = 3.0):
        self.app = app
        self.more_bytes, self.more_seconds = more_bytes, more_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _has_body(scope):
            await self.app(scope, receive, send)
            return
        unread, closing = True, False

        async def receiving() -> Message:
            nonlocal unread
            message = await receive()
            unread = unread and message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def read_more() -> None:
            size = 0
            with anyio.move_on_after(self.more_seconds):
                while unread and size <= self.more_bytes:
                    size += len((await receiving()).get("body", b""))

        async def sending(message: Message) -> None:
            nonlocal closing
            if message["type"] == "http.response.start" and unread:
                closing = True
                MutableHeaders(scope=message)["Connection"] = "close"
            if closing and message["type"] == "http.response.body" and not message.get("more_body", False):
                await send(message | {"more_body": True})
                await read_more()
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        await self.app(scope, receiving, sending)


def _has_body(scope: Scope) -> bool:
    headers = Headers(scope=scope)
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
