"""Weight files of a network, in the layouts found on the Hub: one file or shards with an index, variants, pickles.

Only headers are read until a tensor is accessed.
"""

import json
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, __version__
from transformers.utils import cached_file

from anygpt.errors import InputError, refusing, warn_once
from anygpt.parts.manifest import MANIFEST, find_fault

SAFETENSORS, PICKLES = (".safetensors",), (".bin", ".pt", ".pth")
STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
WEIGHTS = ("safetensors", "any")
# safetensors' names of dtypes
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FLOATS |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
_SHAPES_ONLY: ContextVar[bool] = ContextVar("shapes_only", default=False)
wants_shapes_only = _SHAPES_ONLY.get  # whether the caller is within `shapes_only`


@contextmanager
def shapes_only() -> Iterator[None]:
    """Context in which networks are built on the meta device, and compared with the headers of weight files that are
    local or in the Hub's cache; no weights are read, and no weight files downloaded."""
    token = _SHAPES_ONLY.set(True)
    try:
        yield
    finally:
        _SHAPES_ONLY.reset(token)


@dataclass(frozen=True)
class Place:
    """A local folder, or a folder of a Hub repository; fields as in `PartSettings`.

    `subfolder` is that of the network within `path`, "" for the folder itself; `hub` are `cache_dir`, `token`, … for a
    Hub id.
    """

    path: str
    revision: str | None = None
    subfolder: str = ""
    variant: str | None = None
    weights: str = "safetensors"
    hub: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.path}/{self.subfolder}" if self.subfolder else str(self.path)

    @property
    def taken_for(self) -> str:
        if Path(self.path).is_file():
            return " (it is a file; name the folder that it is in)"
        return "" if Path(self.path).is_dir() else " (there is no such folder, so it is taken for a hub id)"

    def inside(self, subfolder: str) -> "Place":
        return replace(self, subfolder=f"{self.subfolder}/{subfolder}" if self.subfolder else subfolder)

    def file(self, name: str) -> Path | None:
        cached_only = wants_shapes_only() and Path(name).suffix in SAFETENSORS + PICKLES
        try:
            found = cached_file(
                self.path,
                name,
                revision=self.revision,
                subfolder=self.subfolder,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                **{**self.hub, **({"local_files_only": True} if cached_only else {})},
            )
        except OSError as error:
            if not isinstance(error.__cause__, RepositoryNotFoundError):
                raise
            raise InputError(
                f"{self.path!r} is gated: accept its terms at {ENDPOINT}/{self.path}, then run `hf auth login` or set "
                "HF_TOKEN"
                if isinstance(error.__cause__, GatedRepoError)
                else f"there is no {self.path!r} at the hub, or it is private: look at its spelling, or run `hf auth "
                "login`"
            ) from error
        return Path(found) if found else None

    def config(self) -> dict[str, Any]:
        """Content of `config.json`; an `InputError` if it is missing or written for another library."""
        content = self.json("config.json")
        if content is None:
            self.check_no_adapter()
            pipeline = self.file("model_index.json") is not None
            hint = "; it holds a diffusers pipeline, which is a decoder" if pipeline else ", or cannot be reached"
            raise InputError(f"{self} has no config.json{hint}{self.taken_for}")
        if not isinstance(content.get("model_type"), str):
            raise InputError(f"{self}/config.json names no model_type; expected a model that transformers saved")
        if content["model_type"] not in CONFIG_MAPPING:
            code = "; code of its repository is never run" if "auto_map" in content else ""
            raise InputError(
                f"{self}/config.json describes a {content['model_type']!r} model, which transformers {__version__} "
                f"does not have{code}: name a repository or revision of a model that it has"
            )
        return content

    def check_no_adapter(self) -> None:
        if (adapter := self.json("adapter_config.json")) is not None:
            raise InputError(
                f"{self} holds a PEFT adapter of {adapter.get('base_model_name_or_path')!r}, which would not be "
                "applied: merge it into its model (merge_and_unload), save that, and name its folder"
            )

    def download(self, weights: bool = True) -> Path:
        if Path(self.path).is_dir():
            return Path(self.path, self.subfolder)
        formats = [".msgpack", ".onnx", ".h5", ".ckpt", *PICKLES, *([] if weights else SAFETENSORS)]
        folder = snapshot_download(
            self.path,
            revision=self.revision,
            allow_patterns=[f"{self.subfolder}/*" if self.subfolder else "*"],
            ignore_patterns=[f"*{suffix}" for suffix in formats],
            **self.hub,
        )
        return Path(folder, self.subfolder)

    def json(self, name: str) -> dict[str, Any] | None:
        path = self.file(name)
        if path is None:
            return None
        with refusing(f"{path} is damaged", (ValueError,)):  # not JSON, or not text
            content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise InputError(f"{path} holds a {type(content).__name__}; expected a JSON object")
        return content


