"""Conversion of pairs of a medium and a caption, from shards and tables, to conversations of one turn."""

from anygpt.data.formats.base import Pair
from anygpt.data.formats.dialects import split_markers
from anygpt.data.rows import DataError
from anygpt.data.schema import checked_text
from anygpt.errors import InputError

TASKS = ("comprehension", "generation")
# The user's text where the data has no prompt.
COMPREHENSION_PROMPT = "Describe this {kind}."
GENERATION_PROMPT = "Make this {kind}: {caption}"


def check_task(task: str | None, where: str) -> None:
    """Raise `InputError` unless `task` says what to learn from pairs of media and captions."""
    if task not in TASKS:
        raise InputError(
            f"{where} holds media with captions, and task is {task!r}: give comprehension (the medium is asked about, "
            "and its caption is the answer) or generation (the caption is asked for, and the medium is the answer)."
        )


def convert_pair(pair: Pair, where: str, task: str | None) -> dict:
    """Convert one pair; without a medium it is a turn of text.

    Several texts are alternative wordings. Several media replace their markers (`<image>`) in the prompt or precede
    it; as targets they have one text each.
    """
    texts = [text for text in (pair.text if isinstance(pair.text, list) else [pair.text]) if text is not None]
    texts = [checked_text(text, f"{where}: the text").strip() for text in texts]
    texts = [text for text in texts if text]
    if not texts:
        raise DataError(f"{where} has no caption or answer: give it one, or leave it out.", "caption")
    prompt = None if pair.prompt is None else checked_text(pair.prompt, f"{where}: the prompt")
    if pair.kind is None:
        return _turn([_text(prompt or "")], [_text(texts)])
    media = pair.medium if isinstance(pair.medium, list) else [pair.medium]
    parts = [{"type": pair.kind, "path": medium} for medium in media]
    if task == "generation":
        captions = [texts] if len(media) == 1 else texts
        if len(captions) != len(media):
            raise DataError(f"{where} has {len(media)} targets and {len(texts)} captions: give one each.", "caption")
        asked = prompt or [GENERATION_PROMPT.format(kind=pair.kind, caption=text) for text in texts]
        if len(media) > 1 and not prompt:
            asked = GENERATION_PROMPT.format(kind=pair.kind, caption="; ".join(texts))
        targets = [part | {"caption": caption} for part, caption in zip(parts, captions, strict=True)]
        return _turn([_text(asked)], targets)
    prompt = prompt or COMPREHENSION_PROMPT.format(kind=pair.kind)
    markers = prompt.count(f"<{pair.kind}>")
    if markers not in (0, len(parts)):
        text = f"{where}: its prompt has {markers} '<{pair.kind}>' marker(s) for {len(parts)} media: give one each."
        raise DataError(text, "placeholders")
    said = split_markers(prompt, {pair.kind: iter(parts)}) if markers else [*parts, _text(prompt)]
    return _turn(said, [_text(texts)])


def _text(text: str | list[str]) -> dict:
    return {"type": "text", "text": text}


def _turn(said: list[dict], answered: list[dict]) -> dict:
    return {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": answered}]}
