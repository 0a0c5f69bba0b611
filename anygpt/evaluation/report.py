"""Report of a suite: a table for the terminal, an HTML page with images and players, and a run of a tracker."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from anygpt.errors import refusing
from anygpt.evaluation.rows import Row
from anygpt.media.writing import write
from anygpt.pages import page_template


def text_table(report: Mapping[str, Any]) -> str:
    """Table with a line per metric, a column per way of answering, intervals in brackets, and notes below."""
    wide, ways = max(map(len, report["metrics"])) + 2, ways_of(report)
    lines = [" " * wide + "".join(f"{way.replace('_', ' '):>28}" for way in ways)]
    for name, found in report["metrics"].items():
        lines.append(f"{name:<{wide}}" + "".join(f"{shown(found.get(way)):>28}" for way in ways))
    return "\n".join([*lines, "", *notes(report)])


def ways_of(report: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(way for found in report["metrics"].values() for way in found))


def shown(value: Mapping[str, Any] | None) -> str:
    if value is None or value["value"] is None:
        return "–"
    low, high = value.get("interval", (None, None))
    return f"{value['value']:.4g}" + ("" if low is None else f" ({low:.4g}–{high:.4g})")


def notes(report: Mapping[str, Any]) -> list[str]:
    told = [f"{report['rows']} rows; in brackets 95% intervals."]
    told += [f"{report['unanswered']} of them have no answer."] if report["unanswered"] else []
    strangers = report["strangers"]
    told += [f"{strangers['n']} answers are to none of these rows, such as to {id!r}." for id in strangers["first"]]
    told += [f"{count} answers lack the {kind}." for kind, count in report["missing"].items() if count]
    values = ((name, way, value) for name, found in report["metrics"].items() for way, value in found.items())
    return told + [f"{name}, {way}: {value['note']}." for name, way, value in values if "note" in value]


def write_report(path: Path, report: Mapping[str, Any], rows: Sequence[Row], lines: Mapping[str, Any]) -> None:
    """Write the page with the answers (`lines`: `{way: {row id: line}}`) to `rows`; links to media are relative."""

    def link(place: Any) -> str | None:
        return os.path.relpath(place, path.parent) if isinstance(place, Path) else None

    tools = {"ways": ways_of(report), "notes": notes(report), "shown": shown, "link": link}
    template = page_template("anygpt.evaluation", "report.html.jinja")
    write(path, template.render(report=report, rows=rows, lines=lines, **tools).encode())


def flat_values(report: dict[str, Any]) -> dict[str, float]:
    """Values of the model as `{"<suite>/<metric>": value}`, with the suffix `/<baseline>` for the others."""
    return {
        "/".join([report["suite"], name, *([way] if way != "model" else [])]): value["value"]
        for name, found in report["metrics"].items()
        for way, value in found.items()
        if value["value"] is not None
    }


def log_values(tracker: str, folder: Path, values: Mapping[str, float], **images: Image.Image) -> None:
    """Log numbers and images to `wandb` or `tensorboard` (or `none`), with files in `folder`."""
    if tracker == "none":
        return
    os.environ.setdefault("WANDB_SILENT", "true")
    accelerator = Accelerator(log_with=tracker, project_dir=str(folder), cpu=True)
    with refusing(f"--tracker {tracker} cannot start"):
        accelerator.init_trackers("anygpt", init_kwargs={"wandb": {"name": folder.name, "dir": str(folder)}})
    accelerator.log(dict(values), step=0)
    for name, image in images.items():
        content, form = ([image], {}) if tracker == "wandb" else (np.asarray(image)[None], {"dataformats": "NHWC"})
        accelerator.get_tracker(tracker).log_images({name: content}, step=0, **form)
    accelerator.end_training()
