"""Whether images show what was asked for: compositions (prompts of `anygpt.data.grammar`), judged by a detector or, in
ToyWorld 2, exactly; and ToyWorld's edits.

Categories and rules are those of GenEval (arXiv 2310.11513): detections above a threshold, exact counts, colours by
CLIP on the crop, positions by the boxes' centres.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from PIL import Image
from transformers import pipeline

from anygpt.data.grammar import COLOURS, RELATIONS
from anygpt.errors import InputError
from anygpt.evaluation.metrics.base import Batch, MeanOfMeans, Metric
from anygpt.evaluation.metrics.features import loading
from anygpt.toyworld.edits import judge, look
from anygpt.toyworld.scenes import find_things, fits, read_caption

TOLERANCE = 0.1  # minimum offset between two things, relative to the boxes' extents
OVERLAP = 0.5  # intersection over union above which two detections of a class count as one thing
Box = Sequence[float]  # left, top, right, bottom in pixels


def is_composed(
    expected: Mapping[str, Any], found: Mapping[str, Sequence[Box]], image: Image.Image, colour_of: Callable
) -> bool:
    """Whether an image has the expected composition (see `compose`).

    Args:
        found: boxes of the expected things, by decreasing confidence.
        colour_of: `(crop, name) -> one of COLOURS`.
    """
    places = []
    for thing in expected["things"]:
        boxes = found.get(thing["name"], [])
        if len(boxes) < thing["count"] or (expected["category"] == "counting" and len(boxes) > thing["count"]):
            return False
        kept = boxes[: thing["count"]]
        if thing["colour"] and any(colour_of(image.crop(box), thing["name"]) != thing["colour"] for box in kept):
            return False
        places.append(kept)
    relation = expected["relation"]
    return relation is None or any(related(one, other, relation) for one in places[0] for other in places[1])


def related(one: Box, other: Box, relation: str) -> bool:
    """Whether one box has a relation to another: its centre is offset by more than `TOLERANCE` of both extents."""
    axis = 0 if RELATIONS[relation][0] else 1
    (a0, a1), (b0, b1) = ((box[axis], box[axis + 2]) for box in (one, other))
    distance = ((a0 + a1) - (b0 + b1)) / 2
    return distance * RELATIONS[relation][axis] > TOLERANCE * ((a1 - a0) + (b1 - b0))


def overlap(one: Box, other: Box) -> float:
    """Intersection over union of two boxes."""
    wide = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    high = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return wide * high / max(areas - wide * high, 1e-9)


def scenes(metric: Metric, batch: Batch) -> dict[str, list[float]]:
    """Whether images show exactly what their ToyWorld 2 caption says, by category and input."""
    right: dict[str, list[float]] = defaultdict(list)
    for item, found in zip(batch.items, find_things(batch.media("answer", metric.modality)), strict=True):
        caption = item.find("caption", metric.modality)
        if (expected := read_caption(caption)) is None:
            raise InputError(f"row {item.row.id!r}: {caption!r} is no caption of ToyWorld 2, as 'two red rings'")
        given = next(iter(item.row.sources), "text")
        right[f"_{expected['category']}_from_{given}"].append(float(fits(expected, found)))
    return right


def edits(metric: Metric, batch: Batch) -> dict[str, list[bool]]:
    """Whether pictures changed what was asked (`_changed`), kept the rest (`_kept`), and both (`_right`)."""
    seen = (look(batch.media(role, metric.modality)) for role in ("source", "target", "answer"))
    changed, kept = zip(*(judge(*pictures) for pictures in zip(*seen, strict=True)), strict=True)
    return {"_changed": changed, "_kept": kept, "_right": [a and b for a, b in zip(changed, kept, strict=True)]}


class CompositionScore(MeanOfMeans):
    """Share of images with the expected composition, by category."""

    def __init__(
        self, *arguments: Any, detector: str = "google/owlvit-base-patch32", threshold: float = 0.1, **options: Any
    ):
        super().__init__(*arguments, score=CompositionScore.judge, **options)
        self.threshold = threshold
        with loading("detector", detector):
            self.detector = pipeline("zero-shot-object-detection", model=detector, device=self.network.device)

    def judge(self, batch: Batch) -> dict[str, list[float]]:
        right: dict[str, list[float]] = defaultdict(list)
        for item, image in zip(batch.items, batch.media("answer", self.modality), strict=True):
            expected = item.row.expected
            found = self.detect(image, [thing["name"] for thing in expected["things"]])
            right[f"_{expected['category']}"].append(float(is_composed(expected, found, image, self.colour_of)))
        return right

    def detect(self, image: Image.Image, names: Sequence[str]) -> Mapping[str, Sequence[Box]]:
        """Boxes by name, by decreasing confidence, after non-maximum suppression."""
        # Grounding DINO was trained on labels that end with a full stop.
        mark = "." if "dino" in self.detector.model.config.model_type else ""
        found: dict[str, list[Box]] = defaultdict(list)
        for one in self.detector(image, candidate_labels=[name + mark for name in names], threshold=self.threshold):
            left, top, right, bottom = (one["box"][side] for side in ("xmin", "ymin", "xmax", "ymax"))
            box = (max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height))
            kept = found[one["label"].removesuffix(mark)]
            if box[0] < box[2] and box[1] < box[3] and all(overlap(box, other) <= OVERLAP for other in kept):
                kept.append(box)
        return found

    def colour_of(self, crop: Image.Image, name: str) -> str:
        """Colour whose description is closest to a crop."""
        texts = self.network.of_texts([f"a photo of a {colour} {name}" for colour in COLOURS])
        return COLOURS[int(F.cosine_similarity(self.network.of_media([crop]), texts).argmax())]
