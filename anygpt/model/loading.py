"""Strict loading of a composition from a folder or the hub; `anygpt.model.saving` describes the folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from anygpt.composition import Composition
from anygpt.decoders.base import DiffusionDecoder
from anygpt.decoders.module import ModalDecoderModule
from anygpt.decoders.projector import OutputProjector, OutputProjectorConfig
from anygpt.encoders.module import ModalEncoderModule
from anygpt.encoders.projector import MultimodalProjector, MultimodalProjectorConfig
from anygpt.encoders.video import VideoEncoder
from anygpt.errors import InputError
from anygpt.model.configuration import FORMAT_VERSION, MultimodalConfig
from anygpt.model.parts import (
    Source,
    build_callback,
    fingerprint,
    import_class,
    load_decoder,
    load_encoder,
    load_language_model,
)
from anygpt.parts.files import Place, find_weights, open_composition
from anygpt.parts.networks import load_network

# Arguments that transformers' auto classes and pipelines pass to every `from_pretrained`, and that are ignored here.
AUTO_ARGUMENTS = frozenset(
    [
        "_commit_hash",
        "_from_auto",
        "_from_pipeline",
        "adapter_kwargs",
        "code_revision",
        "config",
        "proxies",
        "trust_remote_code",
    ]
)
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download")

C = TypeVar("C", bound=Composition)


def own_tensors(model: Composition) -> dict[str, Tensor]:
    """Tensors that belong to no pretrained part: projectors, signal tokens, layer mixes."""
    prefixes = tuple(f"{name}." if name == "language_model" else f"{name}.module." for name in part_modules(model))
    return {n: tensor.detach() for n, tensor in model.state_dict().items() if not n.startswith(prefixes)}


def from_pretrained(
    cls: type[C],
    folder: str | Path,
    *,
    projections: Mapping[str, nn.Module] | None = None,
    callbacks: Mapping[str, Mapping[str, Callable]] | None = None,
    dtype: str | torch.dtype | None = None,
    torch_dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    output_loading_info: bool = False,
    preprocess_llm_callback: Callable[..., dict[str, Any]] | None = None,
    **hub: Any,
) -> Any:
    """Load a saved composition, with strict tensors and verified frozen parts.

    Args:
        folder: written by `save_pretrained`, or the hub id of a model uploaded by `push_to_hub`.
        projections: `{"<key>_projector": module}` for projectors that wrap a module of your own.
        callbacks: `{"<key>_encoder": {"postprocess_projector_callback": function, …}}`; functions cannot be saved.
        dtype, torch_dtype: of the whole model; each part's own if None or "auto".
        device_map: one device for all, or "auto" for the accelerator if there is one.
        output_loading_info: return `(model, info)` as transformers does; the lists in `info` are always empty.
        preprocess_llm_callback: of `MultimodalModel`, if the saved model had a function.
        hub: `revision`, `token`, `cache_dir`, … of a hub id. Arguments that transformers' auto classes add are ignored.

    Raises:
        InputError: nothing at `folder`; a callback of the saved model is not given; a part has changed at its source;
            tensors that are missing, unexpected, mis-shaped, of another kind of dtype or not finite, by name.
    """
    hub = {name: value for name, value in hub.items() if name not in AUTO_ARGUMENTS}
    if unknown := sorted(set(hub) - set(HUB_ARGUMENTS)):
        raise InputError(
            f"from_pretrained has no argument {unknown[0]!r}; beside its own it takes {', '.join(HUB_ARGUMENTS)}"
        )
    dtype = dtype if torch_dtype is None else torch_dtype
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
    if not isinstance(dtype, torch.dtype) and dtype not in (None, "auto"):
        raise InputError(f"dtype is {dtype!r}; expected a torch dtype, its name, or 'auto'")
    device = _device(device_map)
    folder = open_composition(folder, **hub)
    config = read_config(folder)
    callbacks = callbacks or {}
    options = {"preprocess_llm_callback": preprocess_llm_callback} if preprocess_llm_callback else {}
    check_callbacks(folder, config, callbacks, options)
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
        options = {"preprocess_llm_callback": build_callback(llm_callback)} | options
    model = cls(encoders, parts["language_model"], decoders, **options)
    load_own_tensors(model, folder, as_stored=True)
    if config.signal_token_ids:
        model.signal_tokens.set_ids(config.signal_token_ids)
    model.set_token_ids(config.token_ids)
    if (folder / "tokenizer_config.json").is_file():
        model.tokenizer = AutoTokenizer.from_pretrained(folder)
    model.config.trained = config.trained
    model = model.eval().to(device=device, dtype=dtype if isinstance(dtype, torch.dtype) else None)
    info: dict[str, Any] = {name: [] for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")}
    return (model, info) if output_loading_info else model


def _device(device_map: Any) -> torch.device | None:
    """The device that a `device_map` names; None leaves the model where it is."""
    if isinstance(device_map, Mapping) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        return None if device_map is None else torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"device_map is {device_map!r}; a composition goes to one device ('cuda:0', …) or to the accelerator "
            "('auto'); to spread it, shard it with FSDP (configs/accelerate)"
        ) from error


def load_own_tensors(
    model: Composition, folder: str | Path, *, may_lack: tuple[str, ...] = (), as_stored: bool = False
) -> None:
    """Load the tensors that belong to no pretrained part, strictly.

    Args:
        folder: a saved composition.
        may_lack: prefixes of tensors that the file may lack, because their parts are new in this model.
        as_stored: take the file's dtypes too.

    Raises:
        InputError: see `check_tensors`.
    """
    weights = find_weights(Place(str(folder)))
    found = {name: tensor[...] for name, tensor in weights.tensors()}
    check_tensors(str(weights.entry), own_tensors(model), found, may_lack)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()] if as_stored else []:
        if name in found:
            tensor.data = tensor.data.to(found[name].dtype)
    model.load_state_dict(found, strict=False)


def check_callbacks(
    folder: Path, config: MultimodalConfig, callbacks: Mapping[str, Mapping], init_options: Mapping[str, Any]
) -> None:
    """Raise an `InputError` if a function that the saved model had as a callback is not given again."""
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
    """Raise one `InputError` that lists every missing, unexpected, mis-shaped, mistyped and non-finite tensor."""
    both = sorted(set(found) & set(expected))
    faults = {
        "missing": sorted(n for n in set(expected) - set(found) if not n.startswith(may_lack or ("\0",))),
        "unexpected": sorted(set(found) - set(expected)),
        "of another shape": [
            f"{n} is {tuple(found[n].shape)}, expected {tuple(expected[n].shape)}"
            for n in both
            if found[n].shape != expected[n].shape
        ],
        "of another kind": [
            f"{n} is {found[n].dtype}, expected {expected[n].dtype}"
            for n in both
            if found[n].is_floating_point() != expected[n].is_floating_point()
        ],
    }
    said = [f"{label}: {', '.join(names)}" for label, names in faults.items() if names]
    if said:
        raise InputError(
            f"{where} does not fit this model ({'; '.join(said)}); it is of a model with other parts or sizes"
        )
    check_finite(where, found)


def check_finite(where: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise an `InputError` that names tensors with NaN or infinite values."""
    bad = [name for name, x in tensors.items() if x.is_floating_point() and not bool(x.isfinite().all())]
    if bad:
        raise InputError(
            f"{where} holds tensors that are not finite: {', '.join(bad)}; take an earlier checkpoint of its run"
        )


