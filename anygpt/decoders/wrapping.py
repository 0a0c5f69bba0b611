"""A diffusers pipeline as a module: its networks, loading and saving, which of them train."""

import copy
import inspect
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from torch import nn

from anygpt.decoders.options import is_integer
from anygpt.decoders.pipelines import find_class, find_pipeline, is_hooked, load_pipeline
from anygpt.decoders.schedules import WEIGHTING_SCHEMES
from anygpt.errors import InputError, warn_once
from anygpt.parts.source import MEMORY, DecoderSettings, Source

SETTINGS_FILE = "anygpt_decoder.json"
SIZES = ("num_frames", "height", "width")
UNUSED = ("attn_implementation", "gguf_file")
OF_PART = [field.name for field in fields(DecoderSettings) if field.name not in ("path", *UNUSED)]


class WrappedPipeline(nn.Module):
    """A diffusers pipeline as a module.

    The pipeline's networks become submodules under their own names (`unet`, `vae`, `text_encoder`, …), frozen and in
    eval mode; `.pipeline` is the pipeline itself. Further arguments of a family's constructor are attributes, saved
    beside the pipeline.

    Args:
        pipeline: of the class named by `pipeline_name`.
        max_sequence_length: tokens of the text encoder, the pipeline's by default.
        weighting_scheme: of a flow (see `FlowSchedule`), the family's by default.
        vae_tiling, vae_slicing, offload: see `DecoderSettings`; by default as the pipeline is set. Gradients cannot
            pass through layers that are offloaded one by one (`group`).

    Raises:
        InputError: a pipeline of another class, or a setting that does not apply or is not valid.
    """

    pipeline_name: ClassVar[str]
    """Name of the pipeline's class in diffusers, looked up only when needed because some versions lack it."""
    weighting_scheme: str | None = None
    """None if the denoiser is not trained by flow matching."""
    most_tokens: ClassVar[float] = math.inf
    """The greatest `max_sequence_length` that the pipeline takes."""
    denoiser_adapter: PeftModel | None = None
    """PEFT's wrapper of the denoiser, which it changes in place (see `set_adapter`)."""
    _registry: ClassVar[dict[str, "type[WrappedPipeline]"]] = {}

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "pipeline_name" in cls.__dict__:
            WrappedPipeline._registry[cls.pipeline_name] = cls

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        max_sequence_length: int | None = None,
        weighting_scheme: str | None = None,
        vae_tiling: bool | None = None,
        vae_slicing: bool | None = None,
        offload: str | None = None,
    ):
        super().__init__()
        if not isinstance(pipeline, find_pipeline(self.pipeline_name)):
            raise InputError(
                f"{type(self).__name__} needs a {self.pipeline_name}, but was given a "
                f"{type(pipeline).__name__}: pass such a pipeline, or use DiffusionDecoder.from_pretrained"
            )
        self.pipeline = pipeline
        for name, component in pipeline.components.items():
            if isinstance(component, nn.Module):
                self.add_module(name, component)
        self.max_sequence_length = self.call_default("max_sequence_length")
        if max_sequence_length is not None:
            if self.max_sequence_length is None:
                raise InputError(f"{type(self).__name__} has no max_sequence_length: its pipeline's length is fixed")
            if not is_integer(max_sequence_length) or not 1 <= max_sequence_length <= self.most_tokens:
                most = "" if self.most_tokens == math.inf else f" up to {self.most_tokens}"
                raise InputError(
                    f"max_sequence_length is {max_sequence_length!r:.80}; expected a number of tokens{most}"
                )
            self.max_sequence_length = max_sequence_length
        if weighting_scheme is not None:
            if self.weighting_scheme is None:
                raise InputError(f"{type(self).__name__} has no weighting_scheme: it is not trained by flow matching")
            if weighting_scheme not in WEIGHTING_SCHEMES:
                raise InputError(f"weighting_scheme is {weighting_scheme!r}: expected {', '.join(WEIGHTING_SCHEMES)}")
            self.weighting_scheme = weighting_scheme
        self.save_memory(vae_tiling=vae_tiling, vae_slicing=vae_slicing, offload=offload)
        self.trains: tuple[str, ...] = (next(name for name, part in self.named_children() if part is self.denoiser),)
        self.requires_grad_(False).eval()
        pipeline.set_progress_bar_config(disable=True)
        if pipeline.components.get("safety_checker") is None:
            warn_once(f"{self.pipeline_name} has no safety checker: what it generates is not filtered")

    def call_default(self, name: str) -> Any:
        """Default of an argument of the pipeline's call; None if it has no such argument."""
        parameter = inspect.signature(self.pipeline.__call__).parameters.get(name)
        return None if parameter is None else parameter.default

    @classmethod
    def from_pretrained(cls, path: str | Path | Source, **options: Any) -> Any:
        """Load a pipeline from a folder, hub id or `zoo:<name>`; `DiffusionDecoder` itself picks the class.

        `options` are fields of `DecoderSettings` (`torch_dtype` is `dtype`), `cache_dir` and `token` of the hub,
        further arguments of the family's constructor, and components of the pipeline.

        Raises:
            InputError: nothing at `path`, a pipeline of another class, missing or unexpected tensors, pickled weights
                without `weights="any"`, or an unknown option.
        """

        def taken(*names: str) -> dict[str, Any]:
            found = {name: options.pop(name, None) for name in names}
            return {name: value for name, value in found.items() if value is not None}

        if "torch_dtype" in options:
            options["dtype"] = options.pop("torch_dtype")
        source = Source.of(path, taken(*OF_PART), kind=DecoderSettings)
        place = replace(source.place, hub=taken("cache_dir", "token"))
        found, index = find_class(place, cls if hasattr(cls, "pipeline_name") else None, WrappedPipeline._registry)
        options |= {name: value for name, value in source.to_dict().items() if name in (*SIZES, *MEMORY)}
        if lost := [name for name in SIZES if name in options and name not in found._setting_names()]:
            made = "clips" if lost[0] == "num_frames" else "pictures or clips"
            raise InputError(f"{lost[0]} is set, but a decoder of {found.modality} makes no {made}; leave it out")
        settings = (place.json(SETTINGS_FILE) or {}) | taken(*found._setting_names())
        kind, dtype = find_pipeline(found.pipeline_name), source.torch_dtype or torch.float32
        pipeline = load_pipeline(kind, index, place, dtype, source.quantization_config, **options)
        return found(pipeline, **settings)

    def save_pretrained(self, path: str | Path, **options: Any) -> None:
        """Write the pipeline (safetensors, `options` of diffusers) and this decoder's own settings into `path`."""
        if self.quantized:
            raise InputError(
                f"the {', '.join(self.quantized)} of this {self.pipeline_name} are quantised, and only a reference to "
                "where they were loaded from can be saved: keep that source, or load it without quantization_config"
            )
        self.pipeline.save_pretrained(str(path), safe_serialization=True, **options)
        Path(path, SETTINGS_FILE).write_text(json.dumps(self.settings, indent=2) + "\n")

    @property
    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._setting_names()}

    @property
    def state_beside_tensors(self) -> tuple[dict[str, Any], str]:
        """What can make decoders with the same tensors behave differently: settings, except those that save memory,
        and the scheduler's config as JSON."""
        settings = {name: value for name, value in self.settings.items() if name not in MEMORY}
        return settings, self.pipeline.scheduler.to_json_string()

    @classmethod
    def _setting_names(cls) -> list[str]:
        """The keyword-only arguments of the constructors of this class and its bases."""
        constructors = [
            vars(c)["__init__"] for c in cls.__mro__ if issubclass(c, WrappedPipeline) and "__init__" in vars(c)
        ]
        parameters = [p for one in constructors for p in inspect.signature(one).parameters.values()]
        return list({p.name: None for p in parameters if p.kind is p.KEYWORD_ONLY})

    @property
    def denoiser(self) -> nn.Module:
        """The denoising network, `(noisy latents, timestep, condition) -> prediction`."""
        return self.transformer if hasattr(self, "transformer") else self.unet

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes (its offloading helpers may keep the weights elsewhere)."""
        hooked = is_hooked(self.pipeline)  # cheaper than the pipeline's property, which visits every module
        return self.pipeline._execution_device if hooked else next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self.denoiser.dtype

    @property
    def quantized(self) -> list[str]:
        return [name for name, network in self.named_children() if getattr(network, "is_quantized", False)]

    def save_memory(self, **options: Any) -> None:
        """Set `vae_tiling`, `vae_slicing` and `offload`, before the decoder is moved to an accelerator; an `InputError`
        for a value that is unknown, or that the VAE lacks."""
        for name, value in options.items():
            known = ("model", "group") if name == "offload" else (True, False)
            if value not in (None, *known):
                expected = " or ".join(map(str, known)).lower()
                raise InputError(f"{name} of a {self.pipeline_name} is {value!r}; expected {expected}")
            setattr(self, name, value)
            if value is not None and name != "offload":
                attribute = name.replace("vae", "use")
                if value and not hasattr(self.vae, attribute):
                    raise InputError(f"{name} is set, but the vae is a {type(self.vae).__name__}, which cannot do it")
                setattr(self.vae, attribute, value)
        if self.offload is not None and not torch.accelerator.is_available():
            warn_once(f"offload: {self.offload} does nothing without an accelerator: all weights stay in memory")

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "WrappedPipeline":
        """Apply what `to` asks for; an offloaded pipeline's tensors stay where they are, and hooks move them."""
        device = fn(torch.empty(0)).device
        if self.offload is None or device.type in ("cpu", "meta"):
            return super()._apply(fn, recurse)
        super()._apply(lambda tensor: fn(tensor).to(tensor.device), recurse)
        if self.offload == "model" and not is_hooked(self.pipeline):
            self.pipeline.enable_model_cpu_offload(device=device)
        elif not is_hooked(self.pipeline):
            self.pipeline.enable_group_offload(device, offload_type="leaf_level")
        return self

    def set_adapter(self, adapter: PeftModel | None) -> None:
        """Keep PEFT's wrapper of the denoiser, frozen, but not as a submodule: tensors have one name each."""
        object.__setattr__(self, "denoiser_adapter", adapter)
        self.requires_grad_(False)

    def without_adapter(self, merge: bool = False) -> "WrappedPipeline":
        """A copy whose denoiser has no adapter, or with `merge` holds it in its weights; the rest is shared."""
        if self.denoiser_adapter is None:
            return self
        shared = [network for network in self.children() if network is not self.denoiser]
        tensors = [] if merge else [*self.denoiser.parameters(), *self.denoiser.buffers()]
        copied = copy.deepcopy(self, {id(one): one for one in (*shared, *tensors)})
        adapter = copied.denoiser_adapter
        adapter.merge_and_unload() if merge else adapter.unload()
        object.__setattr__(copied, "denoiser_adapter", None)
        return copied

    def train_networks(self, names: Sequence[str]) -> None:
        """Choose the networks that `train` and `requires_grad_` affect; by default only the denoiser."""
        known = [name for name, _ in self.named_children()]
        if unknown := [name for name in names if name not in known]:
            raise InputError(f"the decoder has no network {unknown[0]!r}; it has {', '.join(known)}")
        self.trains = tuple(names)

    def train(self, mode: bool = True) -> "WrappedPipeline":
        """Set torch's mode on the networks that train; the others stay in eval mode for repeatable encodings."""
        super().train(False)
        for name in self.trains:
            getattr(self, name).train(mode)
        self.training = mode
        return self

    def requires_grad_(self, requires_grad: bool = True) -> "WrappedPipeline":
        """Freeze or unfreeze the networks chosen by `train_networks`; the others stay frozen."""
        super().requires_grad_(False)
        if requires_grad and (found := [name for name in self.trains if name in self.quantized]):
            raise InputError(
                f"the {found[0]} of a {self.pipeline_name} is quantised and cannot be trained: train an adapter "
                "(`<key>_denoiser`), or leave it out of quantization_config"
            )
        for name in self.trains:
            getattr(self, name).requires_grad_(requires_grad)
        return self
