"""The any-to-any matrix: the share of right answers for each input and output modality."""

from __future__ import annotations

import json
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from anygpt.errors import InputError
from anygpt.evaluation.statistics import share
from anygpt.media.writing import write_audio, write_image, write_video
from anygpt.model.multimodal import MultimodalModel
from anygpt.processing.processor import MultimodalProcessor
from anygpt.toyworld.datasets import SUFFIX
from anygpt.toyworld.evaluation.answers import Judged, Settings, ask, judge
from anygpt.toyworld.evaluation.baselines import caption_baseline, upper_bound
from anygpt.toyworld.evaluation.conversations import TURNS, conversation_requests, hold, turn_table
from anygpt.toyworld.evaluation.requests import TALK, WAYS, matrix_requests, talk_requests
from anygpt.toyworld.judges import load_judges
from anygpt.toyworld.world import HELD_OUT, SEEN, Thing
from anygpt.version import __version__

VALIDATION = tuple(
    Thing(shape, colour)
    for shape, colour in (
        ("circle", "cyan"),
        ("square", "yellow"),
        ("triangle", "red"),
        ("cross", "purple"),
        ("ring", "white"),
        ("ring", "green"),
        ("diamond", "orange"),
        ("diamond", "blue"),
    )
)
"""A subset of the seen things, which is left out of training for choosing settings."""
THINGS = {"held_out": HELD_OUT, "seen": SEEN, "validation": VALIDATION}


def evaluate(
    model: MultimodalModel, processor: MultimodalProcessor, folder: Path, settings: Settings
) -> tuple[dict[str, Any], list[Judged]]:
    """Measure every cell of the matrix that the model has encoders and decoders for.

    Input and generated media, and `index.jsonl`, are written to `folder`.

    Returns:
        The content of `matrix.json`, and every answer of the matrix.
    """
    began = time.perf_counter()
    settings = settings.resolved(model)
    things, judges = THINGS[settings.things], load_judges()
    sources = [way for way in WAYS if way == "text" or way in {e.modality for e in model.encoders.values()}]
    targets = [way for way in WAYS if way == "text" or way in {d.modality for d in model.decoders.values()}]
    rates = {decoder.modality: decoder.module.rate for decoder in model.decoders.values()}
    hertz = rates.get("audio", 0)
    requests = matrix_requests(folder, sources, targets, things, settings.samples, settings.seed)
    talk = talk_requests(things, settings.talk_samples, settings.seed)
    scripts = conversation_requests(folder, sources, targets, things, settings.conversations, settings.seed)
    makes = (len(targets) - 1) * settings.samples
    total = len(requests) + len(talk) + TURNS * len(scripts) + (makes * (1 + len(sources)) if settings.baselines else 0)
    with tqdm(total=total, desc="evaluation", unit="sample", dynamic_ncols=True, mininterval=1) as bar:
        judged = [judge(*pair, judges, hertz) for pair in ask(model, processor, requests, settings, bar.update)]
        talked = [judge(*pair, judges, hertz) for pair in ask(model, processor, talk, settings, bar.update)]
        turns = hold(model, processor, scripts, settings, judges, hertz, bar.update)
        beside: dict[str, Any] = {"upper_bound": {}, "caption_baseline": {}}
        if settings.baselines:
            beside["upper_bound"] = upper_bound(model, things, settings, judges, hertz, bar.update)
            beside["caption_baseline"] = caption_baseline(model, judged, settings, judges, hertz, bar.update)
    write_samples(folder, judged, rates)
    cells = cell_table(judged)
    rate = [cell["right"]["rate"] for row in cells.values() for cell in row.values()]
    report = {
        "matrix": {i: {o: cell["right"]["rate"] for o, cell in row.items()} for i, row in cells.items()},
        "upper_bound": {o: found["rate"] for o, found in beside["upper_bound"].items()},
        "caption_baseline": {
            i: {o: found["rate"] for o, found in row.items()} for i, row in beside["caption_baseline"].items()
        },
        "samples": settings.samples,
        "mean": float(np.mean(rate)),
        "min": min(rate),
        "intervals": {i: {o: cell["right"]["interval"] for o, cell in row.items()} for i, row in cells.items()},
        "unasked": share(bool(one.unasked) for one in judged),
        "missing": share(one.missing for one in judged),
        "motion": motion_table(judged),
        "text_only": talk_table(talked),
        "turns": turn_table(turns),
        "shapes": by_property(judged, "shape"),
        "colours": by_property(judged, "colour"),
        "cells": cells,
        "baselines": beside,
        "suite": "toyworld",
        "things": [str(thing) for thing in things],
        "settings": asdict(settings),
        "seconds": round(time.perf_counter() - began, 1),
        "versions": {"anygpt": __version__}
        | {name: version(name) for name in ("torch", "transformers", "diffusers", "peft")}
        | {"python": platform.python_version()},
    }
    return report, judged


