"""Reading of data files of any format into validated samples."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from anygpt.data.formats import alpaca, llava, nextgpt, videochat
from anygpt.data.formats.base import Format, Row, find_files
from anygpt.data.formats.json_files import json_rows, line_rows
from anygpt.data.formats.pairs import check_task, convert_pair
from anygpt.data.formats.tables import is_hub_id, table_rows
from anygpt.data.formats.webdataset import shard_rows
from anygpt.data.rows import checked, nearest
from anygpt.data.schema import DataError, MediaRoot, Sample, parse_sample, row_name
from anygpt.errors import InputError
from anygpt.media.types import MEDIA

FORMATS: dict[str, Format] = {
    "jsonl": Format(line_rows, suffixes=(".jsonl",)),
    "nextgpt": Format(json_rows, nextgpt.NextGptRow, nextgpt.convert, (".json",), media_by_type=True),
    "llava": Format(json_rows, llava.LlavaRow, llava.convert, media_by_type=True),
    "alpaca": Format(json_rows, alpaca.AlpacaRow, alpaca.convert),
    "videochat": Format(json_rows, videochat.VideoChatRow, videochat.convert, media_by_type=True),
    "webdataset": Format(shard_rows, suffixes=(".tar",), pairs=True),
    "datasets": Format(table_rows, suffixes=(".parquet", ".arrow"), takes_columns=True, pairs=True),
}


def read_samples(
    path: str | Path,
    format: str | None = None,
    media_root: str | Path | None = None,
    faults: list[InputError] | None = None,
    columns: Mapping[str, str] | None = None,
    task: str | None = None,
    **options: bool,
) -> list[Sample]:
    """Read one data file, validate every row, and check that every media file exists.

    Args:
        path, format, media_root, columns, task, options: see `iterate_samples`.
        faults: None raises the first fault. A list collects the faults instead, and their rows are left out.

    Returns:
        Samples in file order. Rows without an id get `<file stem>-<row index>`, from 0; repeated ids (LLaVA's are those
        of the images) get a number.

    Raises:
        InputError: see `iterate_samples`; with `faults=None` also an invalid row, or missing media (names the first
            and gives the total).
    """
    samples: list[Sample] = []
    missing: list[tuple[Sample, Path]] = []
    for sample in iterate_samples(path, format, media_root, columns, task, **options):
        try:
            if isinstance(sample, InputError):
                raise sample
            absent = [(sample, file) for file in sample.missing_files()]
            missing += absent
            if absent and faults is not None:
                raise missing_error(absent)
        except InputError as fault:
            if faults is None:
                raise
            faults.append(fault)
        else:
            samples.append(sample)
    if missing and faults is None:
        raise missing_error(missing)
    return with_unique_ids(samples)


def with_unique_ids(samples: Sequence[Sample]) -> list[Sample]:
    """The samples, with a number appended to repeated ids: `7`, `7-2`, `7-3`."""
    taken, uses, found = {sample.id for sample in samples}, Counter(), []
    if len(taken) == len(samples):
        return list(samples)
    for sample in samples:
        uses[sample.id] += 1
        name = sample.id
        if uses[name] > 1:
            while (name := f"{sample.id}-{uses[sample.id]}") in taken:
                uses[sample.id] += 1
            taken.add(name)
        found.append(sample if name == sample.id else replace(sample, id=name))
    return found


def iterate_samples(
    path: str | Path,
    format: str | None = None,
    media_root: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    task: str | None = None,
    streaming: bool = False,
    follow_links: bool = False,
) -> Iterator[Sample | InputError]:
    """Yield the samples of a data file, with a fault in place of each invalid row.

    Repeated ids and missing media are left to `read_samples`.

    Args:
        path: the data file. For "webdataset" and "datasets" also a glob or braces (see `base.find_files`); for
            "datasets" also a folder.
        format: a key of `FORMATS`; None chooses by suffix (`.jsonl`: "jsonl", `.json`: "nextgpt", `.tar`:
            "webdataset", `.parquet` and `.arrow`: "datasets").
        media_root: folder that media paths are relative to and may not leave; None is the folder of `path`. For
            "nextgpt", "llava" and "videochat", names missing there are looked up in its `images`, `videos` and
            `audios` (NExT-GPT keeps `cc3m.json` beside `cc3m/images`).
        columns: required for "datasets": see `tables.table_rows`.
        task: "comprehension" or "generation", required for pairs of a medium and a caption: see `pairs`.
        follow_links: allow links below the media root to lead out of it (see `MediaRoot`).
        streaming: for "datasets": fetch media block by block without a copy of the table; `path` may be a Hub id.

    Raises:
        InputError: an unreadable or empty file, an unknown format, an invalid JSON list (after the rows before that
            place), `columns` or `task` with a format that does not use them.
    """
    path = Path(path)
    remote = streaming and format == "datasets" and is_hub_id(path)
    name = "datasets" if remote else _format_of(path, format)
    chosen = FORMATS[name]
    if streaming and not chosen.takes_columns:
        raise InputError(f"streaming is set for {path}, but the format {name!r} is read as it lies: leave it out.")
    if columns is not None and not chosen.takes_columns:
        raise InputError(f"columns is given for {path}, whose format {name!r} has none: leave it out.")
    if task is not None and not chosen.pairs:
        raise InputError(f"task is given for {path}, whose format {name!r} holds conversations: leave it out.")
    rows = chosen.rows(path, columns, streaming) if chosen.takes_columns else chosen.rows(path)
    if chosen.pairs and not (columns and not set(MEDIA) & set(columns)):  # a table may hold only text
        check_task(task, str(path))
    if media_root is None:
        folder = Path() if remote else path.parent  # a dataset on the Hub has no media beside it
        media_root = folder if path.exists() or remote else find_files(path)[0].parent
    root = MediaRoot(media_root, by_type=chosen.media_by_type, follow_links=follow_links)
    empty = True
    for row in rows:
        empty = False
        try:
            yield _sample(row, chosen, task, root)
        except InputError as fault:
            yield fault
    if empty:
        raise InputError(f"{path} holds no samples: it is empty.")


def _sample(row: Row, chosen: Format, task: str | None, root: MediaRoot) -> Sample:
    value = row.value
    if isinstance(value, InputError):
        raise value
    where = row_name(value, row.source, row.id)
    if chosen.pairs:
        value = convert_pair(value, where, task)
    elif chosen.model is not None:
        found = checked(chosen.model, value, where)
        value = chosen.convert(found, where) | ({"id": found.id} if found.id else {})
    return parse_sample(value, row.source, row.id, root)


def _format_of(path: Path, name: str | None) -> str:
    if name is None:
        name = next((known for known, value in FORMATS.items() if path.suffix.lower() in value.suffixes), None)
    elif name not in FORMATS:
        raise InputError(f"The format {name!r} of {path} is not known{nearest(name, FORMATS)}.")
    if not (name == "datasets" and os.path.isdir(path)):
        several = len(find_files(path)) > 1  # also checks that they exist
        if several and name and not FORMATS[name].pairs:
            raise InputError(f"{path} stands for several files, and {name!r} takes one: give each by itself.")
    if name is None:
        raise InputError(f"The format of {path} cannot be told from its suffix: give format ({', '.join(FORMATS)}).")
    return name


def missing_error(missing: list[tuple[Sample, Path]]) -> DataError:
    """Error that names the first of the missing files and counts them."""
    sample, file = missing[0]
    count = len({file for _, file in missing})
    total = "1 media file is missing" if count == 1 else f"{count} media files are missing in all"
    return DataError(
        f"{sample.source} (sample {sample.id!r}): {file} does not exist or is not a file ({total}): "
        "put the files there, or set media_root.",
        "missing media",
    )
