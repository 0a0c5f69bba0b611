"""Tables that are read as a stream: rows in order, in blocks, without a copy of the table on disk.

The texts are read once, at the beginning. Media are fetched when a sample is asked for, a block at a time, so samples
are to be asked for about in order (`UpdateSampler` does); going back means starting again.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa

from anygpt.errors import InputError
from anygpt.media.files import StoredMedium

ROWS_OF_BLOCK = 32  # their media are in memory, once for each process


class Stream:
    """Blocks of a `datasets.IterableDataset` by number, with a cursor for each process."""

    def __init__(self, table: Any, place: str):
        self.table = table.with_format("arrow")
        self.place = place
        self._process = self._number = -1
        self._blocks: Iterator[pa.Table] = iter(())
        self._block: pa.Table | None = None

    def blocks(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """All blocks in order, of some columns.

        Raises:
            InputError: the stream breaks off, or its rows cannot be read.
        """
        table = self.table if columns is None else self.table.select_columns(columns)
        try:
            yield from table.iter(batch_size=ROWS_OF_BLOCK)
        except Exception as error:  # whatever datasets, Arrow and the network stumble over
            reason = str(error.__cause__ or error).strip().split("\n")[0]
            text = f"{self.place} cannot be read on as a stream: {type(error).__name__}: {reason[:300]}."
            raise InputError(text) from error

    def block(self, number: int) -> pa.Table:
        """One block; quick for the one that was asked for last, and for those behind it."""
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
class StreamedCell(StoredMedium):
    """The bytes in one row of a column of a stream."""

    stream: Stream
    name: str  # of the column
    block: int
    row: int  # within the block
    place: str
    item: int | None = None  # of a list

    def __str__(self) -> str:
        return f"{self.place}, column {self.name!r}"

    def open(self, mode: str = "rb") -> BinaryIO:
        return open_value(self.stream.block(self.block)[self.name][self.row], self.item, str(self))


def open_value(value: pa.Scalar, item: int | None, place: str) -> BinaryIO:
    """The bytes of a table's value: binary, or a structure with `bytes`; or those of an item of a list."""
    if item is not None:
        value = value.values[item] if value.is_valid and item < len(value.values) else pa.NULL
    if pa.types.is_struct(value.type) and value.is_valid:
        value = value["bytes"]
    if not value.is_valid:
        raise InputError(f"{place} holds no bytes.")
    return io.BytesIO(value.as_py())
