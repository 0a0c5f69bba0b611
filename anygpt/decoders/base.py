"""The base class of diffusion decoders: encoding captions and media, the denoising loss, sampling.

Shapes: `B` batch, `T` condition tokens, `D` condition dim, `P` pooled dim, `C` latent channels.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from anygpt.decoders.conditions import Condition, Generators, check_condition, check_generators
from anygpt.decoders.options import ALTERNATIVES, STEERING, Rule, check_options, is_integer, is_number, seeded
from anygpt.decoders.pipelines import is_hooked, step_callback
from anygpt.decoders.schedules import DiffusionSchedule, FlowSchedule, TrainingSchedule
from anygpt.decoders.targets import TargetProcessor
from anygpt.decoders.wrapping import UNUSED, WrappedPipeline
from anygpt.errors import InputError, warn_once
from anygpt.parts.networks import without_report
from anygpt.parts.source import DecoderSettings, Source, load

KL_WEIGHT = 0.03072
"""Weight of the KL divergence beside the absolute error, both summed over a sample: small, to keep latents bounded
(similar to latent diffusion, arXiv 2112.10752, §3.1)."""


def autoencoder_loss(decoded: Tensor, media: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Mean absolute error of `(B, …)` media plus the weighted KL divergence of the posterior from N(0, 1): `(B,)`.

    The divergence is summed over the latents and, like the error, divided by the number of values of a medium: larger
    media have more latents, each with a smaller share in the mean error.
    """
    error = decoded.float() - media.float()
    variance = std.float().square()
    divergence = 0.5 * (mean.float().square() + variance - 1 - variance.clamp(min=1e-12).log())
    return error.abs().flatten(1).mean(1) + KL_WEIGHT * divergence.flatten(1).sum(1) / media[0].numel()


