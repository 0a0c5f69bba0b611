"""Images from SANA: a linear transformer on the latents of a deep-compression autoencoder."""

import math
from typing import Any

import torch
from torch import Tensor

from anygpt.decoders.conditions import Condition
from anygpt.decoders.forms import ImageDecoder


class SanaDecoder(ImageDecoder):
    """Conditions `(B, T, D)` of Gemma 2 with their mask -> PIL images (arXiv 2410.10629).

    Captions are encoded after the pipeline's instruction to enhance them, negative prompts alone. Images have exactly
    the size asked for: the pipeline's rounding to its training resolutions is off.
    """

    pipeline_name = "SanaPipeline"
    weighting_scheme = "none"
    masked = True
    mask_argument = "prompt_attention_mask"

    @property
    def size_multiple(self) -> int:
        """What the pipeline demands, 32, and the VAE's factor times the transformer's patch size."""
        return math.lcm(32, self.pipeline.vae_scale_factor * self.transformer.config.patch_size)

    def encode_text(self, captions: list[str]) -> Condition:
        """The pipeline's embeds `(B, T, D)` and mask."""
        return self._encode(captions, self.call_default("complex_human_instruction"))

    def encode_negative(self, prompts: list[str]) -> Condition:
        return self._encode(prompts, None)

    def _encode(self, texts: list[str], instruction: list[str] | None) -> Condition:
        embeds, mask, _, _ = self.encode_prompt(texts, complex_human_instruction=instruction)
        return Condition(embeds, mask=mask.bool())

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The autoencoder's latents, which have no deviation."""
        latents = self.vae.encode(pixels).latent
        return latents, torch.zeros_like(latents)

    def prompt_arguments(self, condition: Condition, negative: Condition | None) -> dict[str, Any]:
        more: dict[str, Any] = {"use_resolution_binning": False}
        if negative is not None:
            more["negative_prompt"] = None  # the default is a text, which the pipeline takes for a second negative
        return super().prompt_arguments(condition, negative) | more

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The transformer's velocity prediction, without its learned variance if it has one."""
        prediction = self.denoiser(
            noisy,
            encoder_hidden_states=condition.embeds,
            encoder_attention_mask=condition.mask,
            timestep=timesteps * self.transformer.config.timestep_scale,
        ).sample
        return prediction[:, : noisy.shape[1]]
