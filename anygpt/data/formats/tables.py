"""Hugging Face `datasets`, read through a column mapping, optionally as a stream.

Reads a folder written by `save_to_disk`, one that `load_dataset` understands, or Parquet, JSON, CSV and Arrow files; a
stream may also be a dataset on the Hub, given by id. The texts of a stream are read once, at the start. Its media are
fetched on access, a block at a time and without a copy on disk, so samples should be accessed roughly in order (as
`UpdateSampler` does); going back restarts the stream.
"""

import io
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from anygpt.data.formats.base import Pair, Row, find_files
from anygpt.data.rows import nearest
from anygpt.errors import InputError
from anygpt.media.files import StoredMedium
from anygpt.media.types import MEDIA

COLUMNS = ("text", "prompt", "id")
BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".arrow": "arrow"}
ROWS_OF_BLOCK = 32  # a stream holds the media of one block in memory per process

MAX_ROW_GROUP = 320 * 1024**2
"""Bytes in memory that are always allowed; reading texts takes up to five times as much."""
MAX_RATIO = 4  # bytes in memory per byte in the file, for larger row groups
ROWS_AT_ONCE = 16  # decoded to measure values; fewer if values may be long
REPEATING = {"PLAIN_DICTIONARY", "RLE_DICTIONARY", "DELTA_BYTE_ARRAY"}
"""Encodings in which many values may share the bytes of one."""
WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT96": 12, "BYTE_ARRAY": 4}
"""Bytes of a value in memory, 8 for other types; for byte arrays, of the offset."""


