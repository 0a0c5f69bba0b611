"""Building blocks of the formats: raw rows, and the files that a path stands for."""

import glob
import itertools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from braceexpand import braceexpand

from anygpt.data.rows import RowModel
from anygpt.errors import InputError
from anygpt.media.files import StoredMedium

# Longer than any conversation; parsed JSON can take 25 times the memory of its text.
MAX_ROW_BYTES = 16 * 1024**2
MAX_FILES = 100_000
RANGE = re.compile(r"\{(\d+)\.\.(\d+)")


class Row(NamedTuple):
    """One raw row of a file.

    `value` is the parsed JSON, a `Pair`, or the error from reading it; `id` is the sample's id if the row has none.
    """

    source: str
    id: str
    value: Any


class Pair(NamedTuple):
    """A medium and its caption from a WebDataset shard or a table; see `anygpt.data.formats.pairs`.

    Either may be a list: media in the order of their markers, captions as alternative wordings.
    """

    kind: str | None
    medium: str | StoredMedium | list[str | StoredMedium | None] | None
    text: Any
    prompt: Any = None


class Format(NamedTuple):
    """Reader of a file's rows and their conversion to the project's own form.

    rows: `rows(path)`, or `rows(path, columns, streaming)` if `takes_columns`.
    model: row model; None for `Pair`s and the project's own form.
    convert: `convert(row, where)` for a row of `model`; `where` is its name in messages. None if `model` is None.
    suffixes: file suffixes that imply this format.
    media_by_type: also look for media in images/, videos/ and audios/ (see `MediaRoot`).
    pairs: rows are `Pair`s, which need a task.
    """

    rows: Callable[..., Iterator[Row]]
    model: type[RowModel] | None = None
    convert: Callable[[Any, str], dict] | None = None
    suffixes: tuple[str, ...] = ()
    media_by_type: bool = False
    takes_columns: bool = False
    pairs: bool = False


def find_files(path: str | Path) -> list[Path]:
    """Files that a path stands for: itself, a glob (`shards/*.tar`) or braces (`{00000..00012}.tar`, `{a,b}.tar`).

    Raises:
        InputError: a name that does not exist, a glob without matches, or braces that expand to too many files.
    """
    if os.path.isfile(path):
        return [Path(path)]
    try:
        # braceexpand builds a whole range before it yields the first name
        large = any(abs(int(last) - int(first)) >= MAX_FILES for first, last in RANGE.findall(str(path)))
        names = [] if large else list(itertools.islice(braceexpand(str(path)), MAX_FILES + 1))
    except ValueError as error:  # unbalanced braces, or numbers with thousands of digits
        raise InputError(f"The braces of {str(path)[:80]} are not right: {error}.") from error
    if not 0 < len(names) <= MAX_FILES:
        raise InputError(f"The braces of {path} stand for more than {MAX_FILES:,} files: give a smaller range.")
    found: list[Path] = []
    for name in names:
        matches = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
        if not matches:
            raise InputError(f"No file matches {name}: check the pattern.")
        found += [_readable(Path(match)) for match in matches]
    return found


def _readable(path: Path) -> Path:
    if not os.path.isfile(path):
        state = "is not a file" if os.path.exists(path) else "does not exist"
        raise InputError(f"The data file {path} {state}: check the path.")
    if not os.access(path, os.R_OK):
        raise InputError(f"The data file {path} may not be read: change its permissions.")
    return path
