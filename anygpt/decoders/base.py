"""What every diffusion decoder does: encode captions and media, give the denoising loss, sample.

Shapes: `B` batch, `T` condition tokens, `D` condition dim, `P` pooled dim, `C` latent channels.
"""

from __future__ import annotations

import inspect
import json
import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from anygpt.decoders.denoising import DenoisingLoss, Generators, check_generators
from anygpt.decoders.targets import TargetProcessor
from anygpt.errors import InputError

logger = logging.getLogger(__name__)

SETTINGS_FILE = "anygpt_decoder.json"


@dataclass(eq=False)
class Condition:
    """What a decoder is conditioned on: embeds `(B, T, D)`, and where it has them pooled `(B, P)`, mask `(B, T)`."""

    embeds: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def of(cls, condition: Condition | Tensor) -> Condition:
        """A plain tensor means `Condition(embeds=tensor)`."""
        return condition if isinstance(condition, cls) else cls(embeds=condition)

    def __len__(self) -> int:
        return self.embeds.shape[0]

    def __getitem__(self, rows: slice | list[int] | Tensor) -> Condition:
        """The samples of `rows`; the batch dimension stays, so an `int` is not taken."""
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Condition:
        """Moved to `device`; floating-point tensors also cast to `dtype`. Differentiable."""
        return self._map(lambda x: x.to(device=device, dtype=dtype if x.is_floating_point() else None))

    def _map(self, function) -> Condition:
        return Condition(*(None if x is None else function(x) for x in (self.embeds, self.pooled, self.mask)))


