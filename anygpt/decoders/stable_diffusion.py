"""Images from Stable Diffusion: versions 1 and 2, XL and 3."""

import torch
from torch import Tensor

from anygpt.decoders.conditions import Condition
from anygpt.decoders.forms import ImageDecoder


class StableDiffusionDecoder(ImageDecoder):
    """Conditions `(B, T, D)` of a CLIP text encoder -> PIL images."""

    pipeline_name = "StableDiffusionPipeline"


class StableDiffusionXLDecoder(ImageDecoder):
    """Conditions of two CLIP text encoders, embeds `(B, T, D)` and pooled `(B, P)` -> PIL images (arXiv 2307.01952).

    Training and sampling use the pipeline's default size conditioning: the target size, uncropped. The default negative
    condition is zeros if the pipeline has `force_zeros_for_empty_prompt`, else the encoding of "".
    """

    pipeline_name = "StableDiffusionXLPipeline"
    encodes = ("embeds", None, "pooled")

    @property
    def condition_shape(self) -> tuple[int, int]:
        widths = (encoder.config.hidden_size for encoder in (self.text_encoder, self.text_encoder_2))
        return self.pipeline.tokenizer.model_max_length, sum(widths)

    @property
    def pooled_dim(self) -> int:
        return self.text_encoder_2.config.projection_dim

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Computed in float32 if the VAE would overflow in float16, as the pipeline does for decoding."""
        if not (self.vae.dtype == torch.float16 and self.vae.config.force_upcast):
            return super().posterior(pixels)
        self.vae.to(torch.float32)
        try:
            return super().posterior(pixels.float())
        finally:
            self.vae.to(torch.float16)

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The prediction, also conditioned on the pooled encoding and the sizes."""
        height, width = (side * self.pipeline.vae_scale_factor for side in noisy.shape[-2:])
        # original size, top left corner of the crop, target size
        time_ids = torch.tensor([[height, width, 0, 0, height, width]]).repeat(len(noisy), 1).to(noisy)
        added = {"text_embeds": condition.pooled, "time_ids": time_ids}
        return self.denoiser(noisy, timesteps, encoder_hidden_states=condition.embeds, added_cond_kwargs=added).sample


class StableDiffusion3Decoder(ImageDecoder):
    """Conditions of two CLIP encoders and T5, embeds `(B, T, D)` and pooled `(B, P)` -> PIL images.

    Trained as rectified flow (`FlowSchedule`), by default with σ from a logit-normal density with the schedule's shift,
    unweighted. `weighting_scheme` and the loss are those of diffusers' SD 3 training script with
    `--precondition_outputs 0` (its default multiplies the loss by σ²). `max_sequence_length` counts T5's tokens.
    """

    pipeline_name = "StableDiffusion3Pipeline"
    weighting_scheme = "logit_normal"
    most_tokens = 512
    pixel_multiple = 1
    encodes = ("embeds", None, "pooled")

    @property
    def condition_shape(self) -> tuple[int, int]:
        """CLIP's tokens, then T5's (zeros without T5), all of the joint attention's width."""
        tokens, width = super().condition_shape
        return self.pipeline.tokenizer_max_length + tokens, width

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        return self.denoiser(noisy, condition.embeds, condition.pooled, timesteps).sample
