"""Compositions judged by an open-vocabulary detector, colours by CLIP; the rules are in `composition`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from PIL import Image
from transformers import pipeline

from anygpt.errors import InputError
from anygpt.evaluation.composition import COLOURS, Found, is_composed
from anygpt.evaluation.metrics.base import Batch, Metric, Value, mean_value

THRESHOLD = 0.1
OVERLAP = 0.5
"""Intersection over union above which two detections of a class are of one thing."""


class Detector:
    """A transformers detector that takes classes in words (OWL-ViT, OWLv2, Grounding DINO), by id or folder."""

    def __init__(self, path: str, device: Any = "cpu", threshold: float | None = None):
        self.threshold = THRESHOLD if threshold is None else threshold
        try:
            self.pipeline = pipeline("zero-shot-object-detection", model=path, device=device)
        except (OSError, ValueError, KeyError) as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise InputError(
                f"the detector {path!r} cannot be loaded ({reason}); where there is a network, download it with: "
                f"hf download {path}"
            ) from error

    def __call__(self, image: Image.Image, names: Sequence[str]) -> Found:
        """Boxes by name, the surest first, without those that lie on surer ones."""
        # Grounding DINO was trained on words that end in a full stop.
        mark = "." if "dino" in self.pipeline.model.config.model_type else ""
        labels = [f"{name}{mark}" for name in names]
        found: dict[str, list[Sequence[float]]] = defaultdict(list)
        for one in self.pipeline(image, candidate_labels=labels, threshold=self.threshold):
            box = tuple(one["box"][side] for side in ("xmin", "ymin", "xmax", "ymax"))
            kept = found[one["label"].removesuffix(mark)]
            if all(overlap(box, other) <= OVERLAP for other in kept):
                kept.append(box)
        return found


def overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes."""
    wide = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    high = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return wide * high / max(areas - wide * high, 1e-9)


class CompositionScore(Metric):
    """The share of pictures composed as asked, by category; the first value is the mean over categories."""

    def __init__(self, detector: Detector, network: Any, modality: str):
        self.detector, self.network, self.modality = detector, network, modality
        self.right: dict[str, list[float]] = defaultdict(list)

    def update(self, batch: Batch) -> None:
        for item, image in zip(batch.items, batch.media("answer", self.modality), strict=True):
            expected = item.row.expected
            found = self.detector(image, [thing["name"] for thing in expected["things"]])
            right = is_composed(expected, found, image, self.colour_of)
            self.right[expected["category"]].append(float(right))

    def colour_of(self, crop: Image.Image, name: str) -> str:
        """The colour whose description is nearest to a crop."""
        texts = self.network.of_texts([f"a photo of a {colour} {name}" for colour in COLOURS])
        return COLOURS[int(F.cosine_similarity(self.network.of_media([crop]), texts).argmax())]

    def compute(self) -> dict[str, Value]:
        found = {f"_{category}": mean_value(right) for category, right in self.right.items()}
        value = float(np.mean([one["value"] for one in found.values()]))
        return {"": {"value": value, "n": sum(one["n"] for one in found.values())}} | found
