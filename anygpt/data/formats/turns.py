"""Shared parts of NExT-GPT's and LLaVA's JSON: turns with `from` and `value`, and markers in place of media."""

import re
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from anygpt.data.rows import DataError, Id, RowModel, Text, Texts, at_least_one

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


class Turn(RowModel):
    """Speaker and text of one turn."""

    speaker: Literal["human", "gpt", "system"] = Field(alias="from")
    value: Text


class TurnsRow(RowModel):
    """A conversation with a key for each media type, whose value is a string or a list."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Texts | None]

    conversations: Annotated[list[Turn], at_least_one("turn")]
    id: Id = ""

    def listed(self, key: str) -> list[str]:
        """Strings under a media type's key; empty if it is absent."""
        value = self.__pydantic_extra__.get(key)
        return value if isinstance(value, list) else [] if value is None else [value]


def inputs(row: TurnsRow, key: str, kind: str, where: str) -> list[dict]:
    """Input parts of one media type; their number must match that of the markers, unless there are none."""
    files, markers = row.listed(key), count_markers(row, "human", kind)
    if markers not in (len(files), 0) or (files and not any(turn.speaker == "human" for turn in row.conversations)):
        raise count_error(where, "human", kind, markers, f"{key!r} names {len(files)} file(s)")
    return [{"type": kind, "path": file} for file in files]


def messages(row: TurnsRow, media: dict[str, dict[str, list[dict]]]) -> dict:
    """Convert a row, replacing each marker by the next medium of its speaker and type.

    `media`: `{speaker: {type: parts}}`. Inputs of a type without markers open the first human turn.
    """
    unmarked = [
        part for kind, parts in media["human"].items() if not count_markers(row, "human", kind) for part in parts
    ]
    left = {speaker: {kind: iter(parts) for kind, parts in kinds.items()} for speaker, kinds in media.items()}
    found = []
    for turn in row.conversations:
        content = []
        if turn.speaker == "human":
            content, unmarked = unmarked, []
        content += split_markers(turn.value, left.get(turn.speaker, {}))
        found.append({"role": ROLES[turn.speaker], "content": content})
    return {"messages": found}


def split_markers(text: str, left: dict) -> list[dict]:
    """Content parts of a text, each marker replaced by the next part of its type in `left`, if any.

    One line break between a marker and the text belongs to the marker; other white space is text.
    """
    if not left:
        return [{"type": "text", "text": text}]
    pieces = re.split(rf"\n?<({'|'.join(map(re.escape, left))})>\n?", text)
    parts = [next(left[piece]) if i % 2 else {"type": "text", "text": piece} for i, piece in enumerate(pieces)]
    return [part for part in parts if part.get("text") != ""]


def count_markers(row: TurnsRow, speaker: str, kind: str) -> int:
    """Number of markers of a media type in a speaker's turns."""
    return sum(turn.value.count(f"<{kind}>") for turn in row.conversations if turn.speaker == speaker)


def count_error(where: str, speaker: str, kind: str, markers: int, files: str) -> DataError:
    """Error about numbers of markers and files that do not match."""
    return DataError(
        f"{where}: its {speaker} turns hold {markers} '<{kind}>' marker(s), but {files}: give one marker a file.",
        "placeholders",
    )
