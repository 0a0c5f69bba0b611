"""Outputs of an evaluation: matrix.json, contact_sheet.png, report.html and a table for the terminal."""

import base64
import io
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from anygpt.media.types import media_type
from anygpt.media.writing import write
from anygpt.pages import page_template
from anygpt.toyworld.evaluation.answers import Judged
from anygpt.toyworld.evaluation.matrix import sample_path
from anygpt.toyworld.evaluation.requests import WAYS


def text_table(report: dict[str, Any]) -> str:
    """Format the matrix with its intervals and baselines for the terminal."""
    targets, talk = targets_of(report), report["text_only"]
    shown = {"in / out": dict(zip(targets, targets, strict=True))}
    for source, row in report["matrix"].items():
        bounds = report["intervals"][source]
        shown[source] = {target: f"{percent(one)} ({interval(bounds[target])})" for target, one in row.items()}
    beside = {"upper bound": report["upper_bound"]} if report["upper_bound"] else {}
    beside |= {f"caption, {source}": row for source, row in report["caption_baseline"].items()}
    beside |= {f"motion, {source}": row for source, row in motion_rates(report).items()}
    shown |= {name: {target: percent(row.get(target)) for target in targets} for name, row in beside.items()}
    lines = [f"{name:<18}" + "".join(f"{row[target]:>18}" for target in targets) for name, row in shown.items()]
    lines += [
        "",
        f"mean {percent(report['mean'])}, least {percent(report['min'])}; {report['samples']} samples a cell, in "
        "brackets 95% intervals",
        f"not asked for: {rate(report['unasked'])}; missing: {rate(report['missing'])}",
        f"in words: questions {rate(talk['question'])}, small talk {rate(talk['small_talk'])}, "
        f"nonsense {rate(talk['nonsense'])}, media unasked {rate(talk['unasked'])}",
        *turn_lines(report["turns"]),
    ]
    return "\n".join(lines)


def motion_rates(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {source: {o: found["rate"] for o, found in row.items()} for source, row in report["motion"].items()}


def tracked_values(report: dict[str, Any]) -> dict[str, float]:
    """Values for a tracker: every cell as `matrix/<input>/<output>`, the baselines and the totals."""
    values = {name: report[name] for name in ("mean", "min")}
    values |= {name: report[name]["rate"] for name in ("unasked", "missing")}
    for name in ("matrix", "caption_baseline"):
        values |= {f"{name}/{i}/{o}": rate for i, row in report[name].items() for o, rate in row.items()}
    values |= {f"upper_bound/{o}": rate for o, rate in report["upper_bound"].items()}
    return values | {f"text_only/{kind}": found["rate"] for kind, found in report["text_only"].items()}


def write_report(
    output: Path, samples: Path, report: dict[str, Any], judged: Sequence[Judged], sheet: Image.Image
) -> None:
    """Write the report to `output`, each file by one rename; `matrix.json` comes last, so it marks completion.

    `samples`, a folder of media and index on the same disk, is moved to `output`/samples; other files there stay.
    """
    output.mkdir(parents=True, exist_ok=True)
    (output / "matrix.json").unlink(missing_ok=True)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    page = html_page(report, judged, samples, buffer.getvalue())
    shutil.rmtree(output / "samples", ignore_errors=True)
    os.rename(samples, output / "samples")
    write(output / "contact_sheet.png", buffer.getvalue())
    write(output / "report.html", page.encode())
    write(output / "matrix.json", (json.dumps(report, indent=1) + "\n").encode())


def html_page(report: dict[str, Any], judged: Sequence[Judged], samples: Path, sheet: bytes) -> str:
    """Render matrix, baselines, contact sheet (PNG), playable samples and settings as one self-contained HTML file."""
    first: dict[str, dict[str, Judged]] = {}
    for one in judged:
        first.setdefault(one.request.source, {}).setdefault(one.request.target, one)
    return page_template("anygpt.toyworld.evaluation", "matrix.html.jinja").render(
        report=report,
        targets=targets_of(report),
        motion=motion_rates(report),
        turns=turn_lines(report["turns"]),
        sheet=base64.b64encode(sheet).decode(),
        ways=WAYS,
        samples=first,
        settings=json.dumps({name: report[name] for name in ("settings", "versions", "seconds")}, indent=1),
        read=lambda path: base64.b64encode((samples / path).read_bytes()).decode(),
        mime=lambda modality: media_type(modality).mime,
        **{tool.__name__: tool for tool in (interval, percent, rate, sample_path)},
    )


def targets_of(report: dict[str, Any]) -> list[str]:
    return list(next(iter(report["matrix"].values())))


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}" if 0 < share < 1 else f"{share:.0%}"


def interval(bounds: Sequence[float]) -> str:
    return f"{bounds[0] * 100:.0f}–{bounds[1] * 100:.0f}"


def rate(found: dict[str, Any]) -> str:
    return f"{percent(found['rate'])} ({found['right']} of {found['n']})"


def turn_lines(turns: Sequence[dict[str, Any]]) -> list[str]:
    """Results of conversations, one line per turn."""
    return [
        f"turn {number}: right {rate(turn['right'])}, missing {rate(turn['missing'])}, unasked {rate(turn['unasked'])}"
        for number, turn in enumerate(turns, 1)
    ]
