"""`Source`: origin and loading options of a pretrained part; its fields are the part's settings in YAML."""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from anygpt.errors import InputError
from anygpt.parts.files import WEIGHTS, Place

ZOO_PREFIX = "zoo:"
ZOO = Path(__file__).parents[1] / "toyworld" / "weights" / "zoo"


def zoo_part(name: str) -> Path:
    """`from_pretrained` folder of a tiny part in the package; raises `InputError` for an unknown name."""
    parts = sorted(path.name for path in ZOO.iterdir() if path.is_dir())
    if name not in parts:
        raise InputError(f"The zoo has no part {name!r}: expected one of {', '.join(parts)}.")
    return ZOO / name


@dataclass
class Source:
    """Origin and loading options of a frozen part.

    Attributes:
        path: Hub id, folder, or `zoo:<name>`.
        revision: branch, tag or commit of a Hub id.
        subfolder: folder of the part within `path`.
        variant: of the weight files, as in `model.fp16.safetensors`; falls back to files without a variant.
        weights: `safetensors`, or `any` to read pickled tensors if there are no safetensors; never code.
        gguf_file: for a language model: GGUF file to read in place of safetensors.
        dtype: name of a torch dtype to load the part in; that of the checkpoint if None.
        attn_implementation: `eager`, `sdpa`, `flash_attention_2`, …; the library's choice if None.
        quantization_config: arguments of transformers' `BitsAndBytesConfig`, for encoders and language models.
        num_frames: frames per clip, for video encoders and decoders.
        pool_frames: one feature per frame, if an image encoder reads clips (see `VideoEncoder`).
        feature_layer: for an encoder: index of the hidden states to read, -2 in LLaVA; if None, as its whole model
            does, else its output.
        drop_cls: for an encoder: drop the class token.
        processor: settings that override those of an encoder's image processor or feature extractor, and
            `pad_to_square`, as in LLaVA 1.5.
        feature: for an encoder with several kinds of features, such as ImageBind's `embedding` or `tokens`.
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
    num_frames: int | None = None
    pool_frames: bool | None = None
    feature: str | None = None
    feature_layer: int | None = None
    drop_cls: bool | None = None
    processor: dict[str, Any] | None = None

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
    def of(cls, path: str | Path | Source, options: dict[str, Any]) -> Source:
        """Build a source from a path and options as in YAML; raises `InputError` for an unknown option."""
        if isinstance(path, Source):
            path, options = path.path, {k: v for k, v in vars(path).items() if k != "path"} | options
        known = [field.name for field in fields(cls) if field.name != "path"]
        if unknown := sorted(set(options) - set(known)):
            raise InputError(f"a part has no option {unknown[0]!r}; known are {', '.join(known)}")
        return cls(str(path), **options)

    @property
    def folder(self) -> str:
        """`path` for `from_pretrained`, with `zoo:` names resolved."""
        if not self.path.startswith(ZOO_PREFIX):
            return self.path
        return str(zoo_part(self.path.removeprefix(ZOO_PREFIX)))

    @property
    def is_hub_id(self) -> bool:
        """Whether `path` is a Hub id rather than local."""
        return not self.path.startswith(ZOO_PREFIX) and not Path(self.path).exists()

    @property
    def place(self) -> Place:
        return Place(self.folder, self.revision, self.subfolder or "", self.variant, self.weights or WEIGHTS[0])

    @property
    def torch_dtype(self) -> torch.dtype | None:
        return None if self.dtype is None else getattr(torch, self.dtype, None)

    @property
    def where(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` that locate the part in a repository."""
        return {"revision": self.revision, "subfolder": self.subfolder or ""}

    def model_options(self) -> dict[str, Any]:
        """Further arguments of transformers' `from_pretrained` for a model."""
        options: dict[str, Any] = {}
        if self.attn_implementation:
            options["attn_implementation"] = self.attn_implementation
        if self.quantization_config:
            if importlib.util.find_spec("bitsandbytes") is None:
                raise InputError("quantization_config needs the package bitsandbytes, which is not installed")
            from transformers import BitsAndBytesConfig

            options["quantization_config"] = BitsAndBytesConfig(**self.quantization_config)
        return options

    def to_dict(self) -> dict[str, Any]:
        """JSON form without unset fields."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def load(source: Source, kind: str, loader: Callable[[], Any]) -> Any:
    """Run a loader; errors about wrong paths or missing packages become an `InputError` with part and reason."""
    try:
        part = loader()
    except InputError as error:
        raise InputError(f"cannot load the {kind} {source.path!r}: {error}") from error
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"cannot load the {kind} {source.path!r}: a package is missing: {reason}") from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, struct.error) as error:
        where = "" if Path(source.folder).is_dir() else " (there is no such folder, so it is taken for a hub id)"
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"cannot load the {kind} {source.path!r}{where}: {reason}") from error
    if isinstance(part, nn.Module):
        part.anygpt_source = source
    return part
