"""One model, one thread, one bounded queue: requests are answered in order, compatible ones as a batch."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, generate_latest

from anygpt.chat.chat_model import ChatModel, Reply, Settings
from anygpt.generation.events import Closed, DecodingStarted, Event, MediumDone


class Busy(Exception):
    """The queue is full."""


@dataclass(eq=False)
class Job:
    """A request; `deliver` is called in the engine's thread with its events, then with the `Reply` or the exception."""

    messages: Sequence[Mapping[str, Any]]
    settings: Settings
    deliver: Callable[[Event | Reply | Exception], None]
    told: bool = False
    cancelled: bool = False

    def cancel(self) -> None:
        """Abandon the job: it ends at the next token or denoising step, or never starts."""
        self.cancelled = True

    def tell(self, event: Event | Reply | Exception) -> None:
        """Deliver an event unless the job is cancelled; raises `Closed` then."""
        if self.cancelled:
            raise Closed
        self.told = True
        self.deliver(event)


class Metrics:
    """Counters in Prometheus' format: requests by HTTP status, requests waiting for the model, sizes of batches, tokens
    (including media's and signal tokens), and seconds per batch of each decoder."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        names = {"registry": self.registry}
        self.requests = Counter("anygpt_requests", "Requests by HTTP status", ["status"], **names)
        self.waiting = Gauge("anygpt_requests_waiting", "Requests waiting for the model", **names)
        sizes = {"buckets": (1, 2, 4, 8, 16, 32, 64)}
        self.batch = Histogram("anygpt_batch_size", "Requests answered together", **sizes, **names)
        self.tokens = Counter("anygpt_tokens", "Tokens, media and signal tokens included", ["kind"], **names)
        self.decoder = Summary("anygpt_decoder_seconds", "Seconds of a decoder per batch", ["decoder"], **names)
        self._begun: dict[str, float] = {}

    def event(self, event: Event) -> None:
        """Record an event of a batch. `begin` must precede the batch, to drop the previous one's state; events of
        several rows arrive one after the other."""
        if isinstance(event, DecodingStarted):
            self._begun.setdefault(event.key, time.perf_counter())
        elif isinstance(event, MediumDone) and (begun := self._begun.pop(event.content.key, None)) is not None:
            self.decoder.labels(event.content.key).observe(time.perf_counter() - begun)

    def begin(self) -> None:
        self._begun.clear()

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def answered(self, replies: Sequence[Reply]) -> None:
        self.batch.observe(len(replies))
        self.tokens.labels("prompt").inc(sum(reply.prompt_tokens for reply in replies))
        self.tokens.labels("generated").inc(sum(reply.new_tokens for reply in replies))


class Engine:
    """Answers jobs in its own thread, in batches of up to `max_batch` waiting jobs with compatible settings.

    Up to `max_waiting` jobs wait; those that arrive during a batch wait for the next one.
    """

    def __init__(self, chat_model: ChatModel, max_waiting: int = 64, max_batch: int = 8):
        self.chat_model, self.max_waiting, self.max_batch = chat_model, max_waiting, max_batch
        self.metrics = Metrics()
        self.metrics.waiting.set_function(lambda: self.waiting)
        self._jobs: list[Job] = []
        self._changed, self._closing = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return sum(not job.cancelled for job in self._jobs)

    def submit(self, messages: Sequence[Mapping[str, Any]], settings: Settings, deliver: Callable) -> Job:
        job = Job(messages, settings, deliver)
        with self._changed:
            if len(self._uncancelled()) >= self.max_waiting:
                raise Busy(f"{self.max_waiting} requests are already waiting; try again later")
            self._jobs.append(job)
            self._changed.notify()
        return job

    def _uncancelled(self) -> list[Job]:
        self._jobs = [job for job in self._jobs if not job.cancelled]
        return self._jobs

    def close(self) -> None:
        """Stop after the waiting jobs."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._next_batch():
            self._answer(batch)

    def _next_batch(self) -> list[Job]:
        """The job waiting longest and others of its kind; empty on shutdown."""
        with self._changed:
            self._changed.wait_for(lambda: self._uncancelled() or self._closing)
            alike = [job for job in self._jobs if job.settings.kind == self._jobs[0].settings.kind]
            batch = alike[: self.max_batch]
            self._jobs = [job for job in self._jobs if job not in batch]
            return batch

    def _answer(self, batch: list[Job]) -> None:
        def tell(event: Event) -> None:
            self.metrics.event(event)
            batch[event.row].tell(event)

        def finish(outcomes: Sequence[Reply | Exception]) -> None:
            for job, outcome in zip(batch, outcomes, strict=True):
                with suppress(Closed):
                    job.tell(outcome)

        self.metrics.begin()  # decoders whose clients have all disconnected reported no end
        try:
            conversations, settings = [job.messages for job in batch], [job.settings for job in batch]
            replies = self.chat_model.answer_together(conversations, settings, tell)
            self.metrics.answered(replies)
            finish(replies)
        except Closed:
            pass
        except Exception as error:  # delivered to the listener; other jobs continue
            if len(batch) == 1 or any(job.told for job in batch):
                finish([error] * len(batch))
                return
            for job in batch:  # one job is faulty, or the batch does not fit into memory
                self._answer([job])
        finally:
            batch.clear()  # frees the media at once, though cycles of the generation may refer to `tell` for a while
