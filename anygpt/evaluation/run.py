"""A suite from its rows to its report: asked by all processes, scored by the first."""

from __future__ import annotations

import functools
import json
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm

from anygpt.errors import InputError
from anygpt.evaluation.asking import Asker
from anygpt.evaluation.report import write_report
from anygpt.evaluation.rows import read_rows
from anygpt.evaluation.store import AnswerStore, write
from anygpt.evaluation.suite import Suite

LIBRARIES = ("anygpt", "torch", "transformers", "diffusers", "peft", "torchmetrics", "pycocoevalcap")
SCORED = 32  # answers that are looked at together


def evaluate(
    suite: Suite,
    output: Path,
    accelerator: Accelerator,
    model: Any = None,
    processor: Any = None,
    answers: Path | None = None,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Ask what has not been asked yet, score everything, and write `metrics.json`, `report.html` and `samples/`.

    Every process calls it. The numbers do not depend on how many there are, on the batch size (beyond rounding) or on
    how often it was interrupted.

    Args:
        output: the folder; what is finished in it is not asked again.
        model, processor: what is asked, in eval mode on its device; None where there are `answers`.
        answers: a folder of finished answers, with an index as `AnswerStore` has it.
        facts: which model it is; answers of another are not mixed with its own.

    Returns:
        What `metrics.json` holds, in the first process; None in the others.

    Raises:
        InputError: metrics, rows, model and answers that do not fit, or other answers in `output`.
    """
    try:  # their libraries are an extra
        from anygpt.evaluation.metrics import Item, MetricSet, check_specs, load_network, modality_of
    except ImportError as error:
        raise InputError(f"{error.name} is not installed; pip install -e '.[evaluation]' brings it") from error
    began, main, facts = time.perf_counter(), accelerator.is_main_process, dict(facts or {})
    rows = read_rows(suite)
    made = set(suite.ask.require) or {kind for row in rows for kind in row.targets}
    only = min(made) if len(made) == 1 else None
    check_specs(suite.metrics, rows, only)
    kinds = [modality_of(spec, only) for spec in suite.metrics]
    looked_at = [kind for kind in dict.fromkeys(kinds) if kind != "text"]
    load = functools.cache(functools.partial(load_network, device=accelerator.device))
    if main:
        metrics = MetricSet(suite.metrics, only, load)  # what is missing is said before anything is asked
        about = metrics.describe()
    stores = {} if answers is None else {"model": AnswerStore(answers)}
    asker = Asker(model, processor, suite, looked_at) if answers is None else None
    for name, way in asker.ways(rows, "text" in kinds).items() if asker else ():
        folder = output / "samples" if name == "model" else output / "baselines" / name
        stores[name] = store = AnswerStore(folder, accelerator.process_index)
        if main:
            store.claim(asked_for(suite) | facts)
            store.merge()
        accelerator.wait_for_everyone()
        done = store.read()
        mine = [row for row in rows[accelerator.process_index :: accelerator.num_processes] if row.id not in done]
        for row, answer in tqdm(asker.answers(way, mine), name, len(mine), disable=not main, unit="row"):
            store.add(row.id, answer)
        accelerator.wait_for_everyone()
        if main:
            store.merge()
    if not main:
        return None
    lines = {name: store.resolved() for name, store in stores.items()}
    values: dict[str, dict[str, Any]] = {}
    for name, found in lines.items():
        words = {"model": (True, False), "without_media": (True,)}.get(name, (False,))  # whose metrics it has
        specs = [spec for spec, kind in zip(suite.metrics, kinds, strict=True) if (kind == "text") in words]
        metrics = MetricSet(specs, only, load) if values else metrics
        answered = [row for row in rows if row.id in found]
        for start in tqdm(range(0, len(answered), SCORED), f"scoring {name}", unit="batch"):
            batch = answered[start : start + SCORED]
            metrics.update([Item(row, found[row.id]["text"], first_media(found[row.id])) for row in batch])
        values[name] = metrics.compute(len(rows))
    said, names = [lines["model"].get(row.id) for row in rows], values["model"]
    report = {
        "suite": suite.name,
        "rows": len(rows),
        "metrics": {name: {way: found[name] for way, found in values.items() if name in found} for name in names},
        "about": about,
        "missing": {kind: sum(kind not in first_media(line) for line in said if line) for kind in looked_at},
        "unanswered": said.count(None),
        "seed": suite.ask.seed,
        "settings": asdict(suite),
        "seconds": round(time.perf_counter() - began, 1),
        "versions": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        **facts,
    }
    write_report(output / "report.html", report, rows[: suite.shown], lines)
    write(output / "metrics.json", (json.dumps(report, indent=1) + "\n").encode())
    return report


def first_media(line: Mapping[str, Any]) -> dict[str, Path]:
    """The first file of each media type in an answer."""
    return {file["type"]: file["path"] for file in reversed(line["files"])}


def asked_for(suite: Suite) -> dict[str, Any]:
    """What an answer depends on: neither the metrics, nor how many rows there are or go together."""
    ask = {name: value for name, value in asdict(suite.ask).items() if name not in ("batch_size", "num_workers")}
    return {"data": [asdict(source) for source in suite.data], "composition": suite.composition, "ask": ask}
