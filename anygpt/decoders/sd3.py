"""Images from Stable Diffusion 3: a transformer trained by flow matching."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from torch import Tensor, nn

from anygpt.decoders.sampling import Condition
from anygpt.decoders.stable_diffusion import StableDiffusionDecoder
from anygpt.errors import InputError

WEIGHTING_SCHEMES = ("logit_normal", "mode", "cosmap", "sigma_sqrt", "none")


class StableDiffusion3Decoder(StableDiffusionDecoder):
    """Conditions of two CLIP encoders and T5, embeds `(B, T, D)` and pooled `(B, P)` -> PIL images.

    Trained as rectified flow (arXiv 2403.03206): x_t = (1−σ)·x₀ + σ·ε, target ε − x₀, by default σ from a logit-normal
    density (with the schedule's shift) and no weights. `weighting_scheme` is that of diffusers' SD 3 training script,
    whose loss this is with `--precondition_outputs 0` (its default multiplies it by σ²). Sizes are as in
    `StableDiffusionDecoder`; `max_sequence_length` counts T5's tokens and defaults to the pipeline's.

    Raises:
        InputError: an unknown `weighting_scheme`.
    """

    pipeline_class = StableDiffusion3Pipeline

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        height: int | None = None,
        width: int | None = None,
        max_sequence_length: int | None = None,
        weighting_scheme: str = "logit_normal",
    ):
        super().__init__(pipeline, height=height, width=width)
        if weighting_scheme not in WEIGHTING_SCHEMES:
            raise InputError(f"weighting_scheme is {weighting_scheme!r}: expected {', '.join(WEIGHTING_SCHEMES)}.")
        default = inspect.signature(pipeline.__call__).parameters["max_sequence_length"].default
        self.max_sequence_length = max_sequence_length or default
        self.weighting_scheme = weighting_scheme

    @property
    def denoiser(self) -> nn.Module:
        """The transformer."""
        return self.transformer

    @property
    def size_multiple(self) -> int:
        """The VAE's factor, and the transformer's patches."""
        return self.pipeline.vae_scale_factor * self.transformer.config.patch_size

    @property
    def condition_shape(self) -> tuple[int, int]:
        """`(T, D)`: CLIP's tokens, then T5's (zeros where the pipeline has no T5), all as wide as the attention's."""
        tokens = self.pipeline.tokenizer_max_length + self.max_sequence_length
        return tokens, self.transformer.config.joint_attention_dim

    @property
    def pooled_dim(self) -> int:
        """`P`, both CLIP projections."""
        return self.transformer.config.pooled_projection_dim

    @torch.no_grad()
    def encode_text(self, captions: list[str]) -> Condition:
        """What the pipeline conditions on: embeds `(B, T, D)` and pooled `(B, P)`."""
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            captions, None, None, self.device, 1, False, max_sequence_length=self.max_sequence_length
        )
        return Condition(embeds, pooled)

    def prompt_arguments(self, condition: Condition, negative: Condition | None) -> dict[str, Any]:
        """With T5's length, so that the pipeline's own negative has it too."""
        return super().prompt_arguments(condition, negative) | {"max_sequence_length": self.max_sequence_length}

    def make_training_schedule(self) -> FlowMatchEulerDiscreteScheduler:
        """The noise levels of the pipeline's scheduler config, whose own tables are the sampler's.

        Raises:
            InputError: that scheduler is not configured for flow matching.
        """
        config = self.pipeline.scheduler.config
        shift = config.get("flow_shift") if config.get("use_flow_sigmas") else config.get("shift")
        if shift is None:
            raise InputError(
                f"{type(self).__name__} trains by flow matching, but the pipeline's "
                f"{type(self.pipeline.scheduler).__name__} is not configured for it: give it the flow's scheduler."
            )
        dynamic = config.get("use_dynamic_shifting", False)  # leaves the training levels unshifted, as in the script
        return FlowMatchEulerDiscreteScheduler(config.num_train_timesteps, shift, use_dynamic_shifting=dynamic)

    def timestep_density(self, batch_size: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Timesteps `(B,)`, float32, 1000 σ in a schedule of 1000 steps; parameters are the training script's."""
        steps = self.training_schedule.timesteps
        u = compute_density_for_timestep_sampling(
            self.weighting_scheme, batch_size, 0.0, 1.0, 1.29, device=device, generator=generator
        )
        return steps[(u * len(steps)).long().clamp(max=len(steps) - 1).cpu()]

    def noise_and_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(1−σ)·x₀ + σ·ε and ε − x₀."""
        sigmas = self._sigmas(timesteps).to(latents.dtype).view(-1, 1, 1, 1)
        return (1 - sigmas) * latents + sigmas * noise, noise - latents

    def loss_weight(self, timesteps: Tensor, snr_gamma: float | None) -> Tensor:
        """The scheme's weights `(B,)`, 1 but for cosmap and sigma_sqrt; `snr_gamma` is an `InputError`."""
        if snr_gamma is not None:
            raise InputError(f"{type(self).__name__} is trained by flow matching, where snr_gamma means nothing.")
        return compute_loss_weighting_for_sd3(self.weighting_scheme, self._sigmas(timesteps))

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The velocity, from the transformer."""
        return self.denoiser(noisy, condition.embeds, condition.pooled, timesteps).sample

    def _sigmas(self, timesteps: Tensor) -> Tensor:
        return timesteps / self.training_schedule.config.num_train_timesteps
