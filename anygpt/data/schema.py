"""Samples: conversations of text and media, validated when they are read.

Every data format (`anygpt.data.formats`) is converted to the JSON form of `parse_sample`, which applies all rules.
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter

from anygpt.data.rows import PartRow, SampleRow, Text, checked, shown
from anygpt.errors import InputError
from anygpt.media.files import StoredMedium
from anygpt.media.types import MEDIA


@dataclass(frozen=True)
class ContentPart:
    """One piece of a message. `type` is `text` or a media type; a medium has `path` (resolved inside the media root, or
    a `StoredMedium`) and, if it is a target, the `caption` that its decoder is aligned with, and the `source` that it
    was edited from, if the row names one. `others` are other wordings."""

    type: str
    text: str | None = None
    path: Path | StoredMedium | None = None
    caption: str | None = None
    others: tuple[str, ...] = ()
    source: Path | StoredMedium | None = None


@dataclass(frozen=True)
class Message:
    """One turn. Media of the user are inputs, media of the assistant are targets."""

    role: str
    content: tuple[ContentPart, ...]


@dataclass(frozen=True)
class Sample:
    """One conversation. `source` is its origin for messages, such as `data/train.jsonl:17`."""

    id: str
    messages: tuple[Message, ...]
    source: str

    def media(self) -> list[tuple[str, ContentPart]]:
        return [(message.role, part) for message in self.messages for part in message.content if part.path is not None]

    @property
    def name(self) -> str:
        return f"{self.source} (sample {self.id!r})"

    def naming(self, error: Exception) -> str:
        text = str(error)
        return text if text.startswith(self.name) else f"{self.name}: {text}"

    @property
    def wordings(self) -> int:
        return 1 + max((len(part.others) for message in self.messages for part in message.content), default=0)

    def worded(self, number: int) -> "Sample":
        """The conversation in wording `number` modulo `wordings`."""
        number %= self.wordings
        if number == 0:
            return self

        def of(part: ContentPart) -> ContentPart:
            if not part.others:
                return part
            return replace(part, **{"text" if part.path is None else "caption": part.others[number - 1]})

        return replace(self, messages=tuple(replace(m, content=tuple(map(of, m.content))) for m in self.messages))

    def fed_back(self, reads: Collection[str]) -> "Sample":
        """The conversation with media of the assistant added to the user's next turn, as `chat_template.feed_back` does
        in a live chat: those of the types `reads`, which have an encoder, unless the turn already contains them."""
        messages, made = [], []
        for message in self.messages:
            if message.role == "assistant":
                media = (part for part in message.content if part.path is not None and part.type in reads)
                made += [replace(part, caption=None, others=(), source=None) for part in media]
            elif message.role == "user" and made:
                given = {(part.type, part.path) for part in message.content}
                new = [part for part in made if (part.type, part.path) not in given]
                message, made = replace(message, content=(*new, *message.content)), []
            messages.append(message)
        return replace(self, messages=tuple(messages))

    def missing_files(self) -> list[Path]:
        # `Path.is_file` raises on names that are too long and in folders without permission.
        return [p.path for _, p in self.media() if isinstance(p.path, Path) and not os.path.isfile(p.path)]


class MediaRoot:
    """Resolves the file names of a data file to paths that are guaranteed to lie inside one folder, even through links.

    With `by_type` it also looks in `images`, `videos` and `audios` for names missing in the folder itself. With
    `follow_links` links may lead out of the folder, as in a snapshot of the Hub's cache. Without a folder (the data
    files are in several) no name is resolved.
    """

    def __init__(self, folder: str | Path | None, by_type: bool = False, follow_links: bool = False):
        self.folder = None if folder is None else os.path.realpath(folder)
        self.by_type = by_type
        self.follow_links = follow_links
        if self.folder is not None and not os.path.isdir(self.folder):
            raise InputError(f"the media root {folder} is not a folder: give one that exists as media_root")

    def resolve(self, name: str, kind: str, where: str) -> Path:
        """Absolute path of `name`, which need not exist; an `InputError` for a URL or a path outside the root."""
        if not name or "\0" in name or len(name) > 4096:  # PATH_MAX on Linux
            raise InputError(f"{where}: {shown(name)} is not a file name: give a path relative to the media root")
        if "://" in name or name.startswith("data:"):
            raise InputError(
                f"{where}: {name[:80]!r} is a URL, and URLs are not fetched: download it and give its path"
            )
        if self.folder is None:
            text = f"{where}: {shown(name)} is a path, and the data files are in several folders"
            raise InputError(f"{text}: give media_root, which paths are relative to")
        path = self._inside(name, name, where)
        if self.by_type and not os.path.isfile(path):
            beside = self._inside(os.path.join(MEDIA[kind].plural, name), name, where)
            path = beside if os.path.isfile(beside) else path
        return Path(path)

    def _inside(self, relative: str, name: str, where: str) -> str:
        root, path = os.path.join(self.folder, ""), os.path.normpath(os.path.join(self.folder, relative))
        by_link = path.startswith(root)
        if not (self.follow_links and by_link):
            path = os.path.realpath(os.path.join(self.folder, relative))
        if not path.startswith(root):
            links = ", or set follow_links if you trust the links in it" if by_link else ""
            raise InputError(
                f"{where}: {shown(name)} leads to {path[:300]}, which is not inside the media root {self.folder}: "
                f"move the file there, or set media_root to a folder that holds all media{links}"
            )
        return path


def parse_sample(row: Any, source: str, default_id: str, media_root: MediaRoot) -> Sample:
    """Build a `Sample` from a row in the project's own form (`SampleRow`); errors name source, sample and place."""
    where = row_name(row, source, default_id)
    found = checked(SampleRow, row, where)
    media: list[ContentPart] = []
    messages = tuple(
        Message(message.role, tuple(_part(part, where, media_root, media) for part in message.content))
        for message in found.messages
    )
    return Sample(found.id or default_id, messages, source)


def row_name(row: Any, source: str, default_id: str) -> str:
    given = row.get("id") if isinstance(row, Mapping) else None
    return f"{source} (sample {shown(given if isinstance(given, str | int) else default_id)})"


def _part(row: PartRow, where: str, media_root: MediaRoot, media: list[ContentPart]) -> ContentPart:
    """The part of a row; `media` are those before it, to which a medium is added."""
    first, *others = row.wordings
    if row.type == "text":
        return ContentPart("text", text=first, others=tuple(others))
    path = row.path if isinstance(row.path, StoredMedium) else media_root.resolve(row.path, row.type, where)
    source = None if row.source is None else media[row.source].path
    media.append(ContentPart(row.type, path=path, caption=first or None, others=tuple(others), source=source))
    return media[-1]


def checked_text(value: Any, what: str) -> str:
    return checked(_TEXT, value, what)


_TEXT = TypeAdapter(Text, config=ConfigDict(strict=True))
