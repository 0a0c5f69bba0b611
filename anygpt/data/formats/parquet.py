"""How much a Parquet file's row groups hold in memory, told before one is read.

`datasets` reads a row group at a time, and a file of kilobytes may say one value of megabytes a million times: by a
dictionary, by run lengths, or by what values have in common (the encodings of the Parquet format).
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from anygpt.errors import InputError

MAX_ROW_GROUP = 320 * 1024**2
"""Bytes in memory, allowed whatever a file has; reading texts takes up to five times as much."""
MAX_RATIO = 4  # of bytes in memory to bytes in the file, of larger ones
ROWS_AT_ONCE = 16  # decoded to see how long values are; fewer of those that may be long
REPEATING = {"PLAIN_DICTIONARY", "RLE_DICTIONARY", "DELTA_BYTE_ARRAY"}
"""Encodings by which many values may stand for the bytes of one."""
WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT96": 12, "BYTE_ARRAY": 4}
"""Bytes of a value in memory, 8 of the other types; of byte arrays those of the offset."""


def check_row_groups(path: Path) -> None:
    """Check every row group by what the file says of itself, and columns that may repeat long values by decoding them.

    That is a few times as slow as reading such columns, of large media some tens of percent of it.

    Args:
        path: of a Parquet file.

    Raises:
        InputError: a row group needs more memory than `MAX_ROW_GROUP`, and far more than it takes in the file.
        pyarrow.ArrowException: it is no Parquet file.
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
    """What the values of a column take, or something above `limit` as soon as that is reached."""
    size, rows = 0, max(1, min(ROWS_AT_ONCE, limit // max(1, longest)))
    for batch in file.iter_batches(rows, row_groups=[group], columns=[name], use_threads=False):
        leaf = _leaf(batch.column(0))
        size += (leaf.dictionary_decode() if pa.types.is_dictionary(leaf.type) else batch).nbytes
        if size > limit:
            break
    return size


def _leaf(array: pa.Array) -> pa.Array:
    """The values within lists and structures of a single field."""
    while pa.types.is_struct(array.type) or pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        array = array.flatten()[0] if pa.types.is_struct(array.type) else array.flatten()
    return array
