"""Hugging Face `datasets`, read through a column mapping.

Reads a folder written by `save_to_disk`, one that `load_dataset` understands, or Parquet, JSON, CSV and Arrow files.
"""

import glob
import io
import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet

from anygpt.data.formats.base import Pair, Row
from anygpt.data.rows import nearest
from anygpt.errors import InputError, refusing
from anygpt.media.files import StoredMedium
from anygpt.media.types import MEDIA

COLUMNS = ("text", "prompt", "id")
BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".arrow": "arrow"}
ROWS_AT_ONCE = 32
MAX_ROW_GROUP = 320 * 1024**2
"""Bytes in memory that are always allowed; reading texts takes up to five times as much."""
MAX_RATIO = 4  # bytes in memory per byte in the file, for larger row groups
WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT96": 12}
"""Bytes of a value in memory by type; other types take 8."""


@dataclass(frozen=True, eq=False)
class Cell(StoredMedium):
    """Bytes in one row of a column, or in one item of a list there: binary, or a struct with `bytes`."""

    table: Any  # a `datasets.Dataset` in Arrow's format
    place: str
    name: str  # column
    row: int
    item: int | None = None

    def __str__(self) -> str:
        return f"{self.place}[{self.row}], column {self.name!r}"

    def open(self, mode: str = "rb") -> BinaryIO:
        value = self.table[self.row : self.row + 1][self.name][0]
        if self.item is not None:
            value = value.values[self.item]
        return io.BytesIO((value["bytes"] if pa.types.is_struct(value.type) else value).as_py())


def table_rows(path: Path, columns: Mapping[str, str] | None) -> Iterator[Row]:
    """Rows of a table, named `path[0]`, …

    `columns` names the columns of one media type (or none, for text), of `text` (caption or answer, or a list of
    wordings), and optionally of `prompt` (the user's text) and `id`. A medium is bytes, a `datasets` Image, Audio or
    Video feature, or a path below the media root; or a list of these, in the order of the prompt's markers (`<image>`).
    """
    if not columns:
        raise InputError(f"{path} is a table: give columns, as {{image: <its image column>, text: <its captions>}}")
    known = (*MEDIA, *COLUMNS)
    for key in columns:
        if key not in known:
            raise InputError(f"columns of {path}: the key {key!r} is not known{nearest(key, known)}")
    media = [key for key in columns if key in MEDIA]
    if "text" not in columns or len(media) > 1 or (not media and "prompt" not in columns):
        raise InputError(f"columns of {path} must give 'text', and one of {', '.join(MEDIA)} or 'prompt' with it")
    kind = media[0] if media else None
    if (table := _load(path)) is None:
        return
    table = table.with_format("arrow")
    for key, name in columns.items():
        if name not in table.column_names:
            known = ", ".join(table.column_names)
            raise InputError(f"{path} has no column {name!r}, which columns gives for {key}: it has {known}")
    blocks = table.select_columns(list(dict.fromkeys(columns.values()))).iter(ROWS_AT_ONCE)
    for row, one in enumerate(block.slice(i, 1) for block in blocks for i in range(len(block))):
        source = f"{path}[{row}]"
        try:
            one.validate(full=True)  # Arrow does not validate what it reads
        except pa.ArrowException as error:
            damage = str(error).splitlines()[0][:200]
            yield Row(source, f"{path.stem}-{row}", InputError(f"{source} is damaged: {damage}: write it again"))
            continue
        values = {key: one[name][0] for key, name in columns.items()}
        found = {key: value.as_py() for key, value in values.items() if key != kind}
        medium = None if kind is None else _medium(values[kind], partial(Cell, table, str(path), columns[kind], row))
        label = f"{path.stem}-{row}" if found.get("id") is None else str(found["id"])
        yield Row(source, label, Pair(kind, medium, found["text"], found.get("prompt")))


def _load(path: Path) -> Any:
    import datasets  # importing takes a second, and most runs have no table

    try:
        if any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
            table = datasets.load_from_disk(str(path))
        elif os.path.isdir(path):
            table = _build(path, str(path))
        else:
            builder = BUILDERS.get(path.suffix.lower())
            if builder is None:
                known = ", ".join(BUILDERS)
                raise InputError(f"{path} is not a table of a known format: its suffix must be one of {known}")
            table = _build(path, builder, data_files=glob.escape(str(path))) if path.stat().st_size else None
    except InputError:
        raise
    except Exception as error:  # datasets and Arrow raise many types on a broken table
        reason = f"{type(error).__name__}: {str(error.__cause__ or error).strip().splitlines()[0][:300]}"
        raise InputError(f"{path} cannot be read as a table: {reason}") from error
    if not isinstance(table, datasets.Dataset | None):
        if len(table) == 1:
            return next(iter(table.values()))
        raise InputError(f"{path} holds several splits ({', '.join(table)}): give the folder of one of them")
    return table


