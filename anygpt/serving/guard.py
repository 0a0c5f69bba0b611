"""Middleware of the page: gradio may only serve its own files and uploads, fetches no addresses, and takes no other
files of the server as uploads; browsers load nothing from other sites."""

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
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
# Routes that the page does not use.
CLOSED = (
    *("run/", "api/", "call/", "proxy=", "stream/", "file/"),
    *("deep_link", "runs", "component_server", "monitoring"),
)


class Guard:
    """ASGI middleware, for a page whose `uploads` are in a folder; bytes limit the body of an event or an upload, and
    `all_bytes` what the folder holds."""

    def __init__(
        self,
        app: ASGIApp,
        uploads: Path,
        event_bytes: int = 256 * 1024,
        upload_bytes: int = 64 * 1024**2,
        all_bytes: int = 2 * 1024**3,
    ):
        self.app = app
        self.uploads = os.path.realpath(uploads)
        self.event_bytes, self.upload_bytes, self.all_bytes = event_bytes, upload_bytes, all_bytes

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

        try:
            await self.app(scope, await self._checked(scope, receive), with_headers)
        except ClientDisconnect:
            pass
        except HTTPException as refused:
            await refuse(refused.status_code, refused.detail)(scope, receive, with_headers)
        except Exception as error:  # gradio failed on a request that its page would not send
            logger.warning("%s %s: %s", scope["method"], scope["path"][:100], one_line(error))
            if not started:
                await refuse(400, "this request cannot be understood")(scope, receive, with_headers)

    async def _checked(self, scope: Scope, receive: Receive) -> Receive:
        """A `receive` of the request, whose body, if no upload, was read and checked; raises `HTTPException`."""
        route = scope["path"].partition("/gradio_api/")[2]
        is_upload = route.rstrip("/") == "upload"
        if route.startswith(CLOSED):
            raise HTTPException(404, "there is nothing here")
        if route.startswith("file=") and not self._uploaded(route.removeprefix("file=")):
            raise HTTPException(403, "only uploaded and generated files can be read")
        stated = Headers(scope=scope).get("content-length", "")
        limit = self.upload_bytes if is_upload else self.event_bytes
        too_large = HTTPException(413, f"this has more than the {limit:,} bytes that are allowed")
        if stated.isdigit() and int(stated) > limit:
            raise too_large
        if is_upload and not stated.isdigit():
            raise HTTPException(411, "an upload needs a Content-Length header")
        if is_upload and int(stated) + _size_of(self.uploads) > self.all_bytes:
            raise HTTPException(503, "there is no room for uploads now: try again in an hour")
        if is_upload or scope["method"] in ("GET", "HEAD"):
            return receive
        body = bytearray()
        async for piece in HTTPRequest(scope, receive).stream():
            body += piece
            if len(body) > limit:
                raise too_large
        try:
            paths = list(_paths(parse_json(bytes(body)))) if body else []
        except (InputError, RecursionError) as error:
            raise HTTPException(400, str(error)) from error
        if not all(isinstance(path, str) and self._uploaded(path) for path in paths):
            raise HTTPException(400, "this names a file that was not uploaded here")
        messages: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def again() -> Message:
            return messages.pop() if messages else await receive()

        return again

    def _uploaded(self, path: str) -> bool:
        return "\0" not in path and os.path.realpath(path).startswith(os.path.join(self.uploads, ""))


def _size_of(folder: str) -> int:
    """Bytes of all files in a folder, some of which may be removed meanwhile."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(path, name)).st_size
    return total


def one_line(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class QuietTraceback:
    """Replaces the module `traceback` in gradio's queue, which prints one for any invalid request."""

    @staticmethod
    def print_exc() -> None:
        logger.warning("an event of the page was refused: %s", one_line(sys.exc_info()[1]))


def refuse(status: int, reason: str) -> JSONResponse:
    return JSONResponse({"detail": reason}, status)


def _paths(content: Any) -> Iterator[Any]:
    if isinstance(content, dict):
        for key, value in content.items():
            if key == "path" and value is not None:
                yield value
            yield from _paths(value)
    elif isinstance(content, list):
        for value in content:
            yield from _paths(value)