def part_modules(model: Composition) -> dict[str, nn.Module]:
    return {
        **{f"{key}_encoder": encoder.module for key, encoder in model.encoders.items()},
        "language_model": model.language_model,
        **{f"{key}_decoder": decoder.module for key, decoder in model.decoders.items()},
    }


def part_entries(config: MultimodalConfig) -> dict[str, dict[str, Any]]:
    """The config's entries of the parts, named as in `part_modules`."""
    return {
        **{f"{key}_encoder": entry for key, entry in config.encoders.items()},
        "language_model": config.language_model,
        **{f"{key}_decoder": entry for key, entry in config.decoders.items()},
    }


def read_config(folder: Path) -> MultimodalConfig:
    """The composition's config; an `InputError` if it is missing, damaged, of another model type or version."""
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


def _load_part(folder: Path, name: str, entry: dict[str, Any]) -> nn.Module:
    whole = entry["source"] is None
    part = _load_own(folder / "parts" / name, entry) if whole else load_source(Source(**entry["source"]), entry)
    if whole:
        check_finite(str(folder / "parts" / name), part.state_dict())
    actual = fingerprint(part)
    if actual != entry["fingerprint"]:
        where = str(folder / "parts" / name) if whole else entry["source"]["path"]
        raise InputError(
            f"the {name} at {where!r} is not the one that {folder} was trained with (its tensors have fingerprint "
            f"{actual}, expected {entry['fingerprint']}); restore the original, or train again on the new one"
        )
    part.anygpt_fingerprint = actual
    if entry.get("vocab_size"):  # the rows beyond it belong to signal tokens, which `SignalTokens` supplies
        part.resize_token_embeddings(entry["vocab_size"], mean_resizing=False)
    if entry["adapter"]:
        part = _load_adapter(part, folder / "adapters" / name)
    return part


