"""Protection of the servers: middleware that rejects requests from other sites' pages and, on the demo page, requests
for other files of the server; and uvicorn with a bounded number of connections.

A page of another site can make a visitor's browser send requests to a server on the visitor's machine: with the page's
`Origin`, or, after DNS rebinding, with the page's host name as `Host`.
"""

import asyncio
import ipaddress
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import h11
import uvicorn
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from anygpt.errors import InputError

logger = logging.getLogger(__name__)

LOCAL = ("localhost", "127.0.0.1", "::1")
EVERYWHERE = ("0.0.0.0", "::", "")
# Routes that the page does not use.
CLOSED = (
    *("run/", "api/", "call/", "proxy=", "stream/", "file/"),
    *("deep_link", "runs", "component_server", "monitoring"),
)
# The text of a model or a visitor must not make the browser load anything from another site.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
EVENT_BYTES = 256 * 1024  # of an event of the page
MAX_CONNECTIONS = 512  # open connections; beyond it, those idle longest are closed
KEEP_ALIVE = 20
"""Seconds that an idle connection stays open after an answer: more than the 5 of httpx (and OpenAI's client), so that
the server does not close it just as a request arrives."""


class Gate:
    """ASGI middleware that accepts this machine's names, `host` and `hosts`, and pages of `origins` (`*`: any).

    Starlette's `TrustedHostMiddleware` knows neither IPv6 addresses nor "any address of this machine". `refuse` builds
    a response of status 403 from a message.
    """

    def __init__(
        self,
        app: ASGIApp,
        refuse: Callable[[str], Response],
        host: str = "127.0.0.1",
        hosts: Iterable[str] = (),
        origins: Iterable[str] = (),
    ):
        self.app, self.refuse = app, refuse
        self.everywhere = host in EVERYWHERE
        self.hosts, self.origins = {*LOCAL, host, *hosts}, set(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (reason := self._foreign(Headers(scope=scope))):
            await self.refuse(reason)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _foreign(self, headers: Headers) -> str | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        name, is_address = "", False
        with suppress(ValueError):  # no host name, or no address
            name = urlsplit(f"//{host}").hostname or ""
            is_address = bool(ipaddress.ip_address(name))
        if host and not {"*", name} & self.hosts and not (self.everywhere and is_address):
            return f"this server does not answer to the name {host[:80]!r}; allow it with --allow-host"
        if origin is not None and not {"*", origin} & self.origins and origin.partition("://")[2] != (host or None):
            return f"pages of {origin[:80]!r} may not send requests to this server; allow them with --cors-origin"
        return None


class Guard:
    """ASGI middleware for gradio: closes the routes that the page does not use, refuses events that are large or name
    files outside the folder of `uploads`, and keeps browsers from loading anything from other sites."""

    def __init__(self, app: ASGIApp, uploads: Path):
        self.app, self.uploads = app, os.path.realpath(uploads)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["Content-Security-Policy"] = POLICY
            await send(message)

        try:
            await self.app(scope, await self._checked(scope, receive), sending)
        except ClientDisconnect:
            pass
        except HTTPException as refused:
            await refuse(refused.status_code, refused.detail)(scope, receive, send)
        except Exception as error:  # gradio failed on a request that its page would not send
            logger.warning("%s %s: %s", scope["method"], scope["path"][:100], one_line(error))
            if not started:
                await refuse(400, "this request cannot be understood")(scope, receive, send)

    async def _checked(self, scope: Scope, receive: Receive) -> Receive:
        """A `receive` of the request, whose body, if no upload, was read and checked; raises `HTTPException`."""
        route = scope["path"].partition("/gradio_api/")[2]
        if route.startswith(CLOSED):
            raise HTTPException(404, "there is nothing here")
        if route.startswith("file=") and not self._uploaded(route.removeprefix("file=")):
            raise HTTPException(403, "only uploaded and generated files can be read")
        if route.rstrip("/") == "upload" or scope["method"] in ("GET", "HEAD"):
            return receive
        body = bytearray()
        async for piece in Request(scope, receive).stream():
            body += piece
            if len(body) > EVENT_BYTES:
                raise HTTPException(413, f"this has more than the {EVENT_BYTES:,} bytes that are allowed")
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


def one_line(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def log_refused_event() -> None:
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


def parse_json(body: bytes) -> Any:
    """Parse strict JSON; raises `InputError` if it is invalid, nested too deeply, or has NaN or infinite numbers."""

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is no number of JSON")

    try:
        return json.loads(body, parse_constant=no_constant)
    except RecursionError:
        raise InputError("the body is nested too deeply") from None
    except ValueError as error:  # also invalid UTF-8, and integers with thousands of digits
        raise InputError(f"the body is not JSON: {error}") from None


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol, except that idle connections make room for new ones. uvicorn itself answers 503 beyond its
    limit, and waits for a request's first line forever."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.since = self.loop.time()
        if len(self.connections) > MAX_CONNECTIONS:
            others = [one for one in self.connections - {self} if not one.transport.is_closing()]
            if idle := [one for one in others if one.cycle is None or one.cycle.response_complete]:
                min(idle, key=lambda one: one.since).transport.abort()

    def _unset_keepalive_if_required(self) -> None:
        # The rest of a body whose request was answered is discarded for as long as an idle connection is kept.
        if self.conn.our_state is not h11.DONE or self.conn.their_state is not h11.SEND_BODY:
            super()._unset_keepalive_if_required()


def server_config(app: Any, **options: Any) -> uvicorn.Config:
    logging.getLogger("uvicorn.error").addFilter(_is_worth_a_line)
    options = {"timeout_keep_alive": KEEP_ALIVE, "timeout_graceful_shutdown": 5, "backlog": 256} | options
    return uvicorn.Config(app, log_level="warning", http=BoundedProtocol, ws="none", **options)


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """False for answers that are cancelled on shutdown, and for advice on websockets, which the servers do not use."""
    cancelled = record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError)
    return not cancelled and not record.getMessage().startswith(("Unsupported upgrade", "No supported WebSocket"))
