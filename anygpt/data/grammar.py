"""Prompts for compositions of things, in the six categories of GenEval (arXiv 2310.11513)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

OBJECTS = """
apple backpack banana bear bench bicycle bird boat book bottle bowl bus cake car carrot cat chair clock
couch cow cup dog elephant fork giraffe handbag horse kite laptop motorcycle orange pizza sheep spoon suitcase train
truck umbrella vase zebra
"""
"""COCO classes that detectors recognize well, and that may have any number, place and colour."""
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COUNTS = {2: "two", 3: "three", 4: "four"}
PLURALS = {"bench": "benches", "bus": "buses", "couch": "couches", "cross": "crosses", "sheep": "sheep"}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
CATEGORIES = ("single_object", "two_objects", "counting", "colours", "position", "colour_attribution")


def compose(per_category: int, seed: int) -> list[tuple[str, str, dict[str, Any]]]:
    """`(id, caption, expected)` for each category, determined by the seed.

    `expected` has `category`, `things` (each with `name`, `count`, and `colour` or None) and their `relation` or None.
    """
    wishes = []
    for place, category in enumerate(CATEGORIES):
        rng = np.random.default_rng([seed, place])
        for number in range(per_category):
            names = [str(name) for name in rng.choice(OBJECTS.split(), 2, replace=False)]
            colours = [str(colour) for colour in rng.choice(COLOURS, 2, replace=False)]
            relation, count = str(rng.choice(list(RELATIONS))), int(rng.choice(list(COUNTS)))
            names = names[:1] if category in ("single_object", "counting", "colours") else names
            coloured = category.startswith("colour")
            things = [
                {"name": name, "count": count if category == "counting" else 1, "colour": colour if coloured else None}
                for name, colour in zip(names, colours, strict=False)
            ]
            relation = relation if category == "position" else None
            expected = {"category": category, "things": things, "relation": relation}
            wishes.append((f"{category}-{number:04d}", f"a photo of {describe(expected)}", expected))
    return wishes


def describe(expected: Mapping[str, Any]) -> str:
    """The caption of what is expected: "a cat left of a dog"."""
    return f" {expected['relation'] or 'and'} ".join(map(_phrase, expected["things"]))


def _phrase(thing: dict[str, Any]) -> str:
    name, count = thing["name"], thing["count"]
    words = " ".join(filter(None, (thing["colour"], PLURALS.get(name, name + "s") if count > 1 else name)))
    return f"{COUNTS.get(count) or ('an' if words[0] in 'aeiou' else 'a')} {words}"
