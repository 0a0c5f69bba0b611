"""Evaluation of a suite: all processes generate answers, the first one scores them."""

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
from anygpt.evaluation.store import AnswerStore
from anygpt.evaluation.suite import Suite
from anygpt.media.writing import write
from anygpt.version import __version__

SHOWN = 24  # rows in the report
LIBRARIES = ("torch", "transformers", "diffusers", "peft", "torchmetrics", "pycocoevalcap")


def evaluate(
    suite: Suite,
    output: Path,
    accelerator: Accelerator,
    model: Any = None,
    processor: Any = None,
    answers: Path | None = None,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Generate missing answers, score all, and write `metrics.json`, `report.html` and `samples/`; a collective call.

    The numbers do not depend on the number of processes, the batch size (beyond rounding) or interruptions.

    Args:
        output: output folder; finished answers in it are reused.
        model, processor: the model to evaluate, in eval mode on its device; None if `answers` are given.
        answers: folder of finished answers, with an index as written by `AnswerStore`.
        facts: identification of the model; its answers are not mixed with those of another.

    Returns:
        Content of `metrics.json` in the first process; None in the others.

    An `InputError` refuses metrics, rows, model and answers that do not fit together, and an `output` of other answers.
    """
    try:  # their libraries are an extra
        from anygpt.evaluation.metrics import Item, choose, score
        from anygpt.evaluation.metrics.features import load_network
    except ImportError as error:
        raise InputError(f"{error.name} is not installed; pip install -e '.[evaluation]' brings it") from error
    began, main, facts = time.perf_counter(), accelerator.is_main_process, dict(facts or {})
    rows = read_rows(suite)
    made = set(suite.ask.require) or {kind for row in rows for kind in row.targets}
    metrics = choose(suite.metrics, rows, min(made) if len(made) == 1 else None)
    kinds = dict.fromkeys(metric.modality for metric in metrics)
    looked_at = [kind for kind in kinds if kind != "text"]
    load = functools.cache(functools.partial(load_network, device=accelerator.device))
    about = {metric.name: metric.describe(load) for metric in metrics} if main else {}  # finds missing networks first
    stores = {} if answers is None else {"model": AnswerStore(answers)}
    asker = Asker(model, processor, suite, looked_at) if answers is None else None
    for way, how in asker.ways(rows, "text" in kinds).items() if asker else ():
        folder = output / "samples" if way == "model" else output / "baselines" / way
        stores[way] = store = AnswerStore(folder, accelerator.process_index)
        if main:
            store.claim(asked_for(suite) | facts)
            store.merge()
        accelerator.wait_for_everyone()
        done = store.read()
        mine = [row for row in rows[accelerator.process_index :: accelerator.num_processes] if row.id not in done]
        for row, answer in tqdm(asker.answers(how, mine), way, len(mine), disable=not main, unit="row"):
            store.add(row.id, answer)
        accelerator.wait_for_everyone()
        if main:
            store.merge()
    if not main:
        return None
    lines = {way: store.resolved() for way, store in stores.items()}
    strangers = sorted(lines["model"].keys() - {row.id for row in rows})
    if strangers and len(strangers) == len(lines["model"]):
        example = f"no id names one, such as {strangers[0]!r}; rows have ids such as {rows[0].id!r}"
        raise InputError(f"there is no answer to look at: none of {len(rows)} rows is answered, since {example}")
    values = {}
    for way, found in lines.items():
        texts = {"model": (True, False), "without_media": (True,)}.get(way, (False,))  # metrics of text, or of media
        items = [Item(row, found[row.id]["text"], first_media(found[row.id])) for row in rows if row.id in found]
        values[way] = score([m for m in metrics if (m.modality == "text") in texts], load, items, len(rows), way)
    said = [lines["model"].get(row.id) for row in rows]
    report = {
        "suite": suite.name,
        "rows": len(rows),
        "metrics": {
            name: {way: found[name] for way, found in values.items() if name in found} for name in values["model"]
        },
        "about": about,
        "missing": {kind: sum(kind not in first_media(line) for line in said if line) for kind in looked_at},
        "unanswered": said.count(None),
        "strangers": {"n": len(strangers), "first": strangers[:1]},
        "seed": suite.ask.seed,
        "settings": asdict(suite),
        "seconds": round(time.perf_counter() - began, 1),
        "versions": {"anygpt": __version__, "python": platform.python_version()}
        | {library: version(library) for library in LIBRARIES},
        **facts,
    }
    write_report(output / "report.html", report, rows[:SHOWN], lines)
    write(output / "metrics.json", (json.dumps(report, indent=1) + "\n").encode())
    return report


def first_media(line: Mapping[str, Any]) -> dict[str, Path]:
    """First file of each media type in an answer."""
    return {file["type"]: file["path"] for file in reversed(line["files"])}


def asked_for(suite: Suite) -> dict[str, Any]:
    """Settings on which answers depend: not the metrics, the limit or the batch size."""
    ask = {name: value for name, value in asdict(suite.ask).items() if name != "batch_size"}
    return {"data": [asdict(source) for source in suite.data], "composition": suite.composition, "ask": ask}
