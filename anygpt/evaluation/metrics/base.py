"""Batches of answers with their references, metrics that are means of one number per answer, and distances.

Shapes: `M` items of a batch, `F` frames of a clip, `D` width of a network's features.
"""

import functools
import itertools
import tempfile
from array import array
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

from anygpt.errors import InputError
from anygpt.evaluation.rows import Row
from anygpt.media.files import Place
from anygpt.media.types import read_media

SIGMA, SCALE, BLOCK = 10.0, 1000.0, 1024  # CMMD: kernel width, scale, rows per block
Value = dict[str, Any]
"""`value`, `n` (number of samples), and optionally `interval` (95%), `std`, `note`."""


@dataclass(frozen=True)
class Item:
    """An answer with its row: its text, and its first medium of each type."""

    row: Row
    text: str
    media: Mapping[str, Place]

    def find(self, role: str, modality: str) -> Any:
        """The medium (or `text`) of a role (`answer`, `target`, `source`), its `caption`, or the row's field of that
        name."""
        row = self.row
        answer, target = {"text": self.text, **self.media}, {"text": next(iter(row.references), None), **row.targets}
        by_type = {"answer": answer, "target": target, "source": row.sources, "caption": row.captions}
        return by_type[role].get(modality) if role in by_type else getattr(row, role)


class Batch:
    """A batch of items.

    `media(role, modality, num_frames)` decodes one medium per item, `features(network, role, modality, num_frames)`
    computes `(M, D)`; both keep their results for all metrics.
    """

    def __init__(self, items: Sequence[Item]):
        @functools.cache  # of functions without `self`, so that no circle keeps the media
        def media(role: str, modality: str, num_frames: int | None = None) -> list[Any]:
            return [read_media(modality, item.find(role, modality), num_frames) for item in items]

        @functools.cache
        def features(network: Any, role: str, modality: str, num_frames: int | None = None) -> Tensor:
            if role == "caption" or modality == "text":
                return network.of_texts([item.find(role, modality) for item in items])
            return network.of_media(media(role, modality, num_frames))

        self.items, self.media, self.features = items, media, features


class Metric:
    """Accumulates batches in `update`; `compute` returns values by the suffix of their name (`""`, or `"_1"`, …).

    Args: the feature network, if needed; `text` or a media type; the frames of a clip to read, all if None.
    """

    def __init__(self, network: Any = None, modality: str = "text", num_frames: int | None = None):
        self.network, self.modality, self.num_frames = network, modality, num_frames

    def features(self, batch: Batch, role: str) -> Tensor:  # (M, D)
        return batch.features(self.network, role, self.modality, self.num_frames)

    def frames(self, batch: Batch, role: str) -> list[Tensor]:
        """Features `(F, D)` of the frames of each item."""
        return [self.network.of_frames(c.frames) for c in batch.media(role, self.modality, self.num_frames)]


class Mean(Metric):
    """Mean over all answers of what `score(metric, batch)` gives: a number per item, or numbers by the suffix of a
    value's name. All are kept for the interval."""

    def __init__(self, *arguments: Any, score: Callable[[Any, Batch], Any], **options: Any):
        super().__init__(*arguments, **options)
        self.score = score
        self.scores: dict[str, array] = defaultdict(partial(array, "d"))

    def update(self, batch: Batch) -> None:
        found = self.score(self, batch)
        for end, scores in found.items() if isinstance(found, Mapping) else [("", found)]:
            self.scores[end].extend(scores)

    def compute(self) -> dict[str, Value]:
        return {end: mean_value(scores) for end, scores in self.scores.items()}


class MeanOfMeans(Mean):
    """Adds the mean of all means, each of a category of answers, as the first value."""

    def compute(self) -> dict[str, Value]:
        found = super().compute()
        value = float(np.mean([one["value"] for one in found.values()]))
        return {"": {"value": value, "n": sum(one["n"] for one in found.values())}} | found


def mean_value(scores: Sequence[float]) -> Value:
    values = np.asarray(scores, np.float64)
    return {"value": float(values.mean()), "n": len(values), "interval": list(bootstrap_interval(values))}


