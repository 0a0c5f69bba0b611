"""What every diffusion decoder does: encode captions and media, give the denoising loss, sample.

Shapes: `B` batch, `T` condition tokens, `D` condition dim, `P` pooled dim, `C` latent channels.
"""

from __future__ import annotations

import inspect
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from anygpt.decoders.denoising import DenoisingLoss, Generators, check_generators
from anygpt.decoders.pipelines import load_pipeline
from anygpt.decoders.reconstruction import autoencoder_loss
from anygpt.decoders.sampling import Condition, Sampling
from anygpt.decoders.targets import TargetProcessor
from anygpt.errors import InputError
from anygpt.parts.files import Place

logger = logging.getLogger(__name__)

SETTINGS_FILE = "anygpt_decoder.json"


class DiffusionDecoder(DenoisingLoss, Sampling, nn.Module, ABC):
    """A diffusers pipeline as a frozen, differentiable decoder of conditions.

    The pipeline's networks become submodules under their own names (`unet`, `vae`, `text_encoder`, …), frozen and in
    eval mode, and its progress bar is switched off; `.pipeline` is the pipeline itself. The defaults below are those
    of a U-Net that attends to a CLIP text encoder; a family overrides where it differs. The other constructor
    arguments of a family are kept as attributes of the same names and saved beside the pipeline.
    """

    modality: ClassVar[str]
    pipeline_class: ClassVar[type[DiffusionPipeline]]
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
        self.trains = (next(name for name, part in self.named_children() if part is self.denoiser),)
        self.requires_grad_(False).eval()
        pipeline.set_progress_bar_config(disable=True)
        if pipeline.components.get("safety_checker") is None:
            _warn_once(f"{self.pipeline_class.__name__} has no safety checker: what it generates is not filtered.")

    # ---- loading and saving

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path, **kwargs) -> DiffusionDecoder:
        """Load a pipeline folder or hub id; `DiffusionDecoder` itself picks the class by `_class_name`.

        `kwargs` that the family's constructor names go there, those of `Place` (`revision`, `subfolder`, `variant`,
        `weights`) and the hub's (`cache_dir`, `token`, …) say where to look, and the others (`torch_dtype`, …) go to
        the pipeline's `from_pretrained`. Pickled weights are refused unless `weights="any"`; code in them always is.

        Raises:
            InputError: no pipeline there, one of another or an unknown class, or files that do not hold exactly its
                networks' tensors.
        """
        if kwargs.pop("use_safetensors", True) is not True:
            raise InputError(f"{path_or_id}: use_safetensors can only be True; weights='any' also reads .bin files.")
        hub = {k: kwargs.pop(k) for k in ("cache_dir", "token", "local_files_only", "force_download") if k in kwargs}
        where = {k: kwargs.pop(k) for k in ("revision", "subfolder", "variant", "weights") if k in kwargs}
        place = Place(str(path_or_id), **{k: v for k, v in where.items() if v is not None}, hub=hub)
        config = place.json("model_index.json")
        class_name = (config or {}).get("_class_name")
        if class_name is None:
            raise InputError(
                f"No diffusers pipeline at {str(place)!r}: expected a folder with a model_index.json, or a hub id."
            )
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
        settings = (place.json(SETTINGS_FILE) or {}) | settings
        return found(load_pipeline(found.pipeline_class, config, place, **kwargs), **settings)

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
        networks = [x for x in self.pipeline.components.values() if isinstance(x, nn.Module)]
        # accelerate's hooks, and diffusers' where it offloads by blocks, are on the networks; those by leaves on these.
        leaves = [next((m for m in network.modules() if m._parameters), network) for network in networks]
        if any(hasattr(module, hook) for module in networks + leaves for hook in ("_hf_hook", "_diffusers_hook")):
            return self.pipeline._execution_device  # which looks at every module of every network
        return next(self.denoiser.parameters()).device

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
    def rate(self) -> float | None:
        """Samples or frames a second of what is made; None where time is no part of it."""
        return None

    @property
    @abstractmethod
    def targets(self) -> TargetProcessor:
        """Turns raw media into what `encode_media` takes, at this decoder's default size; needs no weights."""

    @abstractmethod
    def collect(self, output: Any) -> list:
        """The samples in a pipeline's output, one an element, in this modality's form."""

    # ---- training

    def train_networks(self, names: Sequence[str]) -> None:
        """Choose the networks that `train` and `requires_grad_` are about: the denoiser alone, if never called.

        Raises:
            InputError: a name that is none of the pipeline's networks.
        """
        known = [name for name, _ in self.named_children()]
        if unknown := [name for name in names if name not in known]:
            raise InputError(f"the decoder has no network {unknown[0]!r}; it has {', '.join(known)}")
        self.trains = tuple(names)

    def train(self, mode: bool = True) -> DiffusionDecoder:
        """Torch's mode, of what trains: otherwise captions and media must be encoded the same each time."""
        super().train(False)
        for name in self.trains:
            getattr(self, name).train(mode)
        self.training = mode
        return self

    def requires_grad_(self, requires_grad: bool = True) -> DiffusionDecoder:
        """Freeze or unfreeze what trains (see `train_networks`); the other networks stay frozen."""
        super().requires_grad_(False)
        for name in self.trains:
            getattr(self, name).requires_grad_(requires_grad)
        return self

    # ---- conditions and latents

    def encode_text(self, captions: list[str]) -> Tensor | Condition:
        """What the pipeline would condition on for `B` captions: `(B, T, D)`, a `Condition` if it has a pooled part.

        There is no graph through it unless the text encoder trains.
        """
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
        return self.sample_posterior(*self.posterior(pixels.to(self.device, self.vae.dtype)), generator)

    def sample_posterior(self, mean: Tensor, std: Tensor, generator: Generators = None) -> Tensor:
        """`encode_media` from its second step on, of what `posterior` gave."""
        latents = mean
        if generator is not None:
            check_generators(generator, len(mean))
            latents = mean + std * randn_tensor(mean.shape, generator, mean.device, mean.dtype)
        return self.scale_latents(latents)

    def reconstruction_losses(self, media: list | Tensor, generator: Generators = None) -> dict[str, Tensor]:
        """How far media are from what the decoder's own networks make of them, `{network: (B,)}`, float32.

        For the networks that train (see `train_networks`); the VAE's is `autoencoder_loss`.
        """
        if "vae" not in self.trains:
            return {}
        pixels = media if isinstance(media, Tensor) else self.targets(media)
        pixels = pixels.to(self.device, self.vae.dtype)
        mean, std = self.posterior(pixels)
        latents = mean + std * randn_tensor(mean.shape, generator, mean.device, mean.dtype)
        return {"vae": autoencoder_loss(self.decode_latents(latents), pixels, mean, std)}

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Media `(B, …)` as `targets` makes them, of latents as `posterior` gives them. Differentiable."""
        return self.vae.decode(latents).sample

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation `(B, C, …)` of the VAE's posterior, not scaled."""
        distribution = self.vae.encode(pixels).latent_dist
        return distribution.mean, distribution.std

    def scale_latents(self, latents: Tensor) -> Tensor:
        """Shifted and scaled by the VAE's `shift_factor` (if any) and `scaling_factor`, as the pipelines undo it."""
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        return (latents - shift) * self.vae.config.scaling_factor


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)
