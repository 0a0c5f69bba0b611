"""The HTTP interface: OpenAI's `POST /v1/chat/completions` and `GET /v1/models`, `GET /health` and `GET /metrics`."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anygpt.chat.chat_model import Reply, TooLong
from anygpt.errors import InputError
from anygpt.generation.events import DecodingStarted, DecodingStep, Event, MediumDone, TextPiece
from anygpt.serving import openai_form as form
from anygpt.serving.engine import Busy, Engine, Job
from anygpt.serving.gate import UNCOUNTED, Gate
from anygpt.serving.unread import Unread

logger = logging.getLogger(__name__)

FAULT = "something went wrong here; the server's log says what"


@dataclass(frozen=True)
class BodyLimits:
    """Limits of request bodies: bytes of one, bytes of all at once, and seconds to receive one."""

    bytes: int = 32 * 1024**2
    all_bytes: int = 512 * 1024**2
    seconds: float = 60.0


class Refused(Exception):
    """A rejected request; `status` is HTTP's, `kind` and `code` are OpenAI's `type` and `code`."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None):
        super().__init__(message)
        self.status, self.body = status, form.error_body(message, kind, code)

    def response(self) -> Response:
        headers = {429: {"Retry-After": "5"}, 503: {"Retry-After": "5"}, 401: {"WWW-Authenticate": "Bearer"}}
        return JSONResponse(self.body, self.status, headers=headers.get(self.status))


