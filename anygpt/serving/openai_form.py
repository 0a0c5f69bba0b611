"""OpenAI's chat completions format: parsing of requests into conversations and settings, and formatting of answers.

Media are content parts with data URLs (`image_url`, `video_url`) or base64 (`input_audio`). An answer has its text in
`content`, and text and media in order in `parts`; clients may send both back in later requests.
"""

import base64
import io
import secrets
import tempfile
import time
import uuid
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal
from urllib.parse import unquote

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from anygpt.chat.chat_model import ChatModel, Reply, Settings, write_segment
from anygpt.data.schema import checked_text
from anygpt.decoders.options import MAX_SEED
from anygpt.errors import InputError, refusing
from anygpt.media.files import StoredMedium
from anygpt.media.types import MEDIA, MediaType, media_type
from anygpt.outputs import Segment

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
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
    """Limits of a request: of its body, of what it contains, and of what it asks of decoders."""

    body_bytes: int = 32 * 1024**2
    body_seconds: float = 60.0
    characters: int = 100_000
    media: int = 16
    steps: int = 200
    side: int = 1024
    frames: int = 64
    seconds: float = 30.0

    def check(self, what: str, amount: float, limit: float) -> None:
        if amount > limit:
            raise InputError(f"{what} is {amount!s:.40}, more than the {limit} that this server allows")

    def check_decoder(self, key: str, options: dict[str, Any]) -> None:
        most = {"num_inference_steps": self.steps, "height": self.side, "width": self.side, "num_frames": self.frames}
        for name, limit in (most | {"audio_length_in_s": self.seconds}).items():
            self.check(f"decoders.{key}.{name}", options.get(name) or 0, limit)
        self.check(f"the length of decoders.{key}.negative_prompt", len(options.get("negative_prompt") or ""), 2000)


