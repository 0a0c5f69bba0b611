"""What happens while an answer is made: the events of `MultimodalModel.generate(on_event=…)` and `generate_stream`.

The text comes first, piece by piece, with a `MediumCalled` where a medium belongs; then each decoder that was called
runs once, for all its media. `segment` is always an index into `Answer.segments`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from anygpt.outputs import Answer, Segment


@dataclass(frozen=True)
class TextPiece:
    """Text that goes on where the last piece of the same segment ended; together they are the segment."""

    segment: int
    text: str


@dataclass(frozen=True)
class MediumCalled:
    """A whole span has been said: a medium of `type` will stand at this place, made by the decoder `key`."""

    segment: int
    type: str
    key: str


@dataclass(frozen=True)
class DecodingStarted:
    """The decoder `key` begins to make the media of these segments."""

    key: str
    segments: tuple[int, ...]


@dataclass(frozen=True)
class DecodingStep:
    """The decoder `key` has finished `step` of `steps` denoising steps."""

    key: str
    step: int
    steps: int


@dataclass(frozen=True)
class MediumDone:
    """The medium of a segment is there."""

    segment: int
    content: Segment


@dataclass(frozen=True)
class AnswerDone:
    """The whole answer, as `generate` returns it."""

    answer: Answer


Event = TextPiece | MediumCalled | DecodingStarted | DecodingStep | MediumDone | AnswerDone
Listener = Callable[[Event], None]


@dataclass
class Narrator:
    """Turns the tokens of one answer into events, as they are said.

    Attributes:
        tell: is given the events.
        decode: ids to text, as for the finished answer.
        types: `{decoder key: modality}`.
        segments: `{place of a span in the answer: its segment}`.
    """

    tell: Listener
    decode: Callable[[list[int]], str]
    types: Mapping[str, str]
    segments: dict[int, int] = field(default_factory=dict)
    _begun: int = 0  # segments that are over
    _length: int = 0  # tokens said
    _run: list[int] = field(default_factory=list)  # tokens since the last span
    _told: str = ""

    def said(self, ids: list[int], key: str | None) -> None:
        """New tokens: a piece of text, or the whole span of the decoder `key`."""
        start, self._length = self._length, self._length + len(ids)
        if key is None:
            self._run += ids
            self._tell_text(final=False)
            return
        self.end_text()
        self.segments[start] = self._begun
        self.tell(MediumCalled(self._begun, self.types[key], key))
        self._begun += 1

    def end_text(self) -> None:
        """No more text comes before the next medium, or at all."""
        self._tell_text(final=True)
        self._begun += bool(self._told)
        self._run, self._told = [], ""

    def _tell_text(self, final: bool) -> None:
        text = self.decode(self._run)
        if not final:
            text = text.rstrip("\ufffd")  # a character whose last bytes are still to come
        if text.startswith(self._told) and len(text) > len(self._told):
            piece, self._told = text[len(self._told) :], text
            self.tell(TextPiece(self._begun, piece))
