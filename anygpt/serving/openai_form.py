"""OpenAI's chat completions format: parsing of requests into conversations and settings, and formatting of answers.

Media are content parts with data URLs: `{"type": "image_url", "image_url": {"url": …}}`, likewise `video_url`, and
`{"type": "input_audio", "input_audio": {"data": <base64>, "format": "wav"}}`. An answer has its text in `content`, and
text and media in order, as such content parts, in `parts`; clients may send both back in later requests.
"""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from anygpt.chat.chat_model import ChatModel, Reply, Settings
from anygpt.data.schema import checked_text
from anygpt.decoders.options import MAX_SEED, is_integer, is_number
from anygpt.errors import InputError
from anygpt.media.types import MEDIA, media_type
from anygpt.outputs import Answer, Segment
from anygpt.serving.media import from_base64, from_data_url, to_base64, to_data_url

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
OWN_FIELDS = ("require", "forbid", "decoders")
FIELDS = (
    *("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stream"),
    *("stream_options", "n", "modalities", "stop"),
    *OWN_FIELDS,
)
# Fields that do not affect an answer.
IGNORED = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("verbosity", "reasoning_effort", "parallel_tool_calls"),
)
# Accepted values of unsupported fields: those without effect. Tools are never called, so "none" is satisfied.
NEUTRAL = {
    **{"frequency_penalty": [0], "presence_penalty": [0], "logprobs": [False], "top_logprobs": [0], "logit_bias": [{}]},
    **{"tools": [[]], "functions": [[]], "tool_choice": ["none", "auto"], "function_call": ["none", "auto"]},
    "response_format": [{"type": "text"}],
}
TOOLS = {"tools": "tool_choice", "functions": "function_call"}
MAX_STOPS = 4


@dataclass(frozen=True)
class Limits:
    """Limits of one request."""

    new_tokens: int = 2**20
    messages: int = 200
    characters: int = 100_000
    media: int = 16
    steps: int = 200
    side: int = 1024
    frames: int = 64
    seconds: float = 30.0

    def check(self, what: str, amount: float, limit: float) -> None:
        if amount > limit:
            raise InputError(f"{what} is {amount!s:.40}, more than the {limit} that this server allows")


@dataclass
class Request:
    """A parsed request; the media in `messages` are not decoded yet (see `decode`)."""

    messages: list[dict[str, Any]]
    settings: Settings
    stream: bool = False
    include_usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def decode(self, chat_model: ChatModel) -> list[dict[str, Any]]:
        """The conversation with its media decoded; slow.

        Raises:
            InputError: a medium that is damaged, over a limit, or without an encoder.
        """
        messages = []
        for message in self.messages:
            parts = [
                part if part["type"] == "text" else chat_model.read(part["type"], part["medium"])
                for part in message["content"]
            ]
            messages.append({"role": message["role"], "content": parts})
        return messages


def parse_request(body: Any, chat_model: ChatModel, limits: Limits) -> Request:
    """Parse a request's JSON.

    Raises:
        InputError: a field or value that the server does not support.
    """
    if not isinstance(body, dict):
        raise InputError(f"the body is a JSON {type(body).__name__}; expected an object with model and messages")
    for name, value in body.items():
        known = name in FIELDS or name in IGNORED or value is None or value in NEUTRAL.get(name, [])
        if not known and body.get(TOOLS.get(name, "")) != "none":
            raise InputError(f"{name!r:.60} is not supported here; leave it out. Known are {', '.join(FIELDS)}")
    given = {name: value for name, value in body.items() if value is not None}
    if given.get("n", 1) != 1:
        raise InputError("n is not 1; one answer is given to a request")
    stream_options = given.get("stream_options", {})
    if not isinstance(stream_options, dict) or not isinstance(given.get("stream", False), bool):
        raise InputError("stream must be true or false, and stream_options an object")
    return Request(
        _messages(given.get("messages"), limits),
        _settings(given, chat_model, limits),
        given.get("stream", False),
        bool(stream_options.get("include_usage", False)),
    )


