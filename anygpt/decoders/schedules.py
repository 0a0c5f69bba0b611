"""Training noise schedules of decoders, separate from the pipeline's scheduler, whose state is for sampling.

`DiffusionSchedule` is for DDPM, `FlowSchedule` for flow matching, `AngularSchedule` for Stable Audio.
Shapes: `B` batch, `C` latent channels.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3, compute_snr
from torch import Tensor

from anygpt.decoders.conditions import Generators
from anygpt.decoders.options import is_number
from anygpt.errors import InputError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
WEIGHTING_SCHEMES = ("logit_normal", "mode", "cosmap", "sigma_sqrt", "none")
SHIFTING = (
    *("num_train_timesteps", "use_dynamic_shifting", "time_shift_type"),
    *("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift"),
)
"""Settings of a flow's noise levels, shared by several scheduler classes."""


class TrainingSchedule(ABC):
    """Timesteps, noise, targets and weights of a denoising loss, at the noise levels of diffusers' `scheduler`."""

    scheduler: Any
    method: str
    """Name of the training method in messages."""
    last: float
    """The last timestep; the first is 0."""

    def draw(self, batch_size: int, generator: Generators, device: torch.device) -> Tensor:
        """Draw training timesteps `(B,)` on `device`, each with its own generator if a list is given."""
        if isinstance(generator, list):
            return torch.cat([self.draw(1, g, device) for g in generator])
        return self.density(batch_size, generator, device if generator is None else generator.device).to(device)

    def shift(self, timesteps: Tensor, tokens: int) -> Tensor:
        """Shift drawn timesteps as sampling does for a sequence of `tokens`; not at all by default."""
        return timesteps

    def check(self, timesteps: Tensor) -> None:
        """Raise an `InputError` for timesteps that the schedule does not have."""
        whole = isinstance(self.last, int)
        if (whole and timesteps.is_floating_point()) or not bool(((timesteps >= 0) & (timesteps <= self.last)).all()):
            raise InputError(
                f"timesteps are {timesteps.tolist()!s:.80}, expected {'whole ' if whole else ''}numbers from 0 to "
                f"{self.last} for {self.method}"
            )

    @abstractmethod
    def density(self, batch_size: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Draw timesteps `(B,)` on `device`."""

    @abstractmethod
    def noise_and_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """The noisy latents and the prediction target, both like `latents`."""

    def weight(self, timesteps: Tensor, snr_gamma: float | None) -> Tensor | float:
        """Loss weights `(B,)` of the samples; an `InputError` if min-SNR-γ does not apply."""
        if snr_gamma is not None:
            raise InputError(
                f"snr_gamma is {snr_gamma}, but the decoder trains by {self.method}, where snr_gamma has no meaning"
            )
        return 1.0


class DiffusionSchedule(TrainingSchedule):
    """The DDPM noise schedule (arXiv 2006.11239) of a pipeline's scheduler.

    A config without betas, as for flow matching (`DDPMScheduler` would silently use its default ones), is an
    `InputError`, and so is a prediction type other than epsilon, v_prediction and sample.
    """

    method = "diffusion"

    def __init__(self, scheduler: Any):
        config = scheduler.config
        self.kind = config.get("prediction_type", PREDICTION_TYPES[0])
        flow = config.get("use_flow_sigmas") or self.kind == "flow_prediction"
        if "beta_schedule" not in config or flow or config.get("timestep_type") == "continuous":
            raise InputError(
                f"the decoder trains with a DDPM noise schedule, but the pipeline's {type(scheduler).__name__} is "
                "configured for flow matching or continuous noise levels: give the pipeline the diffusion scheduler "
                "that it was trained with"
            )
        if self.kind not in PREDICTION_TYPES:
            raise InputError(
                f"the scheduler's prediction_type is {self.kind!r}, expected one of {', '.join(PREDICTION_TYPES)}: "
                "correct scheduler_config.json"
            )
        # With this key, from_config would replace defaults of the other class (such as LCM's betas) by DDPM's.
        self.scheduler = DDPMScheduler.from_config({k: v for k, v in config.items() if k != "_use_default_values"})
        self.last = self.scheduler.config.num_train_timesteps - 1

    def density(self, batch_size: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Draw uniformly over the schedule, int64."""
        high = self.scheduler.config.num_train_timesteps
        return torch.randint(high, (batch_size,), generator=generator, device=device)

    def noise_and_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        if self.kind == "v_prediction":
            return noisy, self.scheduler.get_velocity(latents, noise, timesteps)
        return noisy, noise if self.kind == "epsilon" else latents

    def weight(self, timesteps: Tensor, snr_gamma: float | None) -> Tensor | float:
        """1, or min-SNR-γ weights (arXiv 2303.09556).

        With the signal-to-noise ratio s: epsilon min(s,γ)/s, v_prediction min(s,γ)/(s+1), sample min(s,γ). γ with
        epsilon prediction at zero terminal SNR is an `InputError`.
        """
        if snr_gamma is None:
            return 1.0
        if not is_number(snr_gamma) or snr_gamma <= 0:
            raise InputError(f"snr_gamma is {snr_gamma!r:.80}, expected a number above 0, or None for no weights")
        if self.kind == "epsilon" and self.scheduler.alphas_cumprod.min() == 0:
            raise InputError(
                "snr_gamma cannot be used with epsilon prediction at zero terminal SNR (the weight is 0/0): "
                "leave snr_gamma unset, or use a v_prediction model"
            )
        snr = compute_snr(self.scheduler, timesteps)
        divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[self.kind]
        return snr.clamp(max=snr_gamma) / divisor


class FlowSchedule(TrainingSchedule):
    """Rectified flow (arXiv 2403.03206): x_t = (1−σ)·x₀ + σ·ε, target ε − x₀, with the pipeline's noise levels.

    `scheme`, of `WEIGHTING_SCHEMES`, is the `weighting_scheme` of diffusers' SD 3 training script: the density of σ and
    the loss weights. A scheduler that is not configured for flow matching is an `InputError`.
    """

    method = "flow matching"

    def __init__(self, scheduler: Any, scheme: str = "logit_normal"):
        self.scheme, config = scheme, scheduler.config
        shift = config.get("flow_shift") if config.get("use_flow_sigmas") else config.get("shift")
        if shift is None:
            raise InputError(
                f"the decoder trains by flow matching, but the pipeline's {type(scheduler).__name__} is not configured "
                "for it: give it the flow's scheduler"
            )
        # With use_dynamic_shifting, its levels are unshifted, and `shift` shifts them.
        known = {name: config[name] for name in SHIFTING if name in config}
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, **known)
        self.last = float(config.num_train_timesteps)

    def density(self, batch_size: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Draw float32 timesteps (1000 σ for 1000 steps), with the training script's parameters."""
        steps = self.scheduler.timesteps
        u = compute_density_for_timestep_sampling(
            self.scheme, batch_size, 0.0, 1.0, 1.29, device=device, generator=generator
        )
        return steps[(u * len(steps)).long().clamp(max=len(steps) - 1).cpu()]

    def shift(self, timesteps: Tensor, tokens: int) -> Tensor:
        """σ → e^μ / (e^μ + 1/σ − 1) with μ linear in the number of tokens, if the pipeline does so for sampling.

        A scheduler whose `time_shift_type` is linear has μ in place of e^μ.
        """
        config = self.scheduler.config
        if not config.use_dynamic_shifting:
            return timesteps
        least, most = config.base_image_seq_len, config.max_image_seq_len
        mu = config.base_shift + (config.max_shift - config.base_shift) * (tokens - least) / (most - least)
        return self.scheduler.time_shift(mu, 1.0, self._sigmas(timesteps)) * self.last

    def noise_and_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        sigmas = self._sigmas(timesteps).to(latents.dtype).view(-1, *(1,) * (latents.dim() - 1))
        return (1 - sigmas) * latents + sigmas * noise, noise - latents

    def weight(self, timesteps: Tensor, snr_gamma: float | None) -> Tensor:
        """The scheme's weights, 1 except for cosmap and sigma_sqrt."""
        return super().weight(timesteps, snr_gamma) * compute_loss_weighting_for_sd3(
            self.scheme, self._sigmas(timesteps)
        )

    def _sigmas(self, timesteps: Tensor) -> Tensor:
        return timesteps / self.last


class AngularSchedule(TrainingSchedule):
    """Continuous time t ~ U(0, 1) with x_t = cos(πt/2)·x₀ + sin(πt/2)·ε and target v = cos(πt/2)·ε − sin(πt/2)·x₀.

    The v-objective of Stable Audio (arXiv 2407.14358). The pipeline's scheduler samples at noise levels tan(πt/2); one
    of another parametrisation is an `InputError`.
    """

    method = "the v-objective in continuous time"
    last = 1.0

    def __init__(self, scheduler: Any):
        config = scheduler.config
        if (config.get("prediction_type"), config.get("sigma_data")) != ("v_prediction", 1.0):
            raise InputError(
                f"the decoder trains with v-prediction at a data deviation of 1, which the pipeline's "
                f"{type(scheduler).__name__} is not configured for: give it the scheduler that it was trained with"
            )
        self.scheduler = scheduler

    def density(self, batch_size: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        return torch.rand(batch_size, generator=generator, device=device)

    def noise_and_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        angles = (timesteps * torch.pi / 2).to(latents.dtype).view(-1, *(1,) * (latents.dim() - 1))
        return angles.cos() * latents + angles.sin() * noise, angles.cos() * noise - angles.sin() * latents
