"""Video from Zeroscope and the other text-to-video Stable Diffusion models with a 3D U-Net."""

from functools import partial

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from anygpt.decoders.forms import VideoDecoder


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