class DiffusionDecoder(DenoisingLoss, nn.Module, ABC):
    """A diffusers pipeline as a frozen, differentiable decoder of conditions.

    The pipeline's networks become submodules under their own names (`unet`, `vae`, `text_encoder`, …), frozen and in
    eval mode, and its progress bar is switched off; `.pipeline` is the pipeline itself. The defaults below are those
    of a U-Net that attends to a CLIP text encoder; a family overrides where it differs. The other constructor
    arguments of a family are kept as attributes of the same names and saved beside the pipeline.
    """

    modality: ClassVar[str]
    pipeline_class: ClassVar[type[DiffusionPipeline]]
    size_names: ClassVar[tuple[str, ...]]
    """Size arguments of the pipeline's call; an attribute of the same name holds the default."""
    _registry: ClassVar[dict[str, type[DiffusionDecoder]]] = {}

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "pipeline_class" in cls.__dict__:
            DiffusionDecoder._registry[cls.pipeline_class.__name__] = cls

    def __init__(self, pipeline: DiffusionPipeline):
        super().__init__()
        if not isinstance(pipeline, self.pipeline_class):
            raise InputError(
                f"{type(self).__name__} needs a {self.pipeline_class.__name__}, but was given a "
                f"{type(pipeline).__name__}: pass such a pipeline, or use DiffusionDecoder.from_pretrained."
            )
        self.pipeline = pipeline
        for name, component in pipeline.components.items():
            if isinstance(component, nn.Module):
                self.add_module(name, component)
        self.requires_grad_(False).eval()
        pipeline.set_progress_bar_config(disable=True)
        if pipeline.components.get("safety_checker") is None:
            _warn_once(f"{self.pipeline_class.__name__} has no safety checker: what it generates is not filtered.")

    # ---- loading and saving

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path, **kwargs) -> DiffusionDecoder:
        """Load a pipeline folder or hub id; `DiffusionDecoder` itself picks the class by `_class_name`.

        `kwargs` that the family's constructor names go there, the others (`torch_dtype`, `revision`, …) to the
        pipeline's `from_pretrained`. Only safetensors are read: pickled weights are refused.

        Raises:
            InputError: no pipeline there, one of another or an unknown class, or weights that are not safetensors.
        """
        if kwargs.pop("use_safetensors", True) is not True:
            raise InputError(f"{path_or_id}: use_safetensors can only be True, as pickled weights are never read.")
        hub = {k: kwargs[k] for k in ("revision", "cache_dir", "token", "local_files_only") if k in kwargs}
        try:
            config = DiffusionPipeline.load_config(str(path_or_id), **hub)
            class_name = config["_class_name"]
        except (OSError, KeyError) as error:
            raise InputError(
                f"No diffusers pipeline at {str(path_or_id)!r}: expected a folder with a model_index.json, or a hub id "
                f"({str(error).splitlines()[0]})."
            ) from error
        found = cls if hasattr(cls, "pipeline_class") else DiffusionDecoder._registry.get(str(class_name))
        if found is None:
            raise InputError(
                f"{path_or_id}: no decoder for the pipeline class {class_name}; "
                f"known are {', '.join(sorted(DiffusionDecoder._registry))}."
            )
        if found.pipeline_class.__name__ != class_name:
            raise InputError(
                f"{path_or_id} holds a {class_name}, but {cls.__name__} needs a {found.pipeline_class.__name__}: "
                "name a folder of that kind, or use DiffusionDecoder.from_pretrained."
            )
        settings = {name: kwargs.pop(name) for name in found._setting_names() if name in kwargs}
        saved = Path(path_or_id, SETTINGS_FILE)
        if saved.is_file():
            settings = {**json.loads(saved.read_text()), **settings}
        # diffusers saves a pipeline without a part (SD 3's T5), but loads it only when told that it is to be without.
        absent = {name: None for name, part in config.items() if part == [None, None]}
        try:
            pipeline = found.pipeline_class.from_pretrained(str(path_or_id), use_safetensors=True, **absent | kwargs)
        except OSError as error:
            raise InputError(
                f"{path_or_id}: could not load every part from safetensors ({str(error).splitlines()[0]}); pickled "
                "weights are refused, so name a revision that has safetensors, or convert them where you trust them."
            ) from error
        return found(pipeline, **settings)

    def save_pretrained(self, path: str | Path) -> None:
        """Write the pipeline (safetensors) and this decoder's own settings into the folder `path`."""
        self.pipeline.save_pretrained(str(path), safe_serialization=True)
        settings = {name: getattr(self, name) for name in self._setting_names()}
        Path(path, SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")

    @classmethod
    def _setting_names(cls) -> list[str]:
        return [name for name in inspect.signature(cls).parameters if name != "pipeline"]

    # ---- what a family says about itself

    @property
    def denoiser(self) -> nn.Module:
        """The network that predicts: `(noisy latents, timestep, condition) -> prediction`."""
        return self.unet

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes (its offloading helpers may keep the weights elsewhere)."""
        return self.pipeline._execution_device

    @property
    def dtype(self) -> torch.dtype:
        return self.denoiser.dtype

    @property
    def condition_shape(self) -> tuple[int, int]:
        """`(T, D)` of a condition, from the configs of the tokenizer and the text encoder."""
        return self.pipeline.tokenizer.model_max_length, self.text_encoder.config.hidden_size

    @property
    def pooled_dim(self) -> int | None:
        """`P` of a pooled condition; None where the decoder has none."""
        return None

    @property
    @abstractmethod
    def targets(self) -> TargetProcessor:
        """Turns raw media into what `encode_media` takes, at this decoder's default size; needs no weights."""

    @abstractmethod
    def collect(self, output: Any) -> list:
        """The samples in a pipeline's output, one an element, in this modality's form."""

    # ---- training

    def train(self, mode: bool = True) -> DiffusionDecoder:
        """Torch's mode, of the denoiser alone: captions and media must be encoded the same each time."""
        super().train(False)
        self.denoiser.train(mode)
        self.training = mode
        return self

    def requires_grad_(self, requires_grad: bool = True) -> DiffusionDecoder:
        """Freeze or unfreeze the denoiser; the VAE, the text encoder and the others stay frozen."""
        super().requires_grad_(False)
        self.denoiser.requires_grad_(requires_grad)
        return self

    # ---- conditions and latents

    @torch.no_grad()
    def encode_text(self, captions: list[str]) -> Tensor | Condition:
        """What the pipeline would condition on for `B` captions: `(B, T, D)`, a `Condition` if it has a pooled part."""
        return self.pipeline.encode_prompt(captions, self.device, 1, do_classifier_free_guidance=False)[0]

    def normalize_condition(self, condition: Tensor | Condition) -> Tensor | Condition:
        """Bring a projected condition to where the text encoder's lie; by default nothing. Applied by the loss and
        by sampling, harmless when applied twice, and of the type given."""
        return condition

    @torch.no_grad()
    def encode_media(self, media: list | Tensor, generator: Generators = None) -> Tensor:
        """Latents `(B, C, …)` of raw media, or of a tensor made by `self.targets`.

        The VAE's posterior is sampled with `generator` (a list: one a sample), or its mode taken if there is none;
        then brought to the network's scale (`scale_latents`).

        Raises:
            InputError: media that `targets` does not take, or a list of another number of generators.
        """
        pixels = media if isinstance(media, Tensor) else self.targets(media)
        latents, std = self.posterior(pixels.to(self.device, self.vae.dtype))
        if generator is not None:
            check_generators(generator, len(latents))
            latents = latents + std * randn_tensor(latents.shape, generator, latents.device, latents.dtype)
        return self.scale_latents(latents)

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation `(B, C, …)` of the VAE's posterior, not scaled."""
        distribution = self.vae.encode(pixels).latent_dist
        return distribution.mean, distribution.std

    def scale_latents(self, latents: Tensor) -> Tensor:
        """Shifted and scaled by the VAE's `shift_factor` (if any) and `scaling_factor`, as the pipelines undo it."""
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        return (latents - shift) * self.vae.config.scaling_factor

    # ---- sampling

    @torch.no_grad()
    def sample(
        self,
        condition: Tensor | Condition,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_condition: Tensor | Condition | None = None,
        generator: Generators = None,
        **size: float,
    ) -> list:
        """Generate `B` media by calling the pipeline on the condition, as it would on captions encoded to it.

        Args:
            condition: `(B, T, D)`.
            num_inference_steps, guidance_scale: the pipeline's own defaults if None.
            negative_condition: `(B, T, D)`; if None, what the pipeline uses when given no negative prompt.
            generator: one, or a list with one a sample.
            size: the family's `size_names`; the decoder's own by default.

        Raises:
            InputError: shapes that do not fit, or a size this decoder does not have.
        """
        if unknown := sorted(set(size) - set(self.size_names)):
            raise InputError(
                f"{type(self).__name__}.sample has no argument {', '.join(unknown)}: sizes are "
                f"{', '.join(self.size_names)}."
            )
        condition = self._ready(condition)
        if negative_condition is not None:
            negative_condition = self._ready(negative_condition, len(condition))
        check_generators(generator, len(condition))
        # All sizes are passed: given only one of height and width, diffusers would drop it.
        arguments = {name: getattr(self, name) for name in self.size_names} | size
        steering = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        arguments |= {name: value for name, value in steering.items() if value is not None}
        arguments |= self.prompt_arguments(condition, negative_condition)
        return self.collect(self.pipeline(**arguments, generator=generator))

    def prompt_arguments(self, condition: Condition, negative: Condition | None) -> dict[str, Any]:
        """The conditions as the pipeline's call takes them; a negative of None is left to the pipeline."""
        parts = {"prompt_embeds": "embeds"} | ({} if self.pooled_dim is None else {"pooled_prompt_embeds": "pooled"})
        arguments = {}
        for name, part in parts.items():
            arguments[name] = getattr(condition, part)
            arguments[f"negative_{name}"] = None if negative is None else getattr(negative, part)
        return arguments

    def _ready(self, condition: Tensor | Condition, batch_size: int | None = None) -> Condition:
        """Checked, normalised, on the decoder's device and in its dtype."""
        condition = Condition.of(condition)
        given = tuple(condition.embeds.shape)
        expected = (len(condition) if batch_size is None else batch_size, *self.condition_shape)
        if given != expected:
            raise InputError(
                f"The condition of {type(self).__name__} is {given}, expected (batch, tokens, dim) = {expected}: "
                "make the output projector for this decoder's condition_shape, with one condition a sample."
            )
        pooled = None if condition.pooled is None else tuple(condition.pooled.shape)
        if self.pooled_dim is not None and pooled != (expected[0], self.pooled_dim):
            raise InputError(
                f"The pooled condition of {type(self).__name__} is {pooled}, expected (batch, dim) = "
                f"{(expected[0], self.pooled_dim)}: give Condition(embeds, pooled)."
            )
        return Condition.of(self.normalize_condition(condition)).to(self.device, self.dtype)


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)
