"""Hugging Face `datasets`, by a map of columns.

A folder of `save_to_disk`, one that `load_dataset` understands, or Parquet, JSON, CSV and Arrow files; as a stream also
a dataset on the hub, by its id.
"""

import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute

from anygpt.data.formats.base import Pair, Row, find_files
from anygpt.data.formats.parquet import check_row_groups
from anygpt.data.formats.streams import Stream, StreamedCell, open_value
from anygpt.data.rows import nearest
from anygpt.errors import InputError
from anygpt.media.files import StoredMedium
from anygpt.media.types import MEDIA

COLUMNS = ("text", "prompt", "id")
BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".arrow": "arrow"}
ROWS_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class Cell(StoredMedium):
    """The bytes in one row of a column; `table` is a `datasets.Dataset` in Arrow format, mapped into memory."""

    table: Any
    name: str  # of the column
    row: int
    place: str
    item: int | None = None  # of a list

    def __str__(self) -> str:
        return f"{self.place}, column {self.name!r}"

    def open(self, mode: str = "rb") -> BinaryIO:
        return open_value(self.table[self.row][self.name][0], self.item, str(self))


def table_rows(path: Path, columns: Mapping[str, str] | None, streaming: bool = False) -> Iterator[Row]:
    """The rows of a table, named `path[0]`, …

    Args:
        columns: the table's column for each of `COLUMNS`: one of image, video and audio (or none, for text), `text`
            (the caption or the answer, or a list of several that say the same), and where there are such `prompt`
            (what the user says) and `id`. A medium is bytes, a `datasets` feature of Image, Audio or Video, or a path
            below the media root; or a list of such, in the order of their markers in the prompt (`<image>`).
        streaming: see `streams`.
    """
    columns = _checked_columns(path, columns)
    kind = next((key for key in columns if key in MEDIA), None)
    if streaming:
        yield from _streamed_rows(path, columns, kind)
        return
    table = _load(path, streaming=False).with_format("arrow")
    _check_names(path, columns, table.column_names)
    for start in range(0, len(table), ROWS_AT_ONCE):
        block = table[start : start + ROWS_AT_ONCE]
        for first, part in _whole_rows(block, path, start):
            if isinstance(part, InputError):
                yield Row(f"{path}[{first}]", f"{path.stem}-{first}", part)
                continue
            media = [None] * len(part) if kind is None else _media(part[columns[kind]], path)

            def cell(i: int, item: int | None, first: int = first) -> Cell:
                return Cell(table, columns[kind], first + i, f"{path}[{first + i}]", item)

            yield from _rows(path, part, columns, kind, _placed(media, cell), first)


def _whole_rows(block: pa.Table, path: Path, start: int) -> Iterator[tuple[int, pa.Table | InputError]]:
    """A block as it is; or row by row, with a fault for each that is damaged: Arrow itself trusts what it reads.

    Args:
        start: the number of its first row, which comes with each piece.
    """
    try:
        block.validate(full=True)
    except pa.ArrowException as error:
        if len(block) > 1:
            for i in range(len(block)):
                yield from _whole_rows(block.slice(i, 1), path, start + i)
        else:
            yield start, InputError(f"{path}[{start}] is damaged: {str(error).splitlines()[0][:200]}: write it again.")
    else:
        yield start, block


def _streamed_rows(path: Path, columns: Mapping[str, str], kind: str | None) -> Iterator[Row]:
    """Reads the texts alone; what media there are is not known before they are fetched."""
    stream = Stream(_load(path, streaming=True), str(path))
    first = next(stream.blocks(), None)
    if first is None:
        return
    _check_names(path, columns, first.column_names)
    wanted = [name for key, name in columns.items() if key not in MEDIA]
    column = None if kind is None else first[columns[kind]]
    media = [] if column is None else _media(column, path)
    stored = any(_STORED in (one if isinstance(one, list) else [one]) for one in media)
    # Paths are read with the texts, and lists, to see how long they are.
    looked_at = column is not None and (not stored or _is_list(column.type))
    if column is not None and not stored and is_hub_id(path):
        raise InputError(f"{path} names its media by paths, and is no local table: it must hold their bytes.")
    if looked_at:
        wanted.append(columns[kind])
    start = 0
    for number, block in enumerate(stream.blocks(list(dict.fromkeys(wanted)))):
        for first, part in _whole_rows(block, path, start):
            if isinstance(part, InputError):
                yield Row(f"{path}[{first}]", f"{path.stem}-{first}", part)
                continue
            media = _media(part[columns[kind]], path) if looked_at else [_STORED if stored else None] * len(part)

            def cell(i: int, item: int | None, number: int = number, start: int = start, first: int = first) -> Any:
                place = f"{path}[{first + i}]"
                return StreamedCell(stream, columns[kind], number, first - start + i, place, item)

            yield from _rows(path, part, columns, kind, _placed(media, cell), first)
        start += len(block)


