"""What every format is made of: rows as they stand in a file, and the names of the files."""

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

# No conversation is that long. Parsed JSON can take 25 times the memory of its text.
MAX_ROW_BYTES = 16 * 1024**2
MAX_FILES = 100_000
RANGE = re.compile(r"\{(\d+)\.\.(\d+)")


class Row(NamedTuple):
    """One row as it stands in the file.

    `value` is the parsed JSON, a `Pair`, or the fault that kept the row from being read; `id` is the sample's where
    the row itself has none.
    """

    source: str
    id: str
    value: Any


class Pair(NamedTuple):
    """A medium and its caption, of a WebDataset shard or a row of a table; see `anygpt.data.formats.pairs`.

    Either may be a list: media in the order of their placeholders, captions that say the same.
    """

    kind: str | None
    medium: str | StoredMedium | list[str | StoredMedium | None] | None
    text: Any
    prompt: Any = None


class Format(NamedTuple):
    """How the rows are found in a file, and how one becomes a row in the project's own form.

    rows: `rows(path)`, and `rows(path, columns, streaming)` where `takes_columns`.
    model: of a row; None for `Pair`s and the project's own form.
    convert: `convert(row, where)` of a row of `model`, where messages name it by `where`; None where `model` is.
    suffixes: of the files that are taken to be of this format when none is given.
    media_by_type: look in images/, videos/ and audios/ too (see `MediaRoot`).
    pairs: the rows are `Pair`s, which need a task.
    """

    rows: Callable[..., Iterator[Row]]
    model: type[RowModel] | None = None
    convert: Callable[[Any, str], dict] | None = None
    suffixes: tuple[str, ...] = ()
    media_by_type: bool = False
    takes_columns: bool = False
    pairs: bool = False


def find_files(path: str | Path) -> list[Path]:
    """The files that a path stands for: itself, a glob (`shards/*.tar`) or braces (`{00000..00012}.tar`, `{a,b}.tar`).

    Raises:
        InputError: one of the names does not exist, a glob that nothing matches, or braces that mean too many files.
    """
    if os.path.isfile(path):
        return [Path(path)]
    try:
        # braceexpand makes the whole of a range before it gives the first name
        large = any(abs(int(last) - int(first)) >= MAX_FILES for first, last in RANGE.findall(str(path)))
        names = [] if large else list(itertools.islice(braceexpand(str(path)), MAX_FILES + 1))
    except ValueError as error:  # braces without an end, or numbers of thousands of digits
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