class DiffusionDecoder(WrappedPipeline, ABC):
    """A frozen, differentiable decoder of conditions; the defaults suit a U-Net that attends to a CLIP text encoder."""

    modality: ClassVar[str]
    size_names: ClassVar[tuple[str, ...]]
    """Size arguments of the pipeline's call; an attribute of the same name holds the default."""

    masked: ClassVar[bool] = False
    """Whether conditions have padding (`Condition.mask`)."""
    encodes: ClassVar[tuple[str | None, ...]] = ("embeds",)
    """The parts of a condition in the order in which the pipeline's `encode_prompt` returns them; None for others.

    Without `mask` among them, padding is zeros, which the network attends to.
    """
    takes_reference: ClassVar[bool] = False
    """Whether the denoiser also reads a reference medium, which it is to edit."""
    guided: ClassVar[tuple[str, ...]] = ALTERNATIVES[0]
    """The options that do nothing without guidance."""

    # ---- what a family defines

    @property
    def condition_shape(self) -> tuple[int, int]:
        """`(T, D)` of a condition, from the configs of the tokenizer and of the network that determines its width."""
        tokens = self.max_sequence_length or self.pipeline.tokenizer.model_max_length
        return tokens, self.denoiser.config.get("joint_attention_dim") or self.text_encoder.config.hidden_size

    @property
    def pooled_dim(self) -> int | None:
        """`P` of the pooled condition; None if the decoder has none."""
        return self.denoiser.config.get("pooled_projection_dim")

    @property
    def rate(self) -> float | None:
        """Samples or frames per second of the output; None for images."""
        return None

    @property
    @abstractmethod
    def targets(self) -> TargetProcessor:
        """A converter of raw media to inputs of `encode_media` at this decoder's default size; needs no weights."""

    @abstractmethod
    def collect(self, output: Any) -> list:
        """The list of samples in a pipeline's output."""

    # ---- conditions and latents

    def encode_text(self, captions: list[str]) -> Tensor | Condition:
        """The pipeline's own encoding of `B` captions: `(B, T, D)`, or a `Condition` if it has a pooled part or a mask.

        Differentiable only if the text encoder trains. Captions with too many tokens are cut.
        """
        if not isinstance(captions, (list, tuple)) or not all(isinstance(caption, str) for caption in captions):
            raise InputError(f"captions are {captions!r:.80}; expected a list of texts, as ['a red ring']")
        if self.max_sequence_length is not None:
            return self.encode_prompt(captions)
        for tokenizer in filter(None, map(self.pipeline.components.get, ("tokenizer", "tokenizer_2"))):
            most = tokenizer.model_max_length
            if any(len(ids) > most for ids in tokenizer(captions, verbose=False)["input_ids"]):
                warn_once(f"the {self.modality} decoder reads {most} tokens of a caption: longer captions are cut")
        # diffusers warns for each batch, and prints the padding of its other captions
        with without_report(type(self.pipeline).__module__, "was truncated because"):
            return self.encode_prompt(captions)

    def encode_prompt(self, captions: list[str], **more: Any) -> Tensor | Condition:
        """Encode as the pipeline does without guidance, with `more` arguments of its `encode_prompt`."""
        encode = getattr(self.pipeline, "encode_prompt", None) or self.pipeline._encode_prompt
        more |= {"device": self.device, "max_sequence_length": self.max_sequence_length, "num_images_per_prompt": 1}
        more |= {"do_classifier_free_guidance": False, "prompt_2": None, "prompt_3": None}
        known = inspect.signature(encode).parameters
        found = encode(captions, **{name: more[name] for name in more if name in known})
        # What follows in the tuple are negative encodings, which are None without guidance.
        parts = zip(self.encodes, found if isinstance(found, tuple) else [found], strict=False)
        condition = Condition(**{part: x for part, x in parts if part is not None})
        if self.masked:
            condition.mask = (condition.embeds != 0).any(dim=-1) if condition.mask is None else condition.mask.bool()
        return condition if self.masked or self.pooled_dim is not None else condition.embeds

    def encode_negative(self, prompts: list[str]) -> Tensor | Condition:
        """The pipeline's own encoding of `B` negative prompts."""
        return self.encode_text(prompts)

    def normalize_condition(self, condition: Tensor | Condition) -> Tensor | Condition:
        """Normalise a projected condition as the text encoder's output is (idempotent); loss and sampling apply it."""
        if not self.masked or "mask" in self.encodes or isinstance(condition, Tensor):
            return condition
        return replace(condition, embeds=condition.embeds * condition.real[..., None])

    @torch.no_grad()
    def encode_media(self, media: list | Tensor, generator: Generators = None) -> Tensor:
        """Scaled latents `(B, C, …)` of raw media, or of a tensor from `self.targets`; see `sample_posterior`."""
        pixels = media if isinstance(media, Tensor) else self.targets(media)
        return self.sample_posterior(*self.posterior(pixels.to(self.device, self.vae.dtype)), generator)

    def sample_posterior(self, mean: Tensor, std: Tensor, generator: Generators = None) -> Tensor:
        """Sample what `posterior` returned (take its mode if `generator` is None), and scale it."""
        check_generators(generator, len(mean))
        if generator is not None:
            mean = mean + std * randn_tensor(mean.shape, generator, mean.device, mean.dtype)
        return self.scale_latents(mean)

    def reconstruction_losses(self, media: list | Tensor, generator: Generators = None) -> dict[str, Tensor]:
        """Reconstruction losses `{network: (B,)}` of the networks that train, float32."""
        if "vae" not in self.trains:
            return {}
        pixels = media if isinstance(media, Tensor) else self.targets(media)
        pixels = pixels.to(self.device, self.vae.dtype)
        mean, std = self.posterior(pixels)
        latents = mean + std * randn_tensor(mean.shape, generator, mean.device, mean.dtype)
        return {"vae": autoencoder_loss(self.vae.decode(latents).sample, pixels, mean, std)}

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation `(B, C, …)` of the VAE's posterior, unscaled."""
        distribution = self.vae.encode(pixels).latent_dist
        return distribution.mean, distribution.std

    def scale_latents(self, latents: Tensor) -> Tensor:
        """Shift and scale by the VAE's settings, which the pipeline undoes: means and deviations by channel,
        `shift_factor` and `scaling_factor`, whichever it has."""
        known = dict(self.vae.config) | dict(self.vae.named_buffers(recurse=False))
        scale = known.get("scaling_factor") or 1.0
        mean, std = known.get("latents_mean"), known.get("latents_std")
        if mean is None or std is None:
            return (latents - (known.get("shift_factor") or 0.0)) * scale
        mean, std = (torch.as_tensor(x).to(latents).view(-1, *[1] * (latents.dim() - 2)) for x in (mean, std))
        return (latents - mean) * scale / std

    def encode_reference(self, reference: Tensor) -> Tensor:
        """Scaled latents `(B, C, …)` of references from `targets`, without noise; zeros (none) give zeros."""
        given = reference.flatten(1).any(dim=1).to(self.device)
        latents = self.encode_media(reference)
        return latents * given.view(-1, *[1] * (latents.dim() - 1))

    # ---- the denoising loss

    @cached_property
    def schedule(self) -> TrainingSchedule:
        """The training schedule with the pipeline's scheduler config: a flow if there is a `weighting_scheme`."""
        if self.denoiser.config.get("time_cond_proj_dim"):
            raise InputError(
                "a U-Net with its guidance as input (time_cond_proj_dim) is distilled, and not trained by denoising: "
                "give the denoising loss weight 0, or use the model that it was distilled from"
            )
        if self.weighting_scheme is None:
            return DiffusionSchedule(self.pipeline.scheduler)
        return FlowSchedule(self.pipeline.scheduler, self.weighting_scheme)

    @property
    def patch(self) -> tuple[int, ...]:
        """The latents that are one token of the denoiser, by axis."""
        size = self.denoiser.config.get("patch_size", 1)
        return (size, size) if isinstance(size, int) else tuple(size)

    def count_tokens(self, latents: Tensor) -> int:
        """Tokens of the denoiser's sequence for latents `(B, C, …)`, on which a flow's shift may depend."""
        return math.prod(latents.shape[2:]) // math.prod(self.patch)

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The network's prediction, of the shape of `noisy`."""
        return self.denoiser(noisy, timesteps, encoder_hidden_states=condition.embeds).sample

    def denoising_loss(
        self,
        condition: Tensor | Condition,
        latents: Tensor,
        *,
        noise: Tensor | None = None,
        timesteps: Tensor | None = None,
        generator: Generators = None,
        snr_gamma: float | None = None,
        reference: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error of the prediction by sample: `(B,)`, float32.

        Args:
            condition: `(B, T, D)`; gradients reach it through the frozen network.
            latents: `(B, C, …)` from `encode_media`.
            reference: `(B, …)` from `targets`, for a decoder that takes one; zeros (or None for all) are none.
            noise, timesteps: like `latents`, and `(B,)`; drawn by default.
            generator: one for the batch, or a list with one per sample, which makes a sample's loss independent of
                its batch. A CPU generator works on any device.
            snr_gamma: γ of min-SNR weighting, applied per sample; None for none.

        Raises:
            InputError: wrong shapes, a scheduler unfit for training, a `snr_gamma` that it does not support, or a
                reference for a decoder that takes none.
        """
        condition = self._ready(condition, len(latents))
        check_generators(generator, len(latents))
        # Noise, target and error in float32 (or more): bfloat16 has too few digits to subtract in.
        latents = latents.to(self.device, torch.promote_types(latents.dtype, torch.float32))
        if self.offload == "group" and is_hooked(self.pipeline) and torch.is_grad_enabled():
            raise InputError(
                "offload: group drops each layer's weights before the backward pass needs them; use offload: "
                "model, or give the denoising loss weight 0"
            )
        if noise is None:
            noise = randn_tensor(latents.shape, generator, self.device, latents.dtype)
        elif noise.shape != latents.shape:
            raise InputError(f"noise is {tuple(noise.shape)}, expected the latents' shape {tuple(latents.shape)}")
        if timesteps is None:
            timesteps = self.schedule.draw(len(latents), generator, self.device)
            timesteps = self.schedule.shift(timesteps, self.count_tokens(latents))
        elif timesteps.shape != (len(latents),):
            raise InputError(f"timesteps are {tuple(timesteps.shape)}, expected one per sample: ({len(latents)},)")
        else:
            self.schedule.check(timesteps)
        timesteps = timesteps.to(self.device)
        weight = self.schedule.weight(timesteps, snr_gamma)
        noisy, target = self.schedule.noise_and_target(latents, noise.to(latents), timesteps)
        more = {}
        if reference is not None:
            self.check_reference(reference, len(latents))
            more["reference"] = self.encode_reference(reference).to(self.dtype)
        prediction = self.predict(noisy.to(self.dtype), timesteps, condition, **more)
        return weight * F.mse_loss(prediction.to(target.dtype), target, reduction="none").flatten(1).mean(1)

    def enable_gradient_checkpointing(self) -> None:
        self.denoiser.enable_gradient_checkpointing()

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
        on_step: Callable[[int, int], None] | None = None,
        reference: Sequence[Any] | None = None,
        **size: float,
    ) -> list:
        """Generate `B` media by calling the pipeline with the condition in place of prompt embeddings.

        Args:
            condition: `(B, T, D)`.
            num_inference_steps, guidance_scale: the pipeline's defaults if None. Guidance up to 1 is none.
            negative_condition: `(B, T, D)`; the pipeline's default if None.
            generator: one, or a list with one per sample.
            on_step: called with the numbers of finished and of all denoising steps; an exception ends the sampling.
            reference: one raw medium per sample, to edit.
            size: the family's `size_names`, the decoder's own by default, and its other options.

        Raises:
            InputError: wrong shapes, or an argument that this decoder does not have or cannot use.
        """
        steering = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        given = {name: value for name, value in (steering | size).items() if value is not None}
        for name, instead in ALTERNATIVES:
            if name in given:
                raise InputError(f"sample takes no {name}, which is for generate's decoder_kwargs: give {instead}")
        self.check_options(given | {"negative_condition": negative_condition})
        condition = self._ready(condition)
        if negative_condition is not None:
            negative_condition = self._ready(negative_condition, len(condition))
        check_generators(generator, len(condition))
        # All sizes are passed, because diffusers drops height or width given alone.
        arguments = {name: getattr(self, name) for name in self.size_names} | given
        arguments |= self.prompt_arguments(condition, negative_condition)
        if reference is not None:
            self.check_reference(reference, len(condition), given)
            arguments["reference"] = reference
        if on_step is not None:
            arguments |= step_callback(self.pipeline, on_step)
        return self.collect(self.call_pipeline(**arguments, generator=generator))

    def check_reference(self, reference: Any, batch_size: int, options: Collection[str] = ()) -> None:
        """Raise an `InputError` unless there is one reference per sample, which the decoder uses with these options."""
        if not self.takes_reference and "strength" not in options:
            raise InputError(f"{type(self).__name__} takes no reference: leave it out")
        if len(reference) != batch_size:
            raise InputError(f"{len(reference)} references for {batch_size} samples: give one per sample")

    def call_pipeline(self, **arguments: Any) -> Any:
        """Call the pipeline; a hook for families whose pipelines name arguments otherwise."""
        return self.pipeline(**arguments)

    def prompt_arguments(self, condition: Condition, negative: Condition | None) -> dict[str, Any]:
        """The conditions as arguments of the pipeline's call; if `negative` is None, the pipeline uses its default."""
        names = {"embeds": "prompt_embeds", "pooled": "pooled_prompt_embeds", "mask": "prompt_attention_mask"}
        length = self.max_sequence_length
        arguments: dict[str, Any] = {} if length is None else {"max_sequence_length": length}
        for part in filter(None, self.encodes):
            arguments[names[part]] = getattr(condition, part)
            arguments[f"negative_{names[part]}"] = None if negative is None else getattr(negative, part)
        return arguments

    def _ready(self, condition: Tensor | Condition, batch_size: int | None = None) -> Condition:
        """Check a condition, normalise it, and move it to the decoder's device and dtype."""
        condition = Condition.of(condition)
        check_condition(condition, self, batch_size)
        condition = Condition.of(self.normalize_condition(condition)).to(self.device, self.dtype)
        return replace(condition, mask=condition.real) if self.masked else condition

    # ---- the options of generation

    @property
    def option_rules(self) -> dict[str, Rule]:
        """The options that `generate(decoder_kwargs={key: …})` takes for this decoder; families add their sizes."""
        most = self.pipeline.scheduler.config.num_train_timesteps
        steps = (lambda value: is_integer(value) and 1 <= value <= most, f"a whole number from 1 to {most}")
        return {"num_inference_steps": steps, **STEERING}

    @property
    def pipeline_options(self) -> dict[str, Any]:
        """Default steps, guidance and sizes."""
        steering = {name: self.call_default(name) for name in ("num_inference_steps", "guidance_scale")}
        return steering | {name: getattr(self, name) for name in self.size_names}

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise an `InputError` for an option that this decoder does not have or cannot use."""
        check_options(f"the {self.modality} decoder", self.option_rules, options)
        if idle := self.idle(options):
            raise InputError(
                f"{', '.join(idle)} of the {self.modality} decoder would have no effect without guidance: give a "
                "guidance_scale above 1, or leave it out (a U-Net with time_cond_proj_dim takes none)"
            )

    def idle(self, options: Mapping[str, Any]) -> list[str]:
        """Those of `options` that would do nothing, because there is no guidance."""
        scale = options.get("guidance_scale")
        scale = self.call_default("guidance_scale") if scale is None else scale
        if is_number(scale) and scale > 1 and not self.denoiser.config.get("time_cond_proj_dim"):
            return []
        return [name for name in self.guided if options.get(name) is not None]

    def sampling_arguments(self, options: Mapping[str, Any], places: Sequence[int]) -> dict[str, Any]:
        """Convert checked options of generation to arguments of `sample`.

        A `seed` (or a list with one per sample) and the sample's place (its index among this decoder's media in its
        answer) give each sample its own generator, so that a medium does not depend on the rest of the batch.
        """
        arguments = {name: value for name, value in options.items() if value is not None}
        prompt, seed = arguments.pop("negative_prompt", None), arguments.pop("seed", None)
        if prompt is not None:
            arguments["negative_condition"] = Condition.of(self.encode_negative([prompt]))[[0] * len(places)]
        if seed is not None:
            arguments["generator"] = seeded(seed, places)
        return arguments


def load_decoder(path: str | Path | Source, **options: Any) -> DiffusionDecoder:
    """`DiffusionDecoder.from_pretrained` with the fields of `DecoderSettings`, as for a part in YAML."""
    source = Source.of(path, options, kind=DecoderSettings)
    decoder = load(source, "decoder", lambda: DiffusionDecoder.from_pretrained(source), unused=UNUSED)
    decoder.anygpt_state_beside_tensors = decoder.state_beside_tensors
    return decoder
