"""The report as one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from anygpt.evaluation.formatting import interval, outputs_of, percent, rate, turn_lines
from anygpt.toyworld.evaluation.answers import Judged
from anygpt.toyworld.evaluation.matrix import sample_path
from anygpt.toyworld.evaluation.requests import WAYS

_MIME = {"image": "image/png", "video": "video/mp4", "audio": "audio/wav"}
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1e1e1e;max-width:1000px;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;margin:.5em 0 1.5em}td,th{padding:.35em .8em}
td,th{border:1px solid #ddd;text-align:right}
th{font-weight:600;background:#f6f6f6;text-align:left}small{color:#666}img.pixels{image-rendering:pixelated}
img.sheet{max-width:100%;border:1px solid #ddd}pre{background:#f6f6f6;padding:1em;overflow:auto}
td.sample{text-align:left}
"""


def html_page(
    report: dict[str, Any], judged: Sequence[Judged], samples: Path, sheet: Image.Image, logs: Sequence[Path]
) -> str:
    """One file that needs no other: matrix, baselines, contact sheet, samples to play, losses, settings."""
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    talk = report["text_only"]
    told = [
        f"<p>{report['samples']} samples a cell about {len(report['things'])} things "
        f"({html.escape(report['settings']['things'])}); the small numbers are 95% intervals. "
        f"Mean {percent(report['mean'])}, least {percent(report['min'])}.</p>",
        _html_matrix(report),
        f"<p>Not asked for, yet there: {rate(report['unasked'])}. Asked for and missing: "
        f"{rate(report['missing'])}.<br>"
        f"In words alone: questions {rate(talk['question'])}, small talk {rate(talk['small_talk'])}, nonsense "
        f"{rate(talk['nonsense'])}; media unasked {rate(talk['unasked'])}.</p>",
        "<h2>Conversations</h2>",
        "<p>" + "<br>".join(turn_lines(report["turns"])) + "</p>",
        "<h2>Samples</h2>",
        f'<img class="sheet" alt="contact sheet" src="{_data(buffer.getvalue(), "image")}">',
        _html_samples(judged, samples),
        *(_html_losses(log) for log in logs),
        "<h2>Settings</h2>",
        f"<pre>{html.escape(json.dumps({k: report[k] for k in ('settings', 'versions', 'seconds')}, indent=1))}</pre>",
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>AnyGPT: any-to-any matrix</title>'
        f"<style>{_STYLE}</style><h1>Any-to-any matrix</h1>{''.join(told)}</html>\n"
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


def _html_matrix(report: dict[str, Any]) -> str:
    targets = outputs_of(report)
    rows = ["<tr><th>in \\ out</th>" + "".join(f"<th>{target}</th>" for target in targets) + "</tr>"]
    for source, row in report["matrix"].items():
        cells = []
        for target in targets:
            colour = f"hsl({120 * row[target]:.0f},65%,{88 - 8 * row[target]:.0f}%)"
            small = f"{interval(report['intervals'][source][target])}, n = {report['samples']}"
            cells.append(f'<td style="background:{colour}">{percent(row[target])}<br><small>{small}</small></td>')
        rows.append(f"<tr><th>{source}</th>{''.join(cells)}</tr>")

    def more(title: str, values: dict[str, float | None]) -> None:
        rows.append(f"<tr><th>{title}</th>" + "".join(f"<td>{percent(values.get(t))}</td>" for t in targets) + "</tr>")

    if report["upper_bound"]:
        more("upper bound: true caption → decoder", report["upper_bound"])
        for source, row in report["caption_baseline"].items():
            more(f"caption baseline: {source} → caption → decoder", row)
    for source, row in report["motion"].items():
        more(f"motion right, {source} in", {target: found["rate"] for target, found in row.items()})
    return f"<table>{''.join(rows)}</table>"


def _html_samples(judged: Sequence[Judged], samples: Path) -> str:
    """The first answer of each cell, to look at and to play."""
    first: dict[str, dict[str, Judged]] = {}
    for one in judged:
        first.setdefault(one.request.source, {}).setdefault(one.request.target, one)
    rows = ["<tr><th>given</th>" + "".join(f"<th>{way}</th>" for way in WAYS) + "</tr>"]
    for source, row in first.items():
        any_one = next(iter(row.values())).request
        given = _embed(samples / any_one.path, source) if any_one.path else ""
        cells = [f'<td class="sample">{given}<br>{source}: {html.escape(str(any_one.thing))}</td>']
        for way in WAYS:
            one = row.get(way)
            if one is None:
                cells.append("<td></td>")
                continue
            shown = _embed(samples / sample_path(one), way) if one.medium is not None else ""
            asked, said = html.escape(one.request.prompt), html.escape(one.text)
            cells.append(f'<td class="sample"><small>{asked}</small><br>{said} {shown}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(rows)}</table>"


def _html_losses(log: Path) -> str:
    """The curves of a run's losses, each scaled to its own largest value."""
    curves = {name: points for name, points in read_losses(log).items() if len(points) > 1}
    if not curves:
        return ""
    lines, legend = [], []
    for number, (name, points) in enumerate(curves.items()):
        colour = f"hsl({number * 137 % 360},60%,42%)"
        last, top = max(x for x, _ in points) or 1, max(y for _, y in points) or 1.0
        path = " ".join(f"{600 * x / last:.1f},{150 - 145 * max(y, 0) / top:.1f}" for x, y in points)
        lines.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{path}"/>')
        legend.append(
            f'<span style="color:{colour}">■ {html.escape(name)} {points[0][1]:.3g} → {points[-1][1]:.3g}</span>'
        )
    return (
        f"<h2>Losses of {html.escape(log.parent.name)}</h2>"
        f'<svg viewBox="0 0 600 152" width="600" style="border:1px solid #ddd">{"".join(lines)}</svg>'
        f"<p><small>{' &nbsp; '.join(legend)}</small></p>"
    )


def _embed(path: Path, modality: str) -> str:
    source = _data(path.read_bytes(), modality)
    if modality == "image":
        return f'<br><img class="pixels" width="96" alt="" src="{source}">'
    if modality == "video":
        return f'<br><video width="96" controls loop muted src="{source}"></video>'
    return f'<br><audio controls style="width:160px" src="{source}"></audio>'


def _data(content: bytes, modality: str) -> str:
    return f"data:{_MIME[modality]};base64,{base64.b64encode(content).decode()}"
