"""Pairs of a medium and its caption, of shards and tables, as conversations of one turn."""

from anygpt.data.formats.base import Pair
from anygpt.data.schema import DataError, checked_text
from anygpt.errors import InputError

TASKS = ("comprehension", "generation")
# What the user says where the data has no words of its own for it.
COMPREHENSION_PROMPT = "Describe this {kind}."
GENERATION_PROMPT = "Make this {kind}: {caption}"


def check_task(task: str | None, where: str) -> None:
    """Raises `InputError` where `task` does not say what is learned from pairs of media and captions."""
    if task not in TASKS:
        raise InputError(
            f"{where} holds media with captions, and task is {task!r}: give comprehension (the medium is asked about, "
            "and its caption is the answer) or generation (the caption is asked for, and the medium is the answer)."
        )


def convert_pair(pair: Pair, where: str, task: str | None) -> dict:
    """One pair in the project's own form; without a medium, a turn of text."""
    if not isinstance(pair.text, str) or not pair.text.strip():
        raise DataError(f"{where} has no caption or answer: give it one, or leave it out.", "caption")
    text = checked_text(pair.text, f"{where}: the text").strip()
    prompt = None if pair.prompt is None else checked_text(pair.prompt, f"{where}: the prompt")
    if pair.kind is None:
        return _turn([_text(prompt or "")], [_text(text)])
    medium = {"type": pair.kind, "path": pair.medium}
    if task == "generation":
        asked = prompt or GENERATION_PROMPT.format(kind=pair.kind, caption=text)
        return _turn([_text(asked)], [medium | {"caption": text}])
    return _turn([medium, _text(prompt or COMPREHENSION_PROMPT.format(kind=pair.kind))], [_text(text)])


def _text(text: str) -> dict:
    return {"type": "text", "text": text}


def _turn(said: list[dict], answered: list[dict]) -> dict:
    return {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": answered}]}
