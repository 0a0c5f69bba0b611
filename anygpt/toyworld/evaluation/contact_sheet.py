"""The contact sheet: one picture with inputs and the model's text, picture, clip and sound for each."""

import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from anygpt.media.types import media_type, read_media
from anygpt.toyworld.evaluation.answers import Judged
from anygpt.toyworld.evaluation.requests import Request

ROWS = 3
"""Things shown for each input modality."""
_SIDE = 96
"""Pixels of a picture and of a spectrogram; frames of a clip are half as large, in two rows of four."""
_WIDTHS = {"input": 200, "text": 200, "image": _SIDE, "video": 2 * _SIDE, "audio": _SIDE}
_GAP = 12
_PAPER, _INK, _FAINT, _RIGHT, _WRONG = "#ffffff", "#1e1e1e", "#787878", "#14823c", "#be1e1e"


def contact_sheet(judged: Sequence[Judged], folder: Path, matrix: Mapping[str, Mapping[str, float]]) -> Image.Image:
    """Draw `ROWS` things for each input modality, one line each; right verdicts are green, wrong ones red.

    There must be the same number of answers in each cell; `folder` is that of the input media.
    """
    cells: dict[tuple[str, str], list[Judged]] = defaultdict(list)
    for one in judged:
        cells[one.request.source, one.request.target].append(one)
    targets = list(next(iter(matrix.values())))
    count = len(judged) // len(cells)
    rows = sorted({round(row) for row in np.linspace(0, count - 1, ROWS)})  # far apart, to show different things
    lines = [[_tile("input", "given", height=20)]]
    for target in targets:
        mean = np.mean([shares[target] for shares in matrix.values()])
        lines[0].append(_tile(target, target, [(f"{mean:.0%} right", _FAINT)], height=20))
    for source in matrix:
        for row in rows:
            lines.append([_given(cells[source, targets[0]][row].request, folder)])
            for target in targets:
                lines[-1].append(_made(cells[source, target][row]))
    width = sum(tile.width + _GAP for tile in lines[0]) + _GAP
    sheet = Image.new("RGB", (width, sum(line[0].height + _GAP for line in lines) + _GAP), _PAPER)
    y = _GAP
    for line in lines:
        x = _GAP
        for tile in line:
            sheet.paste(tile, (x, y))
            x += tile.width + _GAP
        y += line[0].height + _GAP
    return sheet


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


def _given(request: Request, folder: Path) -> Image.Image:
    if request.path is None:
        return _tile("input", f"(in words) {request.thing}")
    medium = media_type(request.source).to_target(read_media(request.source, folder / request.path))
    medium, rate = medium if request.source == "audio" else (medium, None)
    return _tile("input", _picture(request.source, medium, rate), [(f"{request.source}: {request.thing}", _INK)])


def _made(one: Judged) -> Image.Image:
    """An answer and its verdict."""
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
    half, film = _SIDE // 2, Image.new("RGB", (2 * _SIDE, _SIDE))
    for place, index in enumerate(np.linspace(0, len(medium) - 1, 8).round().astype(int)):
        frame = Image.fromarray(medium[index]).resize((half, half), Image.Resampling.NEAREST)
        film.paste(frame, (place % 4 * half, place // 4 * half))
    return film


def _tile(
    column: str, content: Image.Image | str, below: Sequence[tuple[str, str]] = (), height: int = _SIDE
) -> Image.Image:
    """A picture or words, and lines of text with their colours below."""
    tile = Image.new("RGB", (_WIDTHS[column], height + 34), _PAPER)
    draw = ImageDraw.Draw(tile)
    font = ImageFont.load_default(12)
    if isinstance(content, str):
        lines = [line for part in content.splitlines() for line in textwrap.wrap(part, tile.width // 7)]
        draw.multiline_text((0, 0), "\n".join(lines[:6]), fill=_INK, font=font)
    else:
        tile.paste(content)
    for number, (text, colour) in enumerate(below):
        draw.text((0, height + 3 + 15 * number), text, fill=colour, font=font)
    return tile
