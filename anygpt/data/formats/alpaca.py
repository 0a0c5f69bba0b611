"""Alpaca's JSON: instructions in text alone."""

from typing import Any

from anygpt.data.schema import check_keys, checked_text

KEYS = ("id", "instruction", "input", "output", "text")  # `text` repeats the others as one prompt: not read


def convert(row: Any, where: str) -> dict:
    """One row in the project's own form: the input, where there is one, follows the instruction after a blank line."""
    check_keys(row, KEYS, where)
    said = [checked_text(row.get("instruction"), f"{where}: 'instruction'")]
    if row.get("input"):
        said.append(checked_text(row["input"], f"{where}: 'input'"))
    answer = checked_text(row.get("output"), f"{where}: 'output'")
    messages = [{"role": "user", "content": "\n\n".join(said)}, {"role": "assistant", "content": answer}]
    return {"messages": messages} | ({"id": row["id"]} if "id" in row else {})
