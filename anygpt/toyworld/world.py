"""What exists in ToyWorld: 6 shapes × 8 colours, and the 10 combinations that alignment never sees."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")
MOTIONS = ("left", "right", "up", "down")
MODALITIES = ("image", "video", "audio")
"""The modalities that have files; text is the fourth one."""


@dataclass(frozen=True, order=True)
class Thing:
    """One thing of the world: a shape (one of `SHAPES`) in a colour (one of `COLOURS`)."""

    shape: str
    colour: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


THINGS = tuple(Thing(shape, colour) for shape, colour in product(SHAPES, COLOURS))

# Each shape is held out once or twice and each colour too, so that every shape is seen in at least six
# colours and every colour on at least four shapes: what is unseen is the combination, never its halves.
HELD_OUT = (
    Thing("circle", "green"),
    Thing("circle", "orange"),
    Thing("square", "red"),
    Thing("square", "cyan"),
    Thing("triangle", "blue"),
    Thing("triangle", "white"),
    Thing("cross", "yellow"),
    Thing("cross", "green"),
    Thing("ring", "purple"),
    Thing("diamond", "red"),
)
SEEN = tuple(thing for thing in THINGS if thing not in HELD_OUT)
