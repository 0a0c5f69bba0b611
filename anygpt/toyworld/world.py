"""The things of ToyWorld: 6 shapes × 8 colours, of which 10 combinations are held out of alignment."""

from dataclasses import dataclass
from itertools import product

SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")
MOTIONS = ("left", "right", "up", "down")
MODALITIES = ("image", "video", "audio")
"""The modalities with files; text is the fourth."""


@dataclass(frozen=True, order=True)
class Thing:
    """A shape (one of `SHAPES`) in a colour (one of `COLOURS`)."""

    shape: str
    colour: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


THINGS = tuple(Thing(shape, colour) for shape, colour in product(SHAPES, COLOURS))


def _things(**colours: str) -> tuple[Thing, ...]:
    return tuple(Thing(shape, colour) for shape, several in colours.items() for colour in several.split())


# Each shape and each colour is held out once or twice, so that every shape is seen in at least six colours and every
# colour on at least four shapes: only combinations are unseen.
HELD_OUT = _things(
    circle="green orange",
    square="red cyan",
    triangle="blue white",
    cross="yellow green",
    ring="purple",
    diamond="red",
)
SEEN = tuple(thing for thing in THINGS if thing not in HELD_OUT)
VALIDATION = _things(
    circle="cyan",
    square="yellow",
    triangle="red",
    cross="purple",
    ring="white green",
    diamond="orange blue",
)
"""A subset of the seen things, which is left out of training for choosing settings."""
