"""Tensors by fingerprint, in shards of safetensors that are mapped into memory.

A store is a folder: `key.json`, which says what its tensors depend on, and `shard-<random>.safetensors`, each written
beside its place and renamed, so that one which bears its name is whole. A tensor is named `<fingerprint>.<name>`; a
fingerprint's tensors are in one shard. Nothing else is read: no pickle is ever loaded.
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

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from anygpt.errors import InputError

KEY = "key.json"
SHARD = "shard-*.safetensors"
SHARD_BYTES = 256 * 1024**2
SHARD_SECONDS = 60.0  # what a killed run loses at most
OPEN_SHARDS = 64  # file handles of one process and store


class Store:
    """A store to read from.

    Args:
        folder: of the store.
        key: what its tensors must depend on (see `anygpt.data.cache.keys`), as JSON values.

    Raises:
        InputError: a folder that is no store, holds other files, is damaged, or was made with another key; the
            message names what differs.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]):
        check_key(folder, key)
        self.folder = folder
        self.shards: list[Path] = []
        self.places: dict[str, int] = {}
        self.names: set[str] = set()
        self._open: OrderedDict[int, Any] = OrderedDict()
        self.refresh()

    def refresh(self) -> None:
        """Look for shards that have been added."""
        for path in sorted(set(self.folder.glob(SHARD)) - set(self.shards)):
            number = len(self.shards)
            self.shards.append(path)
            for tensor in self._shard(number).keys():  # noqa: SIM118 (a handle of safetensors is no dict)
                fingerprint, _, name = tensor.partition(".")
                self.places[fingerprint] = number
                self.names.add(name)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, fingerprint: str) -> bool:
        return fingerprint in self.places

    def get(self, fingerprint: str) -> dict[str, Tensor]:
        """The tensors of a fingerprint by name; views of mapped memory, not to be changed in place."""
        shard = self._shard(self.places[fingerprint])
        return {name: shard.get_tensor(f"{fingerprint}.{name}") for name in self.names}

    def _shard(self, number: int) -> Any:
        if number not in self._open:
            path = self.shards[number]
            try:
                self._open[number] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"{path} is no whole safetensors file ({error}), and nothing else is read; remove it, and run "
                    "scripts/cache_features.py again"
                ) from error
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:  # for workers that are spawned
        return self.__dict__ | {"_open": OrderedDict()}


class StoreWriter:
    """Adds shards to a store; several processes may do so at once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.held: dict[str, Tensor] = {}
        self.size, self.since = 0, time.monotonic()

    def add(self, fingerprint: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of a fingerprint; they are on disk after the next `flush`."""
        for name, tensor in tensors.items():
            # A copy of its own: a slice of a batch would be written with the whole batch, or refused.
            self.held[f"{fingerprint}.{name}"] = kept = tensor.detach().to("cpu", copy=True).contiguous()
            self.size += kept.nbytes
        if self.size >= SHARD_BYTES or time.monotonic() - self.since >= SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is held as a shard."""
        if self.held:
            name = f"shard-{uuid.uuid4().hex[:16]}.safetensors"
            temporary = self.folder / f".{name}.incomplete"
            with writing(self.folder, temporary):
                save_file(self.held, temporary, metadata={"format": "pt"})
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
                os.rename(temporary, self.folder / name)
        self.held, self.size, self.since = {}, 0, time.monotonic()


@contextmanager
def writing(folder: Path, temporary: Path) -> Iterator[None]:
    """Say of a disk that is full or may not be written to that it is; nothing half-written is left."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # the latter names the system's error as well
        with suppress(OSError):
            temporary.unlink()
        raise InputError(
            f"the feature cache {folder} cannot be written: {error}; make room, or name another data.cache_dir, and "
            "give the same command again: what is there is whole"
        ) from error


def create_store(folder: Path, key: Mapping[str, Any]) -> None:
    """Make an empty store, or check that the one which is there has this key; remove what a killed run left.

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
    """What differs between two JSON values, as phrases that name the entry."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted({*found, *wanted}):
            yield from differences(found.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    elif found != wanted:
        shown = [repr(value) for value in (found, wanted)]
        long = name.startswith("weights") or max(map(len, shown)) > 60
        yield f"{name} changed" if long else f"{name} was {shown[0]} and is {shown[1]}"