Stop = Annotated[str, Field(min_length=1)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Fields(BaseModel):
    """The fields that affect an answer."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: Any = None
    messages: list[dict[str, Any]] = Field([], min_length=1, validate_default=True)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    # random unless given, as in OpenAI's API
    seed: int = Field(default_factory=lambda: secrets.randbelow(2**32), ge=-MAX_SEED - 1, le=MAX_SEED)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: Literal[1] = 1
    modalities: list[str] | None = None
    stop: Annotated[list[Stop], BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop)] = Field(
        [], max_length=MAX_STOPS
    )
    require: list[str] = []
    forbid: list[str] = []
    decoders: dict[str, dict[str, Any]] = {}


@dataclass
class Request:
    """A parsed request, and the form of its answers."""

    model: str
    messages: list[dict[str, Any]]
    settings: Settings
    stream: bool = False
    include_usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, reply: Reply) -> dict[str, Any]:
        parts = [part_of(segment) for segment in reply.answer.segments]
        message = {"role": "assistant", "content": reply.answer.text, "refusal": None, "parts": parts}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason(reply)}
        return self._body("chat.completion", [choice]) | {"usage": usage(reply)}

    def chunk(self, delta: dict[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
        """A piece of a streamed answer; `more` are extension fields."""
        more |= {"usage": None} if self.include_usage else {}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return self._body("chat.completion.chunk", [choice]) | more

    def usage_chunk(self, reply: Reply) -> dict[str, Any]:
        return self._body("chat.completion.chunk", []) | {"usage": usage(reply)}

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


# ------------------------------------------------------------------------------------------------------ requests


def parse_request(body: dict[str, Any], chat_model: ChatModel, limits: Limits) -> Request:
    """Parse a request's JSON and decode its media; slow. An `InputError` names what the server does not support."""
    for name, value in body.items():
        known = name in Fields.model_fields or name in IGNORED or value is None or value in NEUTRAL.get(name, [])
        if not known and body.get(TOOLS.get(name, "")) != "none":
            raise InputError(
                f"{name!r:.60} is not supported here; leave it out. Known are {', '.join(Fields.model_fields)}"
            )
    try:
        given = Fields.model_validate({name: value for name, value in body.items() if value is not None})
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        first, *others = fault["loc"]
        name = "".join([str(first), *(f"[{one}]" if isinstance(one, int) else f".{one}" for one in others)])
        raise InputError(f"{name} is {fault['input']!r:.80}: {fault['msg']}") from None
    messages = _messages(given.messages, limits)
    settings = _settings(given, chat_model, limits)
    if body.get("stream_options") and not given.stream:
        raise InputError("stream_options has no effect without stream; leave it out, or set stream to true")
    for message in messages:
        message["content"] = [
            chat_model.read(part["type"], part["medium"]) if "medium" in part else part for part in message["content"]
        ]
    return Request(given.model, messages, settings, given.stream, bool(given.stream_options.include_usage))


def _settings(given: Fields, chat_model: ChatModel, limits: Limits) -> Settings:
    if len({given.max_completion_tokens, given.max_tokens} - {None}) > 1:
        raise InputError("max_tokens and max_completion_tokens differ; give one of them")
    tokens = given.max_completion_tokens or given.max_tokens or Settings.max_new_tokens
    makes, forbid = chat_model.makes, given.forbid
    for name, keys in (("require", given.require), ("forbid", forbid), ("decoders", given.decoders)):
        _check_names(name, keys, makes)
    if given.modalities is not None:
        _check_names("modalities", given.modalities, {"text": None} | dict.fromkeys(makes.values()))
        if "text" not in given.modalities:
            raise InputError(f"modalities is {given.modalities}; an answer may always have text, so also name text")
        forbid = forbid + [key for key, modality in makes.items() if modality not in given.modalities]
    for key, options in given.decoders.items():
        for name in ("generator", "negative_condition"):  # not representable in JSON
            if name in options:
                raise InputError(f"decoders.{key}.{name} cannot be given here")
        if isinstance(options.get("seed"), list):
            raise InputError(f"decoders.{key}.seed is a list; expected one whole number, as a request has one answer")
        chat_model.model.makers[key].check_options(options)
        limits.check_decoder(key, options)
    return Settings(
        max_new_tokens=tokens,
        temperature=given.temperature if given.top_p else 0.0,  # a top_p of 0 leaves the most probable token
        top_p=given.top_p or 1.0,
        seed=given.seed & MAX_SEED,
        require=tuple(given.require),
        forbid=tuple(forbid),
        decoder_kwargs=given.decoders,
        stop=tuple(checked_text(text, "stop") for text in given.stop),
    )


def _check_names(field: str, names: Collection[str], known: Collection[str]) -> None:
    if not all(name in known for name in names):
        raise InputError(f"{field} is {list(names)!r:.80}; expected a list of {', '.join(known)}")


def _messages(messages: list[dict[str, Any]], limits: Limits) -> list[dict[str, Any]]:
    parsed = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    if parsed[-1]["role"] != "user":
        raise InputError(f"the last message is the {parsed[-1]['role']}'s; expected a user's message to answer")
    parts = [part for message in parsed for part in message["content"]]
    limits.check("the number of media", sum("medium" in part for part in parts), limits.media)
    limits.check("the number of characters", sum(len(part.get("text", "")) for part in parts), limits.characters)
    return parsed


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(f"{where}: the role is {role!r:.40}; expected {', '.join(ROLES)}")
    content = message.get("content")
    if role == "assistant":  # an earlier answer, including its media
        content = _of_answer(content or "", message.get("parts") or [], f"{where}.parts")
    _check_keys(message, ("role", "content", *(["parts"] if role == "assistant" else [])), where)
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise InputError(f"{where}: content must be a text or a list of parts")
    parts = [_part(part, ROLES[role], f"{where}.content[{index}]") for index, part in enumerate(content)]
    if role == "user" and not any("medium" in part or part["text"].strip() for part in parts):
        raise InputError(f"{where} is empty; give it text or media")
    return {"role": ROLES[role], "content": parts}


def _of_answer(content: Any, parts: Any, where: str) -> Any:
    """Content of an earlier answer: its parts, or if a stream had only the media in `parts`, these and its text."""
    if not parts:
        return content
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise InputError(f"{where} must be a list of parts")
    texts = [part.get("text") for part in parts if part.get("type") == "text"]
    if content and isinstance(content, str) and not texts:
        taken = [part.get("index") for part in parts]
        place = next(i for i in range(len(parts) + 1) if i not in taken)
        return [*parts[:place], {"type": "text", "text": content}, *parts[place:]]
    if content not in ("", parts, "".join(map(str, texts))):
        raise InputError(f"{where} have another text than content; give one of them, or both as they were sent")
    return parts


def _check_keys(held: dict[str, Any], known: Collection[str], where: str) -> None:
    """Refuse keys that would have no effect, unless their values are empty."""
    if unknown := [key for key, value in held.items() if key not in known and value not in (None, "", [], {})]:
        raise InputError(f"{where}.{unknown[0]:.60} is not supported; leave it out. Known are {', '.join(known)}")


def _part(part: Any, role: str, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    known = {medium.content_part: medium for medium in MEDIA.values()}
    if not isinstance(kind, str) or kind not in ("text", *known):
        raise InputError(f"{where}: the type is {kind!r:.40}; expected text, {', '.join(known)}")
    _check_keys(part, ("type", kind, *(["index"] if role == "assistant" else [])), where)
    if kind == "text":
        return {"type": "text", "text": checked_text(part.get("text"), f"{where}.text")}
    if role == "system":
        raise InputError(f"{where}: a system message holds text only")
    held, name = part.get(kind), f"{where}.{kind}"
    if not isinstance(held, dict):
        raise InputError(f"{name} must be an object")
    medium, is_url = known[kind], kind.endswith("_url")
    if held.get("detail") == "auto":  # sent by habit
        held = held | {"detail": None}
    _check_keys(held, ("url",) if is_url else ("data", "format"), name)
    formats = [suffix.removeprefix(".") for suffix in medium.suffixes]
    if not is_url and held.get("format") not in (None, *formats):
        raise InputError(f"{name}.format is {held['format']!r:.40}; expected {', '.join(formats)}")
    data = _data_of(held.get("url"), name, medium) if is_url else held.get("data")
    if not isinstance(data, str) or not data:
        raise InputError(f"{name} has no data; expected the file's bytes in base64")
    with refusing(f"{name} is not base64", (ValueError,)):
        # data URLs may be percent-encoded, and many encoders wrap lines
        content = base64.b64decode("".join(unquote(data).split()), validate=True)
    return {"type": medium.name, "medium": SentMedium(name, content)}


def _data_of(url: Any, name: str, medium: MediaType) -> str:
    """The base64 in a data URL; other URLs are never fetched."""
    if not isinstance(url, str) or not url:
        raise InputError(f"{name} has no url; expected a data URL, data:<type>;base64,<data>")
    head, comma, data = url.partition(",")
    if not head.lower().startswith("data:"):
        raise InputError(f"{name} is {url[:60]!r}, and URLs are not fetched; send the file itself as a data URL")
    if not comma or not head.lower().endswith(";base64"):
        raise InputError(f"{name} is not a data URL in base64; expected data:<type>;base64,<data>")
    kind, _, form = head[len("data:") :].partition(";")[0].lower().partition("/")
    if kind in MEDIA and kind != medium.mime.partition("/")[0] and f".{form}" not in medium.suffixes:  # GIFs are clips
        raise InputError(f"{name} is of the type {kind}/{form:.40}; expected one of {medium.name}, as {medium.mime}")
    return data


@dataclass(frozen=True)
class SentMedium(StoredMedium):
    """Bytes of a medium in a request; `name` is for messages."""

    name: str
    data: bytes = field(repr=False)

    def open(self, mode: str = "rb") -> BinaryIO:
        return io.BytesIO(self.data)

    def __str__(self) -> str:
        return self.name


# ------------------------------------------------------------------------------------------------------- answers


def part_of(segment: Segment) -> dict[str, Any]:
    """A segment of an answer as a content part, media as PNG, MP4 or WAV files."""
    if segment.type == "text":
        return {"type": "text", "text": segment.content}
    medium = media_type(segment.type)
    with tempfile.TemporaryDirectory() as folder:
        data = base64.b64encode(write_segment(segment, Path(folder, "medium")).read_bytes()).decode()
    if medium.content_part.endswith("_url"):
        content = {"url": f"data:{medium.mime};base64,{data}"}
    else:
        content = {"data": data, "format": medium.suffixes[0].removeprefix(".")}
    return {"type": medium.content_part, medium.content_part: content}


def usage(reply: Reply) -> dict[str, int]:
    total = reply.prompt_tokens + reply.new_tokens
    return {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.new_tokens, "total_tokens": total}


def finish_reason(reply: Reply) -> str:
    return "stop" if reply.complete else "length"
