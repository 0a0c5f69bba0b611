"""Images from Stable Diffusion XL."""

import torch
from torch import Tensor

from anygpt.decoders.conditions import Condition
from anygpt.decoders.forms import ImageDecoder


class StableDiffusionXLDecoder(ImageDecoder):
    """Conditions of two CLIP text encoders, embeds `(B, T, D)` and pooled `(B, P)` -> PIL images (arXiv 2307.01952).

    Training and sampling use the pipeline's default size conditioning: the target size, uncropped. The default negative
    condition is zeros if the pipeline has `force_zeros_for_empty_prompt`, else the encoding of "".
    """

    pipeline_name = "StableDiffusionXLPipeline"

    @property
    def condition_shape(self) -> tuple[int, int]:
        """`(T, D)` of the two text encoders' concatenated states."""
        widths = (encoder.config.hidden_size for encoder in (self.text_encoder, self.text_encoder_2))
        return self.pipeline.tokenizer.model_max_length, sum(widths)

    @property
    def pooled_dim(self) -> int:
        """`P`, the width of the second text encoder's projection."""
        return self.text_encoder_2.config.projection_dim

    @torch.no_grad()
    def encode_text(self, captions: list[str]) -> Condition:
        """Both encoders' penultimate states `(B, T, D)` and the second one's projection `(B, P)`."""
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            captions, device=self.device, do_classifier_free_guidance=False
        )
        return Condition(embeds, pooled)

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
