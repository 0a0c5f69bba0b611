"""Connections under a bound: uvicorn's HTTP/1.1, but those that ask for nothing make room for those that do.

uvicorn counts every open connection against `limit_concurrency` and answers 503 beyond it, and it gives a client any
time for its first line; so a thousand connections that say nothing would shut everybody out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 512
"""Open at once; beyond it, those that have been idle longest are closed."""
HEAD_SECONDS = 20
"""Until a new connection must have sent the head of a request."""
KEEP_ALIVE = 20
"""Seconds that an idle connection stays. httpx, and with it OpenAI's client, drops it after 5; were the server's time
the same, a request could come just as it closes."""
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
    """How both servers run under uvicorn; `options` are its own."""
    # What is still being answered when the server ends is cancelled; that is no fault, and needs no traceback.
    logging.getLogger("uvicorn.error").addFilter(_is_no_cancellation)
    options = {"timeout_keep_alive": KEEP_ALIVE, "timeout_graceful_shutdown": 5, "backlog": 256} | options
    return uvicorn.Config(app, log_level="warning", http=BoundedProtocol, **options)


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def allow_open_files() -> None:
    """Ask the system for more open files than the usual 1,024, where it has such a limit."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # not on Windows

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
