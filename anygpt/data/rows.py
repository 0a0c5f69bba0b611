"""Pydantic models of the rows of data files; errors name the place and key.

`SampleRow` is the project's own format, one object per line of a `.jsonl` file; every other one is converted to it.
"""

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, Discriminator, Field, Tag, TypeAdapter, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError, ValidationError

from anygpt.errors import InputError
from anygpt.media.files import StoredMedium
from anygpt.media.types import MEDIA

R = TypeVar("R", bound=BaseModel)


class DataError(InputError):
    """Error in a data file; `kind` is the category that `scripts/validate_data.py` counts it in."""

    def __init__(self, message: str, kind: str = "structure"):
        super().__init__(message)
        self.kind = kind

    def __reduce__(self):  # workers pickle errors to send them to the main process
        return type(self), (str(self), self.kind)


def checked(model: type[R] | TypeAdapter, value: Any, where: str) -> R:
    """Validate `value` against a row model or a type.

    A `DataError` names the first fault: `where`, the place within the row, the key, and the closest known key.
    """
    try:
        return model.validate_python(value) if isinstance(model, TypeAdapter) else model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise DataError(where + _sentence(first), first.get("ctx", {}).get("kind", "structure")) from error


def fault(message: str, kind: str = "structure") -> PydanticCustomError:
    """Error for a model's own validators to raise; `message` follows the place."""
    return PydanticCustomError("row", "{message}", {"message": message, "kind": kind})


