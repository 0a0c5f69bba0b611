"""Edits of ToyWorld's pictures: "make it blue", "make it a square", "move it to the left".

    python -m anygpt.toyworld.edits --output runs/edits

writes the rows that train an editing decoder (stage 0) and the links (stages 1 to 3), and those that are judged, whose
results are held-out things; and the decoder that training starts from, the zoo's with further input channels.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from anygpt.decoders.base import load_decoder
from anygpt.decoders.instruct_pix2pix import InstructPix2PixDecoder
from anygpt.errors import InputError, exit_code
from anygpt.media.writing import replacing, write_image
from anygpt.toyworld import language
from anygpt.toyworld.judges import load_judges
from anygpt.toyworld.render import FORMS, RGB, SIZE, background_of, draw
from anygpt.toyworld.world import COLOURS, HELD_OUT, MOTIONS, SEEN, SHAPES, THINGS, Thing

KINDS = ("colour", "shape", "place")
FILES = {"pictures": THINGS, "train": SEEN, "eval": HELD_OUT}
"""Files of rows, and the things that may be the result of an edit."""
_LEAST_WAY = 4.0
"""Least distance, in pixels, of an edit that moves a thing."""
_WORDS = {
    "colour": ("Make it {0}.", "Paint it {0}.", "The same, but {0}."),
    "shape": ("Make it {0}.", "Turn it into {0}.", "The same, but as {0}."),
    "place": ("Move it {0}.", "Shift it {0}.", "The same, but more {0}."),
}


@dataclass(frozen=True)
class Scene:
    """A picture of one thing: its centre and radius in pixels, its brightness and its background."""

    thing: Thing
    x: float
    y: float
    radius: float
    shade: float
    background: tuple[int, ...]

    @classmethod
    def drawn(cls, thing: Thing, rng: np.random.Generator) -> Scene:
        """A scene that leaves room to move the thing; `rng` is advanced."""
        radius = SIZE * rng.uniform(0.20, 0.28)
        x, y = SIZE / 2 + rng.uniform(-1, 1, size=2) * room(radius)
        background = background_of(rng)
        return cls(thing, x, y, radius, rng.uniform(0.8, 1.0), background)

    def picture(self) -> Image.Image:
        """An RGB image of 32 × 32 pixels."""
        colour = tuple(int(c) for c in (np.array(RGB[self.thing.colour]) * self.shade).round())
        return draw(SIZE, self.background, [(self.thing.shape, np.array([self.x, self.y]), self.radius, colour)])

    def moved(self, motion: str) -> Scene:
        """The scene with the thing at the border of the picture."""
        end = SIZE / 2 + room(self.radius) * (-1 if motion in ("left", "up") else 1)
        return replace(self, **{"x" if motion in ("left", "right") else "y": end})

    def edits(self, kind: str, things: Sequence[Thing]) -> list[tuple[str, str | None, Scene]]:
        """The possible edits of a kind with a result among `things`: the word asked for, a motion, and the result."""
        if kind == "place":
            ends = [(f"to the {m}" if m in ("left", "right") else m, m, self.moved(m)) for m in MOTIONS]
            far = [end for end in ends if abs(end[2].x - self.x) + abs(end[2].y - self.y) >= _LEAST_WAY]
            return far if self.thing in things else []
        found = []
        for value in COLOURS if kind == "colour" else SHAPES:
            thing = replace(self.thing, **{kind: value})
            if thing != self.thing and thing in things:
                found.append((value if kind == "colour" else language.article(value), None, replace(self, thing=thing)))
        return found


def room(radius: float) -> float:
    """Largest distance of a centre from the middle that leaves a border of one pixel."""
    return SIZE / 2 - radius - 1


def row_of(folder: Path, name: str, index: int, rng: np.random.Generator) -> dict[str, Any]:
    """A conversation: a picture is shown or asked for, then edited once (to judge) or up to three times."""
    things = FILES[name]
    judged, shown = name == "eval", name == "eval" or (name == "train" and index % 2)
    kind = KINDS[index % 3]
    while True:
        scene = Scene.drawn(language.pick(rng, THINGS if judged else things), rng)
        if scene.edits(kind, things):
            break

    def picture(scene: Scene, turn: int) -> dict[str, str]:
        path = f"{name}/{index}-{turn}.png"
        write_image(folder / path, scene.picture())
        return {"type": "image", "path": path}

    def exchange(asked: Any, scene: Scene, turn: int, motion: str | None = None) -> list[dict[str, Any]]:
        said = {"type": "text", "text": language.media_reply("image", scene.thing, rng, motion)}
        made = picture(scene, turn) | {"caption": language.plain_caption(scene.thing, motion)}
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": [said, made]}]

    before = [picture(scene, 0)] if shown else []
    messages = [] if shown else exchange(language.request("image", rng, thing=scene.thing), scene, 0)
    for turn in range(1, 2 if judged else 4):
        word, motion, scene = language.pick(rng, scene.edits(kind, things))
        wish = {"type": "text", "text": language.pick(rng, _WORDS[kind]).format(word)}
        messages += exchange([*before, wish], scene, turn, motion)
        before = []
        kind = language.pick(rng, [kind for kind in KINDS if scene.edits(kind, things)])
    return {"id": f"{name}-{index}", "messages": messages}


@dataclass(frozen=True)
class Seen:
    """Measurements of a picture: its thing by the judge, centre and radius in pixels, background levels (0 to 255)."""

    thing: Thing
    centre: np.ndarray
    radius: float
    background: np.ndarray


def look(pictures: Sequence[Image.Image]) -> list[Seen]:
    """Measure pictures of one thing each.

    The thing's pixels differ from the border's median by more than half of what the most different ones do; radius and
    centre are those at which its shape would fill their bounding box.
    """
    seen = []
    for picture, (shape, colour) in zip(pictures, load_judges().image(pictures), strict=True):
        pixels = np.asarray(picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX), dtype=float)
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        background = np.median(border, axis=0)
        difference = np.abs(pixels - background).max(axis=2)
        rows, columns = np.nonzero(difference > difference.max() / 2)
        low, high = np.array([columns.min(), rows.min()]), np.array([columns.max(), rows.max()]) + 1
        corners = np.concatenate([np.array(places).reshape(-1, 2) for _, places in FORMS[shape]])
        extent, middle = np.ptp(corners, axis=0), (corners.min(axis=0) + corners.max(axis=0)) / 2
        radius = float(np.mean((high - low) / extent))
        seen.append(Seen(Thing(shape, colour), (low + high) / 2 - middle * radius, radius, background))
    return seen


def judge(source: Seen, target: Seen, made: Seen) -> tuple[bool, bool]:
    """Whether a picture changed what was asked, by what differs between `source` and `target`; and kept the rest.

    The rest is the background (within 12 of 255 levels), the radius (within 1.5 pixels), the position (within 2
    pixels on each axis; of a thing to move, across the motion) and each property that was not asked for. A thing was
    moved if it is within 2 pixels of where it should be along the motion.
    """
    off = np.abs(made.centre - target.centre) <= 2
    kept = [np.abs(made.background - target.background).max() <= 12, abs(made.radius - target.radius) <= 1.5]
    right = {name: getattr(made.thing, name) == getattr(target.thing, name) for name in ("shape", "colour")}
    changed = [name for name in right if getattr(source.thing, name) != getattr(target.thing, name)]
    along = np.abs(target.centre - source.centre).argmax()
    asked = [right.pop(name) for name in changed] or [off[along]]
    kept += [*right.values(), *(off if changed else off[[1 - along]])]
    return bool(all(asked)), bool(all(kept))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m anygpt.toyworld.edits", description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="folder to write to, for example runs/edits")
    for name, count in {"pictures": 4000, "train": 2400, "eval": 300}.items():
        parser.add_argument(f"--{name}", type=int, default=count, help=f"rows of {name}.jsonl (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything drawn (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.output.exists():
        raise InputError(f"--output {options.output} exists; give a new folder, or remove it")
    with replacing(options.output) as temporary:
        for number, name in enumerate(FILES):
            (temporary / name).mkdir(parents=True)
            with (temporary / f"{name}.jsonl").open("w", encoding="utf-8") as file:
                for index in tqdm(range(getattr(options, name)), desc=name, unit="row"):
                    rng = np.random.default_rng([options.seed, 100 + number, index])
                    file.write(json.dumps(row_of(temporary, name, index, rng)) + "\n")
        InstructPix2PixDecoder.widened(load_decoder("zoo:image_decoder").pipeline).save_pretrained(temporary / "start")


if __name__ == "__main__":
    sys.exit(exit_code(main))
