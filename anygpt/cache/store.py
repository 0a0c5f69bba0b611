"""Tensors by fingerprint, in memory-mapped safetensors shards.

A store is a folder with `key.json`, which records what its tensors depend on, and `shard-<random>.safetensors` files. A
tensor's name in a shard is `<fingerprint>.<name>`. Nothing else is read: no pickle is loaded.
"""

import json
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from anygpt.errors import InputError, refusing
from anygpt.media.writing import replacing
from anygpt.parts.publishing import let_umask_decide

KEY = "key.json"
SHARD = "shard-*.safetensors"
SHARD_BYTES, SHARD_ENTRIES = 256 * 1024**2, 2**14
SHARD_SECONDS = 60.0  # most work that a killed run loses
NAME = re.compile(r"([0-9a-f]{32})\.(\w+)")


class Store:
    """A store to read from; `key` are the expected dependencies of its tensors (see `anygpt.cache.reading`). An
    `InputError` says that the folder is no store, holds other files, is damaged, or how its key differs."""

    def __init__(self, folder: Path, key: Mapping[str, Any]):
        check_key(folder, key)
        self.folder = folder
        self.shards = sorted(folder.glob(SHARD))
        self.names: set[str] = set()  # of the tensors of an entry
        self.places: dict[bytes, int] = {}  # number of the shard
        self._open: dict[int, Any] = {}
        for number, path in enumerate(self.shards):
            advice = "; nothing else is read: remove it, and run scripts/cache_features.py again"
            kinds = (SafetensorError, OSError, AttributeError)
            with refusing(f"{path} is no whole shard of safetensors", kinds, advice), safe_open(path, "pt") as file:
                for tensor in file.keys():  # noqa: SIM118 (it is no dict)
                    fingerprint, name = NAME.fullmatch(tensor).groups()
                    self.places[bytes.fromhex(fingerprint)] = number
                    self.names.add(name)

    def __contains__(self, fingerprint: str) -> bool:
        return bytes.fromhex(fingerprint) in self.places

    def get(self, fingerprint: str) -> dict[str, Tensor]:
        """The tensors of a fingerprint by name, copied, since workers send the whole storage of a view."""
        number = self.places[bytes.fromhex(fingerprint)]
        if number not in self._open:
            self._open[number] = safe_open(self.shards[number], framework="pt")  # memory-mapped: takes no file handle
        file = self._open[number]
        return {name: file.get_tensor(f"{fingerprint}.{name}").clone() for name in self.names}

    def __getstate__(self) -> dict[str, Any]:  # for spawned workers
        return self.__dict__ | {"_open": {}}


class StoreWriter:
    """Adds shards to a store; several processes may do so at once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.held: dict[str, Tensor] = {}
        self.size, self.since = 0, time.monotonic()

    def add(self, fingerprint: str, tensors: Mapping[str, Tensor]) -> None:
        """Add the tensors of a fingerprint (32 hexadecimal digits); they are on disk after the next `flush`."""
        for name, tensor in tensors.items():
            kept = tensor.detach().to("cpu", copy=True).contiguous()  # a slice would keep the whole batch alive
            self.held[f"{fingerprint}.{name}"] = kept
            self.size += kept.nbytes
        full = self.size >= SHARD_BYTES or len(self.held) >= SHARD_ENTRIES
        if full or time.monotonic() - self.since >= SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self.held:
            shard = self.folder / f"shard-{uuid.uuid4().hex[:16]}.safetensors"
            with _writing(self.folder), replacing(shard) as temporary:
                save_file(self.held, temporary, metadata={"format": "pt"})
                let_umask_decide(temporary)
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
        self.held, self.size, self.since = {}, 0, time.monotonic()


def _writing(folder: Path) -> AbstractContextManager[None]:
    advice = "; make room, or name another data.cache_dir, and give the same command again: what is there is whole"
    return refusing(f"the feature cache cannot be written: {folder}", (OSError, SafetensorError), advice)


def create_store(folder: Path, key: Mapping[str, Any]) -> None:
    """Create an empty store, or check that an existing one has this key and remove a killed run's partial files."""
    for path in folder.glob(".*.tmp"):
        path.unlink()
    if not folder.exists() or not any(folder.iterdir()):
        with _writing(folder), replacing(folder / KEY) as temporary:
            temporary.write_text(json.dumps(key, indent=1, sort_keys=True) + "\n")
    check_key(folder, key)


def check_key(folder: Path, key: Mapping[str, Any]) -> None:
    if not (folder / KEY).is_file():
        raise InputError(
            f"{folder} is no feature cache: it has no {KEY}; name a folder that scripts/cache_features.py wrote (files "
            "of other kinds, pickles among them, are never read)"
        )
    strange = [p for p in folder.iterdir() if p.name != KEY and not p.name.startswith(".") and not p.match(SHARD)]
    if strange:
        raise InputError(
            f"{strange[0]} is no part of a feature cache, which holds safetensors and JSON alone (a pickle is never "
            "read); remove it, or name another data.cache_dir"
        )
    with refusing(f"{folder / KEY} is damaged", (ValueError, OSError), f"; remove {folder}, and write it again"):
        found = json.loads((folder / KEY).read_text())
    wanted = json.loads(json.dumps(key))  # tuples become lists
    if changes := list(differences(found, wanted)):
        raise InputError(
            f"the feature cache {folder} is stale, and is not used: {'; '.join(changes)}. Write it again with "
            "scripts/cache_features.py --overwrite, or name another data.cache_dir"
        )


def differences(found: Any, wanted: Any, name: str = "") -> Iterator[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted({*found, *wanted}):
            yield from differences(found.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    elif found != wanted:
        shown = [repr(value) for value in (found, wanted)]
        long = name.startswith("weights") or max(map(len, shown)) > 60
        yield f"{name} changed" if long else f"{name} was {shown[0]} and is {shown[1]}"
