"""What stands before the page: gradio may serve its own files and what was uploaded to it, and nothing else.

Gradio's `file=` and `proxy=` routes fetch addresses for whoever asks, and an event may name any file of the server as
one that was uploaded. Both end here. The headers let a browser load nothing from elsewhere.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anygpt.errors import InputError
from anygpt.serving.http import logger, parse_json

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
CLOSED = (
    *("run/", "api/", "call/"),
    "proxy=",
    "stream/",
    "deep_link",
    "runs",
    "component_server",
    "monitoring",
)  # routes that the page has no use for


class Guard:
    """An ASGI application before another one.

    Args:
        app: what it stands before.
        uploads: the folder of uploaded files.
        event_bytes: of an event's body.
        upload_bytes: of an upload's body, all of its files together.
    """

    def __init__(self, app: ASGIApp, uploads: Path, event_bytes: int = 256 * 1024, upload_bytes: int = 64 * 1024**2):
        self.app = app
        self.uploads = os.path.realpath(uploads)
        self.event_bytes, self.upload_bytes = event_bytes, upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        started = False

        async def with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        status, reason = self._look_at(scope)
        if status is None and scope["method"] not in ("GET", "HEAD") and not _is_upload(scope):
            try:
                status, reason, receive = await self._look_into(scope, receive)
            except ClientDisconnect:
                return
        if status is not None:
            await refuse(status, reason)(scope, receive, with_headers)
        else:
            try:
                await self.app(scope, receive, with_headers)
            except Exception as error:  # of gradio, over a request that its page would not send
                logger.warning("%s %s: %s", scope["method"], scope["path"][:100], one_line(error))
                if not started:
                    await refuse(400, "this request cannot be understood")(scope, receive, with_headers)

    def _look_at(self, scope: Scope) -> tuple[int | None, str]:
        """A status and a reason to refuse a request by its first lines, or None."""
        route = scope["path"].partition("/gradio_api/")[2]
        if route.startswith(CLOSED):
            return 404, "there is nothing here"
        if route.startswith("file=") and not self._uploaded(route.removeprefix("file=")):
            return 403, "only what was uploaded or made here can be read"
        stated = Headers(scope=scope).get("content-length", "")
        limit = self.upload_bytes if _is_upload(scope) else self.event_bytes
        if stated.isdigit() and int(stated) > limit:
            return 413, f"this has {int(stated):,} bytes, more than the {limit:,} that are allowed"
        if _is_upload(scope) and not stated.isdigit():
            return 411, "an upload must say how long it is"
        return None, ""

    async def _look_into(self, scope: Scope, receive: Receive) -> tuple[int | None, str, Receive]:
        """The same by its body, and the body again for whoever comes next."""
        body = bytearray()
        async for piece in HTTPRequest(scope, receive).stream():
            body += piece
            if len(body) > self.event_bytes:
                return 413, f"an event has more than the {self.event_bytes:,} bytes that are allowed", receive
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        try:
            paths = list(_paths(parse_json(bytes(body)))) if body else []
        except (InputError, RecursionError) as error:
            return 400, str(error) or "the body is nested too deeply", again
        if not all(isinstance(path, str) and self._uploaded(path) for path in paths):
            return 400, "a file that was not uploaded here is named", again
        return None, "", again

    def _uploaded(self, path: str) -> bool:
        if "\0" in path:
            return False
        return os.path.realpath(path).startswith(os.path.join(self.uploads, ""))


def one_line(error: BaseException | None) -> str:
    """An error for the log, where its traceback would say nothing more."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class QuietTraceback:
    """In place of the module `traceback` in gradio's queue, which prints one for whatever a visitor sends.

    What goes wrong in an answer is logged by the page itself.
    """

    @staticmethod
    def print_exc() -> None:
        logger.warning("an event of the page was refused: %s", one_line(sys.exc_info()[1]))


def refuse(status: int, reason: str) -> JSONResponse:
    """An error as gradio's page understands it."""
    return JSONResponse({"detail": reason}, status)


def _is_upload(scope: Scope) -> bool:
    return scope["path"].rstrip("/").endswith("/gradio_api/upload")


def _paths(content: Any) -> Iterator[Any]:
    """All that stands under a key `path`, at any depth."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key == "path" and value is not None:
                yield value
            yield from _paths(value)
    elif isinstance(content, list):
        for value in content:
            yield from _paths(value)