def _build(path: Path, name: str, **options: Any) -> Any:
    """Dataset of a builder, which must have one split and read all tables of a folder; None without rows. Row groups of
    Parquet files that it has not read before are checked first."""
    from datasets import load_dataset_builder
    from datasets.data_files import FILES_TO_IGNORE

    tables = (Path(name) for name in glob.glob("**", root_dir=path, recursive=True))  # without hidden ones
    found = [path / name for name in tables if name.suffix.lower() in BUILDERS and name.name not in FILES_TO_IGNORE]
    present = [file for file in path.rglob("*") if file.is_file()] or [path]
    changed = sorted(file.stat().st_ctime_ns for file in present)  # an mtime can be set
    builder = load_dataset_builder(name, description=str(changed), **options)  # keys of its cache
    files = list(itertools.chain.from_iterable((builder.config.data_files or {}).values()))
    if not os.path.isdir(builder.cache_dir):
        for file in files:
            if (builder.name == "parquet" or file.lower().endswith(".parquet")) and os.path.isfile(file):
                with refusing(f"{file} cannot be read as a table"):
                    check_row_groups(Path(file))
    builder.download_and_prepare()
    splits = list(builder.info.splits)
    if len(splits) > 1:
        raise InputError(
            f"{path} holds several splits ({', '.join(splits)}): name the files of one of them, such as "
            f"{builder.config.data_files[splits[0]][0]}"
        )
    if left := set(map(os.path.realpath, found)) - set(map(os.path.realpath, files)):
        what = f"{path} is read without {len(left)} of its tables, such as {min(left)}"
        raise InputError(f"{what}: name the files, such as {path}/*{Path(files[0]).suffix}")
    return builder.as_dataset(split=splits[0]) if builder.info.splits[splits[0]].num_examples else None


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _medium(value: pa.Scalar, cell: partial[Cell]) -> Any:
    """A cell for bytes, else a path or None; a list of these for a list."""
    kind, binary = value.type, (pa.binary(), pa.large_binary(), pa.binary_view())
    if _is_list(kind) and not _is_list(kind.value_type):
        items = value.values  # None for a list that is null
        return None if items is None else [_medium(item, partial(cell, item=i)) for i, item in enumerate(items)]
    if kind in (pa.string(), pa.large_string(), pa.string_view(), pa.null()):
        return value.as_py()
    fields = {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {}
    if "path" in fields and fields.get("bytes") in (*binary, pa.null()):
        return cell() if value["bytes"].is_valid else value["path"].as_py()
    if kind not in binary:
        raise InputError(f"{cell.args[1]} has a media column of type {str(kind)[:80]}: it must hold bytes, or paths")
    return cell() if value.is_valid else None


def check_row_groups(path: Path) -> None:
    """Check the size of every row group of a Parquet file; texts and other bytes are decoded to measure them.

    `datasets` reads a row group at a time, and a file of kilobytes may repeat a value of megabytes a million times
    through Parquet's dictionary, run-length and delta encodings.

    An `InputError` names a row group that exceeds `MAX_ROW_GROUP` and `MAX_RATIO`.
    """
    with pa.parquet.ParquetFile(path, buffer_size=2**20) as file:
        for number in range(file.metadata.num_row_groups):
            group, total = file.metadata.row_group(number), 0
            columns = [group.column(i) for i in range(group.num_columns)]
            packed = sum(column.total_compressed_size for column in columns)
            limit = max(MAX_ROW_GROUP, MAX_RATIO * min(packed, path.stat().st_size))
            for i, column in enumerate(columns):
                if column.physical_type == "BYTE_ARRAY":
                    total += _decoded(file, number, column, limit - total)
                else:
                    width = max(0, file.schema.column(i).length) or WIDTHS.get(column.physical_type, 8)
                    total += max(0, column.num_values) * width
                if total > limit:
                    raise InputError(
                        f"{path}: row group {number}, of {group.num_rows:,} rows, takes more than {limit:,} bytes in "
                        f"memory, of {packed:,} in the file, and can only be read whole: write the file again with "
                        "smaller ones (row_group_size of pyarrow.parquet.write_table)"
                    )


def _decoded(file: pa.parquet.ParquetFile, group: int, column: Any, limit: int) -> int:
    """Bytes of a column in memory, counted up to the limit, in batches that keep to it even if all values are long."""
    size, rows = 0, max(1, limit // max(1, column.total_uncompressed_size))
    for batch in file.iter_batches(rows, row_groups=[group], columns=[column.path_in_schema], use_threads=False):
        leaf = batch.column(0)
        while pa.types.is_nested(leaf.type):  # lists, and structs of which one field is read
            leaf = leaf.flatten()[0] if pa.types.is_struct(leaf.type) else leaf.flatten()
        size += (leaf.dictionary_decode() if pa.types.is_dictionary(leaf.type) else batch).nbytes
        if size > limit:
            break
    return size