def bootstrap_interval(values: np.ndarray, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Deterministic 95% bootstrap percentile interval of the mean of `(n,)` values, at least one (Efron 1979)."""
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


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


class Distance(Metric):
    """Passes float64 features `(M, D)` of answers and targets (of each frame if `by_frame`) to a subclass's `add`."""

    def __init__(self, *arguments: Any, by_frame: bool = False, **options: Any):
        super().__init__(*arguments, **options)
        self.by_frame, self.count = by_frame, 0

    def update(self, batch: Batch) -> None:
        self.count += len(batch.items)
        read = (lambda batch, role: torch.cat(self.frames(batch, role))) if self.by_frame else self.features
        self.add(read(batch, "answer").double(), read(batch, "target").double())


class Frechet(Distance):
    """‖μ − μ'‖² + tr(Σ + Σ' − 2(ΣΣ')^½) of two Gaussians (FID, arXiv 1706.08500), from running float64 moments."""

    moments: Any = None

    def add(self, answers: Tensor, targets: Tensor) -> None:
        if self.moments is None:
            identity = nn.Identity()
            identity.num_features = answers.shape[1]
            # one process scores: torchmetrics must not wait for the others
            self.moments = FrechetInceptionDistance(feature=identity, sync_on_compute=False).to(answers.device)
        self.moments.update(answers, real=False)
        self.moments.update(targets, real=True)

    def compute(self) -> dict[str, Value]:
        number, width = int(self.moments.fake_features_num_samples), len(self.moments.real_features_sum)
        if number < 2:
            raise InputError("a Fréchet distance needs at least two answers and two true media; this suite has one")
        value: Value = {"value": float(self.moments.compute()), "n": self.count}
        if number <= width:
            value["note"] = (
                f"{number} samples of {width} features have a singular covariance, so the distance is far off; at "
                f"least {width + 1} samples are needed, and some thousands are usual"
            )
        return {"": value}


class Kid(Distance):
    """Unbiased squared MMD under the kernel (x·y / D + 1)³ (arXiv 1801.01401), averaged over blocks of samples.

    Blocks are consecutive samples, of which one is in memory; the paper's random subsets have the same expectation.
    The last block is what is left, 2 to `subset_size` + 1 samples; blocks are weighted by their samples.
    """

    def __init__(self, *arguments: Any, subset_size: int = 1000, **options: Any):
        super().__init__(*arguments, **options)
        if subset_size < 2:
            raise InputError(f"subset_size is {subset_size}; expected at least 2 samples, which are compared in pairs")
        self.size = subset_size
        self.waiting: tuple[Tensor, Tensor] | None = None
        self.values: list[float] = []

    def add(self, answers: Tensor, targets: Tensor) -> None:
        new = (targets, answers)
        held = new if self.waiting is None else tuple(map(torch.cat, zip(self.waiting, new, strict=True)))
        while len(held[0]) > self.size + 1:  # one sample alone would be left out
            self.values.append(float(poly_mmd(*(features[: self.size] for features in held))))
            held = tuple(features[self.size :] for features in held)
        self.waiting = held

    def compute(self) -> dict[str, Value]:
        if len(self.waiting[0]) < 2:
            raise InputError("KID needs at least two answers and two true media; this suite has one")
        values = [*self.values, float(poly_mmd(*self.waiting))]
        weights = [self.size] * len(self.values) + [len(self.waiting[0])]
        value = np.average(values, weights=weights)
        spread = np.sqrt(np.average((np.asarray(values) - value) ** 2, weights=weights))
        return {"": {"value": float(value), "n": self.count, "std": float(spread)}}


class Cmmd(Distance):
    """Squared MMD under a Gaussian kernel on normalized CLIP features (arXiv 2401.09603), times 1000.

    Runs over all pairs; features are kept in temporary files, two blocks at a time in memory.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.files = tuple(tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115 (it is gone when closed)
        self.width = 0

    def add(self, answers: Tensor, targets: Tensor) -> None:
        self.width = answers.shape[1]
        for file, features in zip(self.files, (answers, targets), strict=True):
            file.write(F.normalize(features, dim=-1).cpu().numpy().tobytes())
            file.flush()

    def compute(self) -> dict[str, Value]:
        x, y = (np.memmap(file, np.float64, "r").reshape(-1, self.width) for file in self.files)
        value = _mean_kernel(x, x) + _mean_kernel(y, y) - 2 * _mean_kernel(x, y)
        return {"": {"value": SCALE * value, "n": self.count}}


def _mean_kernel(first: np.ndarray, second: np.ndarray) -> float:
    """Mean of exp(−‖x − y‖² / 2σ²) over all pairs, block by block."""
    total = 0.0
    for i, j in itertools.product(range(0, len(first), BLOCK), range(0, len(second), BLOCK)):
        x, y = first[i : i + BLOCK], second[j : j + BLOCK]
        squares = (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T
        total += float(np.exp(-squares / (2 * SIGMA**2)).sum())
    return total / (len(first) * len(second))
