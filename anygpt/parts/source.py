"""`Source`: where a pretrained part comes from and how it is loaded; its fields are a part's settings in a YAML."""

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
    """The `from_pretrained` folder of one of the tiny parts that come with the package.

    Raises:
        InputError: for an unknown name.
    """
    parts = sorted(path.name for path in ZOO.iterdir() if path.is_dir())
    if name not in parts:
        raise InputError(f"The zoo has no part {name!r}: expected one of {', '.join(parts)}.")
    return ZOO / name


@dataclass
class Source:
    """Where a frozen part comes from.

    Attributes:
        path: hub id, folder, or `zoo:<name>`.
        revision: branch, tag or commit of a hub id.
        subfolder: folder in there that holds the part.
        variant: of the weight files, as in `model.fp16.safetensors`; those without one where there are none.
        weights: `safetensors`, or `any` to read pickled tensors where there are no safetensors; never code.
        gguf_file: of a language model: the file to read, in the place of safetensors.
        dtype: dtype to load it in, as in `torch.<dtype>`; the checkpoint's own when None.
        attn_implementation: `eager`, `sdpa`, `flash_attention_2`, …; the library's choice when None.
        quantization_config: keyword arguments of transformers' `BitsAndBytesConfig`, for encoders and language
            models.
        num_frames: frames of a clip, for video encoders and decoders.
        pool_frames: one feature a frame, where an image encoder reads clips (see `VideoEncoder`).
        feature_layer: of an encoder: hidden states to read, -2 as LLaVA does; its output, or what its whole model
            reads, if None.
        drop_cls: of an encoder: leave the class token out.
        processor: arguments of an encoder's image processor or feature extractor that replace those in its folder, and
            `pad_to_square`, as LLaVA 1.5 does.
        feature: what an encoder with a choice gives, as ImageBind's `embedding` or `tokens`.
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
        if Path(self.path).is_dir():  # so that what is saved can be loaded from any working directory
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
        """A source of a path and options, as they stand in a YAML.

        Raises:
            InputError: an unknown option.
        """
        if isinstance(path, Source):
            path, options = path.path, {k: v for k, v in vars(path).items() if k != "path"} | options
        known = [field.name for field in fields(cls) if field.name != "path"]
        if unknown := sorted(set(options) - set(known)):
            raise InputError(f"a part has no option {unknown[0]!r}; known are {', '.join(known)}")
        return cls(str(path), **options)

    @property
    def folder(self) -> str:
        """What `from_pretrained` takes: `path`, with `zoo:` names resolved."""
        if not self.path.startswith(ZOO_PREFIX):
            return self.path
        return str(zoo_part(self.path.removeprefix(ZOO_PREFIX)))

    @property
    def is_hub_id(self) -> bool:
        """Whether another machine finds it too."""
        return not self.path.startswith(ZOO_PREFIX) and not Path(self.path).exists()

    @property
    def place(self) -> Place:
        return Place(self.folder, self.revision, self.subfolder or "", self.variant, self.weights or WEIGHTS[0])

    @property
    def torch_dtype(self) -> torch.dtype | None:
        return None if self.dtype is None else getattr(torch, self.dtype, None)

    @property
    def where(self) -> dict[str, Any]:
        """Arguments that tell a `from_pretrained` where in the repository to look."""
        return {"revision": self.revision, "subfolder": self.subfolder or ""}

    def model_options(self) -> dict[str, Any]:
        """Further keyword arguments for transformers' `from_pretrained` of a model."""
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
        """As JSON, without what is not set."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def load(source: Source, kind: str, loader: Callable[[], Any]) -> Any:
    """Run a loader, and turn what it says about a wrong path or lacking package into one line.

    Raises:
        InputError: naming part and reason.
    """
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
