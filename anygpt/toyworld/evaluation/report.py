"""Outputs of an evaluation: matrix.json, contact_sheet.png, report.html and a table for the terminal."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from anygpt.evaluation.formatting import interval, outputs_of, percent, rate, turn_lines
from anygpt.evaluation.store import write
from anygpt.toyworld.evaluation.answers import Judged
from anygpt.toyworld.evaluation.page import html_page


def text_table(report: dict[str, Any]) -> str:
    """Format the matrix with its intervals and baselines for the terminal."""
    targets = outputs_of(report)
    lines = [f"{'in / out':<18}" + "".join(f"{target:>18}" for target in targets)]
    for source, row in report["matrix"].items():
        cells = (f"{percent(row[t])} ({interval(report['intervals'][source][t])})" for t in targets)
        lines.append(f"{source:<18}" + "".join(f"{cell:>18}" for cell in cells))
    if report["upper_bound"]:
        lines.append(f"{'upper bound':<18}" + "".join(f"{percent(report['upper_bound'].get(t)):>18}" for t in targets))
        for source, row in report["caption_baseline"].items():
            lines.append(f"{f'caption, {source}':<18}" + "".join(f"{percent(row.get(t)):>18}" for t in targets))
    motion = report["motion"]
    for source, row in motion.items():
        lines.append(
            f"{f'motion, {source}':<18}"
            + "".join(f"{percent(row[t]['rate'] if t in row else None):>18}" for t in targets)
        )
    talk = report["text_only"]
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

    Args:
        output: other files in this folder are left alone.
        samples: folder of media and index on the same disk, which is moved to `output`/samples.
    """
    output.mkdir(parents=True, exist_ok=True)
    (output / "matrix.json").unlink(missing_ok=True)
    page = html_page(report, judged, samples, sheet)
    shutil.rmtree(output / "samples", ignore_errors=True)
    os.rename(samples, output / "samples")
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    write(output / "contact_sheet.png", buffer.getvalue())
    write(output / "report.html", page.encode())
    write(output / "matrix.json", (json.dumps(report, indent=1) + "\n").encode())