def built_from(file: Path | str) -> AbstractContextManager[None]:
    """Context in which errors that libraries raise about a file's values become an `InputError` that names it."""
    kinds = (StrictDataclassError, TypeError, AttributeError, LookupError, ArithmeticError, struct.error)
    return refusing(f"{file} is damaged, or has a value that no model can be built from", kinds)


@dataclass(frozen=True)
class Weights:
    """The weight files of a network: the file or the index of its shards, and the opened files by path."""

    entry: Path
    files: Mapping[Path, Any]
    variant: str | None = None

    @property
    def pickled(self) -> bool:
        return any(path.suffix in PICKLES for path in self.files)

    def tensors(self, names: Mapping[str, str | None] | None = None) -> Iterator[tuple[str, Any]]:
        """Yield names and lazy tensors: slices of safetensors, or tensors mapped from disk. An `InputError` if those of
        the network (see `rename`) are of adapters, or of torchao."""
        for file in self.files.values():
            for name in file.keys():  # noqa: SIM118 (safetensors' files cannot be iterated)
                adapted = any(mark in name for mark in (".lora_", ".ia3_"))
                if (adapted or "_qdata" in name) and rename(names or {}, name) is not None:
                    how = "merge its adapter (merge_and_unload)" if adapted else "undo torchao's quantisation"
                    raise InputError(f"{self.entry} was saved with {name} inside: {how}, and save it again")
                yield name, file[name] if isinstance(file, Mapping) else file.get_slice(name)


def open_composition(path: str | Path, **hub: Any) -> Path:
    """Local folder of a saved composition; a Hub id is downloaded with the arguments `hub`. An `InputError` says that
    it is missing, or differs from its manifest."""
    hub = {name: value for name, value in hub.items() if value is not None}
    where = {name: hub.pop(name) for name in ("revision", "subfolder") if name in hub}
    place = Place(str(path), **where, hub=hub)
    if not Path(path).is_dir():
        if isinstance(path, Path) or path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise InputError(f"{path} does not exist; expected a run's final/ folder")
        if place.file("config.json") is None and place.file("processor_config.json") is None:
            raise InputError(
                f"{path} does not exist: there is no such folder, and no composition of that id can be reached"
            )
    folder = place.download()
    if (folder / MANIFEST).is_file() and (fault := find_fault(folder)) is not None:
        raise InputError(f"{folder} is damaged, or was changed since it was written: {fault}; copy it again")
    return folder


def dtype_of(tensor: Any) -> torch.dtype | None:
    """Dtype of a lazy floating-point tensor; None for other kinds."""
    if isinstance(tensor, torch.Tensor):
        return tensor.dtype if tensor.is_floating_point() else None
    return _FLOATS.get(tensor.get_dtype())


def find_weights(place: Place, names: Mapping[str, str | None] | None = None) -> Weights:
    """Find the weight files of the network at `place`; shards without tensors of it (see `rename`) are left out. An
    `InputError` says why there are none, which is missing or truncated, or that an adapter lies beside them."""
    place.check_no_adapter()
    variants = [place.variant, None] if place.variant else [None]
    for suffixes in (SAFETENSORS, PICKLES) if place.weights == "any" else (SAFETENSORS,):
        for variant in variants:
            entry = _first(place, suffixes, variant)
            if entry is None:
                continue
            if variant != place.variant:
                warn_once(f"{place} has no files of variant {place.variant!r}; those without a variant are read")
            if suffixes is PICKLES:
                warn_once(f"{place} has no safetensors; {entry.name} is read with torch.load(weights_only=True)")
            return Weights(entry, _open_all(place, entry, suffixes, names or {}), variant)
    if wants_shapes_only() and not Path(place.path).is_dir():
        warn_once(f"{place} has no weight files in the cache: its tensors are not compared with them")
        return Weights(Path(place.path), {})
    if place.weights != "any" and (found := _first(place, PICKLES, place.variant) or _first(place, PICKLES, None)):
        raise InputError(
            f"{place} has its weights as {found.name} only, and pickled weights are refused by default; set weights: "
            "any to read their tensors (code in them is never run), or name a revision that has safetensors"
        )
    there = ", ".join(path.name for path in _here(place, SAFETENSORS)[:3])
    hint = f"; it has {there}, so set the variant" if there else "; set the variant if their names have one"
    raise InputError(f"{place} has no weights: expected model.safetensors or diffusion_pytorch_model.safetensors{hint}")