def _rows(
    path: Path, block: pa.Table, columns: Mapping[str, str], kind: str | None, media: list[Any], start: int
) -> Iterator[Row]:
    """The rows of a block whose first one has the number `start`."""
    values = {key: block[name].to_pylist() for key, name in columns.items() if key not in MEDIA}
    for i, medium in enumerate(media):
        pair = Pair(kind, medium, values["text"][i], values["prompt"][i] if "prompt" in values else None)
        name = values["id"][i] if "id" in values else None
        yield Row(f"{path}[{start + i}]", f"{path.stem}-{start + i}" if name is None else str(name), pair)


def _check_names(path: Path, columns: Mapping[str, str], there: list[str]) -> None:
    for key, name in columns.items():
        if name not in there:
            raise InputError(
                f"{path} has no column {name!r}, which columns gives for {key}: it has {', '.join(there)}."
            )


def _checked_columns(path: Path, columns: Mapping[str, str] | None) -> Mapping[str, str]:
    if not columns:
        raise InputError(f"{path} is a table: give columns, as {{image: <its image column>, text: <its captions>}}.")
    known = (*MEDIA, *COLUMNS)
    for key in columns:
        if key not in known:
            raise InputError(f"columns of {path}: the key {key!r} is not known{nearest(key, known)}.")
    media = [key for key in columns if key in MEDIA]
    if "text" not in columns or len(media) > 1 or (not media and "prompt" not in columns):
        raise InputError(f"columns of {path} must give 'text', and one of {', '.join(MEDIA)} or 'prompt' with it.")
    return columns


def _load(path: Path, streaming: bool) -> Any:
    import datasets  # takes a second, and most runs have no table

    try:
        if any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
            table = datasets.load_from_disk(str(path))
            if streaming and isinstance(table, datasets.Dataset):
                table = table.to_iterable_dataset()
        elif os.path.isdir(path) or (streaming and is_hub_id(path)):
            table = _build(datasets.load_dataset_builder(str(path)), streaming)
        else:
            files = find_files(path)
            builder = BUILDERS.get(files[0].suffix.lower())
            if builder is None:
                raise InputError(
                    f"{path} is no table that can be read: its suffix must be one of {', '.join(BUILDERS)}."
                )
            names = [str(file) for file in files]
            table = _build(datasets.load_dataset_builder(builder, data_files=names), streaming)
    except InputError:
        raise
    except Exception as error:  # whatever datasets and Arrow stumble over in a broken table
        reason = str(error.__cause__ or error).strip().split("\n")[0]
        raise InputError(f"{path} cannot be read as a table: {type(error).__name__}: {reason[:300]}.") from error
    if not isinstance(table, datasets.Dataset | datasets.IterableDataset):
        raise InputError(f"{path} holds several splits ({', '.join(table)}): give the folder of one of them.")
    return table


def _build(builder: Any, streaming: bool) -> Any:
    """What `load_dataset` gives; where local Parquet is to be read, its row groups are looked at before."""
    if streaming or not os.path.isdir(builder.cache_dir):
        for file in itertools.chain.from_iterable((builder.config.data_files or {}).values()):
            parquet = builder.name == "parquet" or file.lower().endswith(".parquet")
            if parquet and os.path.isfile(file):
                check_row_groups(Path(file))
    if streaming:
        return builder.as_streaming_dataset(split="train")
    builder.download_and_prepare()
    return builder.as_dataset(split="train")


def is_hub_id(path: Path) -> bool:
    """Whether a path that does not exist can be a dataset's id on the hub: `name` or `owner/name`."""
    return not path.exists() and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path)) is not None and not path.suffix


_STORED = object()


def _placed(media: list[Any], cell: Callable[[int, int | None], StoredMedium]) -> list[Any]:
    """What `_media` gives, with `cell(row, item of a list)` in the place of each `_STORED`."""
    return [
        [cell(i, j) if item is _STORED else item for j, item in enumerate(medium)]
        if isinstance(medium, list)
        else cell(i, None)
        if medium is _STORED
        else medium
        for i, medium in enumerate(media)
    ]


def _holds_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _media(column: pa.ChunkedArray, path: Path) -> list[Any]:
    """For each row of a column `_STORED` where it holds bytes, else the path, or None; of a column of lists, lists."""
    kind = column.type
    if _is_list(kind):
        items = iter(_media(pa.compute.list_flatten(column), path))
        lengths = pa.compute.list_value_length(column).to_pylist()
        return [None if length is None else list(itertools.islice(items, length)) for length in lengths]
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return column.to_pylist()
    if _holds_bytes(kind):
        return [_STORED if there else None for there in column.is_valid().to_pylist()]
    fields = {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {}
    if "path" in fields and "bytes" in fields and (_holds_bytes(fields["bytes"]) or pa.types.is_null(fields["bytes"])):
        there = pa.compute.struct_field(column, "bytes").is_valid().to_pylist()
        paths = pa.compute.struct_field(column, "path").to_pylist()
        return [_STORED if stored else name for stored, name in zip(there, paths, strict=True)]
    raise InputError(f"{path} has a media column of type {str(kind)[:80]}: it must hold bytes, or paths.")