def _settings(given: Mapping[str, Any], chat_model: ChatModel, limits: Limits) -> Settings:
    tokens = given.get("max_completion_tokens", given.get("max_tokens", Settings.max_new_tokens))
    if not is_integer(tokens) or tokens < 1:
        raise InputError(f"max_tokens is {tokens!r:.40}; expected a whole number from 1")
    limits.check("max_tokens", tokens, limits.new_tokens)
    temperature, top_p = given.get("temperature", 0.0), given.get("top_p", 1.0)
    if not is_number(temperature) or not 0 <= temperature <= 2:
        raise InputError(f"temperature is {temperature!r:.40}; expected a number from 0 to 2")
    if not is_number(top_p) or not 0 <= top_p <= 1:
        raise InputError(f"top_p is {top_p!r:.40}; expected a number from 0 to 1")
    if top_p == 0:  # greedy decoding
        temperature, top_p = 0.0, 1.0
    seed = given.get("seed", secrets.randbelow(2**32))  # random unless given, as in OpenAI's API
    if not is_integer(seed) or not -MAX_SEED - 1 <= seed <= MAX_SEED:
        raise InputError(f"seed is {seed!r:.40}; expected a whole number of 64 bits")
    require, forbid = (_keys(name, given.get(name, []), chat_model) for name in ("require", "forbid"))
    modalities = given.get("modalities")
    if modalities is not None:
        known = ["text", *chat_model.makes.values()]
        if not isinstance(modalities, list) or not all(m in known for m in modalities):
            raise InputError(f"modalities is {modalities!r:.80}; expected a list of {', '.join(dict.fromkeys(known))}")
        forbid += tuple(key for key, modality in chat_model.makes.items() if modality not in modalities)
    decoders = _decoders(given, chat_model, limits)
    return Settings(
        tokens, temperature, top_p, seed & MAX_SEED, require, forbid, decoders, _stop(given.get("stop", []))
    )


def _stop(stop: Any) -> tuple[str, ...]:
    texts = [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, list) or len(texts) > MAX_STOPS or not all(isinstance(t, str) and t for t in texts):
        raise InputError(f"stop is {stop!r:.80}; expected a text, or a list of up to {MAX_STOPS} texts")
    return tuple(checked_text(text, "stop") for text in texts)


def _keys(name: str, keys: Any, chat_model: ChatModel) -> tuple[str, ...]:
    if not isinstance(keys, list) or not all(key in chat_model.makes for key in map(str, keys)):
        raise InputError(f"{name} is {keys!r:.80}; expected a list of {', '.join(chat_model.makes)}")
    return tuple(map(str, keys))


def _decoders(given: Mapping[str, Any], chat_model: ChatModel, limits: Limits) -> dict[str, dict[str, Any]]:
    decoders = given.get("decoders", {})
    if not isinstance(decoders, dict) or not all(isinstance(options, dict) for options in decoders.values()):
        raise InputError("decoders must be an object of objects, as {'image': {'num_inference_steps': 25}}")
    _keys("decoders", list(decoders), chat_model)
    for key, options in decoders.items():
        for name in ("generator", "negative_condition"):  # not representable in JSON
            if name in options:
                raise InputError(f"decoders.{key}.{name} cannot be given here")
        chat_model.model.decoders[key].module.check_options(options)
        sizes = {
            **{"num_inference_steps": limits.steps, "height": limits.side, "width": limits.side},
            **{"num_frames": limits.frames, "audio_length_in_s": limits.seconds},
        }
        for name in sizes.keys() & {name for name, value in options.items() if value is not None}:
            limits.check(f"decoders.{key}.{name}", options[name], sizes[name])
        limits.check(f"the length of decoders.{key}.negative_prompt", len(options.get("negative_prompt") or ""), 2000)
    return decoders