def shown(value: Any) -> str:
    try:
        text = "missing" if value is None else repr(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def nearest(name: Any, known: Collection[str]) -> str:
    """End of a message about an unknown name: the closest known name, and all known ones."""
    close = difflib.get_close_matches(str(name)[:100], known, n=1)
    return (f": did you mean {close[0]!r}?" if close else "") + f" (known: {', '.join(sorted(known))})"


def _sentence(error: ErrorDetails) -> str:
    place = [part for part in error["loc"] if not str(part).startswith("<")]  # drop tags of unions
    what = ""
    if place and isinstance(place[-1], str):
        what = f"{place.pop()!r} "
    at = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    value = shown(error["input"])
    match error["type"]:
        case "row":
            text = error["ctx"]["message"]
        case "string_type":
            text = f"must be a string, and is {value}"
        case "literal_error":
            known = re.findall(r"'([^']*)'", error["ctx"]["expected"])
            text = f"is {value}, which is not known{nearest(error['input'], known)}"
        case "too_short" | "string_too_short":
            text = "is empty: give it a value, or leave it out"
        case _:
            text = f"is {value}: {error['msg']}"
    return f"{f', {at[1:]}' if at else ''}{': ' if error['loc'] or error['type'] == 'row' else ' '}{what}{text}"


class RowModel(BaseModel, strict=True, extra="forbid", arbitrary_types_allowed=True):
    """Base of rows and their parts: rejects unknown keys and does not coerce types."""

    @classmethod
    def keys(cls, value: Mapping[str, Any]) -> set[str]:
        return {field.alias or name for name, field in cls.model_fields.items()}

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise fault(
                f"must be a JSON object with the keys {', '.join(sorted(cls.model_fields))}, and is {shown(value)}"
            )
        known = cls.keys(value)
        for key in value:
            if key not in known:
                raise fault(f"the key {shown(key)} is not known{nearest(key, known)}")
        required = (field.alias or name for name, field in cls.model_fields.items() if field.is_required())
        return dict.fromkeys(required) | dict(value)  # None for missing keys: the error then states the expected type


def _encodable(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON may hold half a surrogate pair, "\ud83d"
        place = error.start
        raise fault(f"holds half a character (a lone surrogate) at position {place}: write it as UTF-8") from error
    return text


def _number_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def at_least_one(what: str) -> BeforeValidator:
    def check(value: Any) -> Any:
        if not isinstance(value, list) or not value:
            raise fault(f"must be a list of at least one {what}, and is {shown(value)}")
        return value

    return BeforeValidator(check)


Text = Annotated[str, AfterValidator(_encodable)]
"""A string that can be encoded as UTF-8, as tokenizers and file systems require."""
Id = Annotated[Text, Field(min_length=1), BeforeValidator(_number_as_text)]
"""A string or an integer, not necessarily unique. Defaults to the row's position in the file."""
Texts = Annotated[
    Annotated[Text, Tag("<one>")] | Annotated[list[Text], Tag("<list>")],
    Discriminator(lambda value: "<list>" if isinstance(value, list) else "<one>"),
]
"""A string or a list of wordings. Each epoch draws one of them; an evaluation uses all as references."""


def _place(value: Any) -> Any:
    if not isinstance(value, str | StoredMedium | None):
        raise fault(f"must be a string, and is {shown(value)}")
    return _encodable(value) if isinstance(value, str) else value


class PartRow(RowModel):
    """Text, or a medium: an input in a user's turn, a target in an assistant's, where it needs a caption.

    `path` is relative to the media root and must stay inside it; readers of shards and tables set a `StoredMedium`.
    `source` is the medium that a target was edited from: its number among the media of the conversation, from 0.
    """

    type: str
    text: Texts | None = None
    path: Annotated[Any, AfterValidator(_place), Field(json_schema_extra={"type": "string"})] = None
    caption: Texts | None = None
    source: Annotated[int, Field(ge=0)] | None = None

    @classmethod
    def keys(cls, value: Mapping[str, Any]) -> set[str]:
        kind = value.get("type")
        if not isinstance(kind, str) or kind not in ("text", *MEDIA):
            raise fault(f"the part type {shown(kind)} is not known{nearest(kind, ('text', *MEDIA))}")
        return {"type", "text"} if kind == "text" else {"type", "path", "caption", "source"}

    @model_validator(mode="after")
    def _has_content(self) -> "PartRow":
        if self.type == "text" and self.text is None:
            raise fault("'text' must be a string, and is missing")
        if self.type != "text" and self.path is None:
            raise fault(f"this {self.type} has no 'path': give the file, relative to the media root")
        return self

    @property
    def wordings(self) -> tuple[str, ...]:
        """Wordings of the text or caption; `("",)` if there is none."""
        value = self.text if self.type == "text" else self.caption
        return tuple(value) if isinstance(value, list) and value else (value or "",)


def _text_as_parts(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise fault(f"must be a string or a list of parts, and is {shown(value)}")
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class MessageRow(RowModel):
    role: Literal["system", "user", "assistant"]
    content: Annotated[list[PartRow], BeforeValidator(_text_as_parts)]

    @model_validator(mode="after")
    def _suits_its_role(self) -> "MessageRow":
        for i, part in enumerate(self.content):
            for key in ("source", "caption"):
                if getattr(part, key) is not None and self.role != "assistant":
                    text = f"content[{i}]: this {part.type} has a {key!r}, which only a target of the assistant has"
                    raise fault(f"{text}: leave it out")
            if part.type != "text" and self.role == "system":
                raise fault(f"content[{i}]: a system message holds text only: move the {part.type} to a user message")
            if part.type != "text" and self.role == "assistant" and not all(map(str.strip, part.wordings)):
                raise fault(
                    f"content[{i}]: this {part.type} is a target and has no 'caption', which its decoder is aligned "
                    "with: add one",
                    "caption",
                )
        if not any(part.type != "text" or all(map(str.strip, part.wordings)) for part in self.content):
            raise fault("is empty: give it text or media, or leave the message out")
        return self


class SampleRow(RowModel):
    messages: Annotated[list[MessageRow], at_least_one("message")]
    id: Id = ""

    @model_validator(mode="after")
    def _is_consistent(self) -> "SampleRow":
        if not any(message.role == "assistant" for message in self.messages):
            raise fault("has no assistant message, so there is nothing to learn from it: add the answer")
        counts = {len(part.wordings) for message in self.messages for part in message.content} - {1}
        if len(counts) > 1:
            raise fault(
                f"its lists of wordings have {' and '.join(map(str, sorted(counts)))} entries, and one number is "
                "drawn for all: give each list as many"
            )
        media = [part for message in self.messages for part in message.content if part.type != "text"]
        for number, part in enumerate(media):
            what = f"medium {number} has the source {part.source}, which"
            if part.source is not None and part.source >= number:
                raise fault(f"{what} does not come before it: name an earlier medium, counted from 0")
            if part.source is not None and media[part.source].type != part.type:
                raise fault(f"{what} is no {part.type} but a medium of type {media[part.source].type!r}")
        return self
