"""What stands before both servers: middleware that rejects requests from other sites' pages, and uvicorn with a bounded
number of connections.

A page of another site can make a visitor's browser send requests to a server on the visitor's machine: with the page's
`Origin`, or, after DNS rebinding, with the page's host name as `Host`.
"""

import asyncio
import ipaddress
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

LOCAL = ("localhost", "127.0.0.1", "::1")
EVERYWHERE = ("0.0.0.0", "::", "")
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


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol, where idle connections make room for new ones: uvicorn itself answers 503 beyond its limit,
    and waits for a request's first line without end."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.since = self.loop.time()
        if len(self.connections) > MAX_CONNECTIONS:
            idle = [one for one in self.connections if one is not self and one.idle]
            for one in sorted(idle, key=lambda one: one.since)[: len(self.connections) - MAX_CONNECTIONS]:
                one.transport.abort()

    @property
    def idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete


def server_config(app: Any, **options: Any) -> uvicorn.Config:
    # Answers in progress are cancelled on shutdown, which needs no traceback.
    logging.getLogger("uvicorn.error").addFilter(_is_no_cancellation)
    options = {"timeout_keep_alive": KEEP_ALIVE, "timeout_graceful_shutdown": 5, "backlog": 256} | options
    return uvicorn.Config(app, log_level="warning", http=BoundedProtocol, ws="none", **options)


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))
