"""Middleware of both servers: rejects requests from other sites' pages, and too many at once.

A page of another site can make a visitor's browser send requests to a server on the visitor's machine: with the page's
`Origin`, or, after DNS rebinding, with the page's host name as `Host`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable
from contextlib import suppress
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

    Starlette's `TrustedHostMiddleware` knows neither IPv6 addresses nor "any address of this machine".

    Args:
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
        counted = scope["type"] == "http" and scope["path"] not in UNCOUNTED
        if scope["type"] == "websocket":  # neither server uses them
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http" and (reason := self._foreign(Headers(scope=scope))):
            await self.refuse(403, reason)(scope, receive, send)
        elif counted and self._running >= MAX_REQUESTS:
            reason = f"{MAX_REQUESTS} requests are open already; try again in a while"
            await self.refuse(503, reason)(scope, receive, send)
        else:
            self._running += counted
            try:
                await self.app(scope, receive, send)
            finally:
                self._running -= counted

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
