"""`scripts/validate_data.py` on files of 10,000, 100,000 and a million lines: its time, and that memory stays.

Every line is a question about a picture and its answer; a thousand pictures are shared among them. Nothing is decoded.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from PIL import Image

from anygpt.data.validation import validate

PICTURES = 1000
LINES = (10_000, 100_000, 1_000_000)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lines", nargs="+", type=int, default=LINES, help="of the files (default: %(default)s)")


def sides(options: argparse.Namespace) -> list[str]:
    return [f"{lines:,} lines" for lines in options.lines]


def measure(side: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of the validation, and lines a second."""
    lines = int(side.split()[0].replace(",", ""))
    with tempfile.TemporaryDirectory() as folder:
        path = write_lines(Path(folder), lines)
        begin = time.perf_counter()
        report = validate(path)
        seconds = time.perf_counter() - begin
    assert report.samples == lines, f"{report.samples} of {lines} lines are right"
    return {"validation_s": seconds, "lines a second": lines / seconds}


def write_lines(folder: Path, lines: int) -> Path:
    for i in range(PICTURES):
        Image.new("RGB", (8, 8)).save(folder / f"{i}.png")
    path = folder / "rows.jsonl"
    with path.open("w") as file:
        for i in range(lines):
            asked = [
                {"type": "image", "path": f"{i % PICTURES}.png"},
                {"type": "text", "text": f"What stands in picture number {i}, and what is it made of?"},
            ]
            answer = f"A thing of the kind {i}, which is made of wood, and stands on a table beside a window."
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"id": str(i), "messages": messages}) + "\n")
    return path
