"""What happens while an answer is made: the events of `MultimodalModel.generate(on_event=…)` and `generate_stream`.

The text comes first, piece by piece, with a `MediumCalled` where a medium belongs; then each decoder that was called
runs once, for all its media. `row` is the place in the batch, `segment` an index into that row's `Answer.segments`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from anygpt.outputs import Answer, Segment


@dataclass(frozen=True)
class TextPiece:
    """Text that goes on where the last piece of the same segment ended; together they are the segment."""

    segment: int
    text: str
    row: int = 0


@dataclass(frozen=True)
class MediumCalled:
    """A whole span has been said: a medium of `type` will stand at this place, made by the decoder `key`."""

    segment: int
    type: str
    key: str
    row: int = 0


@dataclass(frozen=True)
class DecodingStarted:
    """The decoder `key` begins to make the media of these segments."""

    key: str
    segments: tuple[int, ...]
    row: int = 0


@dataclass(frozen=True)
class DecodingStep:
    """The decoder `key` has finished `step` of `steps` denoising steps."""

    key: str
    step: int
    steps: int
    row: int = 0


@dataclass(frozen=True)
class MediumDone:
    """The medium of a segment is there."""

    segment: int
    content: Segment
    row: int = 0


@dataclass(frozen=True)
class AnswerDone:
    """The whole answer, as `generate` returns it."""

    answer: Answer
    row: int = 0


Event = TextPiece | MediumCalled | DecodingStarted | DecodingStep | MediumDone | AnswerDone
Listener = Callable[[Event], None]


class Closed(Exception):
    """Raised by a listener: nobody wants the answer of this event's row any more."""


@dataclass
class EventEmitter:
    """Turns the tokens of one row into events, as they are said.

    Attributes:
        listener: is given the events; a `Closed` that it raises ends the row, anything else the generation.
        decode: ids to text, as for the finished answer.
        types: `{decoder key: modality}`.
        row: the row's place in the batch.
        segments: `{place of a span in the answer: its segment}`.
        closed: nobody wants this row any more.
    """

    listener: Listener
    decode: Callable[[list[int]], str]
    types: Mapping[str, str]
    row: int = 0
    segments: dict[int, int] = field(default_factory=dict)
    closed: bool = False
    _begun: int = 0  # segments that are over
    _length: int = 0  # tokens said
    _run: list[int] = field(default_factory=list)  # tokens since the last span
    _told: str = ""

    def emit(self, kind: type, *values: Any) -> None:
        """Tell the listener of an event of the row."""
        if not self.closed:
            try:
                self.listener(kind(*values, row=self.row))
            except Closed:
                self.closed = True

    def said(self, ids: list[int], key: str | None) -> None:
        """New tokens: a piece of text, or the whole span of the decoder `key`."""
        start, self._length = self._length, self._length + len(ids)
        if key is None:
            self._run += ids
            self._emit_text(final=False)
            return
        self.end_text()
        self.segments[start] = self._begun
        self.emit(MediumCalled, self._begun, self.types[key], key)
        self._begun += 1

    def end_text(self) -> None:
        """No more text comes before the next medium, or at all."""
        self._emit_text(final=True)
        self._begun += bool(self._told)
        self._run, self._told = [], ""

    def _emit_text(self, final: bool) -> None:
        text = self.decode(self._run)
        if not final:
            text = text.rstrip("\ufffd")  # a character whose last bytes are still to come
        if text.startswith(self._told) and len(text) > len(self._told):
            piece, self._told = text[len(self._told) :], text
            self.emit(TextPiece, self._begun, piece)


def end_where_all_are_closed(emitters: Sequence[EventEmitter]) -> None:
    """Raises `Closed` where nobody wants any row any more."""
    if emitters and all(emitter.closed for emitter in emitters):
        raise Closed
