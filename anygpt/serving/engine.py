"""One model, one thread, one bounded queue: everybody's requests are answered in turn."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from anygpt.chat.chat_model import ChatModel, Reply, Settings
from anygpt.generation.events import Closed, Event
from anygpt.serving.metrics import Metrics

logger = logging.getLogger(__name__)

Deliver = Callable[["Event | Reply | Exception"], None]


class Busy(Exception):
    """As many requests as there may be are waiting already."""


@dataclass(eq=False)
class Job:
    """One request.

    Attributes:
        messages, settings: see `ChatModel.answer`.
        deliver: is given the events, then the `Reply` or what went wrong; called in the engine's thread.
    """

    messages: Sequence[Mapping[str, Any]]
    settings: Settings
    deliver: Deliver
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Nobody wants the answer any more: it ends at the next token or denoising step, or never begins."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def tell(self, event: Event) -> None:
        if self.cancelled:
            raise Closed
        self.deliver(event)


class Engine:
    """Answers jobs one after the other, in a thread of its own.

    Args:
        chat_model: the model.
        max_waiting: jobs that may wait.

    Attributes:
        metrics: counts of what is answered.
    """

    def __init__(self, chat_model: ChatModel, max_waiting: int = 64):
        self.chat_model = chat_model
        self.metrics = Metrics()
        self.metrics.waiting.set_function(lambda: self.waiting)
        self._waiting: queue.Queue[Job | None] = queue.Queue(max_waiting)
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs that wait, about."""
        return self._waiting.qsize()

    def submit(self, messages: Sequence[Mapping[str, Any]], settings: Settings, deliver: Deliver) -> Job:
        """Put a job into the queue.

        Raises:
            Busy: the queue is full.
        """
        job = Job(messages, settings, deliver)
        try:
            self._waiting.put_nowait(job)
        except queue.Full:
            raise Busy(f"{self._waiting.maxsize} requests are waiting already; try again in a while") from None
        return job

    def close(self) -> None:
        """End when the jobs that wait are done."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._waiting.get()) is not None:
            if not job.cancelled:
                self._answer(job)
            del job  # its media, and the answer's, must not be held until the next one comes

    def _answer(self, job: Job) -> None:
        try:
            reply = self.chat_model.answer(job.messages, job.settings, on_event=partial(self._tell, job))
            self.metrics.reply(reply)
            job.deliver(reply)
        except Closed:
            pass
        except Exception as error:  # the listener says it; the others' requests go on
            if not job.cancelled:
                job.deliver(error)

    def _tell(self, job: Job, event: Event) -> None:
        self.metrics.event(event)
        job.tell(event)
