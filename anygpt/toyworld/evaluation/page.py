"""The report as one self-contained HTML file, from `matrix.html.jinja`."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from anygpt.evaluation.formatting import interval, outputs_of, percent, rate, turn_lines
from anygpt.evaluation.report import page_template
from anygpt.media.types import media_type
from anygpt.toyworld.evaluation.answers import Judged
from anygpt.toyworld.evaluation.matrix import sample_path
from anygpt.toyworld.evaluation.requests import WAYS

SHOWN = ("settings", "versions", "seconds")


def html_page(report: dict[str, Any], judged: Sequence[Judged], samples: Path, sheet: Image.Image) -> str:
    """Render matrix, baselines, contact sheet, playable samples and settings as one HTML file."""
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    first: dict[str, dict[str, Judged]] = {}
    for one in judged:
        first.setdefault(one.request.source, {}).setdefault(one.request.target, one)
    return page_template("anygpt.toyworld.evaluation", "matrix.html.jinja").render(
        report=report,
        targets=outputs_of(report),
        motion={source: {o: found["rate"] for o, found in row.items()} for source, row in report["motion"].items()},
        turns=turn_lines(report["turns"]),
        sheet=base64.b64encode(buffer.getvalue()).decode(),
        ways=WAYS,
        samples=first,
        settings=json.dumps({name: report[name] for name in SHOWN}, indent=1),
        read=lambda path: base64.b64encode((samples / path).read_bytes()).decode(),
        mime=lambda modality: media_type(modality).mime,
        **{tool.__name__: tool for tool in (interval, percent, rate, sample_path)},
    )
