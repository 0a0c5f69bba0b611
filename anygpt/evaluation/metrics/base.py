"""Batches of answers with their references, and metrics that are means of one number per answer.

Shapes: `M` items of a batch, `F` frames of a clip, `D` width of a network's features.
"""

from __future__ import annotations

import functools
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

    def find(self, role: str, modality: str) -> Any:
        """The medium of a role (`answer`, `target`, `source`), its `caption`, or the row's field of that name."""
        row = self.row
        by_type = {"answer": self.media, "target": row.targets, "source": row.sources, "caption": row.captions}
        return by_type[role].get(modality) if role in by_type else getattr(row, role)


class Batch:
    """A batch of items.

    `media(role, modality, num_frames)` decodes one medium per item, `features(network, role, modality, num_frames)`
    computes `(M, D)`, of texts for the role `caption`; both keep their results for all metrics.
    """

    def __init__(self, items: Sequence[Item]):
        @functools.cache  # of functions without `self`, so that no circle keeps the media
        def media(role: str, modality: str, num_frames: int | None = None) -> list[Any]:
            return [read_media(modality, item.find(role, modality), num_frames) for item in items]

        @functools.cache
        def features(network: Any, role: str, modality: str, num_frames: int | None = None) -> Tensor:
            if role == "caption":
                return network.of_texts([item.find(role, modality) for item in items])
            return network.of_media(media(role, modality, num_frames))

        self.items, self.media, self.features = items, media, features


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
    """Mean over all answers of `score(metric, batch)`, one number per item; all are kept for the interval."""

    def __init__(self, *arguments: Any, score: Callable[[Metric, Batch], Sequence[float]], **options: Any):
        super().__init__(*arguments, **options)
        self.score, self.scores = score, array("d")

    def update(self, batch: Batch) -> None:
        self.scores.extend(self.score(self, batch))

    def compute(self) -> dict[str, Value]:
        return {"": mean_value(self.scores)}


def mean_value(scores: Sequence[float]) -> Value:
    """Mean with its bootstrap interval."""
    values = np.asarray(scores, np.float64)
    return {"value": float(values.mean()), "n": len(values), "interval": list(bootstrap_interval(values))}


def cosine(metric: Metric, batch: Batch, role: str) -> list[float]:
    """100 · cosine of an answer and its `caption` (CLIPScore, arXiv 2104.08718), `source` or `target`, by `role`."""
    return (100 * F.cosine_similarity(metric.features(batch, "answer"), metric.features(batch, role))).tolist()


def clipsim(metric: Metric, batch: Batch) -> list[float]:
    """100 · cosine of a caption and each frame, averaged over frames (arXiv 2104.14806)."""
    pairs = zip(metric.frames(batch, "answer"), metric.features(batch, "caption"), strict=True)
    return [float(100 * F.cosine_similarity(frames, text[None]).mean()) for frames, text in pairs]


def frame_consistency(metric: Metric, batch: Batch) -> list[float]:
    """100 · cosine of consecutive frames, averaged; 100 for a single frame."""
    clips = metric.frames(batch, "answer")
    return [float(100 * F.cosine_similarity(f[:-1], f[1:]).mean()) if len(f) > 1 else 100.0 for f in clips]


def label_divergence(metric: Metric, batch: Batch) -> list[float]:
    """KL(labels of the reference sound ‖ labels of the answer) of a classifier's softmax, in nats."""
    answers, targets = (metric.features(batch, role).double().log_softmax(-1) for role in ("answer", "target"))
    return F.kl_div(answers, targets, reduction="none", log_target=True).sum(-1).tolist()
