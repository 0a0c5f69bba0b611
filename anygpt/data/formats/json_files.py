"""JSON lines and JSON lists, read row by row in constant memory."""

import itertools
import json
import mmap
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from anygpt.data.formats.base import MAX_ROW_BYTES, Row
from anygpt.errors import InputError

BOM = b"\xef\xbb\xbf"  # a byte order mark, from Windows editors
CHUNK = 256 * 1024
SPACE = re.compile(rb"[ \t\r\n]*")
TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{},]', re.DOTALL)
"""What tells where a value ends: strings, brackets and commas."""


def json_rows(path: Path) -> Iterator[Row]:
    """Rows of a `.jsonl` file, or of a JSON list for other suffixes."""
    return line_rows(path) if path.suffix.lower() == ".jsonl" else list_rows(path)


def line_rows(path: Path) -> Iterator[Row]:
    """One JSON value per line, named `file.jsonl:1`; blank lines are skipped, invalid ones become faults."""
    index = itertools.count()
    with path.open("rb") as file:
        for number, line in enumerate(_lines(file), start=1):
            line = line.removeprefix(BOM) if number == 1 else line
            if line.strip():
                yield Row(f"{path}:{number}", f"{path.stem}-{next(index)}", _parsed(line.rstrip(), path, number))


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines of a file; a line that is too long is cut just beyond the limit, so that `parse_json` rejects it."""
    while line := file.readline(MAX_ROW_BYTES + 1):
        rest = line
        while rest and len(line) > MAX_ROW_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(CHUNK)
        yield line


def list_rows(path: Path) -> Iterator[Row]:
    """Elements of one JSON list, named `file.json[0]`, `file.json[1]`, …

    ijson's memory is quadratic in the nesting depth (24 GiB for a file of 100 kB), it accepts repeated keys, turns lone
    surrogates into "?", and reports no line numbers.

    Raises:
        InputError: the list is invalid; the rows before that place have been yielded.
    """
    if not path.stat().st_size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        place = line_start = len(BOM) if text[: len(BOM)] == BOM else 0
        line = 1

        def move(to: int) -> None:
            nonlocal place, line, line_start
            line += text[place:to].count(b"\n")
            line_start = max(line_start, text.rfind(b"\n", place, to) + 1)
            place = to

        def next_character() -> bytes:
            move(SPACE.match(text, place).end())
            return text[place : place + 1]

        def broken(message: str) -> InputError:
            return InputError(f"{path}:{line} is not valid JSON: {message} at column {place - line_start + 1}.")

        if not next_character():
            return
        if next_character() != b"[":
            raise InputError(f"{path} must hold one JSON list of rows, and its first character is another than '['.")
        move(place + 1)
        separator = b"]" if next_character() == b"]" else b","
        for index in itertools.count():
            if separator == b"]":
                break
            next_character()
            end = _end_of_value(text, place)
            value = _parsed(text[place:end], path, line, place - line_start)
            yield Row(f"{path}[{index}]", f"{path.stem}-{index}", value)
            move(end)
            separator = next_character()
            if separator not in (b",", b"]"):
                raise broken("Expecting ',' or ']'")
            move(place + (separator == b","))
        move(place + 1)
        if next_character():
            raise broken("Extra data")


def _end_of_value(text: mmap.mmap, start: int) -> int:
    """End of the value at `start`, judged by its brackets; at most just beyond the limit, so that it is rejected."""
    depth, limit = 0, start + MAX_ROW_BYTES + 1
    for token in TOKEN.finditer(text, start, limit):
        mark = token[0][:1]
        if depth == 0 and mark in b",]}":
            return token.start()
        depth += (mark in b"[{") - (mark in b"]}")
        if depth == 0 and mark != b'"':
            return token.end()
    return min(limit, len(text))


def parse_json(content: bytes, name: str, line: int | None = None, column: int = 0) -> Any:
    """Parse one JSON value.

    Args:
        name, line: name of its file and number of its first line, or a name alone, for messages.
        column: characters that precede it on that line.

    Raises:
        InputError: invalid JSON, an object with a repeated key (of which Python would keep the last), or too long.
    """
    where = name if line is None else f"{name}:{line}"
    if len(content) > MAX_ROW_BYTES:
        raise InputError(f"{where} is longer than {MAX_ROW_BYTES:,} bytes, which no conversation is: check the file.")
    repeated: list[str] = []

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            repeated.append(next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1))
        return found

    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=object_of)
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise InputError(f"{where} is not UTF-8 (byte {byte:#04x}): save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        column = error.colno + (column if error.lineno == 1 else 0)
        where = where if line is None else f"{name}:{line + error.lineno - 1}"
        raise InputError(f"{where} is not valid JSON: {error.msg} at column {column}.") from error
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or too many nested brackets
        raise InputError(f"{where} is not JSON that can be read: {error}.") from error
    if repeated:
        raise InputError(f"{where} has the key {repeated[0][:80]!r} more than once in one object: leave one.")
    return value


def _parsed(content: bytes, path: Path, line: int, column: int = 0) -> Any:
    """The value of a row, or the fault in it."""
    try:
        return parse_json(content, str(path), line, column)
    except InputError as fault:
        return fault
