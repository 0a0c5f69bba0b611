"""What every format is made of: rows as they stand in a file, and the names of the files."""

import glob
import itertools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from anygpt.errors import InputError
from anygpt.media.files import StoredMedium

# No conversation is that long. Parsed JSON can take 25 times the memory of its text.
MAX_ROW_BYTES = 16 * 1024**2
MAX_FILES = 1_000_000
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")


class Row(NamedTuple):
    """One row as it stands in the file.

    `value` is the parsed JSON, a `Pair`, or the fault that kept the row from being read; `id` is the sample's where
    the row itself has none.
    """

    source: str
    id: str
    value: Any


class Pair(NamedTuple):
    """A medium and its caption, of a WebDataset shard or a row of a table; see `anygpt.data.formats.pairs`."""

    kind: str | None
    medium: str | StoredMedium | None
    text: Any
    prompt: Any = None


class Format(NamedTuple):
    """How the rows are found in a file, and how one becomes a row in the project's own form.

    rows: `rows(path)`, and `rows(path, columns, streaming)` where `takes_columns`.
    convert: `convert(value, where)`, where messages name the row by `where`; None for `Pair`s.
    suffixes: of the files that are taken to be of this format when none is given.
    media_by_type: look in images/, videos/ and audios/ too (see `MediaRoot`).
    """

    rows: Callable[..., Iterator[Row]]
    convert: Callable[[Any, str], Any] | None
    suffixes: tuple[str, ...] = ()
    media_by_type: bool = False
    takes_columns: bool = False


def find_files(path: str | Path) -> list[Path]:
    """The files that a path stands for: itself, a glob (`shards/*.tar`) or braces (`{00000..00012}.tar`, `{a,b}.tar`).

    Raises:
        InputError: one of the names does not exist, a glob that nothing matches, or braces that mean too many files.
    """
    if os.path.isfile(path):
        return [Path(path)]
    found: list[Path] = []
    for name in _expand_braces(str(path)):
        names = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
        if not names:
            raise InputError(f"No file matches {name}: check the pattern.")
        found += [_readable(Path(name)) for name in names]
    return found


def _readable(path: Path) -> Path:
    if not os.path.isfile(path):
        state = "is not a file" if os.path.exists(path) else "does not exist"
        raise InputError(f"The data file {path} {state}: check the path.")
    if not os.access(path, os.R_OK):
        raise InputError(f"The data file {path} may not be read: change its permissions.")
    return path


def _expand_braces(pattern: str) -> Iterator[str]:
    literals = BRACES.split(pattern)  # text, inside of braces, text, inside of braces, …, text
    choices = [_choices(part, pattern) if i % 2 else [part] for i, part in enumerate(literals)]
    count = 1
    for options in choices:
        count *= len(options)
    _check_count(count, pattern)
    return ("".join(parts) for parts in itertools.product(*choices))


def _choices(inside: str, pattern: str) -> list[str]:
    match = RANGE.fullmatch(inside)
    if not match:
        return inside.split(",")
    if len(inside) > 40:
        raise InputError(f"The braces of {pattern[:80]} hold numbers that are too long: write fewer digits.")
    first, last = int(match[1]), int(match[2])
    _check_count(last - first + 1, pattern)
    return [str(number).zfill(len(match[1])) for number in range(first, last + 1)]


def _check_count(count: int, pattern: str) -> None:
    if not 0 < count <= MAX_FILES:
        raise InputError(f"The braces of {pattern} stand for {count:,} files: give a range of 1 to {MAX_FILES:,}.")
