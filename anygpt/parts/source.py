"""`Source`: origin and loading options of a pretrained part; its fields are the part's settings in YAML."""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedConfig, PreTrainedTokenizerBase

from anygpt.errors import InputError
from anygpt.parts.files import WEIGHTS, Place, built_from
from anygpt.parts.manifest import fingerprint_tensors

MOST = 500  # characters of a library's own message
ZOO_PREFIX = "zoo:"
ZOO = Path(__file__).parents[1] / "toyworld" / "weights" / "zoo"


def zoo_part(name: str) -> Path:
    """`from_pretrained` folder of a tiny part in the package; raises `InputError` for an unknown name."""
    parts = sorted(path.name for path in ZOO.iterdir() if path.is_dir())
    if name not in parts:
        raise InputError(f"the zoo has no part {name!r}: expected one of {', '.join(parts)}")
    return ZOO / name


# A bound far beyond practical values: a few zeros too many should be an error message, not exhausted memory.
Tokens = Annotated[int, Field(ge=1, le=2**12)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass
class PartSettings:
    """Settings of a pretrained part in YAML.

    Attributes:
        path: Hub id, folder, or `zoo:<name>` for a tiny part of `anygpt.toyworld`.
        revision: branch, tag or commit of a Hub id.
        subfolder: folder of the part within `path`.
        variant: variant of the weight files (`fp16`); falls back to files without a variant.
        weights: `safetensors`, or `any` to read `.bin` and `.pth` files if there are none; never runs code.
        gguf_file: GGUF file of a language model, to read in place of safetensors.
        dtype: dtype to load the part in (`float32`, `bfloat16`); the checkpoint's by default, float32 for decoders.
        attn_implementation: `eager`, `sdpa`, `flash_attention_2`, …; the library's choice by default.
        quantization_config: arguments of transformers' `BitsAndBytesConfig`; for decoders, of diffusers'
            `PipelineQuantizationConfig`.
    """

    path: str
    revision: str | None = None
    subfolder: str | None = None
    variant: str | None = None
    weights: str | None = None
    gguf_file: str | None = None
    dtype: str | None = None
    attn_implementation: str | None = None
    quantization_config: dict[str, Any] | None = None


@dataclass
class EncoderSettings(PartSettings):
    """Settings of a pretrained encoder in YAML.

    Attributes:
        num_frames: frames per clip, for video encoders and image encoders under `video`.
        pool_frames: one feature per frame (the default) or all (see `VideoEncoder`).
        feature: kind of features, for encoders with several: `embedding` or `tokens` of ImageBind.
        feature_layer: index of the hidden states to read (-2 in LLaVA); by default as its whole model does, or the
            encoder's output.
        drop_cls: drop the class token.
        processor: settings of its image processor or feature extractor (`do_center_crop: false`, `size: …`).
    """

    num_frames: Tokens | None = None
    pool_frames: bool | None = None
    feature: str | None = None
    feature_layer: int | None = None
    drop_cls: bool | None = None
    processor: dict[str, Any] | None = None


@dataclass
class TokenizerSettings(PartSettings):
    """Settings of a media tokenizer in YAML.

    Attributes:
        size: height and width in pixels, one number if equal; the network's own by default.
        num_frames: frames per clip.
        frame_rate: frames per second of decoded clips.
        seconds: length of sounds.
        codebooks: number of codebooks used of a codec, from the first; all by default.
        delay: whether the codes of codebook q of a codec come q frames later; by default they alternate in a frame.
        vocoder: folder or Hub id of a pipeline with the vocoder for a tokenizer of log-mels.
    """

    size: int | list[int] | None = None
    num_frames: Tokens | None = None
    frame_rate: Positive | None = None
    seconds: Positive | None = None
    codebooks: Tokens | None = None
    delay: bool | None = None
    vocoder: str | None = None


@dataclass
class DecoderSettings(PartSettings):
    """Settings of a pretrained decoder in YAML.

    Attributes:
        height, width, num_frames: size of its media, generated or trained on, in pixels and frames; the decoder's own
            by default.
        vae_tiling: let the VAE work on overlapping tiles.
        vae_slicing: let the VAE work on one sample at a time.
        offload: keep weights on the CPU but for the network (`model`) or layer (`group`) in use.
    """

    height: Tokens | None = None
    width: Tokens | None = None
    num_frames: Tokens | None = None
    vae_tiling: bool | None = None
    vae_slicing: bool | None = None
    offload: str | None = None


MEMORY = ("vae_tiling", "vae_slicing", "offload")
"""Settings of decoders that save memory and leave their weights as they are."""


@dataclass
class Source(EncoderSettings, DecoderSettings, TokenizerSettings):
    """Origin and loading options of a frozen part."""

    def __post_init__(self) -> None:
        self.path = str(self.path)
        if Path(self.path).is_dir():  # a saved source must not depend on the working directory
            self.path = str(Path(self.path).resolve())
        if isinstance(self.dtype, torch.dtype):
            self.dtype = str(self.dtype).removeprefix("torch.")
        if self.dtype is not None and not getattr(self.torch_dtype, "is_floating_point", False):
            raise InputError(f"dtype {self.dtype!r} of part {self.path!r} is unknown; expected float32, bfloat16, …")
        if self.weights not in (None, *WEIGHTS):
            raise InputError(
                f"weights {self.weights!r} of part {self.path!r} is unknown; expected {' or '.join(WEIGHTS)}"
            )

    @classmethod
    def of(cls, path: str | Path | Source, options: dict[str, Any], kind: Any = PartSettings) -> Source:
        """Build a source from a path and options of `kind`; raises `InputError` for an unknown option."""
        known = [field.name for field in fields(kind) if field.name != "path"]
        if unknown := sorted(set(options) - set(known)):
            raise InputError(f"a part has no option {unknown[0]!r}; known are {', '.join(known)}")
        return replace(path, **options) if isinstance(path, Source) else cls(str(path), **options)

    @property
    def folder(self) -> str:
        """`path` for `from_pretrained`, with `zoo:` names resolved."""
        if not self.path.startswith(ZOO_PREFIX):
            return self.path
        return str(zoo_part(self.path.removeprefix(ZOO_PREFIX)))

    @property
    def place(self) -> Place:
        return Place(self.folder, self.revision, self.subfolder or "", self.variant, self.weights or WEIGHTS[0])

    @property
    def torch_dtype(self) -> torch.dtype | None:
        return None if self.dtype is None else getattr(torch, str(self.dtype), None)

    @property
    def where(self) -> dict[str, Any]:
        return {"revision": self.revision, "subfolder": self.subfolder or ""}

    @property
    def auto(self) -> dict[str, Any]:
        """The same for transformers' auto classes, which would otherwise ask whether to run a repository's code."""
        return self.where | {"trust_remote_code": False}

    def config(self) -> PreTrainedConfig:
        """The config of a transformers model; raises `InputError` if `config.json` holds none."""
        self.place.config()
        with built_from(f"{self.place}/config.json"):
            return AutoConfig.from_pretrained(self.folder, **self.auto)

    def model_options(self) -> dict[str, Any]:
        """Further arguments of transformers' `from_pretrained` for a model."""
        options: dict[str, Any] = {}
        if self.attn_implementation:
            options["attn_implementation"] = self.attn_implementation
        if self.quantization_config:
            if importlib.util.find_spec("bitsandbytes") is None:
                raise InputError("quantization_config needs the package bitsandbytes, which is not installed")
            options["quantization_config"] = BitsAndBytesConfig(**self.quantization_config)
        return options

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, place: Place) -> None:
    """Raise `InputError` if a tokenizer has special tokens alone, as transformers builds one without files."""
    if len(tokenizer) <= len({*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}) + 3:
        raise InputError(
            f"{place} has no tokenizer.json, tokenizer.model or other file with a vocabulary, or it is damaged"
        )


def load(source: Source, kind: str, loader: Callable[[], Any], unused: Collection[str] = ()) -> Any:
    """Run a loader; errors about wrong paths, missing packages or an option in `unused` become an `InputError` with the
    part."""
    try:
        for name in unused:
            if getattr(source, name) is not None:
                raise InputError(f"a part of this kind does not read {name}; leave it out")
        part = loader()
    except InputError as error:
        raise InputError(f"cannot load the {kind} {source.path!r}: {error}") from error
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"cannot load the {kind} {source.path!r}: a package is missing: {reason}") from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, struct.error) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        reason = reason if len(reason) < MOST else f"{reason[:MOST]} …"  # some list every model that there is
        raise InputError(f"cannot load the {kind} {source.path!r}{source.place.taken_for}: {reason}") from error
    if isinstance(part, nn.Module):
        part.anygpt_source = source
        if not any(parameter.is_meta for parameter in part.parameters()):
            part.anygpt_fingerprint = fingerprint_tensors(part.state_dict())
    return part
