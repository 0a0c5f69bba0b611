"""Pretrained parts: their sources, loaders and fingerprints.

A part is an encoder, a language model or a diffusion pipeline, named by a hub id, a folder, or `zoo:<name>` for one of
the tiny parts of `anygpt.toyworld`.
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

# Classes named by a checkpoint's config are imported from these packages only.
TRUSTED_PACKAGES = ("transformers", "diffusers", "anygpt")


def source_of(part: nn.Module) -> Source | None:
    """Where a part was loaded from, or None if unknown; checkpoints then save the part whole."""
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
    """A part's tensors under their original names, without PEFT's adapters and wrappers."""
    adapters = set(part.peft_config) if is_peft(part) else set()
    state = {}
    for name, tensor in base_model(part).state_dict().items():
        if adapters.isdisjoint(name.split(".")):
            state[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = tensor
    return state


def fingerprint(part: nn.Module) -> str:
    """The xxh3 hash of all parameters and buffers of a part without its adapters.

    It detects that a frozen part is not the one the rest was trained with; it is not cryptographic.
    """
    return fingerprint_tensors(own_state(part))


def fingerprint_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """The xxh3 hash of tensors' names, shapes, dtypes and bytes."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def class_name(part: nn.Module) -> str:
    """The dotted path of a part's class, inside any PEFT wrapper."""
    cls = type(base_model(part))
    return f"{cls.__module__}.{cls.__qualname__}"


def import_class(name: str) -> Any:
    """The class at a dotted path; an `InputError` outside `TRUSTED_PACKAGES`."""
    module, _, attribute = name.rpartition(".")
    if module.split(".")[0] not in TRUSTED_PACKAGES:
        raise InputError(f"the checkpoint names the class {name!r}, which is not of {', '.join(TRUSTED_PACKAGES)}")
    return getattr(importlib.import_module(module), attribute)


def callback_dict(callback: Any) -> dict[str, Any] | None:
    """The saved form of a callback; None for a plain function or no callback."""
    return callback.to_dict() if isinstance(callback, SavedCallback) else None


def build_callback(entry: dict[str, Any] | None) -> Any:
    if entry is None:
        return None
    cls = import_class(entry["class"])
    if not issubclass(cls, SavedCallback):
        raise InputError(f"the checkpoint names {entry['class']!r} as a callback, which it is not")
    return cls(**entry["settings"])


def is_peft(part: nn.Module) -> bool:
    return isinstance(part, PeftModel)


def source_dict(source: Source | None) -> dict[str, Any] | None:
    return None if source is None else source.to_dict()
