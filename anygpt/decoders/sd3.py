"""Images from Stable Diffusion 3: a transformer trained by flow matching."""

import torch
from torch import Tensor

from anygpt.decoders.conditions import Condition
from anygpt.decoders.forms import ImageDecoder


class StableDiffusion3Decoder(ImageDecoder):
    """Conditions of two CLIP encoders and T5, embeds `(B, T, D)` and pooled `(B, P)` -> PIL images.

    Trained as rectified flow (`FlowSchedule`), by default with σ from a logit-normal density with the schedule's shift,
    unweighted. `weighting_scheme` and the loss are those of diffusers' SD 3 training script with
    `--precondition_outputs 0` (its default multiplies the loss by σ²). `max_sequence_length` counts T5's tokens.
    """

    pipeline_name = "StableDiffusion3Pipeline"
    weighting_scheme = "logit_normal"

    @property
    def size_multiple(self) -> int:
        """The VAE's factor times the transformer's patch size."""
        return self.pipeline.vae_scale_factor * self.transformer.config.patch_size

    @property
    def condition_shape(self) -> tuple[int, int]:
        """`(T, D)`: CLIP's tokens, then T5's (zeros without T5), all of the joint attention's width."""
        tokens = self.pipeline.tokenizer_max_length + self.max_sequence_length
        return tokens, self.transformer.config.joint_attention_dim

    @property
    def pooled_dim(self) -> int:
        """`P`, the width of both CLIP projections together."""
        return self.transformer.config.pooled_projection_dim

    @torch.no_grad()
    def encode_text(self, captions: list[str]) -> Condition:
        """The pipeline's embeds `(B, T, D)` and pooled `(B, P)`."""
        embeds, _, pooled, _ = self.encode_prompt(captions, prompt_2=None, prompt_3=None)
        return Condition(embeds, pooled)

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The transformer's velocity prediction."""
        return self.denoiser(noisy, condition.embeds, condition.pooled, timesteps).sample
