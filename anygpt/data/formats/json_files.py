"""JSON lines, read in constant memory, and JSON lists, whose text is kept in memory while it is read."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anygpt.data.formats.base import MAX_ROW_BYTES, Row
from anygpt.errors import InputError

BOM = b"\xef\xbb\xbf"  # a byte order mark, from Windows editors
SPACE = re.compile(r"[ \t\r\n]*")


def json_rows(path: Path) -> Iterator[Row]:
    """Rows of a `.jsonl` file, or of a JSON list for other suffixes."""
    return line_rows(path) if path.suffix.lower() == ".jsonl" else list_rows(path)


def line_rows(path: Path) -> Iterator[Row]:
    """One JSON value per line, named `file.jsonl:1`; blank lines are skipped, invalid ones become faults."""
    index, number = itertools.count(), 0
    with path.open("rb") as file:
        while line := file.readline(MAX_ROW_BYTES + 1):
            rest, number = line, number + 1
            while len(line) > MAX_ROW_BYTES and rest and not rest.endswith(b"\n"):  # cut: `parse_json` rejects it
                rest = file.readline(MAX_ROW_BYTES)
            line = line.removeprefix(BOM) if number == 1 else line
            if line.strip():
                try:
                    value = parse_json(line.rstrip(), str(path), number)
                except InputError as fault:
                    value = fault
                yield Row(f"{path}:{number}", f"{path.stem}-{next(index)}", value)


def list_rows(path: Path) -> Iterator[Row]:
    """Elements of one JSON list, named `file.json[0]`, `file.json[1]`, …; an `InputError` follows the rows before a
    fault.

    ijson's memory is quadratic in the nesting depth (24 GiB for a file of 100 kB), it accepts repeated keys, turns lone
    surrogates into "?", and reports no line numbers.
    """
    text = _decoded(path.read_bytes().removeprefix(BOM), str(path), 1)
    place = _after_space(text, 0)
    if place == len(text):
        return
    if text[place] != "[":
        raise InputError(f"{path} must hold one JSON list of rows, and its first character is another than '['.")
    place = _after_space(text, place + 1)
    if ended := text.startswith("]", place):
        place = _after_space(text, place + 1)
    for index in itertools.count():
        if ended:
            break
        value, end = _value_at(text, place, str(path), 1)
        yield Row(f"{path}[{index}]", f"{path.stem}-{index}", value)
        place = _after_space(text, end)
        ended = text.startswith("]", place)
        if not ended and not text.startswith(",", place):
            raise _invalid(text, place, str(path), 1, "Expecting ',' or ']'")
        place = _after_space(text, place + 1)
    if place < len(text):
        raise _invalid(text, place, str(path), 1, "Extra data")


def parse_json(content: bytes, name: str, line: int | None = None) -> Any:
    """Parse one JSON value; `name` and `line`, the number of its first line, are for messages. An `InputError` refuses
    invalid JSON, an object with a repeated key (of which Python would keep the last), and what is too long."""
    if len(content) > MAX_ROW_BYTES:
        where = _where("", 0, name, line)
        raise InputError(f"{where} is longer than {MAX_ROW_BYTES:,} bytes, which no conversation is: check the file.")
    text = _decoded(content, name, line)
    value, end = _value_at(text, _after_space(text, 0), name, line)
    if isinstance(value, InputError):
        raise value
    if _after_space(text, end) < len(text):
        raise _invalid(text, end, name, line, "Extra data")
    return value


def _value_at(text: str, place: int, name: str, line: int | None) -> tuple[Any, int]:
    repeated: list[str] = []

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            repeated.append(next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1))
        return found

    try:
        value, end = json.JSONDecoder(object_pairs_hook=object_of).raw_decode(text, place)
    except json.JSONDecodeError as error:
        raise _invalid(text, error.pos, name, line, error.msg) from error
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or too many nested brackets
        raise InputError(f"{_where(text, place, name, line)} is not JSON that can be read: {error}.") from error
    if repeated:
        where = _where(text, place, name, line)
        value = InputError(f"{where} has the key {repeated[0][:80]!r} more than once in one object: leave one.")
    return value, end


def _after_space(text: str, place: int) -> int:
    return SPACE.match(text, place).end()


def _decoded(content: bytes, name: str, line: int | None) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        where = _where(content[: error.start].decode("utf-8"), error.start, name, line)
        byte = content[error.start]
        raise InputError(f"{where} is not UTF-8 (byte {byte:#04x}): save the file as UTF-8.") from error


def _where(text: str, place: int, name: str, line: int | None) -> str:
    return name if line is None else f"{name}:{line + text[:place].count(chr(10))}"


def _invalid(text: str, place: int, name: str, line: int | None, reason: str) -> InputError:
    column = place - text.rfind("\n", 0, place)
    return InputError(f"{_where(text, place, name, line)} is not valid JSON: {reason} at column {column}.")
