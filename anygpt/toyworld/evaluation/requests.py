"""What the model is asked: the 16 cells of the any-to-any matrix, and talk that needs no media.

The same medium is shown in all four cells of a row of the matrix, so that these differ in what is asked alone. Media
go through real files, as in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anygpt.media.files import Audio, Video
from anygpt.media.types import read_media
from anygpt.toyworld import language
from anygpt.toyworld.datasets import SUFFIX, write_render
from anygpt.toyworld.world import MODALITIES, MOTIONS, Thing

WAYS = ("text", *MODALITIES)
"""In and out, in the order of the matrix."""
TALK = ("question", "small talk", "nonsense")
_STREAM = 20_09
"""Sets the draws of the evaluation apart from those of any dataset of the same seed."""


@dataclass(frozen=True)
class Request:
    """One question or wish, and what would be right.

    Attributes:
        id: unique; names the files.
        source, target: one of `WAYS`.
        prompt: the user's words.
        thing: what it is about; None for small talk and nonsense.
        motion: which way a clip that is asked for should move; of a clip that is given, where it is asked about.
        path: of the medium given, relative to the folder of the samples; None for text.
        medium: the same, decoded.
        reference: answers in words that are right, or of which one is.
        before: the messages of earlier turns.
    """

    id: str
    source: str
    target: str
    prompt: str
    thing: Thing | None = None
    motion: str | None = None
    path: str | None = None
    medium: Any = None
    reference: tuple[str, ...] = ()
    before: tuple[dict[str, Any], ...] = ()

    def messages(self) -> list[dict[str, Any]]:
        """The conversation, as `MultimodalProcessor.apply_chat_template` takes it."""
        content = [{"type": "text", "text": self.prompt}]
        if self.path is not None:
            content.insert(0, {"type": self.source, self.source: self.medium})
        return [*self.before, {"role": "user", "content": content}]


def matrix_requests(
    folder: Path, sources: Sequence[str], targets: Sequence[str], things: Sequence[Thing], samples: int, seed: int
) -> list[Request]:
    """`samples` requests for each pair of `sources` and `targets`, things in turn; input media go to `folder`/inputs.

    What is asked depends on (seed, source, target, number) only, and what is shown on (seed, source, number).
    """
    requests, things = [], shuffled(things, seed)
    for source in sources:
        for number in range(samples):
            thing = things[number % len(things)]
            shown, path, medium = _show(folder, source, thing, number, seed)
            for target in targets:
                rng = np.random.default_rng([seed, _STREAM, WAYS.index(source), 1 + WAYS.index(target), number])
                name = f"{source}-{target}-{number:04d}"
                motion = language.pick(rng, MOTIONS) if target == "video" else None
                reference: tuple[str, ...] = ()
                if source == "text" and target == "text":
                    prompt, answer = language.text_qa(thing, rng)
                    reference = (answer,)
                elif target == "text":
                    prompt, motion = language.describe_question(source, rng), shown
                elif source == "text":
                    prompt = language.media_request(target, thing, rng, motion)
                else:
                    prompt = language.convert_request(target, rng, motion)
                requests.append(Request(name, source, target, prompt, thing, motion, path, medium, reference))
    return requests


def talk_requests(things: Sequence[Thing], samples: int, seed: int) -> list[Request]:
    """`samples` of each kind of `TALK`; the kind stands at the beginning of the id."""
    requests, things = [], shuffled(things, seed)
    for kind in TALK:
        for number in range(samples):
            rng = np.random.default_rng([seed, _STREAM, 9, TALK.index(kind), number])
            thing = things[number % len(things)] if kind == "question" else None
            if kind == "question":
                prompt, answer = language.text_qa(thing, rng)
                reference: tuple[str, ...] = (answer,)
            elif kind == "small talk":
                prompt, answer = language.small_talk(rng)
                reference = (answer,)
            else:
                prompt, _ = language.refusal(rng)
                reference = language.REFUSALS
            requests.append(Request(f"{kind}-{number:04d}", "text", "text", prompt, thing, reference=reference))
    return requests


def shuffled(things: Sequence[Thing], seed: int) -> list[Thing]:
    """In an order of their own for each seed, so that a few samples are not all about one shape."""
    return [things[i] for i in np.random.default_rng([seed, _STREAM]).permutation(len(things))]


def _show(folder: Path, source: str, thing: Thing, number: int, seed: int) -> tuple[str | None, str | None, Any]:
    """Renders a medium to a file and reads it back: motion (of a clip), path, medium; all None for text."""
    if source == "text":
        return None, None, None
    rng = np.random.default_rng([seed, _STREAM, WAYS.index(source), 0, number])
    motion = language.pick(rng, MOTIONS) if source == "video" else None
    path = f"inputs/{source}-{number:04d}.{SUFFIX[source]}"
    write_render(folder / path, thing, source, motion, rng)
    return motion, path, plain(read_media(source, folder / path))


def plain(medium: Any) -> Any:
    """A decoded medium as the processors take it: a PIL image, frames, or (waveform, rate)."""
    if isinstance(medium, Video):
        return medium.frames
    return (medium.waveform, medium.sampling_rate) if isinstance(medium, Audio) else medium
