"""Memory limits for the row groups of Parquet files, checked before they are read.

`datasets` reads a row group at a time, and a file of kilobytes may repeat a value of megabytes a million times through
Parquet's dictionary, run-length and delta encodings.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from anygpt.errors import InputError

MAX_ROW_GROUP = 320 * 1024**2
"""Bytes in memory that are always allowed; reading texts takes up to five times as much."""
MAX_RATIO = 4  # bytes in memory per byte in the file, for larger row groups
ROWS_AT_ONCE = 16  # decoded to measure values; fewer if values may be long
REPEATING = {"PLAIN_DICTIONARY", "RLE_DICTIONARY", "DELTA_BYTE_ARRAY"}
"""Encodings in which many values may share the bytes of one."""
WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT96": 12, "BYTE_ARRAY": 4}
"""Bytes of a value in memory, 8 for other types; for byte arrays, of the offset."""


def check_row_groups(path: Path) -> None:
    """Check every row group by the file's metadata; columns that may repeat long values are decoded.

    Decoding takes a few times as long as reading such columns, for large media some tens of percent of it.

    Raises:
        InputError: a row group exceeds `MAX_ROW_GROUP` and `MAX_RATIO`.
        pyarrow.ArrowException: not a Parquet file.
    """
    with pa.parquet.ParquetFile(path, buffer_size=2**20) as file:
        for number in range(file.metadata.num_row_groups):
            group, total = file.metadata.row_group(number), 0
            packed = sum(group.column(i).total_compressed_size for i in range(group.num_columns))
            limit = max(MAX_ROW_GROUP, MAX_RATIO * min(packed, path.stat().st_size))
            for i in range(group.num_columns):
                column, length = group.column(i), max(0, file.schema.column(i).length)
                values, stored = max(0, column.num_values), max(0, column.total_uncompressed_size)
                size = values * (length or WIDTHS.get(column.physical_type, 8))
                if column.physical_type == "BYTE_ARRAY":
                    size += stored
                    repeats = not REPEATING.isdisjoint(column.encodings)
                    if repeats and total + size <= limit < total + size + stored * values:
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
        leaf = _leaf(batch.column(0))
        size += (leaf.dictionary_decode() if pa.types.is_dictionary(leaf.type) else batch).nbytes
        if size > limit:
            break
    return size


def _leaf(array: pa.Array) -> pa.Array:
    """Innermost values of nested lists and single-field structs."""
    while pa.types.is_struct(array.type) or pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        array = array.flatten()[0] if pa.types.is_struct(array.type) else array.flatten()
    return array
