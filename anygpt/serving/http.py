"""The HTTP interface: OpenAI's `POST /v1/chat/completions` and `GET /v1/models`, `GET /health` and `GET /metrics`."""

import asyncio
import contextlib
import hmac
import json
from collections.abc import AsyncIterator, Sequence
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
from anygpt.generation.events import DecodingStarted, DecodingStep, MediumDone, TextPiece
from anygpt.serving import openai_form as form
from anygpt.serving.engine import Busy, Engine
from anygpt.serving.gate import Gate, logger, parse_json

UNCOUNTED = ("/health", "/metrics")
FAULT = "an internal error; the server's log has the details"
HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 408: {"Connection": "close"}, 429: {"Retry-After": "5"}}


class Refused(Exception):
    """A rejected request; `status` is HTTP's, `kind` and `code` are OpenAI's `type` and `code`."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": None, "code": code}}

    def response(self) -> Response:
        return JSONResponse(self.body, self.status, headers=HEADERS.get(self.status))


class Interface:
    """The routes, for a model of this name, with limits on requests.

    With a `key`, clients must send it to `/v1` as `Authorization: Bearer <key>`.
    """

    def __init__(self, engine: Engine, model: str, limits: form.Limits | None = None, key: str | None = None):
        self.engine, self.model, self.limits, self.key = engine, model, limits or form.Limits(), key
        self._decoding = asyncio.Semaphore(2)  # decoded media are larger than bodies

    def app(self, host: str = "127.0.0.1", hosts: Sequence[str] = (), origins: Sequence[str] = ()) -> ASGIApp:
        routes = [
            Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.models, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
        ]
        handlers = dict.fromkeys((Refused, HTTPException, Exception), self._respond)
        app: ASGIApp = self._counted(Starlette(routes=routes, exception_handlers=handlers))
        if origins:
            app = CORSMiddleware(app, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])
        return Gate(app, lambda reason: Refused(403, reason).response(), host, hosts, origins)

    def _counted(self, app: ASGIApp) -> ASGIApp:
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
        name = request.path_params.get("name")
        return JSONResponse(
            self._card(name) if name is not None else {"object": "list", "data": [self._card(self.model)]}
        )

    def _card(self, model: Any) -> dict[str, Any]:
        if model != self.model:
            raise Refused(404, f"there is no model {model!r:.80}; there is {self.model!r}", code="model_not_found")
        return {"id": model, "object": "model", "created": 0, "owned_by": "anygpt"}

    async def chat_completions(self, request: HTTPRequest) -> Response:
        try:
            wanted = await self._accept(request)
            events = self._events(wanted, request)
            event = await anext(events)  # before a stream begins, so that errors have their status
            if wanted.stream:
                stream, kind = self._stream(wanted, event, events), "text/event-stream"
                return StreamingResponse(stream, media_type=kind, headers={"Cache-Control": "no-cache"})
            while not isinstance(event, Reply):
                event = await anext(events)
            return JSONResponse(await asyncio.to_thread(wanted.completion, event))
        except ClientDisconnect:
            return Response(status_code=499)  # the client has disconnected
        except Exception as error:
            raise self._refusal(error) from error

    async def _accept(self, request: HTTPRequest) -> form.Request:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(415, f"the content type is {kind!r:.60}; expected application/json")
        body, limits = bytearray(), self.limits
        try:
            with anyio.fail_after(limits.body_seconds):
                async for piece in request.stream():
                    body += piece
                    if len(body) > limits.body_bytes:
                        raise Refused(413, f"the body has more than the {limits.body_bytes:,} bytes that are allowed")
        except TimeoutError:
            raise Refused(408, f"the body had not arrived after {limits.body_seconds:g} seconds") from None
        async with self._decoding:
            return await asyncio.to_thread(self._understand, bytes(body))

    def _understand(self, body: bytes) -> form.Request:
        content = parse_json(body)
        if not isinstance(content, dict):
            raise InputError(f"the body is a JSON {type(content).__name__}; expected an object with model and messages")
        self._card(content.get("model"))
        return form.parse_request(content, self.engine.chat_model, self.limits)

    async def _events(self, wanted: form.Request, request: HTTPRequest) -> AsyncIterator[Any]:
        """The events of an answer, and its `Reply`; raises its error, or `ClientDisconnect` once the client has gone.

        The request's body must have been read.
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def deliver(event: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the server has shut down
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = self.engine.submit(wanted.messages, wanted.settings, deliver)

        async def watch_client() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            job.cancel()  # immediately, even if nobody awaits an event
            events.put_nowait(ClientDisconnect())

        watching, event = asyncio.create_task(watch_client()), None
        try:
            while not isinstance(event, Reply):
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            watching.cancel()
            job.cancel()  # no effect on a finished job

    async def _stream(self, wanted: form.Request, event: Any, events: AsyncIterator[Any]) -> AsyncIterator[str]:
        try:
            yield _sse(wanted.chunk({"role": "assistant", "content": ""}))
            while not isinstance(event, Reply):
                if isinstance(event, TextPiece):
                    yield _sse(wanted.chunk({"content": event.text}))
                elif isinstance(event, DecodingStarted):
                    yield _sse(wanted.chunk({}, progress={"decoder": event.key, "step": 0}))
                elif isinstance(event, DecodingStep):
                    progress = {"decoder": event.key, "step": event.step, "steps": event.steps}
                    yield _sse(wanted.chunk({}, progress=progress))
                elif isinstance(event, MediumDone):
                    part = await asyncio.to_thread(form.part_of, event.content)
                    yield _sse(wanted.chunk({"parts": [part | {"index": event.segment}]}))
                event = await anext(events)
            yield _sse(wanted.chunk({}, form.finish_reason(event)))
            if wanted.include_usage:
                yield _sse(wanted.usage_chunk(event))
            yield "data: [DONE]\n\n"
        except ClientDisconnect:
            return
        except Exception as error:
            yield _sse(self._refusal(error).body)

    def _refusal(self, error: Exception) -> Refused:
        if isinstance(error, Refused):
            return error
        if isinstance(error, Busy):
            return Refused(429, str(error), "busy")
        if isinstance(error, InputError):
            return Refused(400, str(error), code="context_length_exceeded" if isinstance(error, TooLong) else None)
        logger.error("a request failed", exc_info=error)
        return Refused(500, FAULT, "server_error")

    async def _respond(self, request: HTTPRequest, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            return self._refusal(error).response()
        response = Refused(error.status_code, f"{request.method} {request.url.path[:100]}: {error.detail}").response()
        response.headers.update(error.headers or {})  # such as `Allow`
        return response


def _sse(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
