"""What a sample is: messages of text and media, checked when they are read.

Every data format (`anygpt.data.formats`) is turned into the JSON form of `parse_sample`, so that each rule
about samples is written once, here.
"""

import difflib
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anygpt.data.rows import MEDIA_TYPES, PART_TYPES, ROLES, MediaRow, MessageRow, SampleRow, TextRow
from anygpt.errors import InputError
from anygpt.media.files import StoredMedium

SAMPLE_KEYS = tuple(SampleRow.__annotations__)
MESSAGE_KEYS = tuple(MessageRow.__annotations__)
TEXT_KEYS = tuple(TextRow.__annotations__)
MEDIA_KEYS = tuple(MediaRow.__annotations__)


class DataError(InputError):
    """A fault of a data file. `kind` is what `scripts/validate_data.py` counts it under."""

    def __init__(self, message: str, kind: str = "structure"):
        super().__init__(message)
        self.kind = kind

    def __reduce__(self):  # a worker's error is pickled on its way to the main process
        return type(self), (str(self), self.kind)


class StaleCache(InputError):
    """The feature cache has nothing for a medium or a caption: never a reason to leave a sample out."""


@dataclass(frozen=True)
class ContentPart:
    """One piece of a message: text, or one medium.

    `type` is one of `PART_TYPES`. A text part has `text`; a media part has `path` (resolved, a place inside
    the media root, or a `StoredMedium`) and, where it is a target, the `caption` that its decoder is aligned with.
    """

    type: str
    text: str | None = None
    path: Path | StoredMedium | None = None
    caption: str | None = None


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
        return [
            (message.role, part)
            for message in self.messages
            for part in message.content
            if part.type in MEDIA_TYPES  # a text part has no path
        ]

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

    Raises:
        InputError: the folder does not exist.
    """

    def __init__(self, folder: str | Path, by_type: bool = False):
        self.folder = os.path.realpath(folder)
        self.by_type = by_type
        # Resolving links costs a system call a path component; millions of files share a few folders.
        self._real_folders: dict[str, str] = {}
        if not os.path.isdir(self.folder):
            raise InputError(f"The media root {folder} is not a folder: give one that exists as media_root.")

    def resolve(self, name: Any, media_type: str, where: str) -> Path:
        """The absolute path of `name`, which need not exist yet.

        Raises:
            InputError: a URL, an empty or unusable name, or a path that leaves the media root.
        """
        name = checked_text(name, f"{where}: the path")
        if not name or "\0" in name or len(name) > 4096:  # as long as a path can be on Linux
            raise InputError(f"{where}: {_shown(name)} is not a file name: give a path relative to the media root.")
        if "://" in name or name.startswith("data:"):
            raise InputError(
                f"{where}: {name[:80]!r} is a URL, and URLs are not fetched: download it and give its path."
            )
        path = self._inside(name, name, where)
        if self.by_type and not os.path.isfile(path):
            beside = self._inside(os.path.join(f"{media_type}s", name), name, where)
            path = beside if os.path.isfile(beside) else path
        return Path(path)

    def _inside(self, relative: str, name: str, where: str) -> str:
        path = self._real_path(os.path.join(self.folder, relative))
        if not path.startswith(os.path.join(self.folder, "")):
            raise InputError(
                f"{where}: {_shown(name)} leads to {path[:300]}, which is not inside the media root {self.folder}: "
                "move the file there, or set media_root to a folder that holds all media."
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
    """Checks one row of the project's own JSON form and builds its `Sample`.

    `{"id": "7", "messages": [{"role": "user", "content": [{"type": "image", "path": "7.jpg"}, …]}, …]}`;
    `content` may also be one string. An `id` may be a number, or absent (then `default_id`). Whether the
    files exist is not looked at here.

    Raises:
        InputError: naming `source`, the sample, and the message and part that break a rule.
    """
    check_keys(row, SAMPLE_KEYS, row_name(row, source, default_id))
    sample_id = row.get("id", default_id)
    if isinstance(sample_id, int) and not isinstance(sample_id, bool):
        sample_id = str(sample_id)
    if not checked_text(sample_id, f"{source}: 'id'"):
        raise InputError(f"{source}: 'id' is empty: give the sample a name, or leave 'id' out.")
    where = f"{source} (sample {_shown(sample_id)})"
    rows = row.get("messages")
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{where}: 'messages' must be a list of at least one message, and is {_shown(rows)}.")
    messages = tuple(_parse_message(m, f"{where}, messages[{i}]", media_root) for i, m in enumerate(rows))
    if not any(message.role == "assistant" for message in messages):
        raise InputError(f"{where} has no assistant message, so there is nothing to learn from it: add the answer.")
    return Sample(id=sample_id, messages=messages, source=source)


def row_name(row: Any, source: str, default_id: str) -> str:
    """What messages call a row before it has been checked: where it stands, and its id."""
    given = row.get("id") if isinstance(row, Mapping) else None
    return f"{source} (sample {_shown(given if isinstance(given, str | int) else default_id)})"


def _parse_message(row: Any, where: str, media_root: MediaRoot) -> Message:
    check_keys(row, MESSAGE_KEYS, where)
    role = row.get("role")
    if role not in ROLES:
        raise InputError(f"{where}: the role {_shown(role)} is not known{_nearest(role, ROLES)}.")
    content = row.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise InputError(f"{where}: 'content' must be a string or a list of parts, and is {_shown(content)}.")
    parts = tuple(_parse_part(p, role, f"{where}.content[{i}]", media_root) for i, p in enumerate(content))
    if not any(part.path or part.text for part in parts):
        raise InputError(f"{where} is empty: give it text or media, or leave the message out.")
    return Message(role=role, content=parts)


def _parse_part(row: Any, role: str, where: str, media_root: MediaRoot) -> ContentPart:
    part_type = row.get("type") if isinstance(row, dict) else None
    if part_type == "text":
        check_keys(row, TEXT_KEYS, where)
        return ContentPart(type="text", text=checked_text(row.get("text"), f"{where}: 'text'"))
    if part_type not in MEDIA_TYPES:
        check_keys(row, {*TEXT_KEYS, *MEDIA_KEYS}, where)
        raise InputError(f"{where}: the part type {_shown(part_type)} is not known{_nearest(part_type, PART_TYPES)}.")
    check_keys(row, MEDIA_KEYS, where)
    if role == "system":
        raise InputError(f"{where}: a system message holds text only: move the {part_type} to a user message.")
    if row.get("path") is None:
        raise InputError(f"{where}: this {part_type} has no 'path': give the file, relative to the media root.")
    caption = row.get("caption")
    if caption is not None:
        caption = checked_text(caption, f"{where}: 'caption'")
    if role == "assistant" and not (caption and caption.strip()):
        raise DataError(
            f"{where}: this {part_type} is a target and has no 'caption', which its decoder is aligned with: add one.",
            "caption",
        )
    # Only the readers of shards and tables put a StoredMedium there; what a JSON file says is never one.
    path = row["path"]
    if not isinstance(path, StoredMedium):
        path = media_root.resolve(path, part_type, where)
    return ContentPart(type=part_type, path=path, caption=caption)


def checked_text(value: Any, what: str) -> str:
    """`value`, if it is a string that tokenizers and file systems can take. Raises `InputError` otherwise."""
    if not isinstance(value, str):
        raise InputError(f"{what} must be a string, and is {_shown(value)}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON may hold half a surrogate pair, "\ud83d"
        raise InputError(
            f"{what} holds half a character (a lone surrogate) at position {error.start}: write it as UTF-8."
        ) from error
    return value


def check_keys(row: Any, known: Collection[str], where: str) -> None:
    """Raises `InputError` where `row` is not a JSON object, or has a key that is not `known`."""
    if not isinstance(row, Mapping):
        raise InputError(
            f"{where} must be a JSON object with the keys {', '.join(sorted(known))}, and is {_shown(row)}."
        )
    for key in row:
        if key not in known:
            raise InputError(f"{where}: the key {_shown(key)} is not known{_nearest(key, known)}.")


def _nearest(name: Any, known: Collection[str]) -> str:
    """The end of a sentence about an unknown name: the nearest known one, and all of them."""
    close = difflib.get_close_matches(str(name)[:100], known, n=1)
    return (f": did you mean {close[0]!r}?" if close else "") + f" (known: {', '.join(sorted(known))})"


def _shown(value: Any) -> str:
    try:
        text = "missing" if value is None else repr(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