def _first(place: Place, suffixes: tuple[str, ...], variant: str | None) -> Path | None:
    mark = f".{variant}" if variant else ""
    for suffix in suffixes:
        for stem in STEMS:
            for name in (f"{stem}{mark}{suffix}", f"{stem}{suffix}.index{mark}.json"):
                if (found := place.file(name)) is not None:
                    return found
    loose = [p for p in _here(place, suffixes) if p.suffix != ".bin" and not p.name.startswith(STEMS)]
    return loose[0] if len(loose) == 1 else None  # weights under an unusual name


def _here(place: Place, suffixes: tuple[str, ...]) -> list[Path]:
    folder = Path(place.path, place.subfolder)
    return sorted(p for p in folder.glob("*") if p.suffix in suffixes) if folder.is_dir() else []


def _open_all(place: Place, entry: Path, suffixes: tuple[str, ...], names: Mapping[str, str | None]) -> dict[Path, Any]:
    if entry.suffix != ".json":
        return {entry: _open(entry)}
    index = (place.json(entry.name) or {}).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(shard, str) for shard in index.values()):
        raise InputError(f"{entry} is no index of shards: it has no weight_map")
    files: dict[Path, Any] = {}
    shards = sorted({shard for name, shard in index.items() if rename(names, name) is not None})
    if not shards:
        raise InputError(f"{entry} names no tensor of this network: name the model that these weights are of")
    for shard in shards:
        if Path(shard).name != shard or Path(shard).suffix not in suffixes:
            raise InputError(f"{entry} names the shard {shard!r}, which is no {suffixes[0]} file beside it")
        path = place.file(shard)
        if path is None and wants_shapes_only() and not Path(place.path).is_dir():
            return {}
        if path is None:
            raise InputError(f"{entry} names the shard {shard}, which is not there; download it again")
        files[path] = _open(path)
        if lacking := sorted({name for name, of in index.items() if of == shard} - set(files[path].keys())):
            raise InputError(f"{path} lacks {some(lacking)}, which {entry.name} says is there")
    return files


def _open(path: Path) -> Any:
    if path.suffix in PICKLES:
        return read_pickle(path)
    what = f"{path} cannot be read as safetensors: it is cut off or of another format"
    with refusing(what, (SafetensorError, OSError), "; download it again"):
        return safe_open(path, framework="pt")


def read_pickle(path: Path) -> Mapping[str, torch.Tensor]:
    """A state dict that was saved by torch, or an `InputError`; nothing in the file is run."""
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            content = torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6
    except Exception as error:  # damaged bytes make the unpickler raise anything
        reason = re.split(r"(?<=\.)\s|\n", str(error))[0]
        raise InputError(
            f"{path} is refused: it holds other things than tensors, such as code, or is cut off ({reason}); nothing "
            "in it was run"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout is torch.strided
        for name, value in content.items()
    ):
        raise InputError(f"{path} holds other things than dense tensors by name; expected a state dict")
    return content


def shape_of(tensor: Any) -> torch.Tensor:
    """Meta tensor with the shape of a lazy tensor; integers of any kind become int64."""
    if isinstance(tensor, torch.Tensor):
        return tensor.to("meta")
    return torch.empty(tensor.get_shape(), dtype=dtype_of(tensor) or torch.int64, device="meta")


def some(names: list[str], most: int = 5) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def rename(names: Mapping[str, str | None], name: str) -> str | None:
    """New name of a tensor by its longest prefix in `{prefix in the file: new prefix}`; None for other parts'."""
    prefix = max((p for p in names if name.startswith(p)), key=len, default="")
    new = names.get(prefix, "")
    return None if new is None else new + name.removeprefix(prefix)
