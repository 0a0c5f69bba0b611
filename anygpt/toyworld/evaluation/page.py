"""The report as one self-contained HTML file, from `matrix.html.jinja`."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from anygpt.evaluation.formatting import interval, outputs_of, percent, rate, turn_lines
from anygpt.media.types import media_type
from anygpt.toyworld.evaluation.answers import Judged
from anygpt.toyworld.evaluation.matrix import sample_path
from anygpt.toyworld.evaluation.requests import WAYS

PAGES = jinja2.Environment(
    loader=jinja2.PackageLoader("anygpt.toyworld", "evaluation"), autoescape=True, trim_blocks=True
)
SHOWN = ("settings", "versions", "seconds")


def html_page(
    report: dict[str, Any], judged: Sequence[Judged], samples: Path, sheet: Image.Image, logs: Sequence[Path]
) -> str:
    """One file that needs no other: matrix, baselines, contact sheet, samples to play, losses, settings."""
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    first: dict[str, dict[str, Judged]] = {}
    for one in judged:
        first.setdefault(one.request.source, {}).setdefault(one.request.target, one)
    return PAGES.get_template("matrix.html.jinja").render(
        report=report,
        targets=outputs_of(report),
        motion={source: {o: found["rate"] for o, found in row.items()} for source, row in report["motion"].items()},
        turns=turn_lines(report["turns"]),
        sheet=base64.b64encode(buffer.getvalue()).decode(),
        ways=WAYS,
        samples=first,
        losses={log.parent.name: curves_of(log) for log in logs},
        settings=json.dumps({name: report[name] for name in SHOWN}, indent=1),
        read=lambda path: base64.b64encode((samples / path).read_bytes()).decode(),
        mime=lambda modality: media_type(modality).mime,
        **{tool.__name__: tool for tool in (interval, percent, rate, sample_path)},
    )


def read_losses(log: Path) -> dict[str, list[tuple[int, float]]]:
    """`{loss: [(update, value)]}` from a run's `log.txt`; what is no loss is left out."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        if not (found := re.match(r"update (\d+)  (.*)", line)):
            continue
        for name, value in re.findall(r"(?:^|  )(loss|\S+/\S+) (-?\d[\d.e+-]*)(?=  |$)", found[2]):
            if not name.endswith("/s"):
                curves.setdefault(name, []).append((int(found[1]), float(value)))
    return curves


def curves_of(log: Path) -> list[dict[str, Any]]:
    """The curves of a run's losses, each scaled to its own largest value."""
    curves = []
    for number, (name, points) in enumerate(read_losses(log).items()):
        if len(points) < 2:
            continue
        last, top = max(x for x, _ in points) or 1, max(y for _, y in points) or 1.0
        path = " ".join(f"{600 * x / last:.1f},{150 - 145 * max(y, 0) / top:.1f}" for x, y in points)
        colour = f"hsl({number * 137 % 360},60%,42%)"
        curves.append({"name": name, "colour": colour, "path": path, "first": points[0][1], "last": points[-1][1]})
    return curves
