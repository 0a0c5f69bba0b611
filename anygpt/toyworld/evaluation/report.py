"""Outputs of an evaluation: matrix.json, contact_sheet.png, report.html and a table for the terminal.

The contact sheet is one picture with inputs and the model's text, picture, clip and sound for each.
"""

import base64
import io
import json
import os
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageFont
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from anygpt.media.types import media_type, read_media
from anygpt.media.writing import write
from anygpt.pages import page_template
from anygpt.toyworld.evaluation.answers import Judged, by_cell
from anygpt.toyworld.evaluation.matrix import rates, sample_path
from anygpt.toyworld.evaluation.requests import WAYS, Request

ROWS = 3
"""Things shown for each input modality."""
_SIDE = 96
"""Pixels of a picture and of a spectrogram; frames of a clip are half as large, in two rows of four."""
_WIDTHS = {"input": 200, "text": 200, "image": _SIDE, "video": 2 * _SIDE, "audio": _SIDE}
_GAP = 12
_INK, _FAINT, _RIGHT, _WRONG = "#1e1e1e", "#787878", "#14823c", "#be1e1e"


def text_table(report: dict[str, Any]) -> str:
    """Format the matrix with its intervals and baselines for the terminal."""
    targets, talk = targets_of(report), report["text_only"]
    shown = {"in / out": dict(zip(targets, targets, strict=True))}
    for source, row in report["matrix"].items():
        bounds = report["intervals"][source]
        shown[source] = {target: f"{percent(one)} ({interval(bounds[target])})" for target, one in row.items()}
    beside = {"upper bound": report["upper_bound"]} if report["upper_bound"] else {}
    beside |= {f"caption, {source}": row for source, row in report["caption_baseline"].items()}
    beside |= {f"motion, {source}": row for source, row in rates(report["motion"]).items()}
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


def tracked_values(report: dict[str, Any]) -> dict[str, float]:
    """Values for a tracker: every cell as `matrix/<input>/<output>`, the baselines and the totals."""
    values = {name: report[name] for name in ("mean", "min")}
    values |= {name: report[name]["rate"] for name in ("unasked", "missing")}
    for name in ("matrix", "caption_baseline"):
        values |= {f"{name}/{i}/{o}": rate for i, row in report[name].items() for o, rate in row.items()}
    values |= {f"upper_bound/{o}": rate for o, rate in report["upper_bound"].items()}
    return values | {f"text_only/{kind}": found["rate"] for kind, found in report["text_only"].items()}


def write_report(output: Path, samples: Path, report: dict[str, Any], judged: Sequence[Judged]) -> Image.Image:
    """Write the report to `output`, each file by one rename; `matrix.json` comes last, so it marks completion.

    `samples`, a folder of media and index on the same disk, is moved to `output`/samples; other files there stay.
    Returns the contact sheet.
    """
    sheet = contact_sheet(judged, samples, report["matrix"])
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
    return sheet


