"""JSON lines and JSON lists, read row by row in constant memory."""

import io
import itertools
import json
import re
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from anygpt.data.formats.base import MAX_ROW_BYTES, Row
from anygpt.errors import InputError

BLOCK = 4 * 1024**2
SPACE = re.compile(r"[ \t\r\n]*")
ESCAPED = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of a byte that is not UTF-8


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
            if line.strip().removeprefix(BOM_UTF8):
                try:
                    value = parse_json(line.rstrip(), str(path), number)
                except InputError as fault:
                    value = fault
                yield Row(f"{path}:{number}", f"{path.stem}-{next(index)}", value)


def list_rows(path: Path) -> Iterator[Row]:
    """Elements of one JSON list, named `file.json[0]` and so on; at a fault, an `InputError` after the rows before it.

    ijson's memory is quadratic in the nesting depth (24 GiB for a file of 100 kB), it accepts repeated keys, turns lone
    surrogates into "?", and reports no line numbers.
    """
    with path.open("rb") as file:
        text = _Text(file, str(path))
        if not text.next():
            return
        if not text.took("["):
            raise InputError(f"{path} must hold one JSON list of rows, but it does not begin with '['")
        ended = text.took("]")
        for index in itertools.count():
            if ended:
                break
            yield Row(f"{path}[{index}]", f"{path.stem}-{index}", text.value())
            ended = text.took("]")
            if not ended and not text.took(","):
                raise text.invalid("Expecting ',' or ']'")
        if text.next():
            raise text.invalid("Extra data")


def parse_json(content: bytes, name: str, line: int = 1) -> Any:
    """Parse one JSON value; `name` and `line`, the number of its first line, are for messages. An `InputError` refuses
    invalid JSON, an object with a repeated key (of which Python would keep the last), and what is too long."""
    text = _Text(io.BytesIO(content), name, line)
    if len(content) > MAX_ROW_BYTES:
        raise text.too_long()
    text.next()
    value = text.value()
    if isinstance(value, InputError):
        raise value
    if text.next():
        raise text.invalid("Extra data")
    return value


class _Text:
    """The text of a file from `place` on, with little more than a row in memory. `place` is at `line` and `column`,
    counted from the first line's number and from 1."""

    def __init__(self, file: BinaryIO, name: str, line: int = 1):
        self.file = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
        self.name, self.line, self.column = name, line, 1
        self.text, self.place = "", 0

    def next(self) -> str:
        """Go to the next character that is not a space, and read on until a whole row follows it."""
        while True:
            self.move(SPACE.match(self.text, self.place).end())
            if len(self.text) - self.place > MAX_ROW_BYTES:
                break
            block = self.file.read(BLOCK)
            if bad := ESCAPED.search(block):
                self.text += block[: bad.start()]
                self.move(len(self.text))
                byte = ord(bad[0]) - 0xDC00
                raise InputError(f"{self.where()} is not UTF-8 (byte {byte:#04x}): save the file as UTF-8")
            if not block:
                break
            self.text, self.place = self.text[self.place :] + block, 0
        return self.text[self.place : self.place + 1]

    def took(self, mark: str) -> bool:
        found = self.next() == mark
        self.move(self.place + found)
        return found

    def move(self, to: int) -> None:
        passed = self.text[self.place : to]
        self.line += passed.count("\n")
        self.column = len(passed) - passed.rfind("\n") if "\n" in passed else self.column + len(passed)
        self.place = to

    def value(self) -> Any:
        """The value here, or the fault of a value that can be skipped."""
        self.next()
        repeated: list[str] = []

        def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            found = dict(pairs)
            if len(found) < len(pairs):
                repeated.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            return found

        try:
            value, end = json.JSONDecoder(object_pairs_hook=object_of).raw_decode(self.text, self.place)
        except json.JSONDecodeError as error:
            cut = len(self.text) - self.place > MAX_ROW_BYTES
            if cut and (error.pos - self.place > MAX_ROW_BYTES or error.msg.startswith("Unterminated")):
                raise self.too_long() from error
            self.move(error.pos)
            raise self.invalid(error.msg) from error
        except (ValueError, RecursionError) as error:  # a number with thousands of digits, or too many nested brackets
            raise InputError(f"{self.where()} is not readable JSON: {error}") from error
        if repeated:
            key = repeated[0][:80]
            value = InputError(f"{self.where()} has the key {key!r} more than once in one object: keep one")
        if end - self.place > MAX_ROW_BYTES:
            value = self.too_long()
        self.move(end)
        return value

    def where(self) -> str:
        return f"{self.name}:{self.line}"

    def too_long(self) -> InputError:
        what = f"is longer than {MAX_ROW_BYTES:,} bytes, longer than any conversation"
        return InputError(f"{self.where()} {what}: check the file")

    def invalid(self, reason: str) -> InputError:
        return InputError(f"{self.where()} is not valid JSON: {reason} at column {self.column}")