class Interface:
    """The routes.

    Args:
        engine: answers the requests.
        model: name of the model in the API.
        limits: limits of a request's settings.
        bodies: limits of request bodies.
        key: API key that clients must send to `/v1` as `Authorization: Bearer <key>`; None requires no key.
    """

    def __init__(
        self,
        engine: Engine,
        model: str,
        limits: form.Limits | None = None,
        bodies: BodyLimits | None = None,
        key: str | None = None,
    ):
        self.engine, self.model, self.key = engine, model, key
        self.limits, self.bodies = limits or form.Limits(), bodies or BodyLimits()
        self._held = 0  # bytes of bodies being read or parsed
        self._decoding = ThreadPoolExecutor(2, thread_name_prefix="decoding")

    def app(self, host: str = "127.0.0.1", hosts: Sequence[str] = (), origins: Sequence[str] = ()) -> ASGIApp:
        """The ASGI application; see `Gate` for the arguments."""
        routes = [
            Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.one_model, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
        ]
        handlers = {HTTPException: self._http_error, Exception: self._fault}
        app: ASGIApp = self._counted(Starlette(routes=routes, exception_handlers=handlers))
        if origins:
            app = CORSMiddleware(app, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])

        def refuse(status: int, reason: str) -> Response:
            return Refused(status, reason, "busy" if status == 503 else "invalid_request_error").response()

        return Unread(Gate(app, refuse, host, hosts, origins))

    def _counted(self, app: ASGIApp) -> ASGIApp:
        """Middleware that checks the key and counts requests."""

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            async def count(message: Message) -> None:
                if message["type"] == "http.response.start" and scope["path"] not in UNCOUNTED:
                    self.engine.metrics.requests.labels(str(message["status"])).inc()
                await send(message)

            if scope["type"] == "http" and scope["path"].startswith("/v1") and not self._has_key(Headers(scope=scope)):
                refused = Refused(401, "the API key is missing or wrong", code="invalid_api_key")
                await refused.response()(scope, receive, count)
            else:
                await app(scope, receive, count)

        return counted

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given, expected = key.strip().encode("latin-1"), (self.key or "").encode()  # headers come as latin-1
        return self.key is None or (scheme.lower() == "bearer" and hmac.compare_digest(given, expected))

    async def metrics(self, request: HTTPRequest) -> Response:
        return Response(self.engine.metrics.text(), media_type="text/plain; version=0.0.4")

    async def health(self, request: HTTPRequest) -> Response:
        return JSONResponse({"status": "ok", "waiting": self.engine.waiting})

    async def models(self, request: HTTPRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def one_model(self, request: HTTPRequest) -> Response:
        if request.path_params["name"] != self.model:
            return self._unknown_model(request.path_params["name"]).response()
        return JSONResponse(self._card())

    async def chat_completions(self, request: HTTPRequest) -> Response:
        try:
            wanted, job, events = await self._accept(request)
        except Refused as refused:
            return refused.response()
        except ClientDisconnect:
            return Response(status_code=499)  # the client has gone
        listening = Listening(job, events, request)
        streams = False
        try:
            event = await listening.next()
            while not (wanted.stream or isinstance(event, Reply | Exception)):
                event = await listening.next()
            if isinstance(event, Exception):
                return self._refusal(event).response()
            if streams := wanted.stream:
                body = self._stream(wanted, listening, event)
                return StreamingResponse(body, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
            return JSONResponse(await self._in_thread(form.completion, wanted, self.model, event))
        except ClientDisconnect:
            return Response(status_code=499)
        finally:
            if not streams:
                listening.end()

    async def _accept(self, request: HTTPRequest) -> tuple[form.Request, Job, asyncio.Queue]:
        """Read, parse and queue a request."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(415, f"the content type is {kind!r:.60}; expected application/json")
        size = 0

        def hold(count: int) -> None:
            nonlocal size
            size += count
            self._held += count
            if size > self.bodies.bytes:
                raise Refused(413, f"the body has more than the {self.bodies.bytes:,} bytes that this server allows")
            if self._held > self.bodies.all_bytes:
                raise Refused(429, "too many requests with large bodies are being read; try again in a while", "busy")

        try:
            body = await self._read(request, hold)
            wanted, messages = await self._in_thread(self._understand, body)
        except InputError as error:
            raise Refused(400, str(error)) from error
        finally:
            self._held -= size
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def deliver(event: Event | Reply | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the server has shut down
                loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            return wanted, self.engine.submit(messages, wanted.settings, deliver), events
        except Busy as error:
            raise Refused(429, str(error), "busy") from error

    async def _read(self, request: HTTPRequest, hold) -> bytes:
        stated = request.headers.get("content-length", "")
        if stated.isdigit() and int(stated) > self.bodies.bytes:
            raise Refused(413, f"the body has {int(stated):,} bytes; this server allows {self.bodies.bytes:,}")
        body = bytearray()
        try:
            with anyio.fail_after(self.bodies.seconds):
                async for piece in request.stream():
                    hold(len(piece))
                    body += piece
        except TimeoutError:
            raise Refused(408, f"the body was not there after {self.bodies.seconds:g} seconds") from None
        return bytes(body)

    def _understand(self, body: bytes) -> tuple[form.Request, list[dict[str, Any]]]:
        content = parse_json(body)
        wanted = form.parse_request(content, self.engine.chat_model, self.limits)
        name = content.get("model")
        if name != self.model:
            raise self._unknown_model(name)
        return wanted, wanted.decode(self.engine.chat_model)

    async def _stream(self, wanted: form.Request, listening: Listening, event: Any) -> AsyncIterator[str]:
        """Yield server-sent events until the answer is complete."""
        chunk = partial(form.chunk, wanted, self.model)
        try:
            yield _sse(chunk({"role": "assistant", "content": ""}))
            while not isinstance(event, Reply | Exception):
                if isinstance(event, TextPiece):
                    yield _sse(chunk({"content": event.text}))
                elif isinstance(event, DecodingStarted):
                    yield _sse(chunk({}, progress={"decoder": event.key, "step": 0}))
                elif isinstance(event, DecodingStep):
                    progress = {"decoder": event.key, "step": event.step, "steps": event.steps}
                    yield _sse(chunk({}, progress=progress))
                elif isinstance(event, MediumDone):
                    part = await self._in_thread(form.part_of, event.content)
                    yield _sse(chunk({"parts": [part | {"index": event.segment}]}))
                event = await listening.next()
            if isinstance(event, Exception):
                yield _sse(self._refusal(event).body)
                return
            yield _sse(chunk({}, form.finish_reason(event)))
            if wanted.include_usage:
                yield _sse(form.usage_chunk(wanted, self.model, event))
            yield "data: [DONE]\n\n"
        except ClientDisconnect:
            return
        finally:
            listening.end()

    def _refusal(self, error: Exception) -> Refused:
        if isinstance(error, InputError):
            return Refused(400, str(error), code="context_length_exceeded" if isinstance(error, TooLong) else None)
        logger.error("a request failed", exc_info=error)
        return Refused(500, FAULT, "server_error")

    def _unknown_model(self, name: Any) -> Refused:
        return Refused(404, f"there is no model {name!r:.80}; there is {self.model!r}", code="model_not_found")

    def _card(self) -> dict[str, Any]:
        return {"id": self.model, "object": "model", "created": 0, "owned_by": "anygpt"}

    async def _in_thread(self, function, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._decoding, function, *arguments)

    @staticmethod
    async def _http_error(request: HTTPRequest, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path[:100]}: {error.detail}"
        return JSONResponse(form.error_body(message), error.status_code, headers=error.headers)

    @staticmethod
    async def _fault(request: HTTPRequest, error: Exception) -> Response:
        return JSONResponse(form.error_body(FAULT, "server_error"), 500)


class Listening:
    """The events of a job, until its client disconnects.

    Args:
        job: cancelled when the client disconnects.
        events: queue of the job's events.
        request: the request, its body read completely.
    """

    def __init__(self, job: Job, events: asyncio.Queue, request: HTTPRequest):
        self.job, self.events = job, events
        self._gone = asyncio.create_task(self._wait_until_gone(request))

    async def next(self) -> Any:
        """The next event.

        Raises:
            ClientDisconnect: the client has disconnected.
        """
        event = asyncio.create_task(self.events.get())
        try:
            await asyncio.wait({event, self._gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not event.done():
                event.cancel()
        if self._gone.done():
            raise ClientDisconnect
        return event.result()

    def end(self) -> None:
        """Stop listening."""
        self._gone.cancel()
        self.job.cancel()  # no effect on a finished job

    async def _wait_until_gone(self, request: HTTPRequest) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.job.cancel()  # immediately, even if nobody awaits an event


def parse_json(body: bytes) -> Any:
    """Parse strict JSON.

    Raises:
        InputError: invalid, nested too deeply, or with NaN or infinite numbers.
    """
    try:
        return json.loads(body, parse_constant=_no_constant)
    except RecursionError:
        raise InputError("the body is nested too deeply") from None
    except ValueError as error:  # also invalid UTF-8, and integers with thousands of digits
        raise InputError(f"the body is not JSON: {error}") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _sse(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
