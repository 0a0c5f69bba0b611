"""Video from Zeroscope and the other text-to-video Stable Diffusion models with a 3D U-Net."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, ClassVar

import numpy as np
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from anygpt.decoders.base import DiffusionDecoder
from anygpt.decoders.targets import VideoTargets


class ZeroscopeDecoder(DiffusionDecoder):
    """Conditions `(B, T, D)` of a CLIP text encoder -> uint8 videos `(F, H, W, 3)`; latents `(B, C, F, h, w)`.

    `height` and `width` (pixels) default to the U-Net's `sample_size` × the VAE's factor, `num_frames` to the
    pipeline's own default. `frame_rate` (frames/s) is for writing and timing clips; the model does not use it.
    """

    modality = "video"
    pipeline_name = "TextToVideoSDPipeline"
    size_names: ClassVar[tuple[str, ...]] = ("height", "width", "num_frames")

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        frame_rate: float = 8,
    ):
        super().__init__(pipeline)
        sample_size = self.unet.config.sample_size
        native = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        self.height = height or native[0] * pipeline.vae_scale_factor
        self.width = width or native[1] * pipeline.vae_scale_factor
        self.num_frames = num_frames or inspect.signature(pipeline.__call__).parameters["num_frames"].default
        self.frame_rate = frame_rate

    @property
    def rate(self) -> float:
        return self.frame_rate

    @property
    def targets(self) -> VideoTargets:
        """uint8 videos `(F, H, W, 3)` -> `(B, 3, num_frames, height, width)` in [-1, 1]."""
        return VideoTargets(self.height, self.width, self.num_frames)

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

    def collect(self, output: Any) -> list[np.ndarray]:
        """uint8 videos `(F, H, W, 3)`, from the pipeline's floats in [0, 1]."""
        return [(frames * 255).round().astype(np.uint8) for frames in output.frames]
