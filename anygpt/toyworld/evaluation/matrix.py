"""The any-to-any matrix: the share of right answers for each input and output modality."""

import json
import platform
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from anygpt.errors import InputError
from anygpt.media.types import MEDIA, media_type
from anygpt.model.multimodal import MultimodalModel
from anygpt.processing.processor import MultimodalProcessor
from anygpt.settings import find_misfits
from anygpt.toyworld.evaluation.answers import Examiner, Judged, Settings, by_cell, judge, share
from anygpt.toyworld.evaluation.requests import TALK, TURNS, WAYS, conversation_requests, matrix_requests, talk_requests
from anygpt.toyworld.world import HELD_OUT, SEEN, VALIDATION
from anygpt.version import __version__

THINGS = {"held_out": HELD_OUT, "seen": SEEN, "validation": VALIDATION}


def evaluate(
    model: MultimodalModel, processor: MultimodalProcessor, folder: Path, settings: Settings
) -> tuple[dict[str, Any], list[Judged]]:
    """Measure every cell of the matrix that the model has encoders and decoders for; returns the content of
    `matrix.json`, and every answer. Input and generated media, and `index.jsonl`, are written to `folder`."""
    began = time.perf_counter()
    settings, things = settings.resolved(model), THINGS[settings.things]
    sources = [way for way in WAYS if way == "text" or way in {e.modality for e in model.readers.values()}]
    targets = [way for way in WAYS if way == "text" or way in {d.modality for d in model.makers.values()}]
    requests = matrix_requests(folder, sources, targets, things, settings.samples, settings.seed)
    talk = talk_requests(things, settings.talk_samples, settings.seed)
    scripts = conversation_requests(folder, sources, targets, things, settings.conversations, settings.seed)
    makes = (len(targets) - 1) * settings.samples
    total = len(requests) + len(talk) + TURNS * len(scripts) + (makes * (1 + len(sources)) if settings.baselines else 0)
    beside: dict[str, Any] = {"upper_bound": {}, "caption_baseline": {}}
    with tqdm(total=total, desc="evaluation", unit="sample", dynamic_ncols=True, mininterval=1) as bar:
        examiner = Examiner(model, processor, settings, bar.update)
        judged = [judge(*pair) for pair in examiner.ask(requests)]
        talked = [judge(*pair) for pair in examiner.ask(talk)]
        turns = examiner.hold(scripts)
        if settings.baselines:
            beside["upper_bound"] = examiner.upper_bound(things)
            beside["caption_baseline"] = examiner.caption_baseline(judged)
    write_samples(folder, judged)
    cells = cell_table(judged)
    right = {i: {o: cell["right"] for o, cell in row.items()} for i, row in cells.items()}
    matrix = rates(right)
    all_rates = [rate for row in matrix.values() for rate in row.values()]
    report = {
        "matrix": matrix,
        "upper_bound": {o: found["rate"] for o, found in beside["upper_bound"].items()},
        "caption_baseline": rates(beside["caption_baseline"]),
        "samples": settings.samples,
        "mean": float(np.mean(all_rates)),
        "min": min(all_rates),
        "intervals": {i: {o: found["interval"] for o, found in row.items()} for i, row in right.items()},
        "unasked": share(bool(one.unasked) for one in judged),
        "missing": share(one.missing for one in judged),
        "motion": motion_table(judged),
        "text_only": talk_table(talked),
        "turns": turn_table(turns),
        "cells": cells,
        "baselines": beside,
        "suite": "toyworld",
        "things": [str(thing) for thing in things],
        "settings": asdict(settings),
        "seconds": round(time.perf_counter() - began, 1),
        "versions": {"anygpt": __version__, "python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "diffusers", "peft")},
    }
    return report, judged


def rates(table: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """The rates of a table of shares by input and output."""
    return {source: {target: found["rate"] for target, found in row.items()} for source, row in table.items()}


def cell_table(judged: Sequence[Judged]) -> dict[str, dict[str, dict[str, Any]]]:
    """`{input: {output: {"right", "shape", "colour", "missing", "unasked"}}}`, each a share with its interval."""
    table: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for source, target, ones in ((i, o, ones) for i, row in by_cell(judged).items() for o, ones in row.items()):
        found = {"right": share(one.right for one in ones)}
        if (source, target) != ("text", "text"):  # whose questions are about only one of the two
            found["shape"] = share(one.shape_right for one in ones)
            found["colour"] = share(one.colour_right for one in ones)
        found["missing"] = share(one.missing for one in ones)
        found["unasked"] = share(bool(one.unasked) for one in ones)
        table[source][target] = found
    return dict(table)


def motion_table(judged: Sequence[Judged]) -> dict[str, dict[str, dict[str, Any]]]:
    """`{input: {output: share}}` of clips with the requested motion, and of texts that name an input clip's motion."""
    moving = by_cell(one for one in judged if one.request.motion)
    return {
        source: {target: share(one.motion == one.request.motion for one in ones) for target, ones in row.items()}
        for source, row in moving.items()
    }


def talk_table(talked: Sequence[Judged]) -> dict[str, Any]:
    """Shares of right text-to-text answers by kind, and the share of answers with unrequested media."""
    kinds = {kind: [one for one in talked if one.request.id.startswith(kind)] for kind in TALK}
    table: dict[str, Any] = {kind.replace(" ", "_"): share(one.right for one in ones) for kind, ones in kinds.items()}
    return table | {"unasked": share(bool(one.unasked) for one in talked)}


def turn_table(judged: Sequence[Sequence[Judged]]) -> list[dict[str, Any]]:
    """For each turn, the shares of right answers, of missing media and of unrequested media."""
    kinds = ("right", "missing", "unasked")
    return [{kind: share(bool(getattr(one, kind)) for one in ones) for kind in kinds} for ones in judged]


def write_samples(folder: Path, judged: Sequence[Judged]) -> None:
    """Write the generated media, and `index.jsonl`: one line per sample, paths relative to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "index.jsonl").open("w", encoding="utf-8") as index:
        for one in judged:
            request = one.request
            line = {"id": request.id, "input": request.source, "output": request.target, "thing": str(request.thing)}
            line |= {"prompt": request.prompt, "input_path": request.path, "motion": request.motion, "text": one.text}
            line |= {"right": one.right, "missing": one.missing, "unasked": one.unasked, "judged_motion": one.motion}
            line["judged"] = one.verdict and dict(zip(("shape", "colour"), one.verdict, strict=True))
            if one.medium is not None:
                line["path"] = sample_path(one)
                medium = np.nan_to_num(one.medium) if request.target == "audio" else one.medium
                media_type(request.target).write(folder / line["path"], medium, one.rate)
            index.write(json.dumps(line) + "\n")


def sample_path(one: Judged) -> str:
    return one.request.id + MEDIA[one.request.target].suffixes[0]


def check_settings(settings: Settings) -> None:
    """Raise an `InputError` that names each option with a value out of range."""
    faults = (fault.partition(" ") for fault in find_misfits(settings))  # of `steps.image`, which --steps sets for all
    if named := dict.fromkeys(f"--{name.partition('.')[0].replace('_', '-')} {fault}" for name, _, fault in faults):
        raise InputError("; ".join(named))
