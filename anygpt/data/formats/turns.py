"""What NExT-GPT's and LLaVA's JSON have in common: turns with `from` and `value`, and markers where media stand."""

import re
from typing import Any

from anygpt.data.schema import MEDIA_TYPES, DataError, check_keys, checked_text
from anygpt.errors import InputError

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
# One line break that sets a marker off from the text belongs to the marker; other white space is text.
MARKER = re.compile(r"\n?<(image|video|audio)>\n?")


def checked_turns(row: dict, keys: tuple[str, ...], where: str) -> list[dict]:
    """`row["conversations"]`, each turn with known `keys`, a known speaker and a text."""
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{where}: 'conversations' must be a list of at least one turn.")
    for i, turn in enumerate(turns):
        check_keys(turn, keys, f"{where}.conversations[{i}]")
        if turn.get("from") not in tuple(ROLES):
            raise InputError(
                f"{where}.conversations[{i}]: 'from' is {str(turn.get('from'))[:80]!r}, and must be one of "
                f"{', '.join(ROLES)}."
            )
        checked_text(turn.get("value"), f"{where}.conversations[{i}]: 'value'")
    return turns


def inputs(row: dict, key: str, turns: list[dict], kind: str, where: str) -> list[dict]:
    """The media parts of one type that the user gives: as many as markers, or there is no marker at all."""
    files = listed(row, key, where)
    markers = count_markers(turns, "human", kind)
    if markers not in (len(files), 0) or (files and not any(turn["from"] == "human" for turn in turns)):
        raise count_error(where, "human", kind, markers, f"{key!r} names {len(files)} file(s)")
    return [{"type": kind, "path": file} for file in files]


def messages(turns: list[dict], media: dict[str, dict[str, list[dict]]]) -> list[dict]:
    """The turns in the project's own form, each marker replaced by the next medium of its speaker and type.

    `media`: `{speaker: {type: parts}}`. Inputs of a type without any marker open the first human turn.
    """
    left = {speaker: {kind: iter(parts) for kind, parts in kinds.items()} for speaker, kinds in media.items()}
    unmarked = [
        part for kind in MEDIA_TYPES if not count_markers(turns, "human", kind) for part in media["human"][kind]
    ]
    found = []
    for turn in turns:
        content, position = [], 0
        if turn["from"] == "human":
            content, unmarked = unmarked, []
        for marker in MARKER.finditer(turn["value"]) if turn["from"] in left else ():
            content.append({"type": "text", "text": turn["value"][position : marker.start()]})
            content.append(next(left[turn["from"]][marker[1]]))
            position = marker.end()
        content.append({"type": "text", "text": turn["value"][position:]})
        content = [part for part in content if part["type"] != "text" or part["text"]]
        found.append({"role": ROLES[turn["from"]], "content": content})
    return found


def with_id(row: dict, found: list[dict]) -> dict:
    """A row in the project's own form, with its id where it has one."""
    return {"messages": found} | ({"id": row["id"]} if "id" in row else {})


def count_markers(turns: list[dict], speaker: str, kind: str) -> int:
    """How often a speaker's turns hold the marker of a media type."""
    return sum(turn["value"].count(f"<{kind}>") for turn in turns if turn["from"] == speaker)


def count_error(where: str, speaker: str, kind: str, markers: int, files: str) -> DataError:
    """Of markers and files that do not go together."""
    return DataError(
        f"{where}: its {speaker} turns hold {markers} '<{kind}>' marker(s), but {files}: give one marker a file.",
        "placeholders",
    )


def listed(row: dict, key: str, where: str) -> list[Any]:
    """The strings under `key`, which may hold one, a list, or be absent."""
    value = row.get(key)
    values = [] if value is None else value if isinstance(value, list) else [value]
    return [checked_text(v, f"{where}: {key!r}") for v in values]
