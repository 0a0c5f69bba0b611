"""Middleware of both servers that rejects requests from other sites' pages, and too many at once.

A page of another site can make a visitor's browser send requests to a server on the visitor's machine: with the page's
`Origin`, or, after DNS rebinding, with the page's host name as `Host`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

LOCAL = ("localhost", "127.0.0.1", "::1")
EVERYWHERE = ("0.0.0.0", "::", "")
MAX_REQUESTS = 256
"""Requests handled at once, including those waiting for the model."""
UNCOUNTED = ("/health", "/metrics")


class Gate:
    """ASGI middleware.

    Args:
        app: the wrapped application.
        refuse: builds a response from a status and a message.
        host: address that the server listens on.
        hosts: further accepted host names; `*` for any.
        origins: accepted origins of other sites, such as `https://example.com`; `*` for any.
    """

    def __init__(
        self,
        app: ASGIApp,
        refuse: Callable[[int, str], Response],
        host: str = "127.0.0.1",
        hosts: Iterable[str] = (),
        origins: Iterable[str] = (),
    ):
        self.app, self.refuse = app, refuse
        self.everywhere = host in EVERYWHERE
        self.hosts, self.origins = {*LOCAL, host, *hosts}, set(origins)
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no WebSockets
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._knows(host):
            reason = f"this server does not answer to the name {host[:80]!r}; allow it with --allow-host"
            await self.refuse(403, reason)(scope, receive, send)
        elif origin is not None and not self._welcomes(origin, host):
            reason = f"pages of {origin[:80]!r} may not ask this server; allow them with --cors-origin"
            await self.refuse(403, reason)(scope, receive, send)
        elif scope["path"] in UNCOUNTED:
            await self.app(scope, receive, send)
        elif self._running >= MAX_REQUESTS:
            await self.refuse(503, f"{MAX_REQUESTS} requests are open already; try again in a while")(
                scope, receive, send
            )
        else:
            self._running += 1
            try:
                await self.app(scope, receive, send)
            finally:
                self._running -= 1

    def _knows(self, host: str) -> bool:
        if not host or "*" in self.hosts:  # browsers always send a host
            return True
        name = _hostname(f"//{host}")
        return name in self.hosts or (self.everywhere and _is_address(name))

    def _welcomes(self, origin: str, host: str) -> bool:
        if "*" in self.origins or origin in self.origins:
            return True
        return origin.partition("://")[2] == host != ""


def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