def _messages(messages: Any, limits: Limits) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise InputError("messages must be a list of at least one message")
    limits.check("the number of messages", len(messages), limits.messages)
    parsed = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    if parsed[-1]["role"] != "user":
        raise InputError(f"the last message is the {parsed[-1]['role']}'s; expected the user's, which is answered")
    parts = [part for message in parsed for part in message["content"]]
    limits.check("the number of media", sum(part["type"] != "text" for part in parts), limits.media)
    text = sum(len(part["text"]) for part in parts if part["type"] == "text")
    limits.check("the number of characters", text, limits.characters)
    return parsed


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InputError(f"{where} must be an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(f"{where}: the role is {role!r:.40}; expected {', '.join(ROLES)}")
    content = message.get("content")
    if role == "assistant":  # an earlier answer, including its media
        content = message.get("parts") or content or ""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise InputError(f"{where}: content must be a text or a list of parts")
    parts = [_part(part, ROLES[role], f"{where}.content[{index}]") for index, part in enumerate(content)]
    if role == "user" and not any(part["type"] != "text" or part["text"].strip() for part in parts):
        raise InputError(f"{where} is empty; give it text or media")
    return {"role": ROLES[role], "content": parts}


def _part(part: Any, role: str, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return {"type": "text", "text": checked_text(part.get("text"), f"{where}.text")}
    known = {medium.content_part: medium.name for medium in MEDIA.values()}
    if not isinstance(kind, str) or kind not in known:
        raise InputError(f"{where}: the type is {kind!r:.40}; expected text, {', '.join(known)}")
    if role == "system":
        raise InputError(f"{where}: a system message holds text only")
    held, name = part.get(kind), f"{where}.{kind}"
    if not isinstance(held, dict):
        raise InputError(f"{name} must be an object")
    if kind.endswith("_url"):
        return {"type": known[kind], "medium": from_data_url(held.get("url"), name)}
    return {"type": known[kind], "medium": from_base64(held.get("data"), name)}


# ------------------------------------------------------------------------------------------------------- answers


def part_of(segment: Segment) -> dict[str, Any]:
    """A segment of an answer as a content part."""
    if segment.type == "text":
        return {"type": "text", "text": segment.content}
    medium = media_type(segment.type)
    kind = medium.content_part
    if kind.endswith("_url"):
        return {"type": kind, kind: {"url": to_data_url(segment)}}
    return {"type": kind, kind: {"data": to_base64(segment), "format": medium.suffixes[0].removeprefix(".")}}


def completion(request: Request, model: str, reply: Reply) -> dict[str, Any]:
    """The whole answer."""
    message = {"role": "assistant", "content": reply.answer.text, "refusal": None, "parts": parts_of(reply.answer)}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason(reply)}
    return _head(request, model, "chat.completion") | {"choices": [choice], "usage": usage(reply)}


def parts_of(answer: Answer) -> list[dict[str, Any]]:
    return [part_of(segment) for segment in answer.segments]


def chunk(request: Request, model: str, delta: dict[str, Any], finish: str | None = None, **more: Any) -> dict:
    """A piece of a streamed answer; `more` are extension fields."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    more |= {"usage": None} if request.include_usage else {}
    return _head(request, model, "chat.completion.chunk") | {"choices": [choice]} | more


def usage_chunk(request: Request, model: str, reply: Reply) -> dict[str, Any]:
    return _head(request, model, "chat.completion.chunk") | {"choices": [], "usage": usage(reply)}


def usage(reply: Reply) -> dict[str, int]:
    total = reply.prompt_tokens + reply.new_tokens
    return {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.new_tokens, "total_tokens": total}


def finish_reason(reply: Reply) -> str:
    return "stop" if reply.complete else "length"


def _head(request: Request, model: str, kind: str) -> dict[str, Any]:
    return {"id": request.id, "object": kind, "created": request.created, "model": model}


def error_body(message: str, kind: str = "invalid_request_error", code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
