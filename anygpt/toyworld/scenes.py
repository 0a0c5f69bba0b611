"""ToyWorld 2: pictures of one to four things, in the six categories of GenEval (arXiv 2310.11513), and their judge.

A picture has 64 × 64 pixels, four places of the size of ToyWorld's pictures. Things lie apart, anywhere within their
places. What is left open by a caption (such as the colours in "a circle left of a square") varies. Only captions of two
things without a relation say a little about places: they name first what comes first in reading order, row by row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from anygpt.data.grammar import CATEGORIES, COUNTS, RELATIONS, describe
from anygpt.toyworld.judges import SIZE as WINDOW
from anygpt.toyworld.judges import load_judges
from anygpt.toyworld.language import pick
from anygpt.toyworld.render import background_of, colour_of, draw
from anygpt.toyworld.world import COLOURS, HELD_OUT, SHAPES, Thing

SIZE = 64
PLACES = ((0, 0), (1, 0), (0, 1), (1, 1))
"""Column and row of each place."""
PAIRS_HELD_OUT = ({"circle", "cross"}, {"square", "ring"}, {"triangle", "diamond"})
COUNTS_HELD_OUT = {"circle": 3, "square": 2, "triangle": 4, "cross": 3, "ring": 4, "diamond": 2}
"""Compositions that stages 1 to 3 never see, pairs but with bound colours, beside the things held out in ToyWorld."""
KINDS = {
    "words": [("text", "text")],
    "views": [("image", "text")],
    "pictures": [("text", "image")],
    "stage1": [("image", "text")],
    "stage2": [("text", "image")],
    "stage3": [("text", "text"), ("image", "text"), ("text", "image"), ("image", "image")],
    "eval": [("text", "image"), ("image", "image")],
}
"""Input and output of the rows, in turn, by kind of dataset."""
_ASKED = ("Draw {}.", "Make a picture of {}.", "I want an image of {}.")
_ABOUT = {  # what is asked about a picture, and how another like it is asked for
    "shapes": ("Which shapes are these?", "Draw the same shapes."),
    "colours": ("Which shapes in which colours?", "Draw the same shapes in the same colours."),
    "position": ("Which shape is where?", "Draw the same shapes in the same places."),
}
BRIGHT = 90
"""Brightest channel of a thing's pixel, at least; colours have 144 and more, backgrounds 40 and less."""
LEAST_AREA = 16
"""Pixels of a thing, at least: the smallest one, a diamond, has about 60."""
CLEAR = 4.0
"""Pixels between the centres of two things, at least, of which one is left of the other."""
_COUNTED = {word: number for number, word in COUNTS.items()} | {"a": 1, "an": 1}
_PHRASE = rf"({'|'.join(_COUNTED)}) (?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)})(?:e?s)?"
_CAPTION = re.compile(rf"\b{_PHRASE}(?: (and|{'|'.join(RELATIONS)}) {_PHRASE})?\b")


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Attributes:
        expected: what its caption says (see `anygpt.data.grammar.compose`).
        things, places: all things with their places, indices of `PLACES`.
    """

    expected: dict[str, Any]
    things: tuple[Thing, ...]
    places: tuple[int, ...]

    @property
    def caption(self) -> str:
        return describe(self.expected)


def invent(category: str, things: Sequence[Thing], rng: np.random.Generator) -> Scene:
    """A scene of a category, of some of the things.

    If all of these are held out, so are pairs of shapes and counts; if none is, these are not.
    """
    wanted = {thing in HELD_OUT for thing in things}
    while True:
        first, count = pick(rng, things), pick(rng, tuple(COUNTS))
        others = [other for other in things if other.shape != first.shape and other.colour != first.colour]
        second, relation = pick(rng, others), pick(rng, tuple(RELATIONS))
        pair = category in ("two_objects", "position", "colour_attribution")
        held_out = {
            "counting": COUNTS_HELD_OUT[first.shape] == count,
            "two_objects": {first.shape, second.shape} in PAIRS_HELD_OUT,
            "position": {first.shape, second.shape} in PAIRS_HELD_OUT,
        }.get(category)
        if held_out is None or held_out in wanted:
            break
    count = count if category == "counting" else 1
    shown = (first, second) if pair else (first,) * count
    places = sorted(int(place) for place in rng.permutation(4)[: len(shown)])
    if category == "position":
        across, down = RELATIONS[relation]
        column, row = (int(i) for i in rng.integers(2, size=2))
        column, row = (across > 0, row) if across else (column, down > 0)
        places = [PLACES.index(place) for place in ((column, row), (column - across, row - down))]
    named = [
        {"name": thing.shape, "count": count, "colour": thing.colour if category.startswith("colour") else None}
        for thing in shown[: 1 + pair]
    ]
    relation = relation if category == "position" else None
    return Scene({"category": category, "things": named, "relation": relation}, shown, tuple(places))


def in_full(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same scene with a caption that leaves out neither the colours nor, of two things, the relation."""
    expected, shown = scene.expected, zip(scene.expected["things"], scene.things, strict=False)
    relation = expected["relation"]
    if len(expected["things"]) > 1 and relation is None:
        (x, y), (other_x, other_y) = (PLACES[place] for place in scene.places)
        true = [name for name, (across, down) in RELATIONS.items() if across * (x - other_x) + down * (y - other_y) > 0]
        relation = pick(rng, true)
    named = [thing | {"colour": one.colour} for thing, one in shown]
    return replace(scene, expected=expected | {"things": named, "relation": relation})


