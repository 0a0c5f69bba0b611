"""Images from SANA: a linear transformer on the latents of a deep-compression autoencoder."""

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from anygpt.decoders.conditions import Condition
from anygpt.decoders.forms import STRENGTH, ImageDecoder
from anygpt.decoders.options import Rule


class SanaDecoder(ImageDecoder):
    """Conditions `(B, T, D)` of Gemma 2 with their mask -> PIL images (arXiv 2410.10629).

    Captions are encoded after the pipeline's instruction to enhance them, negative prompts without it. Images have
    exactly the size asked for: the pipeline's rounding to its training resolutions is off.
    """

    pipeline_name = "SanaPipeline"
    weighting_scheme = "none"
    masked = True
    encodes = ("embeds", "mask")
    pixel_multiple = 32

    def encode_prompt(self, captions: list[str], **more: Any) -> Tensor | Condition:
        instruction = self.call_default("complex_human_instruction")
        return super().encode_prompt(captions, complex_human_instruction=instruction, **more)

    def encode_negative(self, prompts: list[str]) -> Tensor | Condition:
        return super().encode_prompt(prompts)

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The autoencoder's latents, which have no deviation."""
        latents = self.vae.encode(pixels).latent
        return latents, torch.zeros_like(latents)

    def prompt_arguments(self, condition: Condition, negative: Condition | None) -> dict[str, Any]:
        more: dict[str, Any] = {"use_resolution_binning": False}
        if negative is not None:
            more["negative_prompt"] = None  # its default is a text, which the pipeline would take as a second negative
        return super().prompt_arguments(condition, negative) | more

    @property
    def option_rules(self) -> dict[str, Rule]:
        """Also `strength`, though diffusers has no image-to-image pipeline of this family."""
        return super().option_rules | {"strength": STRENGTH}

    def call_pipeline(self, **arguments: Any) -> Any:
        """Call the pipeline; with a reference, from the step of the schedule that `strength` gives, on the reference's
        latents under that step's noise."""
        strength, reference = (arguments.pop(name, None) for name in ("strength", "reference"))
        if reference is None:
            return self.pipeline(**arguments)
        pixels = self.reference_pixels(reference, **arguments) * 2 - 1
        scheduler, steps = self.pipeline.scheduler, arguments.get("num_inference_steps")
        steps = steps or self.call_default("num_inference_steps")
        scheduler.set_timesteps(steps, device=self.device)
        timesteps, first = scheduler.timesteps, int(steps - steps * strength)
        scheduler.set_begin_index(first)
        latents = self.encode_media(pixels).float()
        noise = randn_tensor(latents.shape, arguments["generator"], self.device, latents.dtype)
        noisy = torch.lerp(latents, noise, float(scheduler.sigmas[first]))

        def begin(*_: Any, **__: Any) -> Tensor:
            scheduler.timesteps = timesteps  # whose number tells it the last step
            return noisy

        scheduler.timesteps = timesteps[first:]
        scheduler.set_timesteps, self.pipeline.prepare_latents = (lambda *_, **__: None), begin
        try:
            return self.pipeline(**arguments)
        finally:
            del scheduler.set_timesteps, self.pipeline.prepare_latents

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The transformer's velocity prediction, without its learned variance if it has one."""
        prediction = self.denoiser(
            noisy,
            encoder_hidden_states=condition.embeds,
            encoder_attention_mask=condition.mask,
            timestep=timesteps * self.transformer.config.timestep_scale,
        ).sample
        return prediction[:, : noisy.shape[1]]
