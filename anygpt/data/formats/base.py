"""Building blocks of the formats: a data source, raw rows, and the files that a path stands for."""

from __future__ import annotations  # so that jsonargparse does not check bounds: all values are checked at once

import glob
import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from braceexpand import braceexpand
from pydantic import Field

from anygpt.data.rows import RowModel
from anygpt.errors import InputError
from anygpt.media.files import StoredMedium

# Longer than any conversation; parsed JSON can take 25 times the memory of its text.
MAX_ROW_BYTES = 16 * 1024**2
MAX_FILES = 100_000
PATHS = ("media_root", "follow_links")  # settings of formats whose rows name media by their paths
RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")


@dataclass(frozen=True)
class DataSource:
    """One data file.

    path: the file; a glob or braces for "webdataset" and "datasets" (see `find_files`), a folder for "datasets".
    format: a key of `FORMATS`; by default by the suffix (`.jsonl`: "jsonl", `.json`: "nextgpt", `.tar`: "webdataset",
        `.parquet` and `.arrow`: "datasets").
    media_root: folder that media paths are relative to and may not leave; by default the folder of `path`. For
        "nextgpt", "llava" and "videochat", names missing there are looked up in its `images`, `videos` and `audios`
        (NExT-GPT keeps `cc3m.json` beside `cc3m/images`).
    weight: passes over the file per epoch: 1 is once, 0.5 half of it, 2 twice (see `UpdateSampler`).
    columns: a table's columns (format "datasets"), as in `{image: <column>, text: <column>}`; see `tables.table_rows`.
    task: for pairs of media and captions (formats "webdataset" and "datasets"): "comprehension" takes the medium as
        input and learns the caption, "generation" the reverse.
    follow_links: allow links below the media root to lead out of it, as in a snapshot of the Hub's cache.
    """

    path: str
    format: str | None = None
    media_root: str | None = None
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    columns: dict[str, str] | None = None
    task: Literal["comprehension", "generation"] | None = None
    follow_links: bool = False


class Row(NamedTuple):
    """One raw row: parsed JSON, a `Pair`, or the error from reading it; `id` is used if the row has none."""

    source: str
    id: str
    value: Any


class Pair(NamedTuple):
    """A medium and its caption from a WebDataset shard or a table; see `anygpt.data.formats.dialects`.

    Either may be a list: media in the order of their markers, captions as alternative wordings.
    """

    kind: str | None
    medium: str | StoredMedium | list[str | StoredMedium | None] | None
    text: Any
    prompt: Any = None


class Format(NamedTuple):
    """Reader of a file's rows and their conversion to the project's own form.

    rows: `rows(file)`, or `rows(file, columns)` if it uses columns. model: the row model; None for the project's own
    form, and for `Pair`s, which need a task. suffixes: those that imply the format. media_by_type: see `MediaRoot`.
    uses: the optional settings of a `DataSource` that it uses.
    """

    rows: Callable[..., Iterator[Row]]
    model: type[RowModel] | None = None
    suffixes: tuple[str, ...] = ()
    media_by_type: bool = False
    uses: tuple[str, ...] = PATHS


def find_files(path: str | Path) -> list[Path]:
    """Files that a path stands for: itself, a glob (`shards/*.tar`; `**` is any folders) or braces
    (`{00000..00012}.tar`, `{a,b}.tar`). An `InputError` refuses one that does not exist, a glob without matches, and
    unbalanced or too many braces."""
    if os.path.isfile(path):
        return [Path(path)]
    try:
        # braceexpand builds a whole range before it yields the first name
        large = any(abs(int(last) - int(first)) >= MAX_FILES for first, last in RANGE.findall(str(path)))
        names = [] if large else list(itertools.islice(braceexpand(str(path)), MAX_FILES + 1))
    except ValueError as error:  # unbalanced braces, or numbers with thousands of digits
        raise InputError(f"the braces of {str(path)[:80]} cannot be expanded: {error}") from error
    if not 0 < len(names) <= MAX_FILES:
        raise InputError(f"the braces of {str(path)[:80]} stand for more than {MAX_FILES:,} files: give fewer")
    found: list[Path] = []
    for name in names:
        matches = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else [name]
        if not matches:
            raise InputError(f"no file matches {name}: check the pattern")
        found += map(Path, matches)
    for file in found:
        if not os.path.isfile(file):
            folder = " (format 'datasets' reads a folder of tables)" if os.path.isdir(file) else ""
            state = f"is not a file{folder}" if os.path.exists(file) else "does not exist"
            raise InputError(f"the data file {file} {state}: check the path")
        if not os.access(file, os.R_OK):
            raise InputError(f"the data file {file} may not be read: change its permissions")
    return found
