"""uvicorn's HTTP/1.1 with a bounded number of connections, where idle ones make room for new ones.

uvicorn counts every open connection against `limit_concurrency`, answers 503 beyond it, and has no timeout for the
first line of a request, so a thousand silent connections would block everybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 512
"""Open connections; beyond it, those idle longest are closed."""
HEAD_SECONDS = 20
"""Seconds until a new connection must have sent the head of a request."""
KEEP_ALIVE = 20
"""Seconds that an idle connection stays open: more than the 5 of httpx (and OpenAI's client), so that the server does
not close it just as a request arrives."""
OPEN_FILES = 4096


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol with the bounds above."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.since = self.loop.time()
        self._head_due = self.loop.call_later(HEAD_SECONDS, self._close_without_a_request)
        if len(self.connections) > MAX_CONNECTIONS:
            idle = [one for one in self.connections if one is not self and one.idle]
            for one in sorted(idle, key=lambda one: one.since)[: len(self.connections) - MAX_CONNECTIONS]:
                one.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_due.cancel()
        super().connection_lost(exc)

    @property
    def idle(self) -> bool:
        """Whether no request is being read or answered."""
        return self.cycle is None or self.cycle.response_complete

    def _close_without_a_request(self) -> None:
        if self.cycle is None:
            self.transport.close()


def server_config(app: Any, **options: Any) -> uvicorn.Config:
    """uvicorn's config for both servers; `options` are its own."""
    # Answers in progress are cancelled on shutdown, which needs no traceback.
    logging.getLogger("uvicorn.error").addFilter(_is_no_cancellation)
    options = {"timeout_keep_alive": KEEP_ALIVE, "timeout_graceful_shutdown": 5, "backlog": 256} | options
    return uvicorn.Config(app, log_level="warning", http=BoundedProtocol, **options)


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def allow_open_files() -> None:
    """Raise the system's limit of open files, usually 1,024, if there is one."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # not on Windows

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