def render_scene(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Draw a scene as an RGB image of 64 × 64 pixels; `rng` determines radii, positions, brightness and background."""
    side, marks = SIZE / 2, []
    for thing, place in zip(scene.things, scene.places, strict=True):
        radius = side * rng.uniform(0.20, 0.30)
        room = side / 2 - radius - side / 16  # at least four pixels between two things
        centre = side * (np.array(PLACES[place]) + 0.5) + rng.uniform(-room, room, size=2)
        marks.append((thing.shape, centre, radius, colour_of(thing, rng)))
    return draw(SIZE, background_of(rng), marks)


def read_caption(text: str) -> dict[str, Any] | None:
    """What the first caption in a text says, as in `Scene.expected`; None without one."""
    found = _CAPTION.search(text.lower())
    if found is None:
        return None
    link, words = found[4], [found.group(1, 2, 3), found.group(5, 6, 7)]
    things = [{"name": name, "count": _COUNTED[n], "colour": colour} for n, colour, name in words[: 2 if link else 1]]
    coloured, several = any(thing["colour"] for thing in things), len(things) > 1
    if link in RELATIONS:
        category = "position"
    elif coloured:
        category = "colour_attribution" if several else "colours"
    else:
        category = "two_objects" if several else "counting" if things[0]["count"] > 1 else "single_object"
    return {"category": category, "things": things, "relation": link if link in RELATIONS else None}


def scene_row(
    kind: str, index: int, things: Sequence[Thing], rng: np.random.Generator, show: Callable[..., dict[str, str]]
) -> dict[str, Any]:
    """Row number `index` of a kind of dataset; `show(name, scene)` writes a picture and returns its content part."""
    category, way = CATEGORIES[index % len(CATEGORIES)], index // len(CATEGORIES) % len(KINDS[kind])
    (source, target), scene = KINDS[kind][way], invent(category, things, rng)
    if (source, target) == ("text", "image") and kind != "eval":
        # Else links would learn numbers from twelve captions. Relations of the held-out pairs are held out, too.
        open_to_all = kind == "pictures" or {thing.shape for thing in scene.things} not in PAIRS_HELD_OUT
        scene = in_full(scene, rng) if open_to_all and rng.integers(2) else scene
    about = _ABOUT["colours" if category.startswith("colour") else category if category == "position" else "shapes"]
    name = f"{kind}-{index}-{source}-{target}-{category}"
    draws = target == "image" or (kind in ("words", "views") and bool(rng.integers(2)))  # stage 0 only says so
    user = []
    if source == "image":
        user.append(show(f"{name}-in", scene))
        asked = about[draws]
    elif draws and (target == "image" or rng.integers(2)):
        asked = pick(rng, _ASKED).format(scene.caption)
    else:
        verb = "are" if scene.expected["things"][0]["count"] > 1 else "is"
        asked = f"There {verb} {scene.caption}. {about[draws]}"
    user.append({"type": "text", "text": asked})
    answer = [{"type": "text", "text": f"{'Here is the picture: ' if draws else ''}{scene.caption}"}]
    if target == "image":
        answer.append(show(f"{name}-out", scene) | {"caption": scene.caption})
    return {"id": name, "messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}


class Found(NamedTuple):
    """A thing in a picture, with the centre of its box in pixels."""

    shape: str
    colour: str
    centre: tuple[float, float]


def find_things(images: Sequence[Image.Image]) -> list[list[Found]]:
    """The things in each picture, in no particular order."""
    if not images:
        return []
    scaled = [image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX) for image in images]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in scaled]))  # (B, H, W, 3)
    bright = pixels.amax(-1) > BRIGHT
    regions, previous = torch.arange(1.0, SIZE * SIZE + 1).view(SIZE, SIZE) * bright, None
    while previous is None or not torch.equal(regions, previous):  # the largest number spreads through each region
        previous, regions = regions, _spread(regions, 3) * bright
    cut = [list(_cut_out(*one)) for one in zip(pixels, regions, strict=True)]
    verdicts = iter(load_judges().image([window for things in cut for window, _ in things]) if any(cut) else ())
    return [[Found(*next(verdicts), centre) for _, centre in things] for things in cut]


def fits(expected: Mapping[str, Any], found: Sequence[Found]) -> bool:
    """Whether exactly the expected things were found (see `anygpt.data.grammar.compose`), related as expected."""
    wanted = [thing for thing in expected["things"] for _ in range(thing["count"])]
    across, down = RELATIONS.get(expected["relation"], (0, 0))

    def fit(order: Sequence[Found]) -> bool:
        named = all(
            one.shape == thing["name"] and thing["colour"] in (None, one.colour)
            for one, thing in zip(order, wanted, strict=True)
        )
        (x, y), (other_x, other_y) = order[0].centre, order[-1].centre
        beside = across * (x - other_x) + down * (y - other_y)
        return named and (expected["relation"] is None or beside >= CLEAR)

    return len(found) == len(wanted) and any(map(fit, permutations(found)))


def _cut_out(pixels: Tensor, regions: Tensor) -> Iterator[tuple[np.ndarray, tuple[float, float]]]:
    """Each thing alone, in the middle of a window as the judge of single things knows it, and its centre `(x, y)`."""
    empty = regions == 0
    background = pixels[empty].median(0).values if empty.any() else torch.zeros(3, dtype=torch.uint8)
    for number in regions[~empty].unique():
        thing = regions == number
        rows, columns = thing.nonzero(as_tuple=True)
        if len(rows) < LEAST_AREA:
            continue
        near = thing | (empty & (_spread(thing[None].float(), 5)[0] > 0))
        alone = background.repeat(SIZE + 2 * WINDOW, SIZE + 2 * WINDOW, 1)
        alone[WINDOW:-WINDOW, WINDOW:-WINDOW][near] = pixels[near]
        x, y = ((int(at.min()) + int(at.max()) + 1) / 2 for at in (columns, rows))
        left, top = (round(at) + WINDOW // 2 for at in (x, y))  # in the padded picture
        yield alone[top : top + WINDOW, left : left + WINDOW].numpy(), (x, y)


def _spread(values: Tensor, width: int) -> Tensor:
    """Largest value in a window around each pixel: `(B, H, W)` to the same."""
    return F.max_pool2d(values[:, None], width, stride=1, padding=width // 2)[:, 0]
