"""Hashes: `manifest.json`, the digests of a folder's files, and fingerprints of a part's tensors."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import xxhash

MANIFEST = "manifest.json"


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
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """The xxh3 hash of tensors' names, shapes, dtypes and bytes.

    It detects that a part is not the one the rest was trained with; it is not cryptographic.
    """
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        for stored in stored_tensors(tensor):
            digest.update(stored.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def stored_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that hold a quantised one, such as its integers and scales; else the tensor alone."""
    parts = getattr(tensor, "__tensor_flatten__", None)
    return [tensor] if parts is None else [x for name in parts()[0] for x in stored_tensors(getattr(tensor, name))]
