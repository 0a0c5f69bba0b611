"""Edited images from InstructPix2Pix: Stable Diffusion whose U-Net also reads the latents of a reference."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from anygpt.decoders.conditions import Condition
from anygpt.decoders.forms import ImageDecoder
from anygpt.decoders.options import Rule, is_number
from anygpt.decoders.pipelines import find_pipeline


class InstructPix2PixDecoder(ImageDecoder):
    """Conditions `(B, T, D)` of CLIP, and references -> PIL images (arXiv 2211.09800).

    The U-Net gets the reference's unscaled latents as further channels, or zeros without one. `guidance_scale` guides
    by the text, `image_guidance_scale` by the reference.
    """

    pipeline_name = "StableDiffusionInstructPix2PixPipeline"
    takes_reference = True
    guided = (*ImageDecoder.guided, "image_guidance_scale")

    @classmethod
    def widened(cls, pipeline: DiffusionPipeline) -> InstructPix2PixDecoder:
        """A Stable Diffusion pipeline with further input channels of zero weight, from which training starts."""
        unet = pipeline.unet
        wide = UNet2DConditionModel.from_config(unet.config, in_channels=2 * unet.config.in_channels)
        weights = unet.state_dict()
        weights["conv_in.weight"] = torch.cat([weights["conv_in.weight"], 0 * weights["conv_in.weight"]], dim=1)
        wide.load_state_dict(weights)
        parts = {name: part for name, part in pipeline.components.items() if name != "unet"}
        safe = {"requires_safety_checker": pipeline.config.requires_safety_checker}
        return cls(find_pipeline(cls.pipeline_name)(unet=wide, **parts, **safe))

    def encode_reference(self, reference: Tensor) -> Tensor:
        """Latents `(B, C, h, w)` without noise, unscaled as in the pipeline."""
        return super().encode_reference(reference) / self.vae.config.scaling_factor

    def predict(
        self, noisy: Tensor, timesteps: Tensor, condition: Condition, reference: Tensor | None = None
    ) -> Tensor:
        reference = torch.zeros_like(noisy) if reference is None else reference
        return super().predict(torch.cat([noisy, reference], dim=1), timesteps, condition)

    def call_pipeline(self, **arguments: Any) -> Any:
        """Call the pipeline; without references, with latents of zeros in their place."""
        height, width, reference = arguments.pop("height"), arguments.pop("width"), arguments.pop("reference", None)
        if reference is not None:
            return self.pipeline(image=self.reference_pixels(reference, height, width), **arguments)

        def zeros(image: Any, count: int, each: int, dtype: Any, device: Any, guided: bool) -> Tensor:
            size = (side // self.pipeline.vae_scale_factor for side in (height, width))
            return torch.zeros(
                count * each * (3 if guided else 1), self.vae.config.latent_channels, *size, dtype=dtype, device=device
            )

        self.pipeline.prepare_image_latents = zeros
        try:
            return self.pipeline(image=torch.zeros(1, self.vae.config.in_channels, height, width), **arguments)
        finally:
            del self.pipeline.prepare_image_latents

    @property
    def option_rules(self) -> dict[str, Rule]:
        """Also `image_guidance_scale`; below 1 the pipeline would not guide at all."""
        scale = (lambda value: is_number(value) and value >= 1, "a number from 1")
        return super().option_rules | {"image_guidance_scale": scale}

    @property
    def pipeline_options(self) -> dict[str, Any]:
        return super().pipeline_options | {"image_guidance_scale": self.call_default("image_guidance_scale")}
