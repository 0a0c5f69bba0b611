"""Reading of the feature cache by a dataset: cached tensors in place of media and captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from torch import Tensor

from anygpt.cache.keys import CAPTIONS, FEATURES, KINDS, LATENTS, STATES, entries, store_key
from anygpt.cache.store import Store
from anygpt.composition import Composition
from anygpt.decoders.conditions import Condition
from anygpt.errors import InputError
from anygpt.media.files import StoredMedium

CHUNK = 1024**2


class StaleCache(InputError):
    """The feature cache lacks a medium or a caption; a dataset never skips the sample for this."""


@dataclass(frozen=True)
class CachedFeatures:
    """An encoder's features of one medium, `(n, features)`: its projector's input."""

    features: Tensor


@dataclass(frozen=True)
class CachedLatents:
    """Mean and standard deviation of a VAE's posterior for one medium, `(2, C, …)`."""

    posterior: Tensor


@dataclass
class FeatureCache:
    """The stores that a run reads.

    stores: `{kind: {media type: store}}`. notes: for each part a line on where its outputs come from.
    """

    stores: dict[str, dict[str, Store]]
    notes: list[str] = field(default_factory=list)

    def medium(self, role: str, media_type: str, place: Path | StoredMedium) -> CachedFeatures | CachedLatents | None:
        """Cached features of a user's medium or latents of an assistant's; None if nothing is cached for its type.

        Raises:
            StaleCache: the store has no entry for the file's content.
            OSError: the file cannot be read.
        """
        kind = LATENTS if role == "assistant" else FEATURES
        store = self.stores[kind].get(media_type)
        if store is None:
            return None
        fingerprint = fingerprint_medium(place)
        if fingerprint not in store:
            raise StaleCache(
                f"the feature cache {store.folder} has nothing for {place}: the file changed, or came later; run "
                "scripts/cache_features.py again"
            )
        found = store.get(fingerprint)
        return CachedLatents(found[LATENTS]) if kind == LATENTS else CachedFeatures(found[FEATURES])

    def caption(self, media_type: str, caption: str) -> Condition | None:
        """A caption's encoding, without the batch axis; None if captions are not cached for this type.

        Raises:
            StaleCache: the store has no entry for this caption.
        """
        store = self.stores[CAPTIONS].get(media_type)
        if store is None:
            return None
        fingerprint = fingerprint_caption(caption)
        if fingerprint not in store:
            raise StaleCache(
                f"the feature cache {store.folder} has nothing for the caption {caption[:80]!r}; run "
                "scripts/cache_features.py again"
            )
        return Condition(**store.get(fingerprint))

    def states(self, ids: Sequence[int], labels: Sequence[int]) -> dict[str, Tensor] | None:
        """The states of one row without input media (see `read_text`); None if states are not cached.

        Raises:
            StaleCache: the store has no entry for these tokens.
        """
        store = self.stores[STATES].get("text")
        if store is None:
            return None
        fingerprint = fingerprint_row(ids, labels)
        if fingerprint not in store:
            raise StaleCache(
                f"the feature cache {store.folder} has nothing for a row of these {len(ids)} tokens: the text, the "
                "template or data.max_length changed; run scripts/cache_features.py again"
            )
        return store.get(fingerprint)


def open_cache(
    folder: str | Path, model: Composition, processor: Any, num_frames: int | None, precision: str
) -> FeatureCache:
    """Open the stores that can serve a model's parts; the notes give the reason for each part that is computed instead.

    Args:
        folder: `data.cache_dir`.
        model: its `requires_grad` flags are final.
        processor: the model's.
        num_frames, precision: see `store_key`.

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


def fingerprint_medium(place: Path | StoredMedium) -> str:
    """XXH3 hash of a medium's bytes."""
    digest = xxhash.xxh3_128()
    with place.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint_caption(caption: str) -> str:
    return xxhash.xxh3_128_hexdigest(caption.encode())


def fingerprint_row(ids: Sequence[int], labels: Sequence[int]) -> str:
    return xxhash.xxh3_128_hexdigest(np.asarray([ids, labels], dtype=np.int64).tobytes())
