"""uvicorn's HTTP/1.1 with a bounded number of connections, where idle ones make room for new ones: uvicorn answers 503
beyond its own limit, and waits for a request's first line without end."""

import asyncio
import logging
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 512  # open connections; beyond it, those idle longest are closed
KEEP_ALIVE = 20
"""Seconds that an idle connection stays open after an answer: more than the 5 of httpx (and OpenAI's client), so that
the server does not close it just as a request arrives."""


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol with the bound above."""

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
    return uvicorn.Config(app, log_level="warning", http=BoundedProtocol, **options)


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))
