"""How a decoder is trained: its own noise schedule, the denoising loss, min-SNR weights.

Shapes: `B` batch, `T` condition tokens, `D` condition dim, `C` latent channels.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.training_utils import compute_snr
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from anygpt.errors import InputError

if TYPE_CHECKING:
    from anygpt.decoders.base import Condition

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
Generators = torch.Generator | list[torch.Generator] | None


class DenoisingLoss:
    """The training half of a `DiffusionDecoder`, a mixin of that class alone.

    The defaults are those of a network trained on a DDPM schedule. A family trained otherwise (flow matching)
    overrides `make_training_schedule`, `timestep_density`, `noise_and_target` and `loss_weight`.
    """

    # From the other half.
    pipeline: DiffusionPipeline
    denoiser: nn.Module
    device: torch.device
    dtype: torch.dtype

    @cached_property
    def training_schedule(self) -> Any:
        """Made once, apart from the pipeline's scheduler, whose tables change with every `set_timesteps`."""
        return self.make_training_schedule()

    def make_training_schedule(self) -> Any:
        """The DDPM noise schedule of the pipeline's scheduler config.

        Raises:
            InputError: a config without betas, as flow matching's (DDPM would take it, with betas of its own), or
                a prediction type other than epsilon, v_prediction and sample.
        """
        config = self.pipeline.scheduler.config
        kind = config.get("prediction_type", PREDICTION_TYPES[0])
        if "beta_schedule" not in config or config.get("use_flow_sigmas") or kind == "flow_prediction":
            raise InputError(
                f"{type(self).__name__} trains with a DDPM noise schedule, but the pipeline's "
                f"{type(self.pipeline.scheduler).__name__} is configured for flow matching or continuous noise "
                "levels: give the pipeline the diffusion scheduler that it was trained with."
            )
        if kind not in PREDICTION_TYPES:
            raise InputError(
                f"The scheduler's prediction_type is {kind!r}, expected one of {', '.join(PREDICTION_TYPES)}: "
                "correct scheduler_config.json."
            )
        # Without this key: from_config would replace whatever the other class had as a default (LCM's betas, for one)
        # by DDPM's default.
        return DDPMScheduler.from_config({k: v for k, v in config.items() if k != "_use_default_values"})

    def draw_timesteps(self, batch_size: int, generator: Generators) -> Tensor:
        """Training timesteps `(B,)` on the decoder's device; a list of generators draws each sample from its own."""
        if isinstance(generator, list):
            return torch.cat([self.draw_timesteps(1, g) for g in generator])
        device = self.device if generator is None else generator.device
        return self.timestep_density(batch_size, generator, device).to(self.device)

    def timestep_density(self, batch_size: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Timesteps `(B,)`, int64, drawn on `device`: uniform over the schedule (arXiv 2006.11239)."""
        high = self.training_schedule.config.num_train_timesteps
        return torch.randint(high, (batch_size,), generator=generator, device=device)

    def noise_and_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """The noisy latents and what the network should predict from them, both like `latents`."""
        schedule = self.training_schedule
        target = {
            "epsilon": lambda: noise,
            "v_prediction": lambda: schedule.get_velocity(latents, noise, timesteps),
            "sample": lambda: latents,
        }[schedule.config.prediction_type]()
        return schedule.add_noise(latents, noise, timesteps), target

    def loss_weight(self, timesteps: Tensor, snr_gamma: float | None) -> Tensor | float:
        """Weights `(B,)` of the samples' losses: 1, or min-SNR-γ's (arXiv 2303.09556).

        With s the signal-to-noise ratio: epsilon min(s,γ)/s, v_prediction min(s,γ)/(s+1), sample min(s,γ).

        Raises:
            InputError: γ with epsilon prediction at zero terminal SNR.
        """
        if snr_gamma is None:
            return 1.0
        schedule = self.training_schedule
        kind = schedule.config.prediction_type
        if kind == "epsilon" and schedule.alphas_cumprod.min() == 0:
            raise InputError(
                "snr_gamma cannot be used with epsilon prediction at zero terminal SNR (the weight is 0/0): "
                "leave snr_gamma unset, or use a v_prediction model."
            )
        snr = compute_snr(schedule, timesteps)
        divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[kind]
        return snr.clamp(max=snr_gamma) / divisor

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The network's prediction, like `noisy`."""
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
    ) -> Tensor:
        """Mean squared error of the prediction, one number a sample: `(B,)`, float32.

        Args:
            condition: `(B, T, D)`; gradients reach it through the frozen network.
            latents: `(B, C, …)` from `encode_media`.
            noise: like `latents`; drawn if not given.
            timesteps: `(B,)` training steps as `draw_timesteps` gives them; drawn if not given.
            generator: one for the batch, or a list with one a sample, which makes a sample's loss independent of
                the batch it is in. A CPU generator serves any device.
            snr_gamma: γ of min-SNR weighting, applied per sample; None for none.

        Raises:
            InputError: shapes that do not fit, or a schedule that cannot be trained with (see
                `make_training_schedule`, `loss_weight`).
        """
        condition = self._ready(condition, len(latents))
        check_generators(generator, len(latents))
        # Noise, target and error in float32 (or more): bfloat16 has too few digits to subtract in.
        latents = latents.to(self.device, torch.promote_types(latents.dtype, torch.float32))
        if noise is None:
            noise = randn_tensor(latents.shape, generator, self.device, latents.dtype)
        elif noise.shape != latents.shape:
            raise InputError(f"noise is {tuple(noise.shape)}, expected the latents' shape {tuple(latents.shape)}.")
        if timesteps is None:
            timesteps = self.draw_timesteps(len(latents), generator)
        elif timesteps.shape != (len(latents),):
            raise InputError(f"timesteps are {tuple(timesteps.shape)}, expected one a sample: ({len(latents)},).")
        timesteps = timesteps.to(self.device)
        weight = self.loss_weight(timesteps, snr_gamma)
        noisy, target = self.noise_and_target(latents, noise.to(latents), timesteps)
        prediction = self.predict(noisy.to(self.dtype), timesteps, condition)
        return weight * F.mse_loss(prediction.to(target.dtype), target, reduction="none").flatten(1).mean(1)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the network's activations in the backward pass, to save memory."""
        self.denoiser.enable_gradient_checkpointing()


def check_generators(generator: Generators, batch_size: int) -> None:
    """A list of generators must hold one a sample.

    Raises:
        InputError: it holds another number.
    """
    if isinstance(generator, list) and len(generator) != batch_size:
        raise InputError(f"{len(generator)} generators for {batch_size} samples: give one, or one a sample.")
