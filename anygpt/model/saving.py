"""Saving and loading a composition: every tensor that no source supplies, and nothing else.

A folder holds::

    config.json               the composition; source and fingerprint of each frozen part
    model.safetensors         projectors, signal tokens, layer mixes
    adapters/<part>/          PEFT adapters, in PEFT's own format
    parts/<part>/             parts without a source, or changed since they were loaded, whole
    tokenizer and processor   written by `MultimodalProcessor.save_pretrained`

Merged (`save_pretrained(merge=True)`), it has no adapters, and `parts/language_model` is a causal language model that
knows the signal tokens by itself.

Loading is strict: a missing, unexpected or mis-shaped tensor is an error that names it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from anygpt.composition import Composition
from anygpt.decoders.base import DiffusionDecoder
from anygpt.decoders.module import ModalDecoderModule
from anygpt.decoders.projector import OutputProjector, OutputProjectorConfig
from anygpt.encoders.module import ModalEncoderModule, base_model
from anygpt.encoders.projector import MultimodalProjector, MultimodalProjectorConfig
from anygpt.encoders.video import VideoEncoder
from anygpt.errors import InputError
from anygpt.media.types import VIDEO
from anygpt.model.configuration import FORMAT_VERSION, MultimodalConfig
from anygpt.model.parts import (
    Source,
    build_callback,
    fingerprint,
    import_class,
    is_peft,
    load_decoder,
    load_encoder,
    load_language_model,
    own_state,
    source_of,
)
from anygpt.model.standalone import merge_adapter, write_signal_rows

TENSORS = "model.safetensors"
# What transformers' auto classes hand to every `from_pretrained`.
AUTO_ARGUMENTS = frozenset(
    (
        "_commit_hash",
        "_from_auto",
        "_from_pipeline",
        "adapter_kwargs",
        "cache_dir",
        "code_revision",
        "config",
        "force_download",
        "local_files_only",
        "proxies",
        "revision",
        "subfolder",
        "token",
        "trust_remote_code",
    )
)


def own_tensors(model: Composition) -> dict[str, Tensor]:
    """Every tensor of the composition that belongs to no part: projectors, signal tokens, layer mixes."""
    prefixes = tuple(f"{name}." if name == "language_model" else f"{name}.module." for name in part_modules(model))
    return {n: tensor.detach() for n, tensor in model.state_dict().items() if not n.startswith(prefixes)}


class SavedModel(Composition, Protocol):
    """A composition that knows which of its parts have sources."""

    sources: KnownSources


C = TypeVar("C", bound=Composition)


class KnownSources:
    """Which parts are still what their sources supply, so that `save_pretrained` need not write them."""

    def __init__(self, model: Composition):
        self.fingerprints = {
            name: getattr(base_model(part), "anygpt_fingerprint", None) or fingerprint(part)
            for name, part in part_modules(model).items()
            if source_of(part) is not None
        }
        self._same: dict[str, bool] = {}

    def supply(self, name: str, part: nn.Module, entry: Mapping[str, Any]) -> bool:
        """Whether loading the part's source again gives the part as it stands."""
        if entry["fingerprint"] != self.fingerprints.get(name):
            return False
        if name not in self._same:
            # A part that the caller loaded may have been changed before it came here (resized embeddings, a merged
            # adapter), or be of another class than we would load: its name does not tell, so look once.
            ours = hasattr(base_model(part), "anygpt_source")
            try:
                same = ours or fingerprint(_load_source(Source(**entry["source"]), entry)) == entry["fingerprint"]
            except InputError:
                same = False
            self._same[name] = same
        return self._same[name]


