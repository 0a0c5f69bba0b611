"""Base classes of metrics: batches of answers with their references, and values with confidence intervals.

Shapes: `M` items of a batch, `F` frames of a clip, `D` width of a network's features.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from anygpt.evaluation.rows import Place, Row
from anygpt.evaluation.statistics import bootstrap_interval
from anygpt.media.types import read_media

Value = dict[str, Any]
"""`value`, `n` (number of samples), and optionally `interval` (95%), `std`, `note`."""


@dataclass(frozen=True)
class Item:
    """An answer with its row: its text, and its first medium of each type."""

    row: Row
    text: str
    media: Mapping[str, Place]

    def place(self, role: str, modality: str) -> Place | None:
        """File of the medium of a role (`answer`, `target`, `source`)."""
        return {"answer": self.media, "target": self.row.targets, "source": self.row.sources}[role].get(modality)

    def has(self, need: str, modality: str) -> bool:
        """Whether a need of a metric is met; see `Kind.needs`."""
        if need in ("references", "expected", "choices"):
            return bool(getattr(self.row, need))
        return modality in self.row.captions if need == "caption" else self.place(need, modality) is not None


class Batch:
    """A batch of items that caches decoded media and features for all metrics."""

    def __init__(self, items: Sequence[Item]):
        self.items = list(items)
        self._known: dict[tuple, Any] = {}

    def media(self, role: str, modality: str, num_frames: int | None = None) -> list[Any]:
        """Decoded media, one per item."""
        places = [item.place(role, modality) for item in self.items]
        key = (role, modality, num_frames)
        return self._once(key, lambda: [read_media(modality, place, num_frames) for place in places])

    def features(self, network: Any, role: str, modality: str, num_frames: int | None = None) -> Tensor:
        """Features `(M, D)`; of texts for the role `caption`."""
        key = (id(network), role, modality, num_frames)
        if role == "caption":
            return self._once(key, lambda: network.of_texts([item.row.captions[modality] for item in self.items]))
        return self._once(key, lambda: network.of_media(self.media(role, modality, num_frames)))

    def _once(self, key: tuple, make: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]


class Metric:
    """Accumulates batches in `update`; `compute` returns values by the suffix of their name (`""`, or `"_1"`, …).

    Args:
        network: feature network, if needed.
        modality: `text` or a media type.
        num_frames: frames of a clip to read; all if None.
    """

    def __init__(self, network: Any = None, modality: str = "text", num_frames: int | None = None):
        self.network, self.modality, self.num_frames = network, modality, num_frames

    def features(self, batch: Batch, role: str) -> Tensor:
        """Features `(M, D)`."""
        return batch.features(self.network, role, self.modality, self.num_frames)

    def frames(self, batch: Batch, role: str) -> list[Tensor]:
        """Features `(F, D)` of the frames of each item."""
        return [self.network.of_frames(c.frames) for c in batch.media(role, self.modality, self.num_frames)]


class Mean(Metric):
    """Mean of one number per sample; all numbers are kept for the interval."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.scores = array("d")

    def update(self, batch: Batch) -> None:
        self.scores.extend(float(score) for score in self.score(batch))

    def compute(self) -> dict[str, Value]:
        return {"": mean_value(self.scores)}


def mean_value(scores: Sequence[float]) -> Value:
    """Mean with its bootstrap interval."""
    values = np.asarray(scores, np.float64)
    return {"value": float(values.mean()), "n": len(values), "interval": list(bootstrap_interval(values))}


class Cosine(Mean):
    """100 · cosine of an answer and its `caption` (CLIPScore, arXiv 2104.08718), `source` or `target`, by `role`."""

    def __init__(self, *arguments: Any, role: str, **options: Any):
        super().__init__(*arguments, **options)
        self.role = role

    def score(self, batch: Batch) -> list[float]:
        return (100 * F.cosine_similarity(self.features(batch, "answer"), self.features(batch, self.role))).tolist()


class ClipSim(Mean):
    """100 · cosine of a caption and each frame, averaged over frames (arXiv 2104.14806)."""

    def score(self, batch: Batch) -> list[float]:
        pairs = zip(self.frames(batch, "answer"), self.features(batch, "caption"), strict=True)
        return [float(100 * F.cosine_similarity(frames, text[None]).mean()) for frames, text in pairs]


class FrameConsistency(Mean):
    """100 · cosine of consecutive frames, averaged; 100 for a single frame."""

    def score(self, batch: Batch) -> list[float]:
        clips = self.frames(batch, "answer")
        return [float(100 * F.cosine_similarity(f[:-1], f[1:]).mean()) if len(f) > 1 else 100.0 for f in clips]


class LabelDivergence(Mean):
    """KL(labels of the reference sound ‖ labels of the answer) of a classifier's softmax, in nats."""

    def score(self, batch: Batch) -> list[float]:
        answers, targets = (self.features(batch, role).double().log_softmax(-1) for role in ("answer", "target"))
        return F.kl_div(answers, targets, reduction="none", log_target=True).sum(-1).tolist()
