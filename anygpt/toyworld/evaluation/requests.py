"""Requests to the model: the 16 cells of the any-to-any matrix, talk without media, and conversations of four turns.

The four cells in a row of the matrix differ in the request alone, not in the media, which go through files.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from anygpt.media.types import MEDIA, read_media
from anygpt.toyworld import language
from anygpt.toyworld.datasets import write_render
from anygpt.toyworld.world import MODALITIES, MOTIONS, Thing

WAYS = ("text", *MODALITIES)
"""Input and output modalities, in the order of the matrix."""
TALK = ("question", "small talk", "nonsense")
TURNS = 4
"""Turns of a conversation, which measure whether later answers are as accurate as first ones."""
_STREAM, _CONVERSATIONS = 20_09, 20_10
"""Separate the evaluation's random draws from those of a dataset with the same seed."""
_LATER = ("anew", "anew", "it", "it", "first", "talk")


@dataclass(frozen=True)
class Request:
    """A request and its expected answer.

    Attributes:
        id: unique; names the files.
        source, target: one of `WAYS`.
        prompt: the user's words.
        thing: subject of the request; None for small talk and nonsense.
        motion: expected motion of a requested clip, or of an input clip that the answer describes.
        path: file of the input medium, relative to the folder of the samples; None for text.
        medium: the input medium, decoded.
        reference: acceptable answers in words.
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
        """The conversation as input of `MultimodalProcessor.apply_chat_template`."""
        content = [{"type": "text", "text": self.prompt}]
        if self.path is not None:
            content.insert(0, {"type": self.source, self.source: self.medium})
        return [*self.before, {"role": "user", "content": content}]


def matrix_requests(
    folder: Path, sources: Sequence[str], targets: Sequence[str], things: Sequence[Thing], samples: int, seed: int
) -> list[Request]:
    """Make `samples` requests per pair of `sources` and `targets`, things in turn; writes media to `folder`/inputs.

    The request depends on (seed, source, target, number) only, the input medium on (seed, source, number).
    """
    requests, things = [], shuffled(things, seed)
    for source in sources:
        for number in range(samples):
            thing = things[number % len(things)]
            shown, path, medium = _show(folder, source, thing, number, seed)
            for target in targets:
                rng = np.random.default_rng([seed, _STREAM, WAYS.index(source), 1 + WAYS.index(target), number])
                name = f"{source}-{target}-{number:04d}"
                if source == target == "text":
                    requests.append(talk_request(name, "question", thing, rng))
                    continue
                motion = language.pick(rng, MOTIONS) if target == "video" else None
                if target == "text":
                    prompt, motion = language.describe_question(source, rng), shown
                else:
                    prompt = language.request(target, rng, motion, thing if source == "text" else None)
                requests.append(Request(name, source, target, prompt, thing, motion, path, medium))
    return requests


def talk_requests(things: Sequence[Thing], samples: int, seed: int) -> list[Request]:
    """Make `samples` requests of each kind of `TALK`; ids begin with the kind."""
    requests, things = [], shuffled(things, seed)
    for index, kind in enumerate(TALK):
        for number in range(samples):
            rng = np.random.default_rng([seed, _STREAM, 9, index, number])
            requests.append(talk_request(f"{kind}-{number:04d}", kind, things[number % len(things)], rng))
    return requests


def talk_request(name: str, kind: str, thing: Thing | None, rng: np.random.Generator) -> Request:
    """A request of a kind of `TALK`; only a question is about the thing."""
    if kind == "question":
        assert thing is not None
        prompt, answer = language.text_qa(thing, rng)
        return Request(name, "text", "text", prompt, thing, reference=(answer,))
    prompt, answer = language.small_talk(rng) if kind == "small talk" else language.refusal(rng)
    return Request(name, "text", "text", prompt, reference=(answer,) if kind == "small talk" else language.REFUSALS)


def conversation_requests(
    folder: Path, sources: Sequence[str], targets: Sequence[str], things: Sequence[Thing], count: int, seed: int
) -> list[list[Request]]:
    """Make `count` conversations of `TURNS` requests; input media are written to `folder`/conversations.

    First turns go through the cells of the matrix. Later turns are a cell with another thing, refer to an earlier
    thing ("it", "the first one"), or are small talk.
    """
    things = shuffled(things, seed)
    cells = [(source, target) for source in sources for target in targets]
    conversations = []
    for number in range(count):
        rng = np.random.default_rng([seed, _CONVERSATIONS, number])
        told: list[Thing] = []
        turns = []
        for turn in range(TURNS):
            way = language.pick(rng, _LATER) if turn else "anew"
            name = f"conversation-{number:04d}-{turn + 1}"
            if way == "anew":
                source, target = language.pick(rng, cells) if turn else cells[number % len(cells)]
                thing = language.pick(rng, things)
                draw = int(rng.integers(2**31))
                [request] = matrix_requests(folder / "conversations" / name, [source], [target], [thing], 1, draw)
                path = f"conversations/{name}/{request.path}" if request.path else None
                turns.append(replace(request, id=name, path=path))
                told.append(thing)
            elif way == "talk":
                kind = language.pick(rng, TALK[1:])
                turns.append(talk_request(name, kind, None, rng))
            else:
                it, thing = (language.LATEST, told[-1]) if way == "it" else (language.FIRST, told[0])
                told.append(thing)
                target = language.pick(rng, targets)
                if target == "text":
                    prompt, answer = language.later_question(it, thing, rng)
                    turns.append(Request(name, "text", "text", prompt, thing, reference=(answer,)))
                else:
                    motion = language.pick(rng, MOTIONS) if target == "video" else None
                    prompt = language.request(target, rng, motion, it=it)
                    turns.append(Request(name, "text", target, prompt, thing, motion))
        conversations.append(turns)
    return conversations


def shuffled(things: Sequence[Thing], seed: int) -> list[Thing]:
    """Shuffle things by the seed, so that few samples cover several shapes."""
    return [things[i] for i in np.random.default_rng([seed, _STREAM]).permutation(len(things))]


def _show(folder: Path, source: str, thing: Thing, number: int, seed: int) -> tuple[str | None, str | None, Any]:
    """Render a medium to a file and read it back: (motion of a clip, path, medium), all None for text."""
    if source == "text":
        return None, None, None
    rng = np.random.default_rng([seed, _STREAM, WAYS.index(source), 0, number])
    motion = language.pick(rng, MOTIONS) if source == "video" else None
    path = f"inputs/{source}-{number:04d}{MEDIA[source].suffixes[0]}"
    write_render(folder / path, thing, source, motion, rng)
    return motion, path, read_media(source, folder / path)
