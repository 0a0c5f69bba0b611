"""What a suite's numbers look like: a table for the terminal, and a page with pictures and players."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from anygpt.evaluation.rows import Row
from anygpt.evaluation.store import write

PAGES = jinja2.Environment(loader=jinja2.PackageLoader("anygpt.evaluation", "."), autoescape=True, trim_blocks=True)


def text_table(report: Mapping[str, Any]) -> str:
    """Metrics down, ways of answering across, intervals in brackets; what must be said below."""
    ways = ways_of(report)
    wide = max(len(name) for name in report["metrics"]) + 2
    lines = [f"{'':<{wide}}" + "".join(f"{way.replace('_', ' '):>28}" for way in ways)]
    for name, found in report["metrics"].items():
        lines.append(f"{name:<{wide}}" + "".join(f"{shown(found.get(way)):>28}" for way in ways))
    return "\n".join([*lines, "", *notes(report)])


def ways_of(report: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(way for found in report["metrics"].values() for way in found))


def shown(value: Mapping[str, Any] | None) -> str:
    """A value as people read it, its interval behind it."""
    if value is None:
        return "–"
    bounds = value.get("interval")
    return f"{value['value']:.4g}" + (f" ({bounds[0]:.4g}–{bounds[1]:.4g})" if bounds else "")


def notes(report: Mapping[str, Any]) -> list[str]:
    """Sentences that belong to the numbers."""
    told = [f"{report['rows']} rows; in brackets 95% intervals."]
    told += [f"{count} of them have no answer." for count in [report["unanswered"]] if count]
    told += [f"{count} answers lack the {kind}." for kind, count in report["missing"].items() if count]
    for name, found in report["metrics"].items():
        for way, value in found.items():
            told += [f"{name}, {way}: {value['note']}."] if "note" in value else []
    return told


def write_report(path: Path, report: Mapping[str, Any], rows: Sequence[tuple[Row, Mapping[str, Any]]]) -> None:
    """The page; media are linked, so it stays beside its `samples/`.

    Args:
        rows: rows with the answers to all rows, `{way: {row id: line}}`.
    """

    def link(place: Any) -> str | None:
        return os.path.relpath(place, path.parent) if isinstance(place, Path) else None

    examples = []
    for row, lines in rows:
        answers = [
            (way, found[row.id]["text"], [(file["type"], link(file["path"])) for file in found[row.id]["files"]])
            for way, found in lines.items()
            if row.id in found
        ]
        given = [(kind, link(place)) for kind, place in row.sources.items()]
        right = [(kind, link(place)) for kind, place in row.targets.items()]
        examples.append({"row": row, "given": given, "right": right, "answers": answers})
    page = PAGES.get_template("report.html.jinja").render(
        report=report, ways=ways_of(report), notes=notes(report), shown=shown, examples=examples
    )
    write(path, page.encode())
