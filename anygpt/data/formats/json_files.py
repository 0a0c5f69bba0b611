"""JSON lines and JSON lists, read row by row, so that memory does not grow with the file."""

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
    """The rows of a `.jsonl` file, else those of one JSON list."""
    return line_rows(path) if path.suffix.lower() == ".jsonl" else list_rows(path)


def line_rows(path: Path) -> Iterator[Row]:
    """One JSON value a line, named `file.jsonl:1`; blank lines are passed over. A broken line is a row with a fault."""
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
    """The lines of a file; one that is too long is cut just beyond the limit, which `parse_json` refuses."""
    while line := file.readline(MAX_ROW_BYTES + 1):
        rest = line
        while rest and len(line) > MAX_ROW_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(CHUNK)
        yield line


def parse_json(content: bytes, where: str) -> Any:
    """One JSON value. Raises `InputError`, naming `where`, for everything that is none."""
    if len(content) > MAX_ROW_BYTES:
        raise _too_long(where)
    try:
        decoder = _Decoder()
        value = decoder.decode(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _not_utf8(where, content[error.start]) from error
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not valid JSON: {error.msg} at column {error.colno}.") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise InputError(f"{where} is not JSON that can be read: {error}.") from error
    if fault := decoder.fault(where):
        raise fault
    return value


def list_rows(path: Path) -> Iterator[Row]:
    """The elements of one JSON list, named `file.json[0]`, `file.json[1]`, …

    Own code, as ijson, though four times as fast, takes memory quadratic in the depth of brackets (24 GiB for a file of
    100 kB), keeps one of two equal keys, makes "?" of half a character, and tells no line.

    Raises:
        InputError: where the list is broken, after the rows before that place.
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
    """Remembers a key that stood twice in one object; the standard one keeps the last value without a word."""

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
    """A window on a JSON file that moves on as values are read from it."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path = path
        self.file = file
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.window = ""
        self.position = 0
        self.line = 1  # of the window's first character

    def next_character(self) -> str:
        """The next one that is not white space, which stays; "" at the end of the file."""
        while True:
            self.position = SPACE.match(self.window, self.position).end()
            if self.position < len(self.window) or not self.read(CHUNK):
                return self.window[self.position : self.position + 1]

    def value(self) -> Any:
        """The value at the window's position, which moves behind it; a fault, if a key stands twice in it."""
        size = CHUNK
        while True:
            self.next_character()
            decoder = _Decoder()
            try:
                value, end = decoder.raw_decode(self.window, self.position)
            except json.JSONDecodeError as error:
                # Cut off by the window's end, perhaps: then it is a string, or the fault is right there.
                final = len(self.window) - error.pos > 64 and not error.msg.startswith("Unterminated")
                fault = self.error(error.msg, error.pos)
                if final or not self.read(size):
                    raise fault from error
            except (ValueError, RecursionError) as error:
                raise InputError(f"{self.place()} is not JSON that can be read: {error}.") from error
            else:
                length = end - self.position
                if end < len(self.window) or not self.read(size):  # a number could go on
                    fault = decoder.fault(self.place())
                    self.position += length
                    return fault or value
            size *= 2  # so that a long row is parsed few times

    def read(self, size: int) -> bool:
        """Puts more of the file into the window, and takes out what has been passed. False at the end of the file."""
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
