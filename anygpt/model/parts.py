"""Pretrained parts in memory: their names, sources, tensors and callbacks, as a saved composition describes them."""

import importlib
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from anygpt.composition import Composition
from anygpt.decoders.base import DiffusionDecoder
from anygpt.encoders.callbacks import SavedCallback
from anygpt.encoders.module import base_model
from anygpt.encoders.video import VideoEncoder
from anygpt.errors import InputError
from anygpt.parts.manifest import fingerprint_tensors
from anygpt.parts.source import MEMORY, Source

KINDS = ("encoder", "decoder", "tokenizer")
# Classes named by a checkpoint's config are imported from these packages only.
TRUSTED_PACKAGES = ("transformers", "diffusers", "anygpt")
MOVED = {
    "anygpt.encoders.selection": "anygpt.encoders.callbacks",
    "anygpt.model.vlm.llava": "anygpt.encoders.callbacks",
    "anygpt.model.vlm.qwen2_vl": "anygpt.model.vlm",
    "anygpt.decoders.sdxl": "anygpt.decoders.stable_diffusion",
    "anygpt.decoders.sd3": "anygpt.decoders.stable_diffusion",
    "anygpt.decoders.zeroscope": "anygpt.decoders.videos",
    "anygpt.decoders.ltx": "anygpt.decoders.videos",
    "anygpt.decoders.wan": "anygpt.decoders.videos",
    "anygpt.decoders.audioldm2": "anygpt.decoders.audioldm",
}
"""Modules that older checkpoints name."""


def part_modules(model: Composition) -> dict[str, nn.Module]:
    modules = {f"{key}_{kind}": one.module for kind in KINDS for key, one in getattr(model, f"{kind}s").items()}
    return {"language_model": model.language_model, **modules}


def own_tensors(model: Composition) -> dict[str, torch.Tensor]:
    """Tensors that belong to no pretrained part: projectors, signal tokens, layer mixes."""
    prefixes = tuple(f"{name}." if name == "language_model" else f"{name}.module." for name in part_modules(model))
    return {n: tensor.detach() for n, tensor in model.state_dict().items() if not n.startswith(prefixes)}


def is_peft(part: Any) -> bool:
    return isinstance(part, PeftModel)


def adapter_of(part: nn.Module) -> PeftModel | None:
    """PEFT's wrapper of a part, or of a decoder's denoiser; None without adapters."""
    if isinstance(part, DiffusionDecoder):
        return part.denoiser_adapter
    return part if is_peft(part) else None


def check_adapter(part: nn.Module) -> None:
    """Raise an `InputError` for PEFT adapters that a checkpoint could not hold."""
    adapters = {} if (wrapped := adapter_of(part)) is None else wrapped.peft_config
    if set(adapters) - {"default"}:
        raise InputError(
            f"a part has the PEFT adapters {', '.join(adapters)}; a composition keeps one, named 'default': merge the "
            "others into the part (merge_and_unload), or leave adapter_name out"
        )
    if any(getattr(config, "trainable_token_indices", None) for config in adapters.values()):
        raise InputError(
            "an adapter has trainable_token_indices, which a checkpoint does not keep: the tokens that a composition "
            "adds have rows of their own (signal tokens)"
        )


def adapter_name(part: str) -> str:
    """Name of a part's adapter in `adapters/`: a decoder's is its denoiser's."""
    return part.removesuffix("_decoder") + "_denoiser" if part.endswith("_decoder") else part


def source_of(part: nn.Module) -> Source | None:
    """Where a part was loaded from, or None if unknown; checkpoints then save the part whole."""
    part = base_model(part)
    options = {name: getattr(part, name) for name in MEMORY if hasattr(part, name)}
    if hasattr(part, "anygpt_source"):
        return part.anygpt_source and replace(part.anygpt_source, **options)
    path = getattr(part.pipeline if isinstance(part, DiffusionDecoder) else part, "name_or_path", None)
    if not path:
        return None
    frames = VideoEncoder.settings if isinstance(part, VideoEncoder) else ()
    revision = getattr(getattr(part, "config", None), "_commit_hash", None)
    options |= {name: getattr(part.config, name) for name in frames}
    return Source(str(path), revision=revision, dtype=next(part.parameters()).dtype, **options)


def own_state(part: nn.Module) -> dict[str, torch.Tensor]:
    """A part's tensors under their original names, without PEFT's adapters and wrappers."""
    adapter = adapter_of(part)
    adapters = set() if adapter is None else set(adapter.peft_config)
    return {
        unwrapped(name): tensor
        for name, tensor in base_model(part).state_dict().items()
        if adapters.isdisjoint(name.split("."))
    }


def unwrapped(name: str) -> str:
    """A tensor's name without PEFT's wrappers."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def fingerprint(part: nn.Module) -> str:
    """Hash of all parameters and buffers of a part without its adapters."""
    return fingerprint_tensors(own_state(part))


def class_name(part: nn.Module) -> str:
    """The dotted path of a part's class, inside any PEFT wrapper."""
    cls = type(base_model(part))
    return f"{cls.__module__}.{cls.__qualname__}"


def import_class(name: str) -> Any:
    """The class at a dotted path, also one that has moved since; an `InputError` outside `TRUSTED_PACKAGES`."""
    module, _, attribute = name.rpartition(".")
    if module.split(".")[0] not in TRUSTED_PACKAGES:
        raise InputError(f"the checkpoint names the class {name!r}, which is not of {', '.join(TRUSTED_PACKAGES)}")
    return getattr(importlib.import_module(MOVED.get(module, module)), attribute)


def callback_dict(callback: Any) -> dict[str, Any] | None:
    """The saved form of a callback; None for a plain function or no callback."""
    return callback.to_dict() if isinstance(callback, SavedCallback) else None


def build_callback(entry: dict[str, Any] | None) -> Any:
    if entry is None:
        return None
    cls = import_class(entry["class"])
    if not issubclass(cls, SavedCallback):
        raise InputError(f"the checkpoint names {entry['class']!r} as a callback, but it is none")
    return cls(**entry["settings"])
