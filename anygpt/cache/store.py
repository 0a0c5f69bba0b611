"""Tensors by fingerprint, in memory-mapped safetensors shards.

A store is a folder with `key.json`, which records what its tensors depend on, and `shard-<random>.safetensors` files,
each written under a temporary name and renamed when complete. A shard has a few large tensors, so that reading is
slicing: `fingerprints`, `(n, 16)` bytes, and for each name `values.<name>`, all tensors of that name concatenated
along their first axis, and `edges.<name>`, `(n + 1,)`, their boundaries. Nothing else is read: no pickle is loaded.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from anygpt.errors import InputError

KEY = "key.json"
SHARD = "shard-*.safetensors"
SHARD_BYTES = 256 * 1024**2
SHARD_SECONDS = 60.0  # most work that a killed run loses
OPEN_SHARDS = 64  # file handles per process and store
ROWS = 2**32  # more than any shard has


class Store:
    """A store to read from.

    Args:
        folder: of the store.
        key: expected dependencies of its tensors (see `anygpt.cache.keys`), as JSON values.

    Raises:
        InputError: the folder is no store, holds other files, is damaged, or was made with another key; the
            message names the differences.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]):
        check_key(folder, key)
        self.folder = folder
        self.shards: list[Path] = []
        self.places: dict[bytes, int] = {}
        self._open: OrderedDict[int, dict[str, tuple[Tensor, list[int]]]] = OrderedDict()
        self.refresh()

    def refresh(self) -> None:
        """Load shards that were added since."""
        for path in sorted(set(self.folder.glob(SHARD)) - set(self.shards)):
            first = len(self.shards) * ROWS
            names = self._read(path)["fingerprints"].numpy().tobytes()
            self.places.update((names[i : i + 16], first + i // 16) for i in range(0, len(names), 16))
            self.shards.append(path)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, fingerprint: str) -> bool:
        return bytes.fromhex(fingerprint) in self.places

    def get(self, fingerprint: str) -> dict[str, Tensor]:
        """The tensors of a fingerprint by name, copied, since workers send the whole storage of a view."""
        number, row = divmod(self.places[bytes.fromhex(fingerprint)], ROWS)
        columns = self._shard(number).items()
        return {name: values[edges[row] : edges[row + 1]].clone() for name, (values, edges) in columns}

    def _shard(self, number: int) -> dict[str, tuple[Tensor, list[int]]]:
        if number not in self._open:
            found = self._read(self.shards[number])
            names = [name.removeprefix("values.") for name in found if name.startswith("values.")]
            self._open[number] = {n: (found[f"values.{n}"], found[f"edges.{n}"].tolist()) for n in names}
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        return self._open[number]

    def _read(self, path: Path) -> dict[str, Tensor]:
        """The tensors of a file, mapped into memory.

        Raises:
            InputError: the file is no complete shard.
        """
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            _check_shard(found)
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(
                f"{path} is no whole shard of safetensors ({error}), and nothing else is read; remove it, and run "
                "scripts/cache_features.py again"
            ) from error
        return found

    def __getstate__(self) -> dict[str, Any]:  # for spawned workers
        return self.__dict__ | {"_open": OrderedDict()}


def _check_shard(found: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` unless the tensors form a consistent shard."""
    fingerprints = found.get("fingerprints")
    if fingerprints is None or fingerprints.dtype != torch.uint8 or fingerprints.shape[1:] != (16,):
        raise ValueError("it has no fingerprints")
    for name in found.keys() - {"fingerprints"}:
        kind, _, rest = name.partition(".")
        values, edges = found.get(f"values.{rest}"), found.get(f"edges.{rest}")
        if kind not in ("values", "edges") or values is None or edges is None or not values.dim():
            raise ValueError(f"its tensor {name} stands alone")
        places = edges.numpy() if edges.dtype == torch.int64 else np.empty(0)
        whole = places.shape == (len(fingerprints) + 1,) and places[0] == 0 and places[-1] == len(values)
        if not whole or (np.diff(places) < 0).any():
            raise ValueError(f"edges.{rest} does not fit its values")


class StoreWriter:
    """Adds shards to a store; several processes may do so at once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.fingerprints: list[str] = []
        self.held: dict[str, list[Tensor]] = {}
        self.size, self.since = 0, time.monotonic()

    def add(self, fingerprint: str, tensors: Mapping[str, Tensor]) -> None:
        """Add the tensors of a fingerprint (32 hexadecimal digits); they are on disk after the next `flush`."""
        assert tensors and all(tensor.dim() for tensor in tensors.values())
        if self.held and not self.fits(tensors):
            self.flush()
        self.fingerprints.append(fingerprint)
        for name, tensor in tensors.items():
            kept = tensor.detach().to("cpu", copy=True).contiguous()  # a slice would keep the whole batch alive
            self.held.setdefault(name, []).append(kept)
            self.size += kept.nbytes
        if self.size >= SHARD_BYTES or time.monotonic() - self.since >= SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the tensors added since the last flush as a shard."""
        if self.held:
            name = f"shard-{uuid.uuid4().hex[:16]}.safetensors"
            temporary = self.folder / f".{name}.incomplete"
            digests = np.frombuffer(bytes.fromhex("".join(self.fingerprints)), np.uint8).reshape(-1, 16)
            columns = {"fingerprints": torch.from_numpy(digests.copy())}
            for key, tensors in self.held.items():
                columns[f"values.{key}"] = torch.cat(tensors)
                columns[f"edges.{key}"] = torch.tensor([0, *map(len, tensors)]).cumsum(0)
            with writing(self.folder, temporary):
                save_file(columns, temporary, metadata={"format": "pt"})
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
                os.rename(temporary, self.folder / name)
        self.fingerprints, self.held, self.size, self.since = [], {}, 0, time.monotonic()

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether tensors can be concatenated with those of the current shard."""
        pairs = [(self.held[name][0], tensor) for name, tensor in tensors.items() if name in self.held]
        alike = (a.shape[1:] == b.shape[1:] and a.dtype == b.dtype for a, b in pairs)
        return len(pairs) == len(tensors) == len(self.held) and all(alike)


@contextmanager
def writing(folder: Path, temporary: Path) -> Iterator[None]:
    """Turn write errors (disk full, no permission) into `InputError`, and remove the partial file."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # the latter includes the system's error
        with suppress(OSError):
            temporary.unlink()
        raise InputError(
            f"the feature cache {folder} cannot be written: {error}; make room, or name another data.cache_dir, and "
            "give the same command again: what is there is whole"
        ) from error


def create_store(folder: Path, key: Mapping[str, Any]) -> None:
    """Create an empty store, or check that an existing one has this key and remove a killed run's partial files.

    Raises:
        InputError: see `Store`; or the folder cannot be written.
    """
    if folder.exists():
        for path in folder.glob(".*.incomplete"):
            path.unlink()
    if not (folder / KEY).exists():
        if folder.exists() and any(folder.iterdir()):
            raise not_a_store(folder)
        temporary = folder / f".{KEY}.incomplete"
        with writing(folder, temporary):
            folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(key, indent=1, sort_keys=True) + "\n")
            os.rename(temporary, folder / KEY)
    check_key(folder, key)


def check_key(folder: Path, key: Mapping[str, Any]) -> None:
    """Raise `InputError` unless `folder` is a store with this key."""
    if not (folder / KEY).is_file():
        raise not_a_store(folder)
    strange = [p for p in folder.iterdir() if p.name != KEY and not p.name.startswith(".") and not p.match(SHARD)]
    if strange:
        raise InputError(
            f"{strange[0]} is no part of a feature cache, which holds safetensors and JSON alone (a pickle is never "
            "read); remove it, or name another data.cache_dir"
        )
    try:
        found = json.loads((folder / KEY).read_text())
    except (ValueError, OSError) as error:
        raise InputError(f"{folder / KEY} is damaged ({error}); remove {folder}, and write it again") from error
    wanted = json.loads(json.dumps(key))  # tuples become lists
    changes = list(differences(found, wanted))
    if changes:
        raise InputError(
            f"the feature cache {folder} is stale, and is not used: {'; '.join(changes)}. Write it again with "
            "scripts/cache_features.py --overwrite, or name another data.cache_dir"
        )


def not_a_store(folder: Path) -> InputError:
    return InputError(
        f"{folder} is no feature cache: it has no {KEY}; name a folder that scripts/cache_features.py wrote (files of "
        "other kinds, pickles among them, are never read)"
    )


def differences(found: Any, wanted: Any, name: str = "") -> Iterator[str]:
    """Yield descriptions of the differences between two JSON values."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted({*found, *wanted}):
            yield from differences(found.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    elif found != wanted:
        shown = [repr(value) for value in (found, wanted)]
        long = name.startswith("weights") or max(map(len, shown)) > 60
        yield f"{name} changed" if long else f"{name} was {shown[0]} and is {shown[1]}"
