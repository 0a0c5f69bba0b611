"""Media as data URLs: what comes in decoded under limits, what was generated encoded."""

from __future__ import annotations

import base64
import binascii
import io
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

from anygpt.chat.chat_model import write_segment
from anygpt.errors import InputError
from anygpt.media.files import StoredMedium
from anygpt.media.types import media_type
from anygpt.outputs import Segment


@dataclass(frozen=True)
class SentMedium(StoredMedium):
    """The bytes of a medium that came with a request; `name` is for messages."""

    name: str
    data: bytes = field(repr=False)

    def open(self, mode: str = "rb") -> BinaryIO:
        return io.BytesIO(self.data)

    def __str__(self) -> str:
        return self.name


def from_base64(text: Any, name: str) -> SentMedium:
    """Bytes from base64.

    Raises:
        InputError: no text, or no base64.
    """
    if not isinstance(text, str) or not text:
        raise InputError(f"{name} has no data; expected the file's bytes in base64")
    try:
        # as a data URL it may be percent-encoded, and many encoders break lines
        return SentMedium(name, base64.b64decode("".join(unquote(text).split()), validate=True))
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{name} is not base64: {error}") from error


def from_data_url(url: Any, name: str) -> SentMedium:
    """Bytes from a data URL; nothing is ever fetched.

    Raises:
        InputError: another URL, or one that is broken.
    """
    if not isinstance(url, str) or not url:
        raise InputError(f"{name} has no url; expected a data URL, data:<type>;base64,<data>")
    head, comma, data = url.partition(",")
    if not head.lower().startswith("data:"):
        raise InputError(f"{name} is {url[:60]!r}, and URLs are not fetched; send the file itself as a data URL")
    if not comma or not head.lower().endswith(";base64"):
        raise InputError(f"{name} is not a data URL in base64; expected data:<type>;base64,<data>")
    return from_base64(data, name)


def segment_bytes(segment: Segment) -> bytes:
    """A generated medium as the bytes of a file: PNG, MP4 or WAV."""
    with tempfile.TemporaryDirectory() as folder:
        return write_segment(segment, Path(folder, "medium")).read_bytes()


def to_base64(segment: Segment) -> str:
    return base64.b64encode(segment_bytes(segment)).decode()


def to_data_url(segment: Segment) -> str:
    return f"data:{media_type(segment.type).mime};base64,{to_base64(segment)}"
