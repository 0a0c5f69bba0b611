"""Answers on disk: media, and an index with one line per finished row, so that evaluations can resume."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from pydantic import Field

from anygpt.data.rows import Id, PartRow, RowModel, Text, checked
from anygpt.data.schema import MediaRoot
from anygpt.errors import InputError
from anygpt.media.types import media_type
from anygpt.media.writing import write
from anygpt.outputs import Answer

INDEX, SETTINGS = "index.jsonl", "asked.json"


class AnswerRow(RowModel):
    """A line of an index."""

    id: Id
    text: Text = ""
    files: list[PartRow] = Field([])


class AnswerStore:
    """Answers of one way of answering, in a folder.

    Each process appends to its own index, the first one to `index.jsonl`; `merge` combines them. A line is `{"id",
    "text", "files": [{"type", "path"}]}`, with paths relative to the folder; it is written after its media.
    """

    def __init__(self, folder: str | Path, rank: int = 0):
        self.folder = Path(folder)
        self.own = self.folder / (f"index.{rank}.jsonl" if rank else INDEX)

    def read(self) -> dict[str, dict[str, Any]]:
        """All finished lines by row id; a truncated last line and empty ones are ignored, another invalid one, or one
        that differs from an earlier one of its id, is an `InputError`."""
        lines: dict[str, dict[str, Any]] = {}
        for path in sorted(self.folder.glob("index*.jsonl")):
            for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
                where = f"{path}:{number} is no answer"
                try:
                    content = json.loads(line.decode("utf-8-sig"))
                except ValueError as error:
                    if line.strip() and line.endswith(b"\n"):
                        expected = 'expected {"id": …, "text": …, "files": [{"type": "image", "path": …}]} in UTF-8'
                        raise InputError(f"{where}: {expected}") from error
                    continue
                found = {"text": "", "files": []} | checked(AnswerRow, content, where).model_dump(exclude_unset=True)
                if lines.setdefault(found["id"], found) != found:
                    raise InputError(f"{where}: {found['id']!r} has another answer above; leave one of them")
        return lines

    def resolved(self) -> dict[str, dict[str, Any]]:
        """Lines with absolute paths; raises `InputError` for files that are missing or outside the folder."""
        root, lines = MediaRoot(self.folder), self.read()
        for name, line in lines.items():
            where = f"{self.folder / INDEX} (row {name!r})"
            line["files"] = [file | {"path": root.resolve(file["path"], file["type"], where)} for file in line["files"]]
            if absent := [str(file["path"]) for file in line["files"] if not file["path"].is_file()]:
                raise InputError(f"{where}: {absent[0]} does not exist")
        return lines

    def add(self, name: str, answer: Answer) -> None:
        """Write the media of a row's answer, then its line."""
        stem = f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)[:60]}-{xxhash.xxh3_64_hexdigest(name.encode())[:8]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        files = []
        for number, segment in enumerate(s for s in answer.segments if s.type != "text"):
            kind = media_type(segment.type)
            path = f"{stem}-{number}{kind.suffixes[0]}"
            content = np.nan_to_num(segment.content) if kind.heard else segment.content
            kind.write(self.folder / path, content, segment.rate)
            files.append({"type": segment.type, "path": path})
        with self.own.open("a", encoding="utf-8") as index:
            index.write(json.dumps({"id": name, "text": answer.text, "files": files}) + "\n")

    def merge(self) -> None:
        """Merge the indices of all processes; to be called by one process while no other writes."""
        lines, parts = self.read(), list(self.folder.glob("index.*.jsonl"))
        write(self.folder / INDEX, "".join(json.dumps(lines[name]) + "\n" for name in sorted(lines)).encode())
        for path in parts:
            path.unlink()

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Record the settings; raises `InputError` if the folder holds answers made with other settings."""
        path, now = self.folder / SETTINGS, json.loads(json.dumps(settings))
        known = json.loads(path.read_text()) if path.is_file() else None
        if known is None and self.folder.is_dir() and any(self.folder.iterdir()):
            raise InputError(f"--output: {self.folder} holds files of something else; give another folder")
        if known not in (None, now):
            changed = ", ".join(name for name in sorted({*known, *now}) if known.get(name) != now.get(name))
            advice = "give another folder, or remove this one to ask again"
            raise InputError(f"--output: {self.folder} holds answers to other questions ({changed} changed); {advice}")
        write(path, (json.dumps(now, indent=1) + "\n").encode())
