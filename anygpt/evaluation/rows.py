"""What is asked, and what the data say would be right."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from anygpt.data.dataset import ConversationDataset, DataSource, LoadedSample
from anygpt.data.schema import ContentPart, Message, Sample, StoredMedium
from anygpt.errors import InputError
from anygpt.evaluation.composition import compose
from anygpt.evaluation.suite import Ask, Suite

_CHOICE = re.compile(r"^\s*\(?([A-Z])[.):]\s*(.+?)\s*$", re.MULTILINE)
Place = Path | StoredMedium


@dataclass(frozen=True)
class Row:
    """One question or wish.

    Attributes:
        id: unique in the suite.
        prompt: the messages before the answer.
        references: what people answered in words; several where rows ask the same.
        targets, captions: the first medium of each type that the data answer with, and its caption.
        sources: the last medium of each type that the user gives.
        choices: answers to choose from; empty lets the model write.
        expected: what a composition asks for (see `anygpt.evaluation.composition`).
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
        """The user's last words."""
        return text_of(self.prompt.messages[-1])


def read_rows(suite: Suite) -> list[Row]:
    """The rows of a suite, in the order of its data, those over its limit left out.

    Rows that ask the same in words and media, and are answered in words, become one with several references: data
    with five captions a picture has five rows a picture.

    Raises:
        InputError: data that cannot be read, or rows without anything to ask.
    """
    if suite.composition is not None:
        wishes = compose(suite.composition.per_category, suite.composition.seed)
        found = [
            Row(
                name,
                Sample(name, (Message("user", (ContentPart("text", f"Make this image: {caption}."),)),), name),
                captions={"image": caption},
                expected=expected,
            )
            for name, caption, expected in wishes
        ]
    else:
        samples = ConversationDataset.from_files([DataSource(**vars(source)) for source in suite.data]).samples
        found = [row for sample in samples for row in rows_of(sample, suite.ask)]
        same: dict[Any, Row] = {}
        for row in found:
            key = row.id if row.targets else row.prompt.messages
            first = same.get(key)
            same[key] = row if first is None else replace(first, references=first.references + row.references)
        found = list(same.values())
    if suite.limit is not None and suite.limit < len(found):
        chosen = np.random.default_rng(suite.ask.seed).choice(len(found), suite.limit, replace=False)
        found = [found[i] for i in sorted(chosen)]
    return found


def rows_of(sample: Sample, ask: Ask) -> list[Row]:
    """A sample's last answer as a row, or each of them."""
    turns = [i for i, message in enumerate(sample.messages) if message.role == "assistant" and i]
    if not turns:
        raise InputError(f"{sample.source} (sample {sample.id!r}) begins with the answer: there is nothing to ask.")
    rows = []
    for turn in turns if ask.turns == "all" else turns[-1:]:
        name = sample.id if len(turns) == 1 or ask.turns == "last" else f"{sample.id}#{turn}"
        before, answer = sample.messages[:turn], sample.messages[turn]
        media = [part for part in answer.content if part.type != "text"][::-1]  # so that the first one stays
        given = [part for message in before if message.role == "user" for part in message.content if part.path]
        said, choices = text_of(answer), choices_of(before[-1], ask.choices)
        for letter, choice in choices.items():
            said = letter if said.startswith(f"{letter}.") or said == choice else said
        rows.append(
            Row(
                name,
                Sample(name, reworded(before, ask.prompt), sample.source),
                (said,) if said else (),
                {part.type: part.path for part in media},
                {part.type: part.caption for part in media},
                {part.type: part.path for part in given},
                tuple(choices),
            )
        )
    return rows


def text_of(message: Message) -> str:
    return "".join(part.text for part in message.content if part.type == "text").strip()


def reworded(messages: tuple[Message, ...], prompt: str | None) -> tuple[Message, ...]:
    """The last message with other words behind its media; `{text}` in them stands for its own."""
    if prompt is None:
        return messages
    text = prompt.replace("{text}", text_of(messages[-1]))
    media = tuple(part for part in messages[-1].content if part.type != "text")
    return (*messages[:-1], replace(messages[-1], content=(*media, ContentPart("text", text))))


def without_media(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The same messages with their words alone."""
    nothing = (ContentPart("text", ""),)
    return tuple(replace(m, content=tuple(p for p in m.content if p.type == "text") or nothing) for m in messages)


def choices_of(question: Message, choices: Sequence[str] | str | None) -> dict[str, str]:
    """The answers to choose from, each with what it stands for; with `lines`, letters that the question explains."""
    if choices == "lines":
        found = dict(_CHOICE.findall(text_of(question)))
        if len(found) < 2:
            raise InputError(f"ask.choices is lines, but a question lists none, as 'A. a cat': {text_of(question)!r}")
        return found
    return {choice: choice for choice in choices or ()}


def conversation(item: LoadedSample) -> list[dict[str, Any]]:
    """A loaded sample's messages as `MultimodalProcessor.apply_chat_template` takes them, users' media in them."""
    media = {kind: iter(found) for kind, found in item.inputs.items()}

    def part_of(role: str, part: ContentPart) -> dict[str, Any]:
        if part.type == "text":
            return {"type": "text", "text": part.text}
        return {"type": part.type} if role == "assistant" else {"type": part.type, part.type: next(media[part.type])}

    return [{"role": m.role, "content": [part_of(m.role, part) for part in m.content]} for m in item.sample.messages]
