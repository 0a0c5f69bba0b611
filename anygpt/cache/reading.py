"""The cache's stores for a model, their keys (what their tensors depend on), and their reading by a dataset.

An encoder or media tokenizer has one store (`image_encoder`), a decoder two, `image_decoder.captions` and
`image_decoder.latents` (its VAE's posterior). `language_model` has the states of rows without input media, while fixed.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from torch import Tensor, nn

from anygpt.cache.store import Store
from anygpt.composition import Composition
from anygpt.decoders.base import DiffusionDecoder
from anygpt.encoders.callbacks import EncoderCallbacks
from anygpt.encoders.module import ModalEncoderModule
from anygpt.encoders.video import VideoFrameProcessor
from anygpt.errors import InputError
from anygpt.losses.terms import reads_labels
from anygpt.media.files import Place
from anygpt.media.types import is_timed
from anygpt.model.parts import callback_dict, class_name, is_peft
from anygpt.parts.manifest import fingerprint_tensors
from anygpt.tokenizers.base import MediaTokenizer

VERSION = 4  # of the stored format and of the decoding of media
FEATURES, CAPTIONS, LATENTS, STATES, CODES = "features", "captions", "latents", "states", "codes"
KINDS = (FEATURES, CAPTIONS, LATENTS, STATES, CODES)
LANGUAGE_MODEL = "language_model"
# Config entries that only record how it was saved.
NOTES = ("transformers_version", "architectures", "dtype", "torch_dtype", "name_or_path")


@dataclass(frozen=True)
class Entry:
    """One store of a model: the name of its folder, one of `KINDS`, the key of the encoder or decoder, the media type
    in the data or "text", and the reason why this run cannot use the cache for it, or None."""

    name: str
    kind: str
    part: str
    modality: str
    obstacle: str | None

    def place(self, folder: Path, key: Mapping[str, Any]) -> Path:
        """The store's folder; states depend on randomly initialised signal tokens, so each key has its own folder."""
        if self.kind != STATES:
            return folder / self.name
        return folder / f"{self.name}-{xxhash.xxh3_64_hexdigest(json.dumps(key, sort_keys=True).encode())}"


def entries(model: Composition) -> list[Entry]:
    """The stores of a model whose `requires_grad` flags are final."""
    found = []
    for key, encoder in model.encoders.items():
        obstacle = encoder_obstacle(encoder)
        if model.preprocess_llm_callback is not None:
            obstacle = "preprocess_llm_callback reads its inputs"
        found.append(Entry(f"{key}_encoder", FEATURES, key, encoder.modality, obstacle))
    for key, module in model.decoders.items():
        pixels = "a loss looks at the media themselves" if model.loss_weights.reconstruction else None
        for kind, obstacle in ((CAPTIONS, None), (LATENTS, pixels)):
            trained = "it trains" if any(map(trains, encoding_networks(module.module, kind).values())) else None
            if kind == LATENTS and module.signal == "codes":
                trained = "its media tokenizer encodes the same media"
            found.append(Entry(f"{key}_decoder.{kind}", kind, key, module.modality, trained or obstacle))
    for key, tokenizer in model.tokenizers.items():
        obstacle = "it trains" if trains(tokenizer.module) else None
        if key in model.decoder_keys:
            obstacle = "its decoder encodes the same media"
        found.append(Entry(f"{key}_tokenizer", CODES, key, tokenizer.modality, obstacle))
    found.append(Entry(LANGUAGE_MODEL, STATES, LANGUAGE_MODEL, "text", states_obstacle(model)))
    return found


def states_obstacle(model: Composition) -> str | None:
    if trains(model.language_model):
        return "it trains"
    if is_peft(model.language_model):
        return "it has adapters"
    if trains(model.signal_tokens.input_rows):
        return "input rows of signal tokens train"
    if any(decoder.layer_weights is not None for decoder in model.decoders.values()):
        return "a decoder mixes its layers"
    if any(decoder.signal == "codes" for decoder in model.decoders.values()):
        return "codes of media are among its inputs"
    return None if model.preprocess_llm_callback is None else "preprocess_llm_callback changes its inputs"


def encoder_obstacle(encoder: ModalEncoderModule) -> str | None:
    """Why an encoder's features may change during a run, or do not suffice for the next steps; or None."""
    callbacks = encoder.callbacks
    if trains(encoder.module):
        return "it trains"
    if encoder.own_functions:
        return f"its {' and '.join(encoder.own_functions)} has no fingerprint"
    if callbacks is None:
        return None
    if type(callbacks).postprocess_projector is not EncoderCallbacks.postprocess_projector:
        return "a callback reads its inputs after the projector"
    return "its callbacks have parameters" if any(True for _ in callbacks.parameters()) else None


