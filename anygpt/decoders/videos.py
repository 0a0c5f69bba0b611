"""Video from Zeroscope (and other Stable Diffusions of videos, with a 3D U-Net), LTX-Video and Wan 2.1."""

from functools import partial
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from anygpt.decoders.conditions import Condition
from anygpt.decoders.forms import VideoDecoder
from anygpt.errors import InputError


class ZeroscopeDecoder(VideoDecoder):
    """Conditions `(B, T, D)` of a CLIP text encoder -> uint8 videos `(F, H, W, 3)`; its VAE encodes single frames."""

    pipeline_name = "TextToVideoSDPipeline"

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The image VAE's posterior frame by frame: `(B, 3, F, H, W)` -> two of `(B, C, F, h, w)`."""
        frames = pixels.transpose(1, 2)
        moments = super().posterior(frames.flatten(0, 1))
        # Contiguous, as when read from a feature cache: the rounding of kernels depends on the memory layout.
        mean, std = (x.unflatten(0, frames.shape[:2]).transpose(1, 2).contiguous() for x in moments)
        return mean, std

    def enable_gradient_checkpointing(self) -> None:
        """Checkpoint block by block, because diffusers' own switch refuses the 3D U-Net."""
        for block in (*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks):
            if "forward" not in vars(block):  # not yet wrapped
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)


class LTXDecoder(VideoDecoder):
    """Conditions `(B, T, D)` of T5 with their mask -> uint8 videos `(F, H, W, 3)` (arXiv 2501.00103).

    A transformer of all of a clip's latents, which knows `frame_rate`, on a strongly compressing causal VAE. Clips have
    8·n + 1 frames (the VAE's factor).
    """

    pipeline_name = "LTXPipeline"
    weighting_scheme = "none"
    masked = True
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


class WanDecoder(VideoDecoder):
    """Conditions `(B, T, D)` of UMT5 with their mask -> uint8 videos `(F, H, W, 3)` (arXiv 2503.20314).

    The transformer attends to padding, which is zeros: the mask says where a projected condition, too, is set to zero.
    Clips have 4·n + 1 frames (the VAE's factor). Wan 2.2, with two transformers or a timestep per token, is an
    `InputError`.
    """

    pipeline_name = "WanPipeline"
    weighting_scheme = "none"
    masked = True
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
