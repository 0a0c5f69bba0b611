"""Generation as an iterator of events."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

from anygpt.composition import Composition
from anygpt.generation.decoding import generate
from anygpt.generation.events import Closed, Event


def generate_stream(model: Composition, *args: Any, **kwargs: Any) -> Iterator[Event]:
    """`generate` as an iterator of events: text as it comes, decoders as they start and go on, media.

    The generation runs in a thread of its own. Closing the iterator ends it at its next token or denoising step.
    The model can do one thing at a time: do not use it elsewhere before the iterator has ended.

    Args:
        args, kwargs: those of `generate`, without beams.

    Raises:
        InputError: as `generate`.
    """
    events: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()
    closed = threading.Event()

    def on_event(event: Event) -> None:
        if closed.is_set():
            raise Closed
        events.put(event)

    def work() -> None:
        try:
            generate(model, *args, on_event=on_event, **kwargs)
            events.put(None)
        except Closed:
            pass
        except BaseException as error:  # goes on in the thread that listens
            events.put(error)

    worker = threading.Thread(target=work, name="generate_stream", daemon=True)
    worker.start()
    try:
        for event in iter(partial(events.get), None):
            if isinstance(event, BaseException):
                raise event
            yield event
    finally:
        closed.set()
        worker.join()
