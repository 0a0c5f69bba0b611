"""A suite from its rows to its report: asked by all processes, scored by the first."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm

from anygpt.errors import InputError
from anygpt.evaluation.asking import Asker
from anygpt.evaluation.metrics import MetricSet, check_specs, modality_of
from anygpt.evaluation.metrics.base import Item
from anygpt.evaluation.report import write_report
from anygpt.evaluation.rows import Row, read_rows
from anygpt.evaluation.store import AnswerStore, read_answers, write
from anygpt.evaluation.suite import Suite

LIBRARIES = ("anygpt", "torch", "transformers", "diffusers", "peft", "torchmetrics", "pycocoevalcap")
SCORED = 32
"""Answers that are looked at together."""
Lines = Mapping[str, Mapping[str, Any]]


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
        suite: what to ask and to measure.
        output: the folder; what is finished in it is not asked again.
        accelerator: the processes.
        model, processor: what is asked, in eval mode on its device; None where there are `answers`.
        answers: a folder of finished answers.
        facts: which model it is; answers of another are not mixed with its own.

    Returns:
        What `metrics.json` holds, in the first process; None in the others.

    Raises:
        InputError: metrics, rows, model and answers that do not fit, or other answers in `output`.
    """
    began = time.perf_counter()
    rows = read_rows(suite)
    only = _only_medium(suite, rows)
    check_specs(suite.metrics, rows, only)
    kinds = [modality_of(spec, only) for spec in suite.metrics]
    looked_at = list(dict.fromkeys(kind for kind in kinds if kind != "text"))
    loaded: dict[tuple, Any] = {}
    main = accelerator.is_main_process
    if main:
        MetricSet(suite.metrics, loaded, accelerator.device, only)  # what is missing is said before anything is asked
    if answers is not None:
        lines = {"model": read_answers(answers, rows)}
    else:
        asker = Asker(model, processor, suite, looked_at)
        ways = asker.ways(rows, "text" in kinds)
        known = {"suite": _how(suite), **(facts or {})}
        stores = {way: AnswerStore(_folder(output, way), accelerator.process_index) for way in ways}
        for name, way in ways.items():
            if main:
                stores[name].claim(known)
                stores[name].merge()
            accelerator.wait_for_everyone()
            _ask(asker, name, way, stores[name], rows, accelerator)
        accelerator.wait_for_everyone()
        if main:
            lines = {}
            for name, store in stores.items():
                store.merge()
                lines[name] = _with_paths(store)
    if not main:
        return None
    values = {way: _score(suite, way, found, rows, loaded, accelerator, only) for way, found in lines.items()}
    names = dict.fromkeys(name for found in values.values() for name in found)
    report = {
        "suite": suite.name,
        "rows": len(rows),
        "metrics": {name: {way: found[name] for way, found in values.items() if name in found} for name in names},
        "about": MetricSet(suite.metrics, loaded, accelerator.device, only).describe(),
        "missing": {kind: sum(kind not in _types(line) for line in lines["model"].values()) for kind in looked_at},
        "unanswered": len(rows) - len(lines["model"]),
        "seed": suite.ask.seed,
        "settings": asdict(suite),
        "seconds": round(time.perf_counter() - began, 1),
        "versions": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        **(facts or {}),
    }
    write_report(output / "report.html", report, [(row, lines) for row in rows[: suite.shown]])
    write(output / "metrics.json", (json.dumps(report, indent=1) + "\n").encode())
    return report


def _ask(asker: Asker, name: str, way: Any, store: AnswerStore, rows: Sequence[Row], accelerator: Accelerator) -> None:
    """Ask this process's share of what is not finished."""
    done = store.read()
    mine = [row for row in rows[accelerator.process_index :: accelerator.num_processes] if row.id not in done]
    bar = tqdm(total=len(mine), desc=name, unit="row", disable=not accelerator.is_main_process, dynamic_ncols=True)
    with bar:
        for batch, answers in asker.answers(way, mine):
            for row, answer in zip(batch, answers, strict=True):
                store.add(row, answer)
            bar.update(len(batch))


def _score(
    suite: Suite,
    way: str,
    lines: Lines,
    rows: Sequence[Row],
    loaded: dict[tuple, Any],
    accelerator: Accelerator,
    only: str | None,
) -> dict[str, dict[str, Any]]:
    """A way's values by name; a baseline of words has the metrics of words, one of media the others."""
    words = {"model": (True, False), "without_media": (True,)}.get(way, (False,))
    specs = [spec for spec in suite.metrics if (modality_of(spec, only) == "text") in words]
    metrics = MetricSet(specs, loaded, accelerator.device, only)
    answered = [row for row in rows if row.id in lines]
    for start in tqdm(range(0, len(answered), SCORED), desc=f"scoring {way}", unit="batch", dynamic_ncols=True):
        metrics.update([_item(row, lines[row.id]) for row in answered[start : start + SCORED]])
    return metrics.compute(len(rows))


def _item(row: Row, line: Mapping[str, Any]) -> Item:
    return Item(row, line["text"], {file["type"]: file["path"] for file in reversed(line["files"])})


def _with_paths(store: AnswerStore) -> dict[str, dict[str, Any]]:
    found = store.read()
    for line in found.values():
        line["files"] = [file | {"path": store.folder / file["path"]} for file in line["files"]]
    return found


def _types(line: Mapping[str, Any]) -> set[str]:
    return {file["type"] for file in line["files"]}


def _folder(output: Path, way: str) -> Path:
    return output / "samples" if way == "model" else output / "baselines" / way


def _only_medium(suite: Suite, rows: Sequence[Row]) -> str | None:
    """The one medium that answers hold, where there is just one."""
    kinds = set(suite.ask.require) or {kind for row in rows for kind in row.targets}
    return kinds.pop() if len(kinds) == 1 else None


def _how(suite: Suite) -> dict[str, Any]:
    """What an answer depends on: not the metrics, nor how many rows there are."""
    settings = asdict(suite)
    ask = {name: value for name, value in settings["ask"].items() if name not in ("batch_size", "num_workers")}
    return {"data": settings["data"], "composition": settings["composition"], "ask": ask}


def describe_checkpoint(folder: Path) -> dict[str, Any]:
    """Which checkpoint it is: its path, and the sizes and times of its files.

    Raises:
        InputError: no folder.
    """
    if not folder.is_dir():
        raise InputError(f"--checkpoint {folder} does not exist; name a run's final/ folder")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    state = [[str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return {"checkpoint": str(folder), "files": state}
