"""Pretrained parts: where they come from, how they are loaded, and how we know that they are still the same.

A part is an encoder, a language model or a diffusion pipeline. It is named by a hub id, a folder, or `zoo:<name>` for
one of the tiny parts of `anygpt.toyworld`. Weights are read from safetensors only; nothing is ever unpickled.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from anygpt.decoders.base import DiffusionDecoder
from anygpt.encoders.callbacks import SavedCallback
from anygpt.encoders.families import FAMILIES
from anygpt.encoders.module import base_model
from anygpt.encoders.video import VideoEncoder, VideoFrameProcessor
from anygpt.errors import InputError
from anygpt.media.types import is_heard, is_timed

ZOO_PREFIX = "zoo:"
# A checkpoint's config names classes; it may name none outside these packages.
TRUSTED_PACKAGES = ("transformers", "diffusers", "anygpt")


@dataclass
class Source:
    """Where a frozen part comes from.

    Attributes:
        path: hub id, folder, or `zoo:<name>`.
        revision: branch, tag or commit of a hub id.
        dtype: dtype to load it in, as in `torch.<dtype>`; the checkpoint's own when None.
        attn_implementation: `eager`, `sdpa`, `flash_attention_2`, …; the library's choice when None.
        quantization_config: keyword arguments of transformers' `BitsAndBytesConfig`, for encoders and language
            models.
        num_frames: frames of a clip, for video encoders and decoders.
        pool_frames: one feature a frame, where an image encoder reads clips (see `VideoEncoder`).
    """

    path: str
    revision: str | None = None
    dtype: str | None = None
    attn_implementation: str | None = None
    quantization_config: dict[str, Any] | None = None
    num_frames: int | None = None
    pool_frames: bool | None = None

    def __post_init__(self) -> None:
        if Path(self.path).is_dir():  # so that what is saved can be loaded from any working directory
            self.path = str(Path(self.path).resolve())
        dtype = torch.float32 if self.dtype is None else getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise InputError(f"dtype {self.dtype!r} of part {self.path!r} is unknown; expected float32, bfloat16, …")

    @property
    def folder(self) -> str:
        """What `from_pretrained` takes: `path`, with `zoo:` names resolved."""
        if not self.path.startswith(ZOO_PREFIX):
            return self.path
        from anygpt.toyworld import part_path  # the zoo is only built where it is asked for

        return str(part_path(self.path.removeprefix(ZOO_PREFIX)))

    def loading_options(self) -> dict[str, Any]:
        """Keyword arguments for transformers' `from_pretrained`."""
        options: dict[str, Any] = {"use_safetensors": True, "revision": self.revision, "dtype": self.dtype or "auto"}
        if self.attn_implementation:
            options["attn_implementation"] = self.attn_implementation
        if self.quantization_config:
            from transformers import BitsAndBytesConfig  # needs bitsandbytes, which only its users have

            options["quantization_config"] = BitsAndBytesConfig(**self.quantization_config)
        return options


def _load(source: Source, kind: str, load: Any) -> Any:
    """Run a `from_pretrained`, and turn what it says about a wrong path into one sentence."""
    try:
        part = load(source.folder)
    except InputError as error:
        raise InputError(f"cannot load the {kind} {source.path!r}: {error}") from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        where = "" if Path(source.folder).is_dir() else " (there is no such folder, so it is taken for a hub id)"
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"cannot load the {kind} {source.path!r}{where}: {reason}") from error
    if isinstance(part, nn.Module):
        part.anygpt_source = source
    return part


def load_encoder(source: Source, modality: str) -> nn.Module:
    """An encoder of the class that its family needs; under `video`, an image encoder becomes a `VideoEncoder`."""

    def load(folder: str) -> nn.Module:
        config = AutoConfig.from_pretrained(folder, revision=source.revision)
        family = FAMILIES.get(config.model_type)
        if family is None:
            raise InputError(
                f"{config.model_type!r} is no supported encoder family; expected one of {', '.join(sorted(FAMILIES))}"
            )
        encoder = family.load_class().from_pretrained(folder, **source.loading_options())
        if is_timed(modality) and family.main_input == "pixel_values":
            given = {"num_frames": source.num_frames, "pool_frames": source.pool_frames}
            return VideoEncoder(encoder, **{name: value for name, value in given.items() if value is not None})
        return encoder

    return _load(source, f"{modality} encoder", load)


def load_language_model(source: Source) -> nn.Module:
    return _load(
        source,
        "language model",
        lambda folder: AutoModelForCausalLM.from_pretrained(folder, **source.loading_options()),
    )


def load_decoder(source: Source) -> DiffusionDecoder:
    options = {"torch_dtype": getattr(torch, source.dtype)} if source.dtype else {}
    options |= {"num_frames": source.num_frames} if source.num_frames else {}
    return _load(
        source,
        "decoder",
        lambda folder: DiffusionDecoder.from_pretrained(folder, revision=source.revision, **options),
    )


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    return _load(source, "tokenizer", lambda folder: AutoTokenizer.from_pretrained(folder, revision=source.revision))


def load_encoder_processor(source: Source, modality: str) -> Any:
    """The image processor or feature extractor of an encoder, or one that runs it on every frame of a clip."""
    auto = AutoFeatureExtractor if is_heard(modality) else AutoImageProcessor
    processor = _load(
        source, f"{modality} processor", lambda folder: auto.from_pretrained(folder, revision=source.revision)
    )
    if is_timed(modality):
        config = _load(source, "config", lambda folder: AutoConfig.from_pretrained(folder, revision=source.revision))
        frames = source.num_frames or getattr(config, "num_frames", None)  # a video encoder has a number of its own
        return VideoFrameProcessor(processor, **({"num_frames": frames} if frames else {}))
    return processor


def source_of(part: nn.Module) -> Source | None:
    """Where a part was loaded from, or None if nothing can be said: then a checkpoint holds it whole."""
    part = base_model(part)
    if hasattr(part, "anygpt_source"):
        return part.anygpt_source
    path = part.pipeline.name_or_path if isinstance(part, DiffusionDecoder) else part.name_or_path
    if not path:
        return None
    is_video = isinstance(part, VideoEncoder)
    frames = {name: getattr(part.config, name) for name in ("num_frames", "pool_frames")} if is_video else {}
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
    return None if source is None else {k: v for k, v in asdict(source).items() if v is not None}
