"""What a sample is: messages of text and media, checked when they are read.

Every data format (`anygpt.data.formats`) is turned into the JSON form of `parse_sample`, so that each rule
about samples is written once, here.
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter

from anygpt.data.rows import DataError, MediaRow, SampleRow, Text, TextRow, checked, shown, wordings
from anygpt.errors import InputError
from anygpt.media.files import StoredMedium
from anygpt.media.types import MEDIA

__all__ = [
    "ContentPart",
    "DataError",
    "MediaRoot",
    "Message",
    "Sample",
    "checked_text",
    "parse_sample",
    "row_name",
]


@dataclass(frozen=True)
class ContentPart:
    """One piece of a message: text, or one medium.

    `type` is `text` or a media type. A text part has `text`; a media part has `path` (resolved, a place inside
    the media root, or a `StoredMedium`) and, where it is a target, the `caption` that its decoder is aligned with.
    `others` are other wordings of the text or the caption.
    """

    type: str
    text: str | None = None
    path: Path | StoredMedium | None = None
    caption: str | None = None
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Message:
    """One turn. Media of the user are inputs, media of the assistant are targets."""

    role: str
    content: tuple[ContentPart, ...]


@dataclass(frozen=True)
class Sample:
    """One conversation. `source` is where it was read, for messages: `data/train.jsonl:17`."""

    id: str
    messages: tuple[Message, ...]
    source: str

    def media(self) -> list[tuple[str, ContentPart]]:
        """(role, part) of every medium, in order of appearance."""
        return [(message.role, part) for message in self.messages for part in message.content if part.path is not None]

    @property
    def wordings(self) -> int:
        """In how many wordings there is the conversation: 1, but where texts or captions are lists."""
        return 1 + max((len(part.others) for message in self.messages for part in message.content), default=0)

    def worded(self, number: int) -> "Sample":
        """The conversation in one wording, counted from 0 and round again beyond the last."""
        number %= self.wordings
        if number == 0:
            return self

        def of(part: ContentPart) -> ContentPart:
            if not part.others:
                return part
            return replace(part, **{"text" if part.path is None else "caption": part.others[number - 1]})

        return replace(self, messages=tuple(replace(m, content=tuple(map(of, m.content))) for m in self.messages))

    def fed_back(self, reads: Collection[str]) -> "Sample":
        """The conversation as it is when it is held: media that the assistant made are inputs of the user's next turn.

        The same as `processing.chat_template.feed_back` does with an answer. What the user's turn gives anyway is not
        given twice.

        Args:
            reads: the media types that encoders read.
        """
        messages, made = [], []
        for message in self.messages:
            if message.role == "assistant":
                made += [
                    replace(p, caption=None, others=())
                    for p in message.content
                    if p.path is not None and p.type in reads
                ]
            elif message.role == "user" and made:
                given = {(part.type, part.path) for part in message.content}
                new = [part for part in made if (part.type, part.path) not in given]
                message, made = replace(message, content=(*new, *message.content)), []
            messages.append(message)
        return replace(self, messages=tuple(messages))

    def missing_files(self) -> list[Path]:
        """The media files that do not exist or are something else than a file."""
        # os.path: `Path.is_file` raises on names that are too long or in folders that may not be entered.
        return [p.path for _, p in self.media() if isinstance(p.path, Path) and not os.path.isfile(p.path)]


class MediaRoot:
    """Turns the file names of a data file into paths that are certain to lie inside one folder.

    Args:
        folder: the media root; links in it are followed, and what they lead to must be inside it too.
        by_type: also look in the sub-folders `images`, `videos` and `audios` for a name that does not exist
            in `folder` itself.
        follow_links: links in the folder may lead out of it, as they do in a snapshot of the hub's cache.

    Raises:
        InputError: the folder does not exist.
    """

    def __init__(self, folder: str | Path, by_type: bool = False, follow_links: bool = False):
        self.folder = os.path.realpath(folder)
        self.by_type = by_type
        self.follow_links = follow_links
        # Resolving links costs a system call a path component; millions of files share a few folders.
        self._real_folders: dict[str, str] = {}
        if not os.path.isdir(self.folder):
            raise InputError(f"The media root {folder} is not a folder: give one that exists as media_root.")

    def resolve(self, name: Any, kind: str, where: str) -> Path:
        """The absolute path of `name`, which need not exist yet.

        Raises:
            InputError: a URL, an empty or unusable name, or a path that leaves the media root.
        """
        name = checked_text(name, f"{where}: the path")
        if not name or "\0" in name or len(name) > 4096:  # as long as a path can be on Linux
            raise InputError(f"{where}: {shown(name)} is not a file name: give a path relative to the media root.")
        if "://" in name or name.startswith("data:"):
            raise InputError(
                f"{where}: {name[:80]!r} is a URL, and URLs are not fetched: download it and give its path."
            )
        path = self._inside(name, name, where)
        if self.by_type and not os.path.isfile(path):
            beside = self._inside(os.path.join(MEDIA[kind].plural, name), name, where)
            path = beside if os.path.isfile(beside) else path
        return Path(path)

    def _inside(self, relative: str, name: str, where: str) -> str:
        root, path = os.path.join(self.folder, ""), os.path.normpath(os.path.join(self.folder, relative))
        by_link = path.startswith(root)
        if not (self.follow_links and by_link):
            path = self._real_path(os.path.join(self.folder, relative))
        if not path.startswith(root):
            links = ", or set follow_links if you trust the links in it" if by_link else ""
            raise InputError(
                f"{where}: {shown(name)} leads to {path[:300]}, which is not inside the media root {self.folder}: "
                f"move the file there, or set media_root to a folder that holds all media{links}."
            )
        return path

    def _real_path(self, path: str) -> str:
        folder, base = os.path.split(path)
        if base in ("", ".", ".."):
            return os.path.realpath(path)
        if folder not in self._real_folders:
            self._real_folders[folder] = os.path.realpath(folder)
        path = os.path.join(self._real_folders[folder], base)
        return os.path.realpath(path) if os.path.islink(path) else path


def parse_sample(row: Any, source: str, default_id: str, media_root: MediaRoot) -> Sample:
    """Checks one row of the project's own JSON form (`anygpt.data.rows.SampleRow`) and builds its `Sample`.

    Whether the files exist is not looked at here.

    Raises:
        InputError: naming `source`, the sample, and the message and part that break a rule.
    """
    where = row_name(row, source, default_id)
    found = checked(SampleRow, row, where)
    messages = tuple(
        Message(message.role, tuple(_part(part, where, media_root) for part in message.content))
        for message in found.messages
    )
    return Sample(found.id or default_id, messages, source)


def row_name(row: Any, source: str, default_id: str) -> str:
    """What messages call a row before it has been checked: where it stands, and its id."""
    given = row.get("id") if isinstance(row, Mapping) else None
    return f"{source} (sample {shown(given if isinstance(given, str | int) else default_id)})"


def _part(row: TextRow | MediaRow, where: str, media_root: MediaRoot) -> ContentPart:
    first, *others = wordings(row.text if isinstance(row, TextRow) else row.caption)
    if isinstance(row, TextRow):
        return ContentPart("text", text=first, others=tuple(others))
    path = row.path if isinstance(row.path, StoredMedium) else media_root.resolve(row.path, row.type, where)
    return ContentPart(row.type, path=path, caption=first or None, others=tuple(others))


def checked_text(value: Any, what: str) -> str:
    """`value`, if it is a string that tokenizers and file systems can take. Raises `InputError` otherwise."""
    return checked(_TEXT, value, what)


_TEXT = TypeAdapter(Text, config=ConfigDict(strict=True))
