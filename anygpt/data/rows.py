"""The project's own JSON form as types: one object a line of a `.jsonl` file.

`anygpt.data.schema.parse_sample` checks rows of this form and takes its known keys from here;
`anygpt.data.json_schema` writes the same types as a JSON Schema, for editors and for other programs.
"""

from typing import Literal, TypedDict

MediaType = Literal["image", "video", "audio"]

MEDIA_TYPES: tuple[str, ...] = ("image", "video", "audio")
PART_TYPES = ("text", *MEDIA_TYPES)
ROLES = ("system", "user", "assistant")


class TextRow(TypedDict):
    """Text of a message."""

    type: Literal["text"]
    text: str


class _MediaKeys(TypedDict):
    type: MediaType
    path: str


class TargetRow(_MediaKeys):
    """A medium that the assistant answers with; its decoder is aligned with the caption."""

    caption: str


class MediaRow(_MediaKeys, total=False):
    """A medium that the user gives. `path` is relative to the media root, and may not leave it."""

    caption: str


class SystemRow(TypedDict):
    """Instructions: text only."""

    role: Literal["system"]
    content: str | list[TextRow]


class UserRow(TypedDict):
    """A turn of the user, whose media are inputs."""

    role: Literal["user"]
    content: str | list[TextRow | MediaRow]


class AssistantRow(TypedDict):
    """A turn of the assistant, whose media are targets."""

    role: Literal["assistant"]
    content: str | list[TextRow | TargetRow]


MessageRow = UserRow  # every role has the same keys


class _SampleKeys(TypedDict):
    messages: list[SystemRow | UserRow | AssistantRow]


class SampleRow(_SampleKeys, total=False):
    """A conversation, with one turn of the assistant at least. Without an id it gets its place in the file."""

    id: str | int
