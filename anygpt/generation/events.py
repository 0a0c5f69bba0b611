"""The events of `MultimodalModel.generate(on_event=…)` and `generate_stream`.

Text is streamed first, with a `MediumCalled` where a medium belongs; then each called decoder runs once for all its
media. `segment` is the index into the row's `Answer.segments`.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from anygpt.outputs import Answer, Segment


@dataclass(frozen=True)
class Event:
    """Base of the events; `row` is the index in the batch."""

    row: int = field(default=0, kw_only=True)


@dataclass(frozen=True)
class TextPiece(Event):
    """The next piece of a text segment's content."""

    segment: int
    text: str


@dataclass(frozen=True)
class MediumCalled(Event):
    """A signal span was generated: this segment will be a medium of `type`, made by the decoder `key`."""

    segment: int
    type: str
    key: str


@dataclass(frozen=True)
class DecodingStarted(Event):
    """The decoder `key` starts generating the media of these segments."""

    key: str
    segments: tuple[int, ...]


@dataclass(frozen=True)
class DecodingStep(Event):
    """The decoder `key` has finished `step` of `steps` denoising steps."""

    key: str
    step: int
    steps: int


@dataclass(frozen=True)
class MediumDone(Event):
    """The medium of a segment is finished."""

    segment: int
    content: Segment


@dataclass(frozen=True)
class AnswerDone(Event):
    """The whole answer, as `generate` returns it."""

    answer: Answer


Listener = Callable[[Event], None]


class Closed(Exception):
    """Raised by a listener to end the row of the event."""


@dataclass
class EventEmitter:
    """Turns the tokens of one row into events as they are generated."""

    listener: Listener  # if it raises `Closed` the row ends, with any other exception the generation
    decode: Callable[[list[int], bool], str]  # ids, and whether a span precedes them, to text
    types: Mapping[str, str]  # `{decoder key: modality}`
    row: int = 0
    stop: Sequence[str] = ()  # texts that end the answer, which excludes them
    segments: dict[int, int] = field(default_factory=dict)  # index of a span's first token: index of its segment
    closed: bool = False  # whether the listener has ended this row
    stopped: bool = False  # whether a stop text has ended it
    _begun: int = 0  # finished segments
    _length: int = 0  # tokens so far
    _run: list[int] = field(default_factory=list)  # tokens since the last span
    _told: str = ""

    def emit(self, kind: type, *values: Any) -> None:
        if not self.closed:
            try:
                self.listener(kind(*values, row=self.row))
            except Closed:
                self.closed = True

    def said(self, ids: Sequence[int], key: str | None) -> None:
        """Handle new tokens: text, or the whole span of the decoder `key`."""
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
        """End the current text segment."""
        self._emit_text(final=True)
        self._begun += bool(self._told)
        self._run, self._told = [], ""

    def _emit_text(self, final: bool) -> None:
        text = self.decode(self._run, bool(self.segments))
        end = first_stop(text, self.stop)
        if end is not None:
            text, self.stopped = text[:end], True
        elif not final:
            text = text.rstrip("\ufffd")  # a character with bytes still to come
            text = text[: len(text) - _beginning(text, self.stop)]
        if text.startswith(self._told) and len(text) > len(self._told):
            piece, self._told = text[len(self._told) :], text
            self.emit(TextPiece, self._begun, piece)


def generate_stream(model: Any, *args: Any, **kwargs: Any) -> Iterator[Event]:
    """Run `model.generate`, whose arguments it takes (beams excepted), in a thread, and yield its events.

    Closing the iterator ends the generation at its next token or denoising step. Do not use the model elsewhere before
    the iterator has ended.
    """
    events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
    closed = threading.Event()

    def on_event(event: Event) -> None:
        if closed.is_set():
            raise Closed
        events.put(event)

    with ThreadPoolExecutor(1, "generate_stream") as pool:
        work = pool.submit(model.generate, *args, on_event=on_event, **kwargs)
        work.add_done_callback(lambda _: events.put(None))
        try:
            yield from iter(events.get, None)
            work.result()  # raises its exception, if any
        finally:
            closed.set()


def end_where_all_are_closed(emitters: Sequence[EventEmitter]) -> None:
    """Raise `Closed` if there are emitters and all are closed."""
    if emitters and all(emitter.closed for emitter in emitters):
        raise Closed


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Index of the first stop text in a text, or None."""
    return min((place for one in stop if (place := text.find(one)) >= 0), default=None)


def _beginning(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of a text that begins a stop text."""
    lengths = range(min(len(text), max(map(len, stop), default=1) - 1), 0, -1)
    return next((n for n in lengths if any(s.startswith(text[-n:]) for s in stop)), 0)