def save_pretrained(model: SavedModel, folder: str | Path, *, merge: bool = False, **_: Any) -> None:
    """Write the composition into `folder`.

    A part with a source is written only as that source, as long as its tensors are what they were when the
    model was made; a part without one, or trained since, is written whole under `parts/`.

    Args:
        folder: made where it is not there.
        merge: merge adapters into their parts, and write the language model whole, with the signal tokens' rows in
            its own matrices and the tokenizer beside it. The model in memory stays as it is; its adapted parts
            and the language model are copied for it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = MultimodalConfig.of(model)
    modules = part_modules(model)
    if merge:
        modules = {name: merge_adapter(part) for name, part in modules.items()}
    for name, entry in part_entries(config).items():
        part = modules[name]
        entry["adapter"] = is_peft(part)
        if merge and name == "language_model" and model.signal_tokens.ids:
            entry["vocab_size"] = part.get_input_embeddings().weight.shape[0]
            part = write_signal_rows(part, model.signal_tokens, (model.token_ids or {}).values())
        entry["fingerprint"] = fingerprint(part)
        if source_of(part) is None or not model.sources.supply(name, part_modules(model)[name], entry):
            entry["source"] = None
            _save_part(part, folder / "parts" / name)
        if entry["adapter"]:
            part.save_pretrained(folder / "adapters" / name, save_embedding_layers=False)
    if merge and model.tokenizer is not None and (folder / "parts/language_model").is_dir():
        model.tokenizer.save_pretrained(folder / "parts/language_model")
    config.save_pretrained(folder)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in own_tensors(model).items()}
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def from_pretrained(
    cls: type[C],
    folder: str | Path,
    *,
    projections: Mapping[str, nn.Module] | None = None,
    callbacks: Mapping[str, Mapping[str, Callable]] | None = None,
    dtype: Any = None,
    **init_options: Any,
) -> C:
    """Give a saved composition back, tensors strict and frozen parts verified.

    Args:
        folder: what `save_pretrained` wrote.
        projections: `{"<key>_projector": module}` for projectors that wrap a module of your own.
        callbacks: `{"<key>_encoder": {"postprocess_projector_callback": function, …}}`; functions cannot be saved.
        dtype: only "auto", which transformers' pipelines give: each part has its own.
        init_options: `preprocess_llm_callback` of `MultimodalModel`. What transformers' auto classes add is
            left aside: the folder is local, and its own config stands.

    Raises:
        InputError: no such folder; callbacks that the saved model had are not given; a part that changed at its
            source; tensors missing, unexpected or of another shape, all by name.
    """
    if dtype not in (None, "auto"):
        raise InputError(
            f"dtype={dtype} cannot be set for all parts at once; each is loaded in the dtype that config.json names"
        )
    init_options = {name: value for name, value in init_options.items() if name not in AUTO_ARGUMENTS}
    folder = Path(folder)
    config = read_config(folder)
    callbacks = callbacks or {}
    check_callbacks(folder, config, callbacks, init_options)
    parts = {name: _load_part(folder, name, entry) for name, entry in part_entries(config).items()}
    projections = projections or {}
    encoders = {
        key: ModalEncoderModule(
            parts[f"{key}_encoder"],
            projector=MultimodalProjector(
                MultimodalProjectorConfig(**entry["projector"]), projections.get(f"{key}_projector")
            ),
            additional_args=entry["additional_args"],
            **callbacks.get(f"{key}_encoder", {}),
            modality=entry["modality"],
            callbacks=build_callback(entry["saved_callbacks"]),
        )
        for key, entry in config.encoders.items()
    }
    decoders = {
        key: ModalDecoderModule(
            parts[f"{key}_decoder"],
            projector=OutputProjector(
                OutputProjectorConfig(**entry["projector"]), projections.get(f"{key}_output_projector")
            ),
            num_signal_tokens=entry["num_signal_tokens"],
            hidden_layer=entry["hidden_layer"],
            modality=entry["modality"],
            signal=entry["signal"],
            defaults=entry.get("defaults"),
        )
        for key, entry in config.decoders.items()
    }
    llm_callback = config.preprocess_llm_callback
    if isinstance(llm_callback, dict):
        init_options = {"preprocess_llm_callback": build_callback(llm_callback)} | init_options
    model = cls(encoders, parts["language_model"], decoders, **init_options)
    load_own_tensors(model, folder)
    if config.signal_token_ids:
        model.signal_tokens.set_ids(config.signal_token_ids)
    model.set_token_ids(config.token_ids)
    if (folder / "tokenizer_config.json").is_file():
        model.tokenizer = AutoTokenizer.from_pretrained(folder)
    return model.eval()


def load_own_tensors(model: Composition, folder: str | Path, *, may_lack: tuple[str, ...] = ()) -> None:
    """Load `model.safetensors` strictly.

    Args:
        folder: a saved composition.
        may_lack: prefixes of tensors that the file need not have: those of parts that are new in this model.

    Raises:
        InputError: tensors that are missing, unexpected or of another shape, all by name.
    """
    path = Path(folder) / TENSORS
    if not path.is_file():
        raise InputError(f"{folder} has no {TENSORS}; expected a folder written by save_pretrained")
    try:
        found = load_file(path)
    except Exception as error:  # safetensors raises its own type, which it does not export
        raise InputError(f"{path} cannot be read as safetensors: {error}") from error
    check_tensors(str(path), own_tensors(model), found, may_lack)
    model.load_state_dict(found, strict=False)


def check_callbacks(
    folder: Path, config: MultimodalConfig, callbacks: Mapping[str, Mapping], init_options: Mapping[str, Any]
) -> None:
    """Callbacks cannot be saved: a model that had some must be given them again, or it would be another model."""
    lacking = [
        f"callbacks={{'{key}_encoder': {{'{name}': …}}}}"
        for key, entry in config.encoders.items()
        for name in entry.get("callbacks", [])
        if name not in callbacks.get(f"{key}_encoder", {})
    ]
    if config.preprocess_llm_callback is True and init_options.get("preprocess_llm_callback") is None:
        lacking.append("preprocess_llm_callback=…")
    if lacking:
        raise InputError(
            f"the model in {folder} was saved with callbacks, which cannot be saved; give them to from_pretrained "
            f"again: {', '.join(lacking)}"
        )


def check_tensors(
    where: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor], may_lack: tuple[str, ...] = ()
) -> None:
    """Raise one `InputError` that lists every missing, unexpected and mis-shaped tensor."""
    missing = sorted(n for n in set(expected) - set(found) if not n.startswith(may_lack or ("\0",)))
    unexpected = sorted(set(found) - set(expected))
    reshaped = [
        f"{n} is {tuple(found[n].shape)}, expected {tuple(expected[n].shape)}"
        for n in sorted(set(found) & set(expected))
        if found[n].shape != expected[n].shape
    ]
    faults = [
        f"{label}: {', '.join(names)}"
        for label, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        if names
    ]
    if faults:
        raise InputError(
            f"{where} does not fit this model ({'; '.join(faults)}); it is of a model with other parts or sizes"
        )


def part_modules(model: Composition) -> dict[str, nn.Module]:
    """The pretrained parts by name."""
    return {
        **{f"{key}_encoder": encoder.module for key, encoder in model.encoders.items()},
        "language_model": model.language_model,
        **{f"{key}_decoder": decoder.module for key, decoder in model.decoders.items()},
    }


def part_entries(config: MultimodalConfig) -> dict[str, dict[str, Any]]:
    """The config's entry of each part, by the same names as `part_modules`."""
    return {
        **{f"{key}_encoder": entry for key, entry in config.encoders.items()},
        "language_model": config.language_model,
        **{f"{key}_decoder": entry for key, entry in config.decoders.items()},
    }