def cell_table(judged: Sequence[Judged]) -> dict[str, dict[str, dict[str, Any]]]:
    """`{input: {output: {"right", "shape", "colour", "missing", "unasked"}}}`, each a share with its interval."""
    cells: dict[tuple[str, str], list[Judged]] = defaultdict(list)
    for one in judged:
        cells[one.request.source, one.request.target].append(one)
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for source, target in sorted(cells, key=lambda cell: tuple(map(WAYS.index, cell))):
        ones = cells[source, target]
        found = {"right": share(one.right for one in ones)}
        if (source, target) != ("text", "text"):  # whose questions are about only one of the two
            found["shape"] = share(one.shape_right for one in ones)
            found["colour"] = share(one.colour_right for one in ones)
        found["missing"] = share(one.missing for one in ones)
        found["unasked"] = share(bool(one.unasked) for one in ones)
        table.setdefault(source, {})[target] = found
    return table


def motion_table(judged: Sequence[Judged]) -> dict[str, dict[str, dict[str, Any]]]:
    """`{input: {output: share}}` of clips with the requested motion, and of texts that name an input clip's motion."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for source, target in dict.fromkeys((one.request.source, one.request.target) for one in judged):
        moving = [o for o in judged if (o.request.source, o.request.target) == (source, target) and o.request.motion]
        if moving:
            table.setdefault(source, {})[target] = share(one.motion_right for one in moving)
    return table


def talk_table(talked: Sequence[Judged]) -> dict[str, Any]:
    """Shares of right text-to-text answers by kind, and the share of answers with unrequested media."""
    kinds = {kind: [one for one in talked if one.request.id.startswith(kind)] for kind in TALK}
    table: dict[str, Any] = {kind.replace(" ", "_"): share(one.right for one in ones) for kind, ones in kinds.items()}
    return table | {"unasked": share(bool(one.unasked) for one in talked)}


def by_property(judged: Sequence[Judged], name: str) -> dict[str, float]:
    """The share of right answers for each shape or each colour (`name`), over all cells."""
    found: dict[str, list[bool]] = defaultdict(list)
    for one in judged:
        found[getattr(one.request.thing, name)].append(one.right)
    return {value: float(np.mean(outcomes)) for value, outcomes in found.items()}


def write_samples(folder: Path, judged: Sequence[Judged], rates: dict[str, float | None]) -> None:
    """Write the generated media, and `index.jsonl`: one line per sample, paths relative to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    writers: dict[str, Callable[[Path, Any], None]] = {
        "image": write_image,
        "video": lambda path, clip: write_video(path, clip, rates["video"]),
        "audio": lambda path, sound: write_audio(path, np.nan_to_num(sound), rates["audio"]),
    }
    with (folder / "index.jsonl").open("w", encoding="utf-8") as index:
        for one in judged:
            line = sample_line(one)
            if one.medium is not None:
                line["path"] = sample_path(one)
                writers[one.request.target](folder / line["path"], one.medium)
            index.write(json.dumps(line) + "\n")


def sample_path(one: Judged) -> str:
    return f"{one.request.id}.{SUFFIX[one.request.target]}"


def sample_line(one: Judged) -> dict[str, Any]:
    """A sample's line of `index.jsonl`, without the path of its medium."""
    request = one.request
    return {
        "id": request.id,
        "input": request.source,
        "output": request.target,
        "thing": str(request.thing),
        "shape": request.thing.shape,
        "colour": request.thing.colour,
        "prompt": request.prompt,
        "input_path": request.path,
        "text": one.text,
        "judged": None if one.verdict is None else dict(zip(("shape", "colour"), one.verdict, strict=True)),
        "right": one.right,
        "motion": request.motion,
        "judged_motion": one.motion,
        "missing": one.missing,
        "unasked": list(one.unasked),
    }


def check_settings(settings: Settings) -> None:
    """Check the settings before anything is loaded.

    Raises:
        InputError: a number is out of range, or `things` is unknown.
    """
    rules = [
        ("--samples", settings.samples, settings.samples >= 1, "at least 1"),
        ("--talk-samples", settings.talk_samples, settings.talk_samples >= 1, "at least 1"),
        ("--conversations", settings.conversations, settings.conversations >= 1, "at least 1"),
        ("--batch-size", settings.batch_size, settings.batch_size >= 1, "at least 1"),
        ("--seed", settings.seed, settings.seed >= 0, "at least 0"),
        ("--max-new-tokens", settings.max_new_tokens, settings.max_new_tokens >= 1, "at least 1"),
        ("--things", settings.things, settings.things in THINGS, f"one of {', '.join(THINGS)}"),
        *((f"--steps {way}", steps, steps >= 1, "at least 1") for way, steps in settings.steps.items()),
        *((f"--guidance {way}", g, np.isfinite(g), "a finite number") for way, g in settings.guidance.items()),
    ]
    faults = [f"{name} is {value!r}, expected {expected}" for name, value, good, expected in rules if not good]
    if faults:
        raise InputError("; ".join(faults))
