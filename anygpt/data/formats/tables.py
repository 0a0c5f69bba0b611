"""Hugging Face `datasets`, by a map of columns: a folder of `save_to_disk`, or Parquet, JSON, CSV and Arrow files."""

import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute

from anygpt.data.formats.base import Pair, Row, find_files
from anygpt.data.schema import MEDIA_TYPES, StoredMedium, check_keys
from anygpt.errors import InputError

COLUMNS = (*MEDIA_TYPES, "text", "prompt", "id")
BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".arrow": "arrow"}
ROWS_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class Cell(StoredMedium):
    """The bytes in one row of a column; `table` is a `datasets.Dataset` in Arrow format, mapped into memory."""

    table: Any
    name: str  # of the column
    row: int
    place: str

    def __str__(self) -> str:
        return f"{self.place}, column {self.name!r}"

    def open(self, mode: str = "rb") -> BinaryIO:
        value = self.table[self.row][self.name][0]
        return io.BytesIO((value["bytes"] if pa.types.is_struct(value.type) else value).as_py())


def table_rows(path: Path, columns: Mapping[str, str] | None) -> Iterator[Row]:
    """The rows of a table, named `path[0]`, …

    Args:
        columns: the table's column for each of `COLUMNS`: one of image, video and audio (or none, for text), `text`
            (the caption or the answer), and where there are such `prompt` (what the user says) and `id`. A medium is
            bytes, a `datasets` feature of Image, Audio or Video, or a path below the media root.
    """
    columns = _checked_columns(path, columns)
    table = _load(path).with_format("arrow")
    for key, name in columns.items():
        if name not in table.column_names:
            raise InputError(
                f"{path} has no column {name!r}, which columns gives for {key}: it has {', '.join(table.column_names)}."
            )
    kind = next((key for key in columns if key in MEDIA_TYPES), None)
    for start in range(0, len(table), ROWS_AT_ONCE):
        block = table[start : start + ROWS_AT_ONCE]
        values = {key: block[name].to_pylist() for key, name in columns.items() if key not in MEDIA_TYPES}
        media = [None] * len(block) if kind is None else _media(block[columns[kind]], path)
        for i, medium in enumerate(media):
            source = f"{path}[{start + i}]"
            if medium is _STORED:
                medium = Cell(table, columns[kind], start + i, source)
            pair = Pair(kind, medium, values["text"][i], values["prompt"][i] if "prompt" in values else None)
            name = values["id"][i] if "id" in values else None
            yield Row(source, f"{path.stem}-{start + i}" if name is None else str(name), pair)


def _checked_columns(path: Path, columns: Mapping[str, str] | None) -> Mapping[str, str]:
    if not columns:
        raise InputError(f"{path} is a table: give columns, as {{image: <its image column>, text: <its captions>}}.")
    check_keys(columns, COLUMNS, f"columns of {path}")
    media = [key for key in columns if key in MEDIA_TYPES]
    if "text" not in columns or len(media) > 1 or (not media and "prompt" not in columns):
        raise InputError(
            f"columns of {path} must give 'text', and one of {', '.join(MEDIA_TYPES)} or 'prompt' with it."
        )
    return columns


def _load(path: Path) -> Any:
    import datasets  # takes a second, and most runs have no table

    try:
        if os.path.isdir(path):
            table = datasets.load_from_disk(str(path))
        else:
            files = find_files(path)
            builder = BUILDERS.get(files[0].suffix.lower())
            if builder is None:
                raise InputError(
                    f"{path} is no table that can be read: its suffix must be one of {', '.join(BUILDERS)}."
                )
            table = datasets.load_dataset(builder, data_files=[str(file) for file in files], split="train")
    except InputError:
        raise
    except Exception as error:  # whatever datasets and Arrow stumble over in a broken table
        reason = str(error.__cause__ or error).strip().split("\n")[0]
        raise InputError(f"{path} cannot be read as a table: {type(error).__name__}: {reason[:300]}.") from error
    if not isinstance(table, datasets.Dataset):
        raise InputError(f"{path} holds several splits ({', '.join(table)}): give the folder of one of them.")
    return table


_STORED = object()


def _media(column: pa.ChunkedArray, path: Path) -> list[Any]:
    """For each row of a column `_STORED` where it holds bytes, else the path, or None."""
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return column.to_pylist()
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return [_STORED if there else None for there in column.is_valid().to_pylist()]
    if pa.types.is_struct(kind) and {"bytes", "path"} <= {kind.field(i).name for i in range(kind.num_fields)}:
        there = pa.compute.struct_field(column, "bytes").is_valid().to_pylist()
        paths = pa.compute.struct_field(column, "path").to_pylist()
        return [_STORED if stored else name for stored, name in zip(there, paths, strict=True)]
    raise InputError(f"{path} has a media column of type {str(kind)[:80]}: it must hold bytes, or paths.")
