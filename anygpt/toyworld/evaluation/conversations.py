"""Conversations of four exchanges, which measure whether later answers are as accurate as first ones.

Each turn's context has the model's own earlier answers, including media.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from anygpt.model.multimodal import MultimodalModel
from anygpt.processing.chat_template import answer_message
from anygpt.processing.processor import MultimodalProcessor
from anygpt.toyworld import language
from anygpt.toyworld.evaluation.answers import Judged, Settings, ask, judge
from anygpt.toyworld.evaluation.formatting import share
from anygpt.toyworld.evaluation.requests import TALK, Request, matrix_requests, shuffled, talk_request
from anygpt.toyworld.world import MOTIONS, Thing

TURNS = 4
_STREAM = 20_10
_LATER = ("anew", "anew", "it", "it", "first", "talk")


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
        rng = np.random.default_rng([seed, _STREAM, number])
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
                    prompt = language.later_request(target, it, rng, motion)
                    turns.append(Request(name, "text", target, prompt, thing, motion))
        conversations.append(turns)
    return conversations


def hold(
    model: MultimodalModel,
    processor: MultimodalProcessor,
    conversations: Sequence[Sequence[Request]],
    settings: Settings,
    progress: Callable[[int], object] = lambda count: None,
) -> list[list[Judged]]:
    """Hold all conversations and judge the answers, `[turn][conversation]`."""
    said: dict[str, list[dict[str, Any]]] = {turns[0].id[:-2]: [] for turns in conversations}
    judged = []
    for turn in range(TURNS):
        requests = [replace(turns[turn], before=tuple(said[turns[turn].id[:-2]])) for turns in conversations]
        found = {}
        for request, answer in ask(model, processor, requests, settings, progress):
            said[request.id[:-2]] = [*request.messages(), answer_message(answer)]
            found[request.id] = judge(request, answer)
        judged.append([found[turns[turn].id] for turns in conversations])
    return judged


def turn_table(judged: Sequence[Sequence[Judged]]) -> list[dict[str, Any]]:
    """For each turn, the shares of right answers, of missing media and of unrequested media."""
    kinds = ("right", "missing", "unasked")
    return [{kind: share(bool(getattr(one, kind)) for one in ones) for kind in kinds} for ones in judged]
