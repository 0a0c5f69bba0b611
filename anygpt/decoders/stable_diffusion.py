"""Images from Stable Diffusion (1.x, 2.x)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image

from anygpt.decoders.base import DiffusionDecoder
from anygpt.decoders.conditions import Condition
from anygpt.decoders.targets import ImageTargets


class StableDiffusionDecoder(DiffusionDecoder):
    """Conditions `(B, T, D)` of a CLIP text encoder -> PIL images.

    `height` and `width` (pixels) of targets and samples default to the network's `sample_size` × the VAE's factor. The
    pipeline's safety checker, if any, blackens images that it flags.
    """

    modality = "image"
    pipeline_name = "StableDiffusionPipeline"
    size_names: ClassVar[tuple[str, ...]] = ("height", "width")

    def __init__(self, pipeline: DiffusionPipeline, *, height: int | None = None, width: int | None = None):
        super().__init__(pipeline)
        sample_size = self.denoiser.config.sample_size
        native = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        self.height = height or native[0] * pipeline.vae_scale_factor
        self.width = width or native[1] * pipeline.vae_scale_factor

    @property
    def targets(self) -> ImageTargets:
        """PIL images -> `(B, channels, height, width)` in [-1, 1], with the VAE's number of channels."""
        return ImageTargets(self.height, self.width, self.vae.config.in_channels)

    def collect(self, output: Any) -> list[Image.Image]:
        """PIL images: the pipeline's RGB, or 16-bit grey converted from one channel of floats in [0, 1]."""
        if isinstance(output.images, list):
            return output.images
        return [Image.fromarray((image[..., 0] * 65535).round().astype(np.uint16)) for image in output.images]

    def prompt_arguments(self, condition: Condition, negative: Condition | None) -> dict[str, Any]:
        one = {"output_type": "np"} if self.vae.config.out_channels == 1 else {}
        return super().prompt_arguments(condition, negative) | one
