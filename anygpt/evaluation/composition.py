"""Whether pictures are composed as they were asked to be: prompts of our own grammar, judged by a detector.

The six categories and the rules of judging are those of GenEval (arXiv 2310.11513): detections above a threshold,
counts that must be exact, colours by CLIP on the crop, positions by the boxes' centres.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

OBJECTS = (
    "apple", "backpack", "banana", "bear", "bench", "bicycle", "bird", "boat", "book", "bottle", "bowl", "bus", "cake",
    "car", "carrot", "cat", "chair", "clock", "couch", "cow", "cup", "dog", "elephant", "fork", "giraffe", "handbag",
    "horse", "kite", "laptop", "motorcycle", "orange", "pizza", "sheep", "spoon", "suitcase", "train", "truck",
    "umbrella", "vase", "zebra",
)  # fmt: skip
"""Classes of COCO that detectors know well, and that may have any number, place and colour."""
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COUNTS = {2: "two", 3: "three", 4: "four"}
PLURALS = {"bench": "benches", "bus": "buses", "couch": "couches", "sheep": "sheep"}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
CATEGORIES = ("single_object", "two_objects", "counting", "colours", "position", "colour_attribution")
TOLERANCE = 0.1
"""Of the boxes' extents, by which one thing must lie further than the other."""

Found = Mapping[str, Sequence[Sequence[float]]]
"""`{class: [(left, top, right, bottom)]}` in pixels, the surest first."""


def compose(per_category: int, seed: int) -> list[tuple[str, str, dict[str, Any]]]:
    """`(id, caption, what is expected)` of each category, the same for the same seed.

    What is expected: `category`, `things` (`name`, `count`, `colour` or None, one each) and `relation` (of the first
    thing to the second) or None.
    """
    wishes = []
    for place, category in enumerate(CATEGORIES):
        rng = np.random.default_rng([seed, place])
        for number in range(per_category):
            first, second = (str(name) for name in rng.choice(OBJECTS, 2, replace=False))
            colours = [str(colour) for colour in rng.choice(COLOURS, 2, replace=False)]
            relation, count = str(rng.choice(list(RELATIONS))), int(rng.choice(list(COUNTS)))
            one = _article(first)
            things, text = {
                "single_object": ([(first, 1, None)], one),
                "two_objects": ([(first, 1, None), (second, 1, None)], f"{one} and {_article(second)}"),
                "counting": ([(first, count, None)], f"{COUNTS[count]} {PLURALS.get(first, first + 's')}"),
                "colours": ([(first, 1, colours[0])], _article(f"{colours[0]} {first}")),
                "position": ([(first, 1, None), (second, 1, None)], f"{one} {relation} {_article(second)}"),
                "colour_attribution": (
                    [(first, 1, colours[0]), (second, 1, colours[1])],
                    " and ".join(_article(f"{c} {name}") for c, name in zip(colours, (first, second), strict=True)),
                ),
            }[category]
            expected = {
                "category": category,
                "things": [dict(zip(("name", "count", "colour"), thing, strict=True)) for thing in things],
                "relation": relation if category == "position" else None,
            }
            wishes.append((f"{category}-{number:04d}", f"a photo of {text}", expected))
    return wishes


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def is_composed(
    expected: Mapping[str, Any], found: Found, image: Image.Image, colour_of: Callable[[Image.Image, str], str]
) -> bool:
    """Whether a picture holds what it should.

    Args:
        expected: see `compose`.
        found: what a detector saw of the things expected.
        colour_of: the colour of a thing on its crop: `(crop, name) -> one of COLOURS`.
    """
    places = []
    for thing in expected["things"]:
        boxes = found.get(thing["name"], [])
        exact = expected["category"] == "counting"
        if len(boxes) < thing["count"] or (exact and len(boxes) > thing["count"]):
            return False
        kept = boxes[: thing["count"]]
        if thing["colour"] and any(colour_of(image.crop(box), thing["name"]) != thing["colour"] for box in kept):
            return False
        places.append(kept)
    if expected["relation"] is None:
        return True
    return any(related(one, other, expected["relation"]) for one in places[0] for other in places[1])


def related(one: Sequence[float], other: Sequence[float], relation: str) -> bool:
    """Whether one box lies so to another: its centre is further that way by more than a part of both extents."""
    axis = 0 if RELATIONS[relation][0] else 1
    (a0, a1), (b0, b1) = ((box[axis], box[axis + 2]) for box in (one, other))
    distance = ((a0 + a1) - (b0 + b1)) / 2
    return distance * RELATIONS[relation][axis] > TOLERANCE * ((a1 - a0) + (b1 - b0))
