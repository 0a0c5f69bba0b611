"""Reading of data files of any format into validated samples."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from anygpt.data.formats import dialects
from anygpt.data.formats.base import PATHS, DataSource, Format, find_files
from anygpt.data.formats.json_files import json_rows, line_rows
from anygpt.data.formats.tables import COLUMNS, table_rows
from anygpt.data.formats.webdataset import shard_rows
from anygpt.data.rows import DataError, checked, nearest
from anygpt.data.schema import MediaRoot, Sample, parse_sample, row_name
from anygpt.errors import InputError

FORMATS: dict[str, Format] = {
    "jsonl": Format(line_rows, suffixes=(".jsonl",)),
    "nextgpt": Format(json_rows, dialects.NextGptRow, (".json",), media_by_type=True),
    "llava": Format(json_rows, dialects.LlavaRow, media_by_type=True),
    "alpaca": Format(json_rows, dialects.AlpacaRow, uses=()),
    "videochat": Format(json_rows, dialects.VideoChatRow, media_by_type=True),
    "webdataset": Format(shard_rows, suffixes=(".tar",), uses=("task",)),
    "datasets": Format(table_rows, suffixes=(".parquet", ".arrow"), uses=("columns", "task", *PATHS)),
}
# First bytes of files that none of these readers takes.
UNREAD = {b"\x1f\x8b": "gzip-compressed: unpack it (gunzip)"}
UNREAD |= dict.fromkeys((b"\xff\xfe", b"\xfe\xff"), "UTF-16: save it as UTF-8")


def read_samples(
    path: str | Path,
    format: str | None = None,
    media_root: str | Path | None = None,
    faults: list[InputError] | None = None,
    **options: Any,
) -> list[Sample]:
    """Read one data file, validate every row, and check that every media file exists.

    Arguments are those of `DataSource`. Rows with a fault are left out if there is a list for their `faults`, else the
    first one is raised. A row without an id gets `<file stem>-<row index>`, from 0; repeated ids get a number.
    """
    samples: list[Sample] = []
    missing: list[tuple[Sample, Path]] = []
    for sample in iterate_samples(DataSource(str(path), format, media_root and str(media_root), **options)):
        absent = [] if isinstance(sample, InputError) else [(sample, file) for file in sample.missing_files()]
        if isinstance(sample, InputError):
            if faults is None:
                raise sample
            faults.append(sample)
        elif absent and faults is not None:
            faults.append(missing_error(absent))
        else:
            samples.append(sample)
            missing += absent
    if missing:
        raise missing_error(missing)
    return with_unique_ids(samples)


def with_unique_ids(samples: Sequence[Sample]) -> list[Sample]:
    """The samples, with a number appended to repeated ids: `7`, `7-2`, `7-3`."""
    taken, uses, found = {sample.id for sample in samples}, Counter(), []
    for sample in samples:
        name = sample.id
        uses[name] += 1
        if uses[name] > 1:
            while (name := f"{sample.id}-{uses[sample.id]}") in taken:
                uses[sample.id] += 1
            taken.add(name)
        found.append(sample if name == sample.id else replace(sample, id=name))
    return found


def iterate_samples(source: DataSource) -> Iterator[Sample | InputError]:
    """Yield the samples of a data file, with a fault in place of each invalid row; media may be missing. An
    `InputError` is raised for a file that is unreadable or empty, for a JSON list that becomes invalid (after the rows
    before that place), and for a setting that the format does not use."""
    path = Path(source.path)
    name, files = _format_and_files(path, source.format)
    chosen = FORMATS[name]
    text_alone = "columns" in chosen.uses and source.columns and set(source.columns) <= set(COLUMNS)
    uses = ("columns",) if text_alone else chosen.uses
    for setting in ("columns", "task", *PATHS):
        if getattr(source, setting) and setting not in uses:
            what = f"format {name!r}{' without a media column' if text_alone else ''}"
            raise InputError(f"{setting} is given for {path}, whose {what} has no use for it: leave it out")
    if "task" in uses and source.task not in dialects.TASKS:
        raise InputError(
            f"{path} holds media with captions, and task is {source.task!r}: give comprehension (the medium is asked "
            "about, its caption is the answer) or generation (the caption is asked for, the medium is the answer)"
        )
    pairs = "task" in chosen.uses
    columns = [source.columns] if "columns" in uses else []
    rows = (row for file in files or [path] for row in chosen.rows(file, *columns))
    folder, folders = source.media_root, {file.parent for file in files} or {path.parent}
    if folder is None and len(folders) == 1:
        (folder,) = folders
    root = MediaRoot(folder, by_type=chosen.media_by_type, follow_links=source.follow_links)
    empty = True
    for row in rows:
        empty, value = False, row.value
        try:
            if isinstance(value, InputError):
                raise value
            where = row_name(value, row.source, row.id)
            if pairs:
                value = dialects.convert_pair(value, where, source.task)
            elif chosen.model is not None:
                found = checked(chosen.model, value, where)
                value = found.converted(where) | ({"id": found.id} if found.id else {})
            yield parse_sample(value, row.source, row.id, root)
        except InputError as fault:
            yield fault
    if empty:
        raise InputError(f"{path} holds no samples: it is empty, or holds something else")


def _format_and_files(path: Path, name: str | None) -> tuple[str, list[Path]]:
    """A key of `FORMATS`, and the files that a path stands for, which exist; none for a folder of tables."""
    if name is None:
        name = next((known for known, value in FORMATS.items() if path.suffix.lower() in value.suffixes), None)
    elif name not in FORMATS:
        raise InputError(f"the format {name!r} of {path} is not known{nearest(name, FORMATS)}")
    files = [] if name == "datasets" and os.path.isdir(path) else find_files(path)
    if len(files) > 1 and name and "task" not in FORMATS[name].uses:
        raise InputError(f"{path} stands for several files, and {name!r} takes one: give each separately")
    for file in files[:1] if name != "datasets" else ():
        with file.open("rb") as opened:
            if problem := UNREAD.get(opened.read(2)):
                raise InputError(f"{file} is {problem}, and give that file")
    if name is None:
        raise InputError(f"the format of {path} cannot be told from its suffix: give format ({', '.join(FORMATS)})")
    return name, files


def missing_error(missing: list[tuple[Sample, Path]]) -> DataError:
    sample, file = missing[0]
    count = len({file for _, file in missing})
    total = "1 media file is missing" if count == 1 else f"{count} media files are missing in all"
    return DataError(
        f"{sample.name}: {file} does not exist or is not a file ({total}): put the files there, or set media_root",
        "missing media",
    )
