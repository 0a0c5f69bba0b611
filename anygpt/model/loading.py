"""Strict loading of a composition from a folder or the hub; `anygpt.model.saving` describes the folder."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from anygpt.composition import Composition
from anygpt.decoders.base import DiffusionDecoder, load_decoder
from anygpt.decoders.module import ModalDecoderModule
from anygpt.decoders.projector import OutputProjector, OutputProjectorConfig
from anygpt.encoders.families import FAMILIES, UNKNOWN
from anygpt.encoders.loading import load_encoder
from anygpt.encoders.module import ModalEncoderModule
from anygpt.encoders.projector import MultimodalProjector, MultimodalProjectorConfig
from anygpt.encoders.video import VideoEncoder
from anygpt.errors import InputError, refusing
from anygpt.model.configuration import FORMAT_VERSION, OF_DECODERS, MultimodalConfig
from anygpt.model.language_models import load_language_model, load_tokenizer
from anygpt.model.parts import adapter_name, build_callback, fingerprint, import_class, own_tensors, source_of
from anygpt.parts.files import Place, find_weights, open_composition, wants_shapes_only
from anygpt.parts.networks import load_network
from anygpt.parts.source import Source
from anygpt.tokenizers.base import MediaTokenizer, load_media_tokenizer
from anygpt.tokenizers.module import ModalTokenizerModule

HUB_ARGUMENTS = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download")
# Arguments that transformers' auto classes and pipelines pass to every `from_pretrained`, and that are ignored here.
AUTO_ARGUMENTS = {"_commit_hash", "_from_auto", "_from_pipeline", "adapter_kwargs", "code_revision", "config"}
AUTO_ARGUMENTS |= {"proxies", "trust_remote_code"}


def from_pretrained(
    cls: type[Composition],
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
        folder: a folder written by `save_pretrained`, or the hub id of a model uploaded by `push_to_hub`.
        projections: `{"<key>_projector": module}` for projectors that wrap a module of your own.
        callbacks: `{"<key>_encoder": {"postprocess_projector_callback": function, …}}`; functions cannot be saved.
        dtype, torch_dtype: dtype of the whole model; each part's own if None or "auto".
        device_map: one device for all, or "auto" for the accelerator if there is one.
        output_loading_info: return `(model, info)` as transformers does; the lists in `info` are always empty.
        preprocess_llm_callback: argument of `MultimodalModel`, needed if the saved model's was a function.
        hub: `revision`, `token`, `cache_dir`, … for a hub id. What transformers' auto classes add is ignored.

    Raises:
        InputError: nothing at `folder`; a callback of the saved model is not given; a part has changed at its source;
            tensors, by name, that are missing, unexpected, mis-shaped, of another kind of dtype or not finite.
    """
    hub = {name: value for name, value in hub.items() if name not in AUTO_ARGUMENTS}
    if unknown := sorted(set(hub) - set(HUB_ARGUMENTS)):
        raise InputError(
            f"from_pretrained has no argument {unknown[0]!r}; beside its own it takes {', '.join(HUB_ARGUMENTS)}"
        )
    dtype, device = _dtype(dtype if torch_dtype is None else torch_dtype), _device(device_map)
    folder = open_composition(folder, **hub)
    config = read_config(folder)
    callbacks, projections = callbacks or {}, projections or {}
    _check_callbacks(folder, config, callbacks, preprocess_llm_callback)
    parts = {name: _load_part(folder, name, entry) for name, entry in config.parts.items()}
    encoders = {}
    for key, entry in config.encoders.items():
        projector = MultimodalProjectorConfig(**entry["projector"])
        encoders[key] = ModalEncoderModule(
            parts[f"{key}_encoder"],
            MultimodalProjector(projector, projections.get(f"{key}_projector")),
            entry["additional_args"],
            **callbacks.get(f"{key}_encoder", {}),
            modality=entry["modality"],
            callbacks=build_callback(entry["saved_callbacks"]),
        )
    decoders = {}
    for key, entry in config.decoders.items():
        projector = OutputProjectorConfig(**entry["projector"])
        decoders[key] = ModalDecoderModule(
            parts[f"{key}_decoder"],
            projector=OutputProjector(projector, projections.get(f"{key}_output_projector")),
            **{name: entry.get(name) for name in OF_DECODERS},
        )
    tokenizers = {
        key: ModalTokenizerModule(parts[f"{key}_tokenizer"], entry["row_ends"], entry["defaults"])
        for key, entry in config.tokenizers.items()
    }
    if isinstance(config.preprocess_llm_callback, dict) and preprocess_llm_callback is None:
        preprocess_llm_callback = build_callback(config.preprocess_llm_callback)
    composed = (encoders, parts["language_model"], decoders, tokenizers)
    model = cls(*composed, preprocess_llm_callback=preprocess_llm_callback)
    load_own_tensors(model, folder)
    if config.signal_token_ids:
        model.signal_tokens.set_ids(config.signal_token_ids)
    model.set_token_ids(config.token_ids)
    source = source_of(model.language_model)
    if (folder / "tokenizer_config.json").is_file():
        model.tokenizer = load_tokenizer(folder)
    elif source is not None:  # saved without its processor
        with suppress(InputError):  # only decoding text needs it, and then says what is missing
            model.tokenizer = load_tokenizer(source)
    model.config.trained = config.trained
    model = model.eval().to(device=device, dtype=dtype)
    info: dict[str, Any] = {name: [] for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")}
    return (model, info) if output_loading_info else model


def _dtype(dtype: Any) -> torch.dtype | None:
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
    if not isinstance(dtype, torch.dtype) and dtype not in (None, "auto"):
        raise InputError(f"dtype is {dtype!r}; expected a torch dtype, its name, or 'auto'")
    return dtype if isinstance(dtype, torch.dtype) else None


def _device(device_map: Any) -> torch.device | None:
    """The device that a `device_map` names; None leaves the model where it is."""
    if isinstance(device_map, Mapping) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    advice = (
        "; a composition goes to one device ('cuda:0', …) or to the accelerator ('auto'); to spread it, shard it with "
        "FSDP (configs/accelerate)"
    )
    with refusing(f"device_map is {device_map!r}", (RuntimeError, TypeError), advice):
        return None if device_map is None else torch.device(device_map)


def read_config(folder: Path) -> MultimodalConfig:
    """The composition's config; an `InputError` if it is missing, damaged, of another model type or version."""
    path = folder / "config.json"
    content = Place(str(folder)).json(path.name) if path.is_file() else None
    if content is None:
        raise InputError(f"{folder} holds no saved model: there is no config.json; expected a run's final/ folder")
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


def _check_callbacks(folder: Path, config: MultimodalConfig, callbacks: Mapping[str, Mapping], of_llm: Any) -> None:
    lacking = [
        f"callbacks={{'{key}_encoder': {{'{name}': …}}}}"
        for key, entry in config.encoders.items()
        for name in entry.get("callbacks", [])
        if name not in callbacks.get(f"{key}_encoder", {})
    ]
    if config.preprocess_llm_callback is True and of_llm is None:
        lacking.append("preprocess_llm_callback=…")
    if lacking:
        raise InputError(
            f"the model in {folder} was saved with callbacks, which cannot be saved; give them to from_pretrained "
            f"again: {', '.join(lacking)}"
        )


def load_own_tensors(model: Composition, folder: str | Path) -> None:
    """Load the tensors of a saved composition that belong to no pretrained part, in the file's dtypes; an `InputError`
    names those that are missing, unexpected, mis-shaped, of another kind of dtype or not finite."""
    weights = find_weights(Place(str(folder)))
    found = {name: tensor[...] for name, tensor in weights.tensors()}
    _check_tensors(weights.entry, own_tensors(model), found)
    _cast(model, {name: tensor.dtype for name, tensor in found.items()})
    model.load_state_dict(found, strict=False)


def _cast(module: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name in dtypes:
            tensor.data = tensor.data.to(dtypes[name])


def _check_tensors(where: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise one `InputError` that lists every missing, unexpected, mis-shaped, mistyped and non-finite tensor."""
    pairs = {name: (found[name], expected[name]) for name in sorted(found.keys() & expected.keys())}
    faults = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{n} is {tuple(a.shape)}, expected {tuple(b.shape)}" for n, (a, b) in pairs.items() if a.shape != b.shape
        ],
        "of another kind": [
            f"{n} is {a.dtype}, expected {b.dtype}"
            for n, (a, b) in pairs.items()
            if a.is_floating_point() != b.is_floating_point()
        ],
    }
    if said := [f"{label}: {', '.join(names)}" for label, names in faults.items() if names]:
        raise InputError(
            f"{where} does not fit this model ({'; '.join(said)}); it belongs to a model with other parts or sizes"
        )
    _check_finite(where, found)


def _check_finite(where: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise an `InputError` that names tensors with NaN or infinite values."""
    bad = [name for name, x in tensors.items() if x.is_floating_point() and not bool(x.isfinite().all())]
    if bad:
        raise InputError(
            f"{where} holds tensors that are not finite: {', '.join(bad)}; take an earlier checkpoint of its run"
        )


def _load_part(folder: Path, name: str, entry: dict[str, Any]) -> nn.Module:
    if entry["source"] is None:
        where = folder / "parts" / name
        part = _load_own(where, entry)
        if not wants_shapes_only():
            _check_finite(where, part.state_dict())
            part.anygpt_fingerprint = fingerprint(part)
    else:
        where = entry["source"]["path"]
        part = load_source(entry)
    if getattr(part, "anygpt_fingerprint", entry["fingerprint"]) != entry["fingerprint"]:  # unknown on the meta device
        raise InputError(
            f"the {name} at {str(where)!r} is not the one that {folder} was trained with (its tensors have fingerprint "
            f"{part.anygpt_fingerprint}, expected {entry['fingerprint']}); restore the original, or train again on the "
            "new one"
        )
    if entry.get("vocab_size"):  # the rows beyond it belong to signal tokens, which `SignalTokens` supplies
        part.resize_token_embeddings(entry["vocab_size"], mean_resizing=False)
    if not entry["adapter"]:
        return part
    where = folder / "adapters" / adapter_name(name)
    if not isinstance(part, DiffusionDecoder):
        return _load_adapter(part, where)
    part.set_adapter(_load_adapter(part.denoiser, where))
    return part


def load_source(entry: dict[str, Any]) -> nn.Module:
    """Load a part from its source, given its entry in the config."""
    source = Source(**entry["source"])
    if issubclass(import_class(entry["class"]), MediaTokenizer):
        return load_media_tokenizer(source, entry["modality"])
    if issubclass(import_class(entry["class"]), DiffusionDecoder):
        return load_decoder(source)
    return load_encoder(source, entry["modality"]) if "modality" in entry else load_language_model(source)


def _load_own(folder: Path, entry: dict[str, Any]) -> nn.Module:
    if not folder.is_dir():
        raise InputError(f"the checkpoint lacks its folder {folder}, which should hold a {entry['class']}")
    cls, dtypes = import_class(entry["class"]), entry.get("dtypes", {})
    several = "float64" if "float64" in dtypes else "float32"  # represents the narrower dtypes exactly
    widest = several if len(dtypes) > 1 else next(iter(dtypes), None)
    if issubclass(cls, DiffusionDecoder):
        part: nn.Module = load_decoder(folder, dtype=widest)
    elif issubclass(cls, MediaTokenizer):
        part = load_media_tokenizer(folder, entry["modality"], dtype=widest)
    elif cls is VideoEncoder:
        settings = {name: entry[name] for name in VideoEncoder.settings if name in entry}
        part = load_encoder(folder, entry["modality"], dtype=widest, **settings)
    else:
        config, place = cls.config_class.from_pretrained(folder), Place(str(folder))
        optional = FAMILIES.get(config.model_type, UNKNOWN).optional
        part = load_network(cls, config, place, optional=optional, dtype=getattr(torch, widest or "", None))
    _cast(part, {name: getattr(torch, dtype) for dtype, names in dtypes.items() for name in names})
    part.anygpt_source = None  # a checkpoint's folder is no source: save the part whole again
    return part


def _load_adapter(part: nn.Module, folder: Path) -> PeftModel:
    """Load a saved adapter strictly; PEFT itself only warns about tensors that do not match."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise InputError(f"the checkpoint lacks its adapter {path}")
    stored = load_file(path)
    with refusing(f"{path} does not fit the part that it adapts", (RuntimeError,)):  # such as other sizes
        wrapped = PeftModel.from_pretrained(part, folder, is_trainable=True)
    _check_tensors(path, get_peft_model_state_dict(wrapped, save_embedding_layers=False), stored)
    for name, parameter in wrapped.named_parameters():  # PEFT casts adapters to float32
        saved = stored.get(name.replace(".default", ""))
        if saved is not None:
            parameter.data = parameter.data.to(saved.dtype)
    return wrapped
