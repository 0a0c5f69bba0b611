"""What an evaluation leaves behind: matrix.json, contact_sheet.png, report.html and a table for the terminal."""

from __future__ import annotations

import io
import json
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from anygpt.evaluation.formatting import interval, outputs_of, percent, rate
from anygpt.toyworld.evaluation.answers import Judged
from anygpt.toyworld.evaluation.page import html_page


def text_table(report: dict[str, Any]) -> str:
    """The matrix with its intervals, and what stands beside it, for the terminal."""
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
    ]
    return "\n".join(lines)


def write_report(
    output: Path,
    samples: Path,
    report: dict[str, Any],
    judged: Sequence[Judged],
    sheet: Image.Image,
    logs: Sequence[Path],
) -> None:
    """Move everything into `output`, each by one rename; `matrix.json` comes last, so where it is, all is.

    Args:
        output: the folder; other files in it are left alone.
        samples: folder beside, with media and index, that becomes `output`/samples.
        logs: `log.txt` of the training runs, for the curves of the losses.
    """
    output.mkdir(parents=True, exist_ok=True)
    (output / "matrix.json").unlink(missing_ok=True)
    page = html_page(report, judged, samples, sheet, logs)
    shutil.rmtree(output / "samples", ignore_errors=True)
    os.rename(samples, output / "samples")
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    _write(output / "contact_sheet.png", buffer.getvalue())
    _write(output / "report.html", page.encode())
    _write(output / "matrix.json", (json.dumps(report, indent=1) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    """Beside its place, then renamed."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