def load_source(source: Source, entry: dict[str, Any]) -> nn.Module:
    cls = import_class(entry["class"])
    if issubclass(cls, DiffusionDecoder):
        return load_decoder(source)
    if "modality" in entry:
        return load_encoder(source, entry["modality"])
    return load_language_model(source)


def _load_own(folder: Path, entry: dict[str, Any]) -> nn.Module:
    if not folder.is_dir():
        raise InputError(f"the checkpoint lacks its folder {folder}, which should hold a {entry['class']}")
    cls, dtypes = import_class(entry["class"]), entry.get("dtypes", {})
    several = "float64" if "float64" in dtypes else "float32"  # represents the narrower dtypes exactly
    widest = several if len(dtypes) > 1 else next(iter(dtypes), None)
    if issubclass(cls, DiffusionDecoder):
        part: nn.Module = load_decoder(Source(str(folder), dtype=widest))
    elif cls is VideoEncoder:
        frames = {name: entry[name] for name in VideoEncoder.settings if name in entry}
        part = load_encoder(Source(str(folder), dtype=widest, **frames), entry["modality"])
    else:
        config = cls.config_class.from_pretrained(folder)
        part = load_network(cls, config, Place(str(folder)), dtype=getattr(torch, widest or "", None))
    for name, tensor in [*part.named_parameters(), *part.named_buffers()]:
        for dtype, names in dtypes.items():
            if name in names:
                tensor.data = tensor.data.to(getattr(torch, dtype))
    part.anygpt_source = None  # the folder of a checkpoint is no source: save the part whole again
    return part


def _load_adapter(part: nn.Module, folder: Path) -> PeftModel:
    """Load a saved adapter strictly; PEFT itself only warns about tensors that do not match."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise InputError(f"the checkpoint lacks its adapter {path}")
    stored = load_file(path)
    try:
        wrapped = PeftModel.from_pretrained(part, folder, is_trainable=True)
    except RuntimeError as error:  # sizes that do not fit
        raise InputError(f"{path} does not fit the part that it adapts: {' '.join(str(error).split())}") from error
    check_tensors(str(path), get_peft_model_state_dict(wrapped, save_embedding_layers=False), stored)
    for name, parameter in wrapped.named_parameters():  # PEFT casts adapters to float32
        saved = stored.get(name.replace(".default", ""))
        if saved is not None:
            parameter.data = parameter.data.to(saved.dtype)
    return wrapped
