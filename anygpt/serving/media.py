"""Media as data URLs: decoding of inputs and encoding of generated media."""

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
    """Bytes of a medium in a request; `name` is for messages."""

    name: str
    data: bytes = field(repr=False)

    def open(self, mode: str = "rb") -> BinaryIO:
        return io.BytesIO(self.data)

    def __str__(self) -> str:
        return self.name


def from_base64(text: Any, name: str) -> SentMedium:
    """Decode base64; raises `InputError` if it is invalid."""
    if not isinstance(text, str) or not text:
        raise InputError(f"{name} has no data; expected the file's bytes in base64")
    try:
        # data URLs may be percent-encoded, and many encoders wrap lines
        return SentMedium(name, base64.b64decode("".join(unquote(text).split()), validate=True))
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{name} is not base64: {error}") from error


def from_data_url(url: Any, name: str) -> SentMedium:
    """Decode a data URL; other URLs are never fetched.

    Raises:
        InputError: another or an invalid URL.
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
    """Encode a generated medium as a PNG, MP4 or WAV file."""
    with tempfile.TemporaryDirectory() as folder:
        return write_segment(segment, Path(folder, "medium")).read_bytes()


def to_base64(segment: Segment) -> str:
    return base64.b64encode(segment_bytes(segment)).decode()


def to_data_url(segment: Segment) -> str:
    return f"data:{media_type(segment.type).mime};base64,{to_base64(segment)}"
