"""`manifest.json`: size and digest of every file of a folder, to detect damaged or changed files."""

from __future__ import annotations

import json
from pathlib import Path

import xxhash

MANIFEST = "manifest.json"
_CHUNK = 1 << 20


def write_manifest(folder: Path) -> None:
    """Write a folder's `manifest.json`: `{"files": {name: {"size": bytes, "xxh3": digest}}}`."""
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "xxh3": _digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1))


def find_fault(folder: Path) -> str | None:
    """First difference between a folder and its manifest, or None. Additional files are allowed."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        for name, entry in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["size"]:
                return f"{name} has {path.stat().st_size} bytes, expected {entry['size']}"
            if _digest(path) != entry["xxh3"]:
                return f"{name} has other content than was written"
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} or a file that it names cannot be read ({type(error).__name__}: {error})"
    return None


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
