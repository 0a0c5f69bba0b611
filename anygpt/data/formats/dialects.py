"""Rows of other projects' JSON (NExT-GPT, LLaVA, Alpaca, VideoChat), and pairs, converted to the project's own form.

A row's `converted(where)` is a row in the project's own form; `where` is its name in messages.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from anygpt.data.formats.base import Pair
from anygpt.data.rows import DataError, Id, RowModel, Text, Texts, at_least_one, fault, shown
from anygpt.data.schema import checked_text
from anygpt.errors import InputError
from anygpt.media.types import MEDIA

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


class Turn(RowModel):
    speaker: Literal["human", "gpt", "system"] = Field(alias="from")
    value: Text


class NextGptTurn(Turn):
    caption: Text | None = None
    input_modality: Any = None
    output_modality: Any = None


class TurnsRow(RowModel, extra="allow"):
    """A conversation, whose media stand under a key for each type, a string or a list."""

    __pydantic_extra__: dict[str, Texts | None]
    media_keys: ClassVar[tuple[str, ...]]

    conversations: Annotated[list[Turn], at_least_one("turn")]
    id: Id = ""

    @classmethod
    def keys(cls, value: Mapping) -> set[str]:
        return super().keys(value) | {form.format(kind) for form in cls.media_keys for kind in MEDIA}

    def listed(self, key: str) -> list[str]:
        value = self.__pydantic_extra__.get(key)
        return value if isinstance(value, list) else [] if value is None else [value]

    def markers(self, speaker: str, kind: str) -> int:
        return sum(turn.value.count(f"<{kind}>") for turn in self.conversations if turn.speaker == speaker)

    def inputs(self, key: str, kind: str, where: str) -> list[dict]:
        """Input parts of one media type; their number must match that of the markers, unless there are none."""
        files, markers = self.listed(key), self.markers("human", kind)
        if markers not in (len(files), 0) or (
            files and not any(turn.speaker == "human" for turn in self.conversations)
        ):
            raise _count_error(where, "human", kind, markers, key, files)
        return [{"type": kind, "path": file} for file in files]

    def in_place(self, media: dict[str, dict[str, list[dict]]]) -> dict:
        """The conversation with each marker replaced by the next medium of its speaker and type.

        `media`: `{speaker: {type: parts}}`. Inputs of a type without markers open the first human turn.
        """
        unmarked = [part for kind, parts in media["human"].items() if not self.markers("human", kind) for part in parts]
        left = {speaker: {kind: iter(parts) for kind, parts in kinds.items()} for speaker, kinds in media.items()}
        messages = []
        for turn in self.conversations:
            content = split_markers(turn.value, left.get(turn.speaker, {}))
            if turn.speaker == "human":
                content, unmarked = unmarked + content, []
            messages.append({"role": ROLES[turn.speaker], "content": content})
        return {"messages": messages}


def split_markers(text: str, left: Mapping) -> list[dict]:
    """Content parts of a text, each marker replaced by the next part of its type in `left`, if any.

    One line break between a marker and the text belongs to the marker; other white space is text.
    """
    if not left:
        return [{"type": "text", "text": text}]
    pieces = re.split(rf"\n?<({'|'.join(map(re.escape, left))})>\n?", text)
    parts = [next(left[piece]) if i % 2 else {"type": "text", "text": piece} for i, piece in enumerate(pieces)]
    return [part for part in parts if part.get("text") != ""]


def _count_error(where: str, speaker: str, kind: str, markers: int, key: str, files: list[str]) -> DataError:
    text = f"hold {markers} '<{kind}>' marker(s), but {key!r} names {len(files)} file(s): give one marker per file"
    return DataError(f"{where}: its {speaker} turns {text}", "placeholders")


class LlavaRow(TurnsRow):
    """LLaVA's row; the last five keys are ignored.

    `image` (and `video`, `audio`, as in LLaVA's successors) names one file or a list. `<image>` in the human turns
    marks their places; without markers they open the first human turn. Rows without media are text.
    """

    media_keys = ("{}",)

    model: Any = None
    source: Any = None
    data_source: Any = None
    width: Any = None
    height: Any = None

    def converted(self, where: str) -> dict:
        # Markers in answers stay text: LLaVA's assistant produces nothing else.
        return self.in_place({"human": {kind: self.inputs(kind, kind, where) for kind in MEDIA}})


class NextGptRow(TurnsRow):
    """NExT-GPT's row; `*_caption_embeddings` (pickled arrays) and `source_data` are ignored.

    `<image>`, `<video>` and `<audio>` in the turns mark the places of the media: in a human turn the next of
    `input_<type>`, in a gpt turn the next of `output_<type>` with the next of `<type>_captions` (each a string or a
    list). Inputs of a type without markers open the first human turn, as in LLaVA. A turn's own `caption` is used if
    the row has none. A row with captions but no media (NExT-GPT's T-T+X and MosIT files, which rely on precomputed
    encodings) is an error, because it has no target to decode.
    """

    media_keys = ("input_{}", "output_{}", "{}_captions", "{}_caption_embeddings")

    conversations: Annotated[list[NextGptTurn], at_least_one("turn")]
    source_data: Any = None

    def converted(self, where: str) -> dict:
        human = {kind: self.inputs(f"input_{kind}", kind, where) for kind in MEDIA}
        gpt = {kind: self.targets(kind, where) for kind in MEDIA}
        used = {part["caption"] for parts in gpt.values() for part in parts}
        if lost := [turn.caption for turn in self.conversations if turn.caption and turn.caption not in used]:
            text = f"{where}: the caption {shown(lost[0])} of a turn belongs to no target"
            raise DataError(f"{text}: give the turn a marker, 'output_modality' and a file, or take it out", "caption")
        return self.in_place({"human": human, "gpt": gpt})

    def targets(self, kind: str, where: str) -> list[dict]:
        files, captions = self.listed(f"output_{kind}"), self.listed(f"{kind}_captions")
        if captions and not files:
            raise InputError(
                f"{where} has '{kind}_captions' but no 'output_{kind}': a target is a {kind} file with its caption; "
                f"add the file names, or take the '<{kind}>' markers and captions out"
            )
        if (markers := self.markers("gpt", kind)) != len(files):
            raise _count_error(where, "gpt", kind, markers, f"output_{kind}", files)
        if not captions:
            turns = (turn for turn in self.conversations if turn.speaker == "gpt" and turn.output_modality == kind)
            captions = [turn.caption for turn in turns if turn.caption]
        if len(captions) != len(files):
            text = f"'output_{kind}' names {len(files)} file(s) and '{kind}_captions' holds {len(captions)} caption(s)"
            raise DataError(f"{where}: {text}: give one caption per file", "caption")
        return [{"type": kind, "path": f, "caption": c} for f, c in zip(files, captions, strict=True)]


class AlpacaRow(RowModel):
    """An instruction with its answer; `text`, the whole prompt in one string, is ignored."""

    instruction: Text
    output: Text
    input: Text | None = None
    text: Any = None
    id: Id = ""

    def converted(self, where: str) -> dict:
        asked = "\n\n".join(filter(None, (self.instruction, self.input)))
        return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": self.output}]}


class Question(RowModel):
    a: Text
    q: Text
    i: Text | None = None


class VideoChatRow(RowModel):
    """One medium, which opens the first user turn, and questions about it, which may be empty (captions).

    The first question's instruction `i` becomes a system message, and the others are ignored, as in VideoChat2's own
    loader; questions keep their order.
    """

    QA: Annotated[list[Question], at_least_one("pair of question and answer")]
    video: Text | None = None
    image: Text | None = None
    start: Any = None
    end: Any = None
    id: Id = ""

    @model_validator(mode="after")
    def _has_one_whole_medium(self) -> "VideoChatRow":
        if (self.video is None) == (self.image is None):
            raise fault(f"must have either 'video' or 'image', and has {'neither' if self.video is None else 'both'}")
        if self.start is not None or self.end is not None:
            raise fault("means a part of its video, from 'start' to 'end': cut that part out beforehand")
        return self

    def converted(self, where: str) -> dict:
        kind = "image" if self.video is None else "video"
        messages: list[dict] = [{"role": "system", "content": self.QA[0].i}] if self.QA[0].i else []
        medium = [{"type": kind, "path": getattr(self, kind)}]
        for pair in self.QA:
            said = [*medium, *([{"type": "text", "text": pair.q}] if pair.q else [])]
            messages += [{"role": "user", "content": said}, {"role": "assistant", "content": pair.a}]
            medium = []
        return {"messages": messages}


# -- pairs ------------------------------------------------------------------------------------------------

TASKS = ("comprehension", "generation")
# The user's text if the data has no prompt.
COMPREHENSION_PROMPT = "Describe this {kind}."
GENERATION_PROMPT = "Make this {kind}: {caption}"


def convert_pair(pair: Pair, where: str, task: str | None) -> dict:
    """Convert one pair; without a medium it is a turn of text.

    Several texts are alternative wordings. Several media replace their markers (`<image>`) in the prompt or precede
    it; as targets they have one text each.
    """
    given = pair.text if isinstance(pair.text, list) else [pair.text]
    texts = [checked_text(text, f"{where}: the text").strip() for text in given if text is not None]
    texts = [text for text in texts if text]
    if not texts:
        raise DataError(f"{where} has no caption or answer: give it one, or leave it out", "caption")
    prompt = None if pair.prompt is None else checked_text(pair.prompt, f"{where}: the prompt")
    if pair.kind is None:
        return _turn([_text(prompt or "")], [_text(texts)])
    media = pair.medium if isinstance(pair.medium, list) else [pair.medium]
    if not media:
        raise DataError(f"{where} has an empty list of media: give it one, or leave it out")
    parts = [{"type": pair.kind, "path": medium} for medium in media]
    if task == "generation":
        if len(media) > 1 and not len(media) == len(given) == len(texts):
            text = f"{where} has {len(media)} targets and {len(given)} captions ({len(given) - len(texts)} blank)"
            raise DataError(f"{text}: give one each", "caption")
        captions, wishes = ([texts], texts) if len(media) == 1 else (texts, ["; ".join(texts)])
        asked = prompt or [GENERATION_PROMPT.format(kind=pair.kind, caption=wish) for wish in wishes]
        targets = [part | {"caption": caption} for part, caption in zip(parts, captions, strict=True)]
        return _turn([_text(asked)], targets)
    prompt = prompt or COMPREHENSION_PROMPT.format(kind=pair.kind)
    markers = prompt.count(f"<{pair.kind}>")
    if markers not in (0, len(parts)):
        text = f"{where}: its prompt has {markers} '<{pair.kind}>' marker(s) for {len(parts)} media: give one each"
        raise DataError(text, "placeholders")
    said = split_markers(prompt, {pair.kind: iter(parts)}) if markers else [*parts, _text(prompt)]
    return _turn(said, [_text(texts)])


def _text(text: str | list[str]) -> dict:
    return {"type": "text", "text": text}


def _turn(said: list[dict], answered: list[dict]) -> dict:
    return {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": answered}]}
