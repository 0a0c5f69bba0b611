"""Generation as an iterator of events."""

import queue
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

from anygpt.composition import Composition
from anygpt.generation.decoding import generate
from anygpt.generation.events import Closed, Event


def generate_stream(model: Composition, *args: Any, **kwargs: Any) -> Iterator[Event]:
    """Run `generate`, whose arguments it takes but beams, in a thread and yield its events.

    Closing the iterator ends the generation at its next token or denoising step. Do not use the model elsewhere before
    the iterator has ended.
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
        except BaseException as error:  # re-raised in the consumer's thread
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
