"""What every metric is made of: batches of answers beside what would be right, and values with their certainty.

Shapes: `M` items of a batch, `D` width of a network's features.
"""

from __future__ import annotations

import abc
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from anygpt.evaluation.rows import Place, Row
from anygpt.evaluation.statistics import bootstrap_interval
from anygpt.media.types import read_media

Value = dict[str, Any]
"""`value` and `n`, the samples that it is of; where there are such, `interval` (95%), `std`, `note`."""


@dataclass(frozen=True)
class Item:
    """An answer beside its row: what was said, and the first medium of each type."""

    row: Row
    text: str
    media: Mapping[str, Place]

    def place(self, role: str, modality: str) -> Place | None:
        """Where the medium of a role (`answer`, `target`, `source`) is."""
        return {"answer": self.media, "target": self.row.targets, "source": self.row.sources}[role].get(modality)

    def has(self, need: str, modality: str) -> bool:
        """Whether a metric's need is met; see `Kind.needs`."""
        if need in ("references", "expected", "choices"):
            return bool(getattr(self.row, need))
        if need == "caption":
            return modality in self.row.captions
        return self.place(need, modality) is not None


class Network(Protocol):
    """What gives features; see `anygpt.evaluation.metrics.features`."""

    def of_media(self, media: Sequence[Any]) -> Tensor: ...

    def of_texts(self, texts: Sequence[str]) -> Tensor: ...


class Batch:
    """Items that are looked at together; what is decoded or computed is so once, for all metrics."""

    def __init__(self, items: Sequence[Item]):
        self.items = list(items)
        self._known: dict[tuple, Any] = {}

    def media(self, role: str, modality: str, num_frames: int | None = None) -> list[Any]:
        """Decoded, one an item."""
        key = (role, modality, num_frames)
        if key not in self._known:
            places = [item.place(role, modality) for item in self.items]
            self._known[key] = [read_media(modality, place, num_frames) for place in places]
        return self._known[key]

    def features(self, network: Network, role: str, modality: str, num_frames: int | None = None) -> Tensor:
        """`(M, D)`; the role `caption` is in words."""
        key = (id(network), role, modality, num_frames)
        if key not in self._known:
            if role == "caption":
                self._known[key] = network.of_texts([item.row.captions[modality] for item in self.items])
            else:
                self._known[key] = network.of_media(self.media(role, modality, num_frames))
        return self._known[key]


class Metric(abc.ABC):
    """Looks at batches one after the other, and keeps no more than it needs."""

    @abc.abstractmethod
    def update(self, batch: Batch) -> None: ...

    @abc.abstractmethod
    def compute(self) -> dict[str, Value]:
        """Values by what follows the metric's name: `""`, or `"_1"` and the like where there are several."""


class Mean(Metric):
    """The mean of one number a sample: 8 bytes each are kept, for the interval."""

    def __init__(self, score: Callable[[Batch], Sequence[float]]):
        self.score = score
        self.scores = array("d")

    def update(self, batch: Batch) -> None:
        self.scores.extend(float(score) for score in self.score(batch))

    def compute(self) -> dict[str, Value]:
        return {"": mean_value(self.scores)}


def mean_value(scores: Sequence[float]) -> Value:
    """The mean with its bootstrap interval."""
    values = np.asarray(scores, np.float64)
    return {"value": float(values.mean()), "n": len(values), "interval": list(bootstrap_interval(values))}
