"""The contact sheet: one picture with inputs and the model's text, picture, clip and sound for each."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from anygpt.media.types import read_media
from anygpt.toyworld.evaluation.answers import Judged
from anygpt.toyworld.evaluation.requests import WAYS, plain

ROWS = 3
"""Things shown for each input modality."""
_SIDE = 96
"""Pixels of a picture and of a spectrogram; frames of a clip are half as large, in two rows of four."""
_WIDTHS = {"input": 200, "text": 200, "image": _SIDE, "video": 2 * _SIDE, "audio": _SIDE}
_HEIGHT = _SIDE + 34
_GAP = 12
_HEAD = 52
_PAPER, _INK, _FAINT = (255, 255, 255), (30, 30, 30), (120, 120, 120)
_RIGHT, _WRONG = (20, 130, 60), (190, 30, 30)
_MELS = 64


def contact_sheet(
    judged: Sequence[Judged], folder: Path, matrix: dict[str, dict[str, float]], sampling_rate: int
) -> Image.Image:
    """Draw `ROWS` things for each input modality, one line each; right verdicts are green, wrong ones red.

    Args:
        judged: all answers, the same number in each cell.
        folder: of the input media.
        matrix: shares for the headings.
        sampling_rate: of generated audio, in Hz.
    """
    cells: dict[tuple[str, str], list[Judged]] = {}
    for one in judged:
        cells.setdefault((one.request.source, one.request.target), []).append(one)
    sources = [way for way in WAYS if any(source == way for source, _ in cells)]
    targets = [way for way in WAYS if any(target == way for _, target in cells)]
    count = len(cells[sources[0], targets[0]])
    rows = sorted({round(row) for row in np.linspace(0, count - 1, ROWS)})  # far apart, to show different things
    shown = [(source, row) for source in sources for row in rows]
    width = _GAP + sum(_WIDTHS[column] + _GAP for column in ("input", *targets))
    sheet = Image.new("RGB", (width, _HEAD + len(shown) * (_HEIGHT + _GAP)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    _line(draw, _GAP, 8, "given", 16)
    x = _GAP * 2 + _WIDTHS["input"]
    for target in targets:
        mean = np.mean([row[target] for row in matrix.values() if target in row])
        _line(draw, x, 8, target, 16)
        _line(draw, x, 28, f"{mean:.0%} right", 11, _FAINT)
        x += _WIDTHS[target] + _GAP
    for number, (source, row) in enumerate(shown):
        y = _HEAD + number * (_HEIGHT + _GAP)
        draw.line((0, y - _GAP // 2, width, y - _GAP // 2), fill=(225, 225, 225))
        _given(sheet, draw, cells[source, targets[0]][row], folder, y)
        x = _GAP * 2 + _WIDTHS["input"]
        for target in targets:
            one = cells[source, target][row]
            _made(sheet, draw, one, x, y, sampling_rate)
            if row == rows[0]:
                _line(draw, x, y + _SIDE + 19, f"{matrix[source][target]:.0%} of this cell", 10, _FAINT)
            x += _WIDTHS[target] + _GAP
    return sheet


def spectrogram_image(waveform: np.ndarray, sampling_rate: int, side: int = _SIDE) -> Image.Image:
    """Draw the log-mel spectrogram of a waveform `(N,)`, low frequencies at the bottom."""
    waveform = np.nan_to_num(waveform.astype(np.float64))
    waveform = np.pad(waveform, (0, max(0, 2048 - len(waveform))))
    filters = mel_filter_bank(513, _MELS, 0.0, sampling_rate / 2, sampling_rate, norm="slaney", mel_scale="slaney")
    mels = spectrogram(
        waveform,
        window_function(1024, "hann"),
        1024,
        160,
        power=1.0,
        mel_filters=filters,
        mel_floor=1e-5,
        log_mel="log",
    )
    level = ((mels - mels.max()) / 6 + 1).clip(0, 1)[::-1]  # 52 dB from black to full
    colours = np.stack([level**0.6, level**1.5, 0.25 * level + 0.3 * level**4], axis=-1)
    return Image.fromarray((colours * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BILINEAR)


def _given(sheet: Image.Image, draw: ImageDraw.ImageDraw, one: Judged, folder: Path, y: int) -> None:
    request = one.request
    if request.path is None:
        _words(draw, _GAP, y, f"(in words) {request.thing}")
        return
    medium: Any = plain(read_media(request.source, folder / request.path))
    rate = 0
    if request.source == "audio":
        medium, rate = medium[0][0], medium[1]
    _paste(sheet, request.source, medium, rate, _GAP, y)
    _line(draw, _GAP, y + _SIDE + 4, f"{request.source}: {request.thing}", 12)


def _made(sheet: Image.Image, draw: ImageDraw.ImageDraw, one: Judged, x: int, y: int, sampling_rate: int) -> None:
    """Draw an answer and its verdict."""
    request = one.request
    colour = _RIGHT if one.right else _WRONG
    if request.target == "text":
        asked = f"{request.prompt}\n" if request.source == "text" else ""
        _words(draw, x, y, asked + (one.text.strip() or "(nothing)"))
    elif one.medium is None:
        _words(draw, x, y, "(nothing)", width=_WIDTHS[request.target])
    else:
        _paste(sheet, request.target, one.medium, sampling_rate, x, y)
    said = " ".join(part or "?" for part in reversed(one.verdict)) if one.verdict else "missing"
    if (request.source, request.target) == ("text", "text"):
        said = "right" if one.right else "wrong"
    if request.target == "video" and one.motion:
        said += f", {one.motion}"
    _line(draw, x, y + _SIDE + 4, said, 12, colour)


def _paste(sheet: Image.Image, modality: str, medium: Any, sampling_rate: int, x: int, y: int) -> None:
    if modality == "image":
        sheet.paste(medium.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.NEAREST), (x, y))
    elif modality == "audio":
        sheet.paste(spectrogram_image(medium, sampling_rate), (x, y))
    else:
        chosen = np.linspace(0, len(medium) - 1, 8).round().astype(int)
        for place, frame in enumerate(medium[i] for i in chosen):
            picture = Image.fromarray(frame).resize((_SIDE // 2, _SIDE // 2), Image.Resampling.NEAREST)
            sheet.paste(picture, (x + place % 4 * (_SIDE // 2), y + place // 4 * (_SIDE // 2)))


def _words(draw: ImageDraw.ImageDraw, x: int, y: int, text: str, width: int = _WIDTHS["text"]) -> None:
    lines = [line for part in text.splitlines() for line in textwrap.wrap(part, width // 7)][:6]
    for number, line in enumerate(lines):
        _line(draw, x, y + 15 * number, line, 12)


def _line(draw: ImageDraw.ImageDraw, x: int, y: int, text: str, size: int, colour: tuple[int, ...] = _INK) -> None:
    draw.text((x, y), text, fill=colour, font=ImageFont.load_default(size))
