"""The judge of ToyWorld 2: what a picture of several things shows, and whether that is what was asked for.

Things are connected regions brighter than the dark background; the judge of single things tells what each one is. All
pictures are scaled to 64 × 64 pixels.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from anygpt.data.grammar import RELATIONS
from anygpt.toyworld.judges import SIZE as WINDOW
from anygpt.toyworld.judges import load_judges
from anygpt.toyworld.scenes import SIZE

BRIGHT = 90
"""Brightest channel of a thing's pixel, at least; colours have 144 and more, backgrounds 40 and less."""
LEAST_AREA = 16
"""Pixels of a thing, at least: the smallest one, a diamond, has about 60."""
CLEAR = 4.0
"""Pixels between the centres of two things, at least, of which one is left of the other."""


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
