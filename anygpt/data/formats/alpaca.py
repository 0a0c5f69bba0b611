"""Alpaca's JSON: text-only instructions."""

from typing import Any

from anygpt.data.rows import Id, RowModel, Text


class AlpacaRow(RowModel):
    """An instruction with its answer; `text`, the whole prompt in one string, is ignored."""

    instruction: Text
    output: Text
    input: Text | None = None
    text: Any = None
    id: Id = ""


def convert(row: AlpacaRow, where: str) -> dict:
    """Convert one row; a non-empty input follows the instruction after a blank line."""
    asked = "\n\n".join(filter(None, (row.instruction, row.input)))
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": row.output}]}
