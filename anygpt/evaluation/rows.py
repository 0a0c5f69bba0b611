"""Rows of a suite: prompts with their references."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from anygpt.data.dataset import ConversationDataset, LoadedSample
from anygpt.data.grammar import compose
from anygpt.data.schema import ContentPart, Message, Sample
from anygpt.errors import InputError
from anygpt.evaluation.suite import Ask, Suite
from anygpt.media.files import Place

_CHOICE = re.compile(r"^\s*\(?([A-Z])[.):]\s*(.+?)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Row:
    """One prompt with its references.

    Attributes:
        id: unique in the suite.
        prompt: the messages before the answer.
        references: reference texts; several if rows have the same prompt.
        targets, captions: first medium of each type in the reference answer, and its caption.
        sources: last medium of each type in the prompt.
        choices: answers to choose from; if empty, the model writes its answer.
        expected: expected composition (see `anygpt.data.grammar`).
    """

    id: str
    prompt: Sample
    references: tuple[str, ...] = ()
    targets: Mapping[str, Place] = field(default_factory=dict)
    captions: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, Place] = field(default_factory=dict)
    choices: tuple[str, ...] = ()
    expected: Mapping[str, Any] | None = None

    @property
    def question(self) -> str:
        """Text of the last user message."""
        return text_of(self.prompt.messages[-1])


def read_rows(suite: Suite) -> list[Row]:
    """Rows of a suite in the order of its data, up to its limit.

    Rows of text with the same prompt become one with several references, such as the five captions of an image.

    An `InputError` refuses unreadable data, and rows without a prompt.
    """
    found: dict[Any, Row] = {}
    if suite.composition is not None:
        for name, caption, expected in compose(suite.composition, suite.ask.seed):
            said = Message("user", (ContentPart("text", f"Make this image: {caption}."),))
            found[name] = Row(name, Sample(name, (said,), name), captions={"image": caption}, expected=expected)
    else:
        samples = ConversationDataset.from_files(suite.data).samples
        for row in (row for sample in samples for row in rows_of(sample, suite.ask)):
            key = row.id if row.targets else row.prompt.messages
            same = found.get(key)
            found[key] = replace(same, references=same.references + row.references) if same else row
    rows = list(found.values())
    if suite.limit is not None and suite.limit < len(rows):
        chosen = np.random.default_rng(suite.ask.seed).choice(len(rows), suite.limit, replace=False)
        rows = [rows[i] for i in sorted(chosen)]
    return rows


def rows_of(sample: Sample, ask: Ask) -> Iterator[Row]:
    """A sample's last answer, or each of its answers, as a row."""
    turns = [i for i, message in enumerate(sample.messages) if message.role == "assistant" and i]
    if not turns:
        raise InputError(f"{sample.source} (sample {sample.id!r}) begins with the answer: there is nothing to ask")
    for turn in turns if ask.turns == "all" else turns[-1:]:
        before, answer = sample.messages[:turn], sample.messages[turn]
        question = text_of(before[-1])
        choices = dict(_CHOICE.findall(question)) if ask.choices == "lines" else {c: c for c in ask.choices or ()}
        if ask.choices == "lines" and len(choices) < 2:
            raise InputError(f"ask.choices is lines, but a question lists none, as 'A. a cat': {question!r}")
        others = [text for part in answer.content if part.type == "text" for text in part.others]
        references = [_chosen(said, choices) for said in (text_of(answer), *others)] if text_of(answer) else []
        if ask.choices == "lines" and (wrong := [said for said in references if said not in choices]):
            expected = f"expected one of {', '.join(choices)}, or its text"
            raise InputError(f"{sample.source} (sample {sample.id!r}): {wrong[0]!r} is none of the choices; {expected}")
        if ask.prompt is not None:
            before = (*before[:-1], reworded(before[-1], ask.prompt.replace("{text}", question)))
        media = [part for part in answer.content if part.path][::-1]  # the first of each type wins
        given = [part for message in before if message.role == "user" for part in message.content if part.path]
        yield Row(
            f"{sample.id}#{turn}" if ask.turns == "all" and len(turns) > 1 else sample.id,
            replace(sample, messages=before),
            tuple(references),
            targets={part.type: part.path for part in media},
            captions={part.type: part.caption for part in media if part.caption},
            sources={part.type: part.path for part in given},
            choices=tuple(choices),
        )


def _chosen(said: str, choices: Mapping[str, str]) -> str:
    """The choice that a reference names, with or without its text or brackets; else the reference itself."""
    whole = {text: choice for choice, text in choices.items()} | dict(zip(choices, choices, strict=True))
    begun = (choice for choice in choices if re.match(rf"\(?{re.escape(choice)}(?:[.):]|$)", said))
    return whole.get(said) or next(begun, said)


def text_of(message: Message) -> str:
    return "".join(part.text for part in message.content if part.type == "text").strip()


def reworded(message: Message, text: str) -> Message:
    """The message with its text replaced, after its media."""
    return replace(message, content=(*(part for part in message.content if part.path), ContentPart("text", text)))


def conversation(item: LoadedSample, answered: bool = False) -> list[dict[str, Any]]:
    """Messages of a loaded sample for `MultimodalProcessor.apply_chat_template`, with the users' media; `answered`: and
    the assistant's, which tokenizers read."""
    media = {("user", kind): iter(found) for kind, found in item.inputs.items()}
    media |= {("assistant", kind): iter(found) for kind, found in item.targets.items() if answered}

    def part_of(role: str, part: ContentPart) -> dict[str, Any]:
        if part.type == "text":
            return {"type": "text", "text": part.text}
        found = media.get((role, part.type))
        return {"type": part.type} if found is None else {"type": part.type, part.type: next(found)}

    return [{"role": m.role, "content": [part_of(m.role, part) for part in m.content]} for m in item.sample.messages]
