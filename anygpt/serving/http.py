"""The HTTP interface: OpenAI's `POST /v1/chat/completions` and `GET /v1/models`, and `GET /health`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from anygpt.chat.chat_model import Reply
from anygpt.errors import InputError
from anygpt.generation.events import DecodingStarted, DecodingStep, Event, MediumDone, TextPiece
from anygpt.serving import openai_form as form
from anygpt.serving.engine import Busy, Engine, Job
from anygpt.serving.unread import Unread

logger = logging.getLogger(__name__)

FAULT = "something went wrong here; the server's log says what"


@dataclass(frozen=True)
class BodyLimits:
    """Of the bodies of requests: bytes of one, bytes of all at once, and seconds until one is there."""

    bytes: int = 32 * 1024**2
    all_bytes: int = 512 * 1024**2
    seconds: float = 60.0


class Refused(Exception):
    """A request that gets an error; `status` is HTTP's."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error"):
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind

    def response(self) -> Response:
        headers = {"Retry-After": "5"} if self.status in (429, 503) else None
        return JSONResponse(form.error_body(self.message, self.kind), self.status, headers=headers)


class Interface:
    """The routes.

    Args:
        engine: answers.
        model: the name under which the model is known.
        limits: of what a request asks for.
        bodies: of requests' bodies.
    """

    def __init__(self, engine: Engine, model: str, limits: form.Limits | None = None, bodies: BodyLimits | None = None):
        self.engine, self.model = engine, model
        self.limits, self.bodies = limits or form.Limits(), bodies or BodyLimits()
        self._held = 0  # bytes of bodies that are being read or understood
        self._decoding = ThreadPoolExecutor(2, thread_name_prefix="decoding")

    def app(self) -> ASGIApp:
        routes = [
            Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.one_model, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
        ]
        handlers = {HTTPException: self._http_error, Exception: self._fault}
        return Unread(Starlette(routes=routes, exception_handlers=handlers))

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
            return Response(status_code=499)  # nobody reads it
        try:
            first = await _next(events, job, request)
            if isinstance(first, Exception):
                return self._refusal(first).response()
            if wanted.stream:
                body = self._stream(request, wanted, job, events, first)
                return StreamingResponse(body, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
            while not isinstance(first, Reply | Exception):
                first = await _next(events, job, request)
            if isinstance(first, Exception):
                return self._refusal(first).response()
            return JSONResponse(await self._in_thread(form.completion, wanted, self.model, first))
        except ClientDisconnect:
            job.cancel()
            return Response(status_code=499)
        except BaseException:
            job.cancel()
            raise

    async def _accept(self, request: HTTPRequest) -> tuple[form.Request, Job, asyncio.Queue]:
        """Read and understand a request, and put it into the queue."""
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
            with contextlib.suppress(RuntimeError):  # the server has ended, and nobody listens
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

    async def _stream(
        self, request: HTTPRequest, wanted: form.Request, job: Job, events: asyncio.Queue, event: Any
    ) -> AsyncIterator[str]:
        """Server-sent events until the answer is done."""
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
                event = await _next(events, job, request)
            if isinstance(event, Exception):
                refused = self._refusal(event)
                yield _sse(form.error_body(refused.message, refused.kind))
                return
            yield _sse(chunk({}, form.finish_reason(wanted, event)))
            if wanted.include_usage:
                yield _sse(form.usage_chunk(wanted, self.model, event))
            yield "data: [DONE]\n\n"
        except ClientDisconnect:
            return
        finally:
            job.cancel()

    def _refusal(self, error: Exception) -> Refused:
        if isinstance(error, InputError):
            return Refused(400, str(error))
        logger.error("a request failed", exc_info=error)
        return Refused(500, FAULT, "server_error")

    def _unknown_model(self, name: Any) -> Refused:
        return Refused(404, f"there is no model {name!r:.80}; there is {self.model!r}")

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


async def _next(events: asyncio.Queue, job: Job, request: HTTPRequest) -> Any:
    """The next event of a job.

    Raises:
        ClientDisconnect: the client has gone; the job is cancelled then.
    """
    while True:
        try:
            with anyio.fail_after(0.5):
                return await events.get()
        except TimeoutError:
            if await request.is_disconnected():
                job.cancel()
                raise ClientDisconnect from None


def parse_json(body: bytes) -> Any:
    """JSON as it should be.

    Raises:
        InputError: broken, nested too deeply, or with numbers that JSON does not have.
    """
    try:
        return json.loads(body, parse_constant=_no_constant)
    except RecursionError:
        raise InputError("the body is nested too deeply") from None
    except ValueError as error:  # a broken encoding, and an integer of thousands of digits, are such too
        raise InputError(f"the body is not JSON: {error}") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _sse(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
