"""Answers on disk: media beside an index with one line a finished row, so that nothing is ever asked twice."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from anygpt.data.schema import MediaRoot
from anygpt.errors import InputError
from anygpt.evaluation.rows import Row
from anygpt.media.types import MEDIA, media_type, media_type_of
from anygpt.outputs import Answer

INDEX = "index.jsonl"
SETTINGS = "asked.json"


class AnswerStore:
    """The answers of one way of answering, in a folder.

    Each process appends to an index of its own, the first one to `index.jsonl`; `merge` makes one of them. A line is
    `{"id", "text", "files": [{"type", "path"}], …}`, paths relative to the folder; it is written after its media. A
    line that a kill cut off is no line.
    """

    def __init__(self, folder: str | Path, rank: int = 0):
        self.folder = Path(folder)
        self.own = self.folder / (f"index.{rank}.jsonl" if rank else INDEX)

    def read(self) -> dict[str, dict[str, Any]]:
        """All finished lines, by row."""
        lines: dict[str, dict[str, Any]] = {}
        for path in sorted(self.folder.glob("index*.jsonl")):
            lines |= {line["id"]: line for line in _read_lines(path)}
        return lines

    def add(self, row: Row, answer: Answer, **more: Any) -> None:
        """Write an answer's media, then its line."""
        stem = f"{re.sub(r'[^A-Za-z0-9_.-]', '_', row.id)[:60]}-{xxhash.xxh3_64_hexdigest(row.id.encode())[:8]}"
        files = []
        for number, segment in enumerate(s for s in answer.segments if s.type != "text"):
            kind = media_type(segment.type)
            path = f"{stem}-{number}{kind.suffixes[0]}"
            kind.write(
                self.folder / path, np.nan_to_num(segment.content) if kind.heard else segment.content, segment.rate
            )
            files.append({"type": segment.type, "path": path})
        line = {"id": row.id, "text": answer.text, "files": files, **more}
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.own.open("a", encoding="utf-8") as index:
            index.write(json.dumps(line) + "\n")

    def merge(self) -> None:
        """One index of all processes', without what a kill cut off; by one process, while no other writes."""
        parts = list(self.folder.glob("index*.jsonl"))
        if parts:
            lines = self.read()
            content = "".join(json.dumps(lines[name]) + "\n" for name in sorted(lines))
            write(self.folder / INDEX, content.encode())
            for path in parts:
                if path.name != INDEX:
                    path.unlink()

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Make certain that what is here was asked as it would be now, and note how.

        Raises:
            InputError: other answers are here.
        """
        path = self.folder / SETTINGS
        known = json.loads(path.read_text()) if path.is_file() else None
        if known is None and self.folder.is_dir() and any(self.folder.iterdir()):
            raise InputError(f"--output: {self.folder} holds answers or files of something else; give another folder")
        now = json.loads(json.dumps(settings))
        if known is not None and known != now:
            changed = ", ".join(name for name in sorted({*known, *now}) if known.get(name) != now.get(name))
            raise InputError(
                f"--output: the answers in {self.folder} were asked for otherwise ({changed} changed); give another "
                "folder, or remove this one to ask again"
            )
        write(path, (json.dumps(now, indent=1) + "\n").encode())


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        try:
            found = json.loads(line)
            good = isinstance(found, dict) and isinstance(found.get("id"), str)
        except ValueError:
            good = False
        if good:
            yield found
        elif line.endswith("\n"):
            raise InputError(f"{path}:{number} is no answer: expected a JSON object with an id, a text and files")


def read_answers(folder: str | Path, rows: list[Row]) -> dict[str, dict[str, Any]]:
    """Finished answers of anybody's model, `{row id: line}`, `files` with whole paths.

    The folder has an `index.jsonl` as `AnswerStore` writes it (`path` may stand for a single file), or files that are
    named by their row: `<id>.png`, `<id>.mp4`, `<id>.wav`, `<id>.txt`.

    Raises:
        InputError: no folder, lines that are no answers, files outside the folder or missing, or no answer to any row.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"--answers {folder} is no folder; give one with index.jsonl, or with files named by row")
    root = MediaRoot(folder)
    lines = AnswerStore(folder).read() if (folder / INDEX).is_file() else {}
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        line = lines.get(row.id) or (None if lines else _by_name(folder, row.id))
        if line is None:
            continue
        files = list(line.get("files") or [])
        if "path" in line:
            kind = media_type_of(line["path"])
            if kind is None:
                raise InputError(f"{folder / INDEX} (row {row.id!r}): the suffix of {line['path']} names no media type")
            files.append({"type": kind.name, "path": line["path"]})
        where = f"{folder / INDEX} (row {row.id!r})"
        places = [{"type": f["type"], "path": root.resolve(f["path"], f["type"], where)} for f in files]
        if absent := [str(file["path"]) for file in places if not file["path"].is_file()]:
            raise InputError(f"{where}: {absent[0]} does not exist")
        found[row.id] = {"id": row.id, "text": str(line.get("text") or ""), "files": places}
    if not found:
        raise InputError(f"{folder} has no answer to any of the {len(rows)} rows; their ids are as {rows[0].id!r}")
    return found


def _by_name(folder: Path, name: str) -> dict[str, Any] | None:
    if "/" in name or "\0" in name:
        return None
    text = folder / f"{name}.txt"
    files = [
        {"type": kind.name, "path": f"{name}{suffix}"}
        for kind in MEDIA.values()
        for suffix in kind.suffixes
        if (folder / f"{name}{suffix}").is_file()
    ]
    if not files and not text.is_file():
        return None
    return {"text": text.read_text(encoding="utf-8") if text.is_file() else "", "files": files}


def write(path: Path, content: bytes) -> None:
    """Beside its place, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
