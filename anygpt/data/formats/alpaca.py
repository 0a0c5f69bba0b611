"""Alpaca's JSON: instructions in text alone."""

from typing import Any

from anygpt.data.rows import Id, RowModel, Text


class AlpacaRow(RowModel):
    """An instruction with its answer; `text` repeats the others as one prompt, and is not read."""

    instruction: Text
    output: Text
    input: Text | None = None
    text: Any = None
    id: Id = ""


def convert(row: AlpacaRow, where: str) -> dict:
    """One row in the project's own form: the input, where there is one, follows the instruction after a blank line."""
    asked = "\n\n".join(filter(None, (row.instruction, row.input)))
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": row.output}]}
