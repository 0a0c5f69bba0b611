"""Video from LTX-Video: a transformer of all of a clip's latents, on a strongly compressing causal VAE."""

from typing import Any

from torch import Tensor

from anygpt.decoders.conditions import Condition
from anygpt.decoders.forms import VideoDecoder


class LTXDecoder(VideoDecoder):
    """Conditions `(B, T, D)` of T5 with their mask -> uint8 videos `(F, H, W, 3)` (arXiv 2501.00103).

    The transformer knows `frame_rate`. Clips have 8·n + 1 frames (the VAE's factor).
    """

    pipeline_name = "LTXPipeline"
    weighting_scheme = "none"
    masked = True
    mask_argument = "prompt_attention_mask"
    encodes = ("embeds", "mask")
    pixel_multiple = 32

    @property
    def frame_multiple(self) -> int:  # type: ignore[override]
        return self.vae.temporal_compression_ratio * self.transformer.config.patch_size_t

    def prompt_arguments(self, condition: Condition, negative: Condition | None) -> dict[str, Any]:
        return super().prompt_arguments(condition, negative) | {"frame_rate": self.frame_rate}

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The transformer's velocity prediction, of packed latents."""
        frames, height, width = noisy.shape[2:]
        patches = self.transformer.config.patch_size, self.transformer.config.patch_size_t
        space = self.vae.spatial_compression_ratio
        prediction = self.denoiser(
            self.pipeline._pack_latents(noisy, *patches),
            encoder_hidden_states=condition.embeds,
            timestep=timesteps,
            encoder_attention_mask=condition.mask,
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(self.vae.temporal_compression_ratio / self.frame_rate, space, space),
        ).sample
        return self.pipeline._unpack_latents(prediction, frames, height, width, *patches)
