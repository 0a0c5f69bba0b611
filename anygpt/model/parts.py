"""Pretrained parts: where they come from, how they are loaded, and how we know that they are still the same.

A part is an encoder, a language model or a diffusion pipeline. It is named by a hub id, a folder, or `zoo:<name>` for
one of the tiny parts of `anygpt.toyworld`. Weights are read from safetensors only; nothing is ever unpickled.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
import xxhash
from peft import PeftModel
from torch import nn

from anygpt.decoders.base import DiffusionDecoder
from anygpt.decoders.loading import load_decoder
from anygpt.encoders.callbacks import SavedCallback
from anygpt.encoders.loading import load_encoder, load_encoder_processor
from anygpt.encoders.module import base_model
from anygpt.encoders.video import VideoEncoder
from anygpt.errors import InputError
from anygpt.model.language_models import load_language_model, load_tokenizer
from anygpt.parts.source import Source

__all__ = [
    "Source",
    "load_decoder",
    "load_encoder",
    "load_encoder_processor",
    "load_language_model",
    "load_tokenizer",
]

# A checkpoint's config names classes; it may name none outside these packages.
TRUSTED_PACKAGES = ("transformers", "diffusers", "anygpt")


def source_of(part: nn.Module) -> Source | None:
    """Where a part was loaded from, or None if nothing can be said: then a checkpoint holds it whole."""
    part = base_model(part)
    if hasattr(part, "anygpt_source"):
        return part.anygpt_source
    path = part.pipeline.name_or_path if isinstance(part, DiffusionDecoder) else part.name_or_path
    if not path:
        return None
    is_video = isinstance(part, VideoEncoder)
    frames = {name: getattr(part.config, name) for name in VideoEncoder.settings} if is_video else {}
    dtype = next(part.parameters()).dtype
    revision = getattr(getattr(part, "config", None), "_commit_hash", None)
    return Source(str(path), revision=revision, dtype=str(dtype).removeprefix("torch."), **frames)


def own_state(part: nn.Module) -> dict[str, torch.Tensor]:
    """A part's own tensors under their own names, without what PEFT put around and between them."""
    adapters = set(part.peft_config) if is_peft(part) else set()
    state = {}
    for name, tensor in base_model(part).state_dict().items():
        if adapters.isdisjoint(name.split(".")):
            state[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = tensor
    return state


def fingerprint(part: nn.Module) -> str:
    """xxh3 over names, shapes, dtypes and bytes of all tensors, buffers included, of a part without its adapters.

    It tells whether a frozen part is the one that the rest was trained with; it is no protection against malice.
    """
    return fingerprint_tensors(own_state(part))


def fingerprint_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """xxh3 over names, shapes, dtypes and bytes."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def class_name(part: nn.Module) -> str:
    """The dotted path of a part's class, behind PEFT."""
    cls = type(base_model(part))
    return f"{cls.__module__}.{cls.__qualname__}"


def import_class(name: str) -> Any:
    """The class of a dotted path, of a trusted package only."""
    module, _, attribute = name.rpartition(".")
    if module.split(".")[0] not in TRUSTED_PACKAGES:
        raise InputError(f"the checkpoint names the class {name!r}, which is not of {', '.join(TRUSTED_PACKAGES)}")
    return getattr(importlib.import_module(module), attribute)


def callback_dict(callback: Any) -> dict[str, Any] | None:
    """The saved form of a callback, or None: of no callback, or of a plain function."""
    return callback.to_dict() if isinstance(callback, SavedCallback) else None


def build_callback(entry: dict[str, Any] | None) -> Any:
    """A callback of its saved form."""
    if entry is None:
        return None
    cls = import_class(entry["class"])
    if not issubclass(cls, SavedCallback):
        raise InputError(f"the checkpoint names {entry['class']!r} as a callback, which it is not")
    return cls(**entry["settings"])


def is_peft(part: nn.Module) -> bool:
    return isinstance(part, PeftModel)


def source_dict(source: Source | None) -> dict[str, Any] | None:
    """A source as JSON, without what is not set."""
    return None if source is None else source.to_dict()
