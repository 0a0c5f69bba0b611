"""Reading of the feature cache by a dataset: cached tensors in place of media and captions."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from torch import Tensor

from anygpt.cache.keys import KINDS, entries, store_key
from anygpt.cache.store import Store
from anygpt.composition import Composition
from anygpt.errors import InputError
from anygpt.media.files import Place

CHUNK = 1024**2

Content = Place | str | tuple[list[int], list[int]]
"""What a store holds tensors for: a medium, a caption, or the ids and labels of a row without input media."""


class StaleCache(InputError):
    """The feature cache lacks a medium, a caption or a row; a dataset never skips the sample for this."""


@dataclass(frozen=True)
class Cached:
    """A medium's replacement: an encoder's features, its projector's input, `(n, features)`; or mean and standard
    deviation of a VAE's posterior, `(2, C, …)`."""

    values: Tensor


@dataclass
class FeatureCache:
    """The stores that a run reads.

    stores: `{kind: {media type: store}}`. notes: for each part a line on where its outputs come from.
    """

    stores: dict[str, dict[str, Store]]
    notes: list[str] = field(default_factory=list)

    def get(self, kind: str, modality: str, content: Content) -> dict[str, Tensor] | None:
        """The tensors of one content, by name; None if nothing of the kind is cached for its media type.

        Raises:
            StaleCache: the store has no entry for it.
            OSError: the medium's file cannot be read.
        """
        store = self.stores[kind].get(modality)
        if store is None:
            return None
        name = fingerprint(content)
        if name in store:
            return store.get(name)
        if isinstance(content, str):
            said = f"the caption {content[:80]!r}: it changed"
        elif isinstance(content, tuple):
            said = f"a row of these {len(content[0])} tokens: the text, the template or data.max_length changed"
        else:
            said = f"{content}: the file changed, or came later"
        raise StaleCache(
            f"the feature cache {store.folder} has nothing for {said}; run scripts/cache_features.py again"
        )


def open_cache(
    folder: str | Path, model: Composition, processor: Any, num_frames: int | None, precision: str
) -> FeatureCache:
    """Open the stores that can serve a model's parts; the notes give the reason for each part that is computed instead.

    Args: see `store_key`; the model's `requires_grad` flags are final.

    Raises:
        InputError: there is no cache, or it is stale: the message names the changes.
    """
    folder = Path(folder)
    wanted = entries(model)
    if not any(place.is_dir() for entry in wanted for place in folder.glob(f"{entry.name}*")):
        state = "has none of the folders" if folder.is_dir() else "is a file, not a folder with"
        raise InputError(
            f"data.cache_dir {folder} {state if folder.exists() else 'does not exist; it should hold'} "
            f"{', '.join(entry.name for entry in wanted)}; write it with scripts/cache_features.py (safetensors and "
            "JSON alone are read, never a pickle)"
        )
    cache = FeatureCache({kind: {} for kind in KINDS})
    for entry in wanted:
        obstacle = entry.obstacle
        if obstacle is None:
            key = store_key(entry, model, processor, num_frames, precision)
            place = entry.place(folder, key)
            if place.exists():
                cache.stores[entry.kind].setdefault(entry.modality, Store(place, key))
            else:
                obstacle = "the cache does not hold it"
        cache.notes.append(f"{entry.name}: {'from the cache' if obstacle is None else f'computed anew: {obstacle}'}")
    return cache


def fingerprint(content: Content) -> str:
    """XXH3 hash of a medium's bytes, a caption, or a row's tokens."""
    if isinstance(content, str):
        return xxhash.xxh3_128_hexdigest(content.encode())
    if isinstance(content, tuple):
        return xxhash.xxh3_128_hexdigest(np.asarray(content, dtype=np.int64).tobytes())
    digest = xxhash.xxh3_128()
    with content.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