def store_key(
    entry: Entry, model: Composition, processor: Any, num_frames: int | None, precision: str
) -> dict[str, Any]:
    """Everything that a store's tensors depend on, apart from the media files or captions themselves.

    `num_frames` is the number of frames decoded of a clip, `precision` is `train.mixed_precision`.
    """
    key: dict[str, Any] = {"version": VERSION, "precision": precision}
    if is_timed(entry.modality) and entry.kind != CAPTIONS:
        key["num_frames"] = num_frames
    if entry.kind == FEATURES:
        encoder = model.encoders[entry.part]
        return key | {
            "class": class_name(encoder.module),
            "weights": fingerprint_tensors(encoder.module.state_dict()),  # includes adapters
            "config": plain(encoder.config.to_dict()),
            "preprocessing": processing(processor.encoder_processors[entry.part]),
            "fit": processor.fit[entry.part],
            "callbacks": callback_dict(encoder.callbacks),
            **({"cut_by": encoder.family.cut_by} if encoder.family.cut_by else {}),
        }
    if entry.kind == STATES:
        rows = model.signal_tokens
        weights = {"language_model": model.language_model, "input_rows": rows.input_rows}
        return key | {
            "class": class_name(model.language_model),
            "weights": {name: fingerprint_tensors(part.state_dict()) for name, part in weights.items()},
            "config": plain(model.language_model.config.to_dict()),
            "signal_tokens": rows.ids,
            "hidden_layer": {name: decoder.hidden_layer for name, decoder in model.decoders.items()},
            "nll": reads_labels(model.loss_weights),
        }
    one = model.tokenizers if entry.kind == CODES else model.decoders
    decoder = one[entry.part].module
    networks = encoding_networks(decoder, entry.kind)
    key["class"] = class_name(decoder)
    key["weights"] = {name: fingerprint_tensors(network.state_dict()) for name, network in networks.items()}
    key["config"] = {name: plain(n.config.to_dict()) for name, n in networks.items() if hasattr(n.config, "to_dict")}
    key["config"] |= {name: plain(n.config) for name, n in networks.items() if isinstance(n.config, Mapping)}
    if entry.kind in (LATENTS, CODES):
        delayed = {"delay": True} if isinstance(decoder, MediaTokenizer) and decoder.delayed else {}
        return key | {"preprocessing": decoder.targets.to_dict() | delayed}
    parts = decoder.pipeline.components.items()
    key["tokenizers"] = {name: tokenizer(part) for name, part in parts if name.startswith("tokenizer") and part}
    return key | {"shape": list(decoder.condition_shape), "pooled": decoder.pooled_dim}


def encoding_networks(decoder: DiffusionDecoder | MediaTokenizer, kind: str) -> dict[str, nn.Module]:
    """By name: a media tokenizer's, a decoder's VAE for latents, or for captions all others but the denoiser."""
    networks = dict(decoder.named_children())
    if kind == CODES:
        return networks
    left_out = (decoder.denoiser, decoder.vae)
    return {
        n: part for n, part in networks.items() if (part is decoder.vae if kind == LATENTS else part not in left_out)
    }


def trains(network: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in network.parameters())


def processing(processor: Any) -> dict[str, Any]:
    if isinstance(processor, VideoFrameProcessor):
        return {"frames": processor.num_frames, "of": processing(processor.image_processor)}
    return {"class": type(processor).__name__, **plain(processor.to_dict())}


def tokenizer(part: Any) -> dict[str, Any]:
    backend = getattr(part, "backend_tokenizer", None)
    content = dict(part.get_vocab()) if backend is None else json.loads(backend.to_str())
    for name in () if backend is None else ("truncation", "padding"):
        content.pop(name, None)  # state of the last call
    fingerprint = xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
    return {"fingerprint": fingerprint, "length": part.model_max_length}


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in settings.items() if not str(k).startswith("_") and k not in NOTES}
    return {
        str(k): plain(v) if isinstance(v, Mapping) else json.loads(json.dumps(v, default=str)) for k, v in kept.items()
    }


Content = Place | str | tuple[list[int], list[int]]
"""What a store holds tensors for: a medium, a caption, or the ids and labels of a row without input media."""


class StaleCache(InputError):
    """The feature cache lacks a medium, a caption or a row; a dataset never skips the sample for this."""


@dataclass(frozen=True)
class Cached:
    """In place of a medium: features `(n, features)`, a VAE's posterior `(2, C, …)` (mean and std), or codes `(n,)`."""

    values: Tensor


@dataclass
class FeatureCache:
    """The stores that a run reads, by kind and media type, and for each part a line on where its outputs come from."""

    stores: dict[str, dict[str, Store]]
    notes: list[str] = field(default_factory=list)

    def get(self, kind: str, modality: str, content: Content) -> dict[str, Tensor] | None:
        """The tensors of one content, by name; None if nothing of the kind is cached for its media type. Raises
        `StaleCache` if the store has no entry for it, `OSError` if the medium's file cannot be read."""
        store = self.stores[kind].get(modality)
        return None if store is None else store.get(self.find(store, content))

    def check_caption(self, modality: str, caption: str) -> None:
        """Raise `StaleCache` if captions of this media type are cached, and this one is not."""
        if (store := self.stores[CAPTIONS].get(modality)) is not None:
            self.find(store, caption)

    @staticmethod
    def find(store: Store, content: Content) -> str:
        """The name under which a store holds a content; raises as `get`."""
        name = fingerprint(content)
        if name in store:
            return name
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
    An `InputError` says that there is no cache, or what changed since it was written."""
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
    with content.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()  # type: ignore[arg-type]