def html_page(report: dict[str, Any], judged: Sequence[Judged], samples: Path, sheet: bytes) -> str:
    """Render matrix, baselines, contact sheet (PNG), playable samples and settings as one self-contained HTML file."""
    return page_template("anygpt.toyworld.evaluation", "matrix.html.jinja").render(
        report=report,
        targets=targets_of(report),
        motion=rates(report["motion"]),
        turns=turn_lines(report["turns"]),
        sheet=base64.b64encode(sheet).decode(),
        ways=WAYS,
        samples={source: {target: ones[0] for target, ones in row.items()} for source, row in by_cell(judged).items()},
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
    return [
        f"turn {number}: right {rate(turn['right'])}, missing {rate(turn['missing'])}, unasked {rate(turn['unasked'])}"
        for number, turn in enumerate(turns, 1)
    ]


def contact_sheet(judged: Sequence[Judged], folder: Path, matrix: Mapping[str, Mapping[str, float]]) -> Image.Image:
    """Draw `ROWS` things for each input modality, one line each; right verdicts are green, wrong ones red.

    There must be the same number of answers in each cell; `folder` is that of the input media.
    """
    cells, targets = by_cell(judged), list(next(iter(matrix.values())))
    count = len(cells["text"]["text"])
    rows = sorted({round(row) for row in np.linspace(0, count - 1, ROWS)})  # far apart, to show different things
    lines = [[_tile("input", "given", height=20)]]
    for target in targets:
        mean = np.mean([shares[target] for shares in matrix.values()])
        lines[0].append(_tile(target, target, [(f"{mean:.0%} right", _FAINT)], height=20))
    for source, row in product(matrix, rows):
        lines.append([_given(cells[source][targets[0]][row].request, folder)])
        lines[-1] += [_made(cells[source][target][row]) for target in targets]
    sheet = np.concatenate([np.concatenate(line, axis=1) for line in lines])
    return Image.fromarray(np.pad(sheet, ((_GAP, 0), (_GAP, 0), (0, 0)), constant_values=255))


def spectrogram_image(waveform: np.ndarray, sampling_rate: float) -> Image.Image:
    """Draw the log-mel spectrogram of a waveform `(N,)`, low frequencies at the bottom."""
    waveform = np.nan_to_num(waveform.astype(np.float64))
    waveform = np.pad(waveform, (0, max(0, 2048 - len(waveform))))
    filters = mel_filter_bank(513, 64, 0.0, sampling_rate / 2, int(sampling_rate), norm="slaney", mel_scale="slaney")
    window = window_function(1024, "hann")
    mels = spectrogram(waveform, window, 1024, 160, power=1.0, mel_filters=filters, mel_floor=1e-5, log_mel="log")
    level = ((mels - mels.max()) / 6 + 1).clip(0, 1)[::-1]  # 52 dB from black to full
    colours = np.stack([level**0.6, level**1.5, 0.25 * level + 0.3 * level**4], axis=-1)
    return Image.fromarray((colours * 255).astype(np.uint8)).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)


def _given(request: Request, folder: Path) -> np.ndarray:
    if request.path is None:
        return _tile("input", f"(in words) {request.thing}")
    medium = media_type(request.source).to_target(read_media(request.source, folder / request.path))
    medium, rate = medium if request.source == "audio" else (medium, None)
    return _tile("input", _picture(request.source, medium, rate), [(f"{request.source}: {request.thing}", _INK)])


def _made(one: Judged) -> np.ndarray:
    request, content = one.request, "(nothing)"
    if request.target == "text":
        asked = f"{request.prompt}\n" if request.source == "text" else ""
        content = asked + (one.text.strip() or content)
    elif one.medium is not None:
        content = _picture(request.target, one.medium, one.rate)
    said = " ".join(part or "?" for part in reversed(one.verdict)) if one.verdict else "missing"
    if (request.source, request.target) == ("text", "text"):
        said = "right" if one.right else "wrong"
    if request.target == "video" and one.motion:
        said += f", {one.motion}"
    return _tile(request.target, content, [(said, _RIGHT if one.right else _WRONG)])


def _picture(modality: str, medium: Any, rate: float | None) -> Image.Image:
    if modality == "image":
        return medium.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
    if modality == "audio":
        return spectrogram_image(medium, rate or 16_000)
    shown = (Image.fromarray(medium[i]) for i in np.linspace(0, len(medium) - 1, 8).round().astype(int))
    return make_image_grid([x.resize((_SIDE // 2, _SIDE // 2), Image.Resampling.NEAREST) for x in shown], 2, 4)


def _tile(
    column: str, content: Image.Image | str, below: Sequence[tuple[str, str]] = (), height: int = _SIDE
) -> np.ndarray:
    """A picture or words, lines of text with their colours below, and gaps below and to the right: uint8 (H, W, 3)."""
    width = _WIDTHS[column]
    tile = Image.new("RGB", (width + _GAP, height + 34 + _GAP), "white")
    draw, font = ImageDraw.Draw(tile), ImageFont.load_default(12)
    if isinstance(content, str):
        lines = [line for part in content.splitlines() for line in textwrap.wrap(part, width // 7)]
        draw.multiline_text((0, 0), "\n".join(lines[:6]), fill=_INK, font=font)
    else:
        tile.paste(content)
    for number, (text, colour) in enumerate(below):
        draw.text((0, height + 3 + 15 * number), text, fill=colour, font=font)
    return np.asarray(tile)
