"""Counters for `GET /metrics`, in Prometheus' format."""

from __future__ import annotations

import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, generate_latest

from anygpt.chat.chat_model import Reply
from anygpt.generation.events import DecodingStarted, Event, MediumDone


class Metrics:
    """Metrics of one server.

    Attributes:
        requests: answered requests by HTTP status.
        waiting: requests waiting for the model.
        batch: sizes of batches.
        tokens: tokens of `prompt`s, including media, and `generated` ones, including signal tokens.
        decoder: seconds per batch of each decoder.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        names = {"registry": self.registry}
        self.requests = Counter("anygpt_requests", "Requests by HTTP status", ["status"], **names)
        self.waiting = Gauge("anygpt_requests_waiting", "Requests that wait for the model", **names)
        sizes = {"buckets": (1, 2, 4, 8, 16, 32, 64)}
        self.batch = Histogram("anygpt_batch_size", "Requests answered together", **sizes, **names)
        self.tokens = Counter("anygpt_tokens", "Tokens, media and signal tokens included", ["kind"], **names)
        self.decoder = Summary("anygpt_decoder_seconds", "Seconds of a decoder for a batch", ["decoder"], **names)
        self._begun: dict[str, float] = {}

    def event(self, event: Event) -> None:
        """Record an event of a batch; those of several rows come after each other."""
        if isinstance(event, DecodingStarted):
            self._begun.setdefault(event.key, time.perf_counter())
        elif isinstance(event, MediumDone) and (begun := self._begun.pop(event.content.key, None)) is not None:
            self.decoder.labels(event.content.key).observe(time.perf_counter() - begun)

    def answered(self, replies: Sequence[Reply]) -> None:
        """Record the replies of a batch."""
        self.batch.observe(len(replies))
        self.tokens.labels("prompt").inc(sum(reply.prompt_tokens for reply in replies))
        self.tokens.labels("generated").inc(sum(reply.new_tokens for reply in replies))

    def text(self) -> bytes:
        return generate_latest(self.registry)
