"""JSON lines and JSON lists, read row by row in constant memory."""

import codecs
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from anygpt.data.formats.base import MAX_ROW_BYTES, Row
from anygpt.errors import InputError

BOM = b"\xef\xbb\xbf"  # a byte order mark, from Windows editors
CHUNK = 256 * 1024
SPACE = re.compile(r"[ \t\r\n]*")


def json_rows(path: Path) -> Iterator[Row]:
    """Rows of a `.jsonl` file, or of a JSON list for other suffixes."""
    return line_rows(path) if path.suffix.lower() == ".jsonl" else list_rows(path)


def line_rows(path: Path) -> Iterator[Row]:
    """One JSON value per line, named `file.jsonl:1`; blank lines are skipped, invalid ones become faults."""
    index = 0
    with path.open("rb") as file:
        for number, line in enumerate(_lines(file), start=1):
            if number == 1:
                line = line.removeprefix(BOM)
            if not line.strip():
                continue
            source = f"{path}:{number}"
            try:
                value = parse_json(line, source)
            except InputError as fault:
                value = fault
            yield Row(source, f"{path.stem}-{index}", value)
            index += 1


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines of a file; a line that is too long is cut just beyond the limit, so that `parse_json` rejects it."""
    while line := file.readline(MAX_ROW_BYTES + 1):
        rest = line
        while rest and len(line) > MAX_ROW_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(CHUNK)
        yield line


def parse_json(content: bytes, where: str) -> Any:
    """Parse one JSON value; raises `InputError`, naming `where`, if it is invalid."""
    if len(content) > MAX_ROW_BYTES:
        raise _too_long(where)
    try:
        decoder = _Decoder()
        value = decoder.decode(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _not_utf8(where, content[error.start]) from error
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not valid JSON: {error.msg} at column {error.colno}.") from error
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or too many nested brackets
        raise InputError(f"{where} is not JSON that can be read: {error}.") from error
    if fault := decoder.fault(where):
        raise fault
    return value


def list_rows(path: Path) -> Iterator[Row]:
    """Elements of one JSON list, named `file.json[0]`, `file.json[1]`, …

    ijson is four times as fast, but its memory is quadratic in the nesting depth (24 GiB for a file of 100 kB), it
    accepts repeated keys, turns lone surrogates into "?", and reports no line numbers.

    Raises:
        InputError: the list is invalid; the rows before that place have been yielded.
    """
    with path.open("rb") as file:
        text = _Text(path, file)
        if (first := text.next_character()) == "":
            return
        if first != "[":
            raise InputError(f"{path} must hold one JSON list of rows, and its first character is another than '['.")
        text.position += 1
        separator = "]" if text.next_character() == "]" else ","
        for index in itertools.count():
            if separator == "]":
                break
            yield Row(f"{path}[{index}]", f"{path.stem}-{index}", text.value())
            separator = text.next_character()
            if separator not in (",", "]") or separator == "":
                raise text.error("Expecting ',' or ']'")
            text.position += separator == ","
        text.position += 1
        if text.next_character() != "":
            raise text.error("Extra data")


class _Decoder(json.JSONDecoder):
    """Records repeated keys in an object; the standard decoder silently keeps the last value."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object)
        self.repeated: str | None = None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            self.repeated = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        return found

    def fault(self, where: str) -> InputError | None:
        if self.repeated is None:
            return None
        return InputError(f"{where} has the key {self.repeated[:80]!r} more than once in one object: leave one.")


class _Text:
    """A window on a JSON file that advances as values are read."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path = path
        self.file = file
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.window = ""
        self.position = 0
        self.line = 1  # line of the window's first character

    def next_character(self) -> str:
        """Skip white space and return the next character without consuming it; "" at the end of the file."""
        while True:
            self.position = SPACE.match(self.window, self.position).end()
            if self.position < len(self.window) or not self.read(CHUNK):
                return self.window[self.position : self.position + 1]

    def value(self) -> Any:
        """Consume and return the value at the current position, or a fault if an object in it repeats a key."""
        size = CHUNK
        while True:
            self.next_character()
            decoder = _Decoder()
            try:
                value, end = decoder.raw_decode(self.window, self.position)
            except json.JSONDecodeError as error:
                # The window's end may have cut the value: then a string is unterminated or the error is near the end.
                final = len(self.window) - error.pos > 64 and not error.msg.startswith("Unterminated")
                fault = self.error(error.msg, error.pos)
                if final or not self.read(size):
                    raise fault from error
            except (ValueError, RecursionError) as error:
                raise InputError(f"{self.place()} is not JSON that can be read: {error}.") from error
            else:
                length = end - self.position
                if end < len(self.window) or not self.read(size):  # a number may continue beyond the window
                    fault = decoder.fault(self.place())
                    self.position += length
                    return fault or value
            size *= 2  # a long row is then parsed few times

    def read(self, size: int) -> bool:
        """Read more of the file into the window and drop consumed text; False at the end of the file."""
        if len(self.window) - self.position > MAX_ROW_BYTES:
            raise _too_long(self.place())
        content = self.file.read(size)
        self.line += self.window.count("\n", 0, self.position)
        self.window, self.position = self.window[self.position :], 0
        try:
            self.window += self.decoder.decode(content, final=not content)
        except UnicodeDecodeError as error:
            line = self.line + self.window.count("\n") + error.object.count(b"\n", 0, error.start)
            raise _not_utf8(f"{self.path}:{line}", error.object[error.start]) from error
        return bool(content)

    def place(self, position: int | None = None) -> str:
        line = self.line + self.window.count("\n", 0, self.position if position is None else position)
        return f"{self.path}:{line}"

    def error(self, message: str, position: int | None = None) -> InputError:
        position = self.position if position is None else position
        column = position - self.window.rfind("\n", 0, position)
        return InputError(f"{self.place(position)} is not valid JSON: {message} at column {column}.")


def _not_utf8(where: str, byte: int) -> InputError:
    return InputError(f"{where} is not UTF-8 (byte {byte:#04x}): save the file as UTF-8.")


def _too_long(where: str) -> InputError:
    return InputError(f"{where} is longer than {MAX_ROW_BYTES:,} bytes, which no conversation is: check the file.")