class Table:
    """Blocks of rows by number: random access for a `datasets.Dataset`, sequential for an `IterableDataset`."""

    def __init__(self, table: Any, place: str):
        self.table = table.with_format("arrow")
        self.place = place
        self._process = self._number = -1
        self._blocks: Iterator[pa.Table] = iter(())
        self._block: pa.Table | None = None

    def blocks(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Yield all blocks of some columns in order; raises `InputError` if reading fails."""
        table = self.table if columns is None else self.table.select_columns(columns)
        try:
            yield from table.iter(batch_size=ROWS_OF_BLOCK)
        except Exception as error:  # datasets, Arrow and the network raise many types
            raise InputError(f"{self.place} cannot be read on: {_reason(error)}.") from error

    def block(self, number: int) -> pa.Table:
        """One block; for a stream, fast only for the last one requested and those after it."""
        if hasattr(self.table, "__len__"):
            return self.table[number * ROWS_OF_BLOCK : (number + 1) * ROWS_OF_BLOCK]
        if self._process != os.getpid() or number < self._number:  # a forked process must not share open files
            self._process, self._number, self._blocks = os.getpid(), -1, self.blocks()
        while self._number < number:
            self._block = next(self._blocks, None)
            self._number += 1
            if self._block is None:
                self._process = -1
                raise InputError(f"{self.place} has fewer rows than before: its files changed.")
        return self._block

    def __getstate__(self) -> dict[str, Any]:
        return {"table": self.table, "place": self.place, "_process": -1, "_number": -1, "_block": None}


@dataclass(frozen=True, eq=False)
class Cell(StoredMedium):
    """Bytes in one row of a column, or in one item of a list there: binary, or a struct with `bytes`."""

    table: Table
    name: str  # column
    row: int
    item: int | None = None

    def __str__(self) -> str:
        return f"{self.table.place}[{self.row}], column {self.name!r}"

    def open(self, mode: str = "rb") -> BinaryIO:
        block, row = divmod(self.row, ROWS_OF_BLOCK)
        value = self.table.block(block)[self.name][row]
        if self.item is not None:
            value = value.values[self.item] if value.is_valid and self.item < len(value.values) else pa.NULL
        if pa.types.is_struct(value.type) and value.is_valid:
            value = value["bytes"]
        if not value.is_valid:
            raise InputError(f"{self} holds no bytes.")
        return io.BytesIO(value.as_py())


def table_rows(path: Path, columns: Mapping[str, str] | None, streaming: bool = False) -> Iterator[Row]:
    """Rows of a table, named `path[0]`, …

    Args:
        columns: column names for one media type (or none, for text), for `text` (caption or answer, or a list of
            wordings), and optionally for `prompt` (the user's text) and `id`. A medium is bytes, a `datasets` Image,
            Audio or Video feature, or a path below the media root; or a list of these, in the order of their markers
            (`<image>`) in the prompt.
    """
    columns = _checked_columns(path, columns)
    kind = next((key for key in columns if key in MEDIA), None)
    table = Table(_load(path, streaming), str(path))
    first = next(table.blocks(), None)
    if first is None:
        return
    for key, name in columns.items():
        if name not in first.column_names:
            known = ", ".join(first.column_names)
            raise InputError(f"{path} has no column {name!r}, which columns gives for {key}: it has {known}.")
    column = columns[kind] if kind is not None else None

    def media_of(part: pa.Table, row: int) -> list[Any]:
        return _media(part[column], lambda i, item: Cell(table, column, row + i, item), path)

    listed = [one if isinstance(one, list) else [one] for one in ([] if column is None else media_of(first, 0))]
    stored = any(isinstance(item, Cell) for items in listed for item in items)
    if column is not None and not stored and is_hub_id(path):
        raise InputError(f"{path} names its media by paths, and is no local table: it must hold their bytes.")
    # Media bytes of a stream are not read here; paths are, and lists for their length.
    unseen = streaming and stored and not _is_list(first[column].type)
    wanted = [name for name in columns.values() if not (unseen and name == column)]
    row = 0
    for block in table.blocks(list(dict.fromkeys(wanted))):
        left = [block]
        while left:
            part = left.pop(0)
            damage = _damage(part)
            if damage and len(part) > 1:
                left[:0] = [part.slice(i, 1) for i in range(len(part))]
                continue
            if damage:
                fault = InputError(f"{path}[{row}] is damaged: {damage}: write it again.")
                yield Row(f"{path}[{row}]", f"{path.stem}-{row}", fault)
                row += 1
                continue
            values = {key: part[name].to_pylist() for key, name in columns.items() if key != kind}
            if unseen:
                values[kind] = [Cell(table, column, row + i) for i in range(len(part))]
            elif kind is not None:
                values[kind] = media_of(part, row)
            for i in range(len(part)):
                found = {key: column_values[i] for key, column_values in values.items()}
                name = f"{path.stem}-{row}" if found.get("id") is None else str(found["id"])
                yield Row(f"{path}[{row}]", name, Pair(kind, found.get(kind), found["text"], found.get("prompt")))
                row += 1


def _damage(part: pa.Table) -> str | None:
    """The reason why a block of a table is invalid, or None; Arrow does not validate what it reads."""
    try:
        part.validate(full=True)
    except pa.ArrowException as error:
        return str(error).splitlines()[0][:200]
    return None


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
    import datasets  # importing takes a second, and most runs have no table

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
                known = ", ".join(BUILDERS)
                raise InputError(f"{path} is no table that can be read: its suffix must be one of {known}.")
            names = [str(file) for file in files]
            table = _build(datasets.load_dataset_builder(builder, data_files=names), streaming)
    except InputError:
        raise
    except Exception as error:  # datasets and Arrow raise many types on a broken table
        raise InputError(f"{path} cannot be read as a table: {_reason(error)}.") from error
    if not isinstance(table, datasets.Dataset | datasets.IterableDataset):
        raise InputError(f"{path} holds several splits ({', '.join(table)}): give the folder of one of them.")
    return table


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error.__cause__ or error).strip().splitlines()[0][:300]}"


def _build(builder: Any, streaming: bool) -> Any:
    """Dataset of a builder; row groups of local Parquet files are checked first."""
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
    """Whether a path that does not exist may be a dataset id on the Hub: `name` or `owner/name`."""
    return not path.exists() and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path)) is not None and not path.suffix


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _media(column: pa.ChunkedArray, cell: Callable[[int, int | None], Cell], path: Path) -> list[Any]:
    """For each row a cell if it holds bytes, else its path or None; lists of these for a column of lists."""
    kind, binary = column.type, (pa.binary(), pa.large_binary())
    if _is_list(kind) and not _is_list(kind.value_type):
        lengths = pa.compute.list_value_length(column).to_pylist()
        places = [(row, item) for row, length in enumerate(lengths) for item in range(length or 0)]
        items = iter(_media(pa.compute.list_flatten(column), lambda i, _: cell(*places[i]), path))
        return [None if length is None else list(itertools.islice(items, length)) for length in lengths]
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return column.to_pylist()
    paths, there = [None] * len(column), column
    fields = {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {}
    if "path" in fields and fields.get("bytes") in (*binary, pa.null()):
        paths = pa.compute.struct_field(column, "path").to_pylist()
        there = pa.compute.struct_field(column, "bytes")
    elif kind not in binary:
        raise InputError(f"{path} has a media column of type {str(kind)[:80]}: it must hold bytes, or paths.")
    stored = there.is_valid().to_pylist()
    return [cell(i, None) if bytes_ else name for i, (bytes_, name) in enumerate(zip(stored, paths, strict=True))]


def check_row_groups(path: Path) -> None:
    """Check every row group of a Parquet file by its metadata; columns that may repeat long values are decoded.

    `datasets` reads a row group at a time, and a file of kilobytes may repeat a value of megabytes a million times
    through Parquet's dictionary, run-length and delta encodings.

    Raises:
        InputError: a row group exceeds `MAX_ROW_GROUP` and `MAX_RATIO`.
        pyarrow.ArrowException: not a Parquet file.
    """
    with pa.parquet.ParquetFile(path, buffer_size=2**20) as file:
        for number in range(file.metadata.num_row_groups):
            group, total = file.metadata.row_group(number), 0
            columns = [group.column(i) for i in range(group.num_columns)]
            packed = sum(column.total_compressed_size for column in columns)
            limit = max(MAX_ROW_GROUP, MAX_RATIO * min(packed, path.stat().st_size))
            for i, column in enumerate(columns):
                values, stored = max(0, column.num_values), max(0, column.total_uncompressed_size)
                size = values * (max(0, file.schema.column(i).length) or WIDTHS.get(column.physical_type, 8))
                if column.physical_type == "BYTE_ARRAY":
                    size += stored
                    most = total + size + stored * values  # if each value were as long as all together
                    if total + size <= limit < most and not REPEATING.isdisjoint(column.encodings):
                        size = _decoded(file, number, column.path_in_schema, limit - total, stored)
                total += size
                if total > limit:
                    raise InputError(
                        f"{path}: row group {number}, of {group.num_rows:,} rows, takes more than {limit:,} bytes in "
                        f"memory, of {packed:,} in the file, and can only be read whole: write the file again with "
                        "smaller ones (row_group_size of pyarrow.parquet.write_table)."
                    )


def _decoded(file: pa.parquet.ParquetFile, group: int, name: str, limit: int, longest: int) -> int:
    """Bytes that a column's values take; stops once above `limit`."""
    size, rows = 0, max(1, min(ROWS_AT_ONCE, limit // max(1, longest)))
    for batch in file.iter_batches(rows, row_groups=[group], columns=[name], use_threads=False):
        leaf = batch.column(0)
        while pa.types.is_nested(leaf.type):  # lists, and structs of which one field is read
            leaf = leaf.flatten()[0] if pa.types.is_struct(leaf.type) else leaf.flatten()
        size += (leaf.dictionary_decode() if pa.types.is_dictionary(leaf.type) else batch).nbytes
        if size > limit:
            break
    return size
