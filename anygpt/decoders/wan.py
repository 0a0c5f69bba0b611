"""Video from Wan 2.1."""

from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from anygpt.decoders.conditions import Condition
from anygpt.decoders.forms import VideoDecoder
from anygpt.errors import InputError


class WanDecoder(VideoDecoder):
    """Conditions `(B, T, D)` of UMT5 with their mask -> uint8 videos `(F, H, W, 3)` (arXiv 2503.20314).

    The transformer attends to padding, which is zeros: the mask says where a projected condition is set to zero too.
    Clips have 4·n + 1 frames (the VAE's factor). A Wan 2.2, with two transformers or a timestep a token, is an
    `InputError`.
    """

    pipeline_name = "WanPipeline"
    weighting_scheme = "none"
    masked = True
    zero_padding = True
    native_rate = 16
    pixel_multiple = 16

    def __init__(self, pipeline: DiffusionPipeline, **settings: Any):
        parts, config = pipeline.components, pipeline.config
        later = parts.get("transformer_2") is not None or parts.get("transformer") is None
        if later or config.get("expand_timesteps"):
            raise InputError("WanDecoder is for Wan 2.1, with one transformer and one timestep; this is a Wan 2.2")
        super().__init__(pipeline, **settings)

    @property
    def frame_multiple(self) -> int:  # type: ignore[override]
        return self.pipeline.vae_scale_factor_temporal

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        return self.denoiser(noisy, timesteps, condition.embeds).sample