def read_config(folder: Path) -> MultimodalConfig:
    """The composition's config, or an `InputError` that says what the folder is not."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} holds no saved model: there is no config.json; expected a run's final/ folder")
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if content.get("model_type") != MultimodalConfig.model_type:
        raise InputError(
            f"{path} describes a {content.get('model_type')!r} model; expected {MultimodalConfig.model_type!r}, "
            "as in a run's final/ folder"
        )
    if content.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path} has format_version {content.get('format_version')}; this version of anygpt reads {FORMAT_VERSION}"
        )
    return MultimodalConfig(**content)


def _save_part(part: nn.Module, folder: Path) -> None:
    if isinstance(part, DiffusionDecoder):
        part.save_pretrained(folder)
        return
    inner, state = base_model(part), own_state(part)
    if isinstance(inner, VideoEncoder):
        prefix = f"{VideoEncoder.base_model_prefix}."
        inner, state = inner.image_encoder, {name.removeprefix(prefix): t for name, t in state.items()}
    inner.save_pretrained(folder, state_dict=state)


def _load_part(folder: Path, name: str, entry: dict[str, Any]) -> nn.Module:
    if entry["source"] is not None:
        part = _load_source(Source(**entry["source"]), entry)
    else:
        part = _load_own(folder / "parts" / name, entry)
    actual = fingerprint(part)
    if actual != entry["fingerprint"]:
        where = entry["source"]["path"] if entry["source"] else str(folder / "parts" / name)
        raise InputError(
            f"the {name} at {where!r} is not the one that {folder} was trained with (its tensors have fingerprint "
            f"{actual}, expected {entry['fingerprint']}); restore the original, or train again on the new one"
        )
    part.anygpt_fingerprint = actual
    if entry.get("vocab_size"):  # the rows beyond are the signal tokens', which `SignalTokens` lends it
        part.resize_token_embeddings(entry["vocab_size"], mean_resizing=False)
    if entry["adapter"]:
        part = _load_adapter(part, folder / "adapters" / name)
    return part


def _load_source(source: Source, entry: dict[str, Any]) -> nn.Module:
    cls = import_class(entry["class"])
    if issubclass(cls, DiffusionDecoder):
        return load_decoder(source)
    if "modality" in entry:
        return load_encoder(source, entry["modality"])
    return load_language_model(source)


def _load_own(folder: Path, entry: dict[str, Any]) -> nn.Module:
    if not folder.is_dir():
        raise InputError(f"the checkpoint lacks its folder {folder}, which should hold a {entry['class']}")
    cls = import_class(entry["class"])
    if issubclass(cls, DiffusionDecoder):
        return load_decoder(Source(str(folder)))
    if cls is VideoEncoder:
        frames = {name: entry[name] for name in VideoEncoder.settings if name in entry}
        part = load_encoder(Source(str(folder), **frames), VIDEO.name)
    else:
        part = cls.from_pretrained(folder, use_safetensors=True, dtype="auto")
    # It was saved whole because it has no source, and the folder that it now comes from is not one either.
    part.anygpt_source = None
    return part


def _load_adapter(part: nn.Module, folder: Path) -> PeftModel:
    """Wrap a part with its saved adapter, strictly: PEFT itself only warns about tensors that do not match."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise InputError(f"the checkpoint lacks its adapter {path}")
    try:
        wrapped = PeftModel.from_pretrained(part, folder, is_trainable=True)
    except RuntimeError as error:  # sizes that do not fit
        raise InputError(f"{path} does not fit the part that it adapts: {' '.join(str(error).split())}") from error
    check_tensors(str(path), get_peft_model_state_dict(wrapped, save_embedding_layers=False), load_file(path))
    return wrapped
