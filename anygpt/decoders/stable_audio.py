"""Sound from Stable Audio Open: a transformer on the latents of waveforms."""

from functools import cached_property
from typing import Any

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor, nn

from anygpt.decoders.conditions import Condition
from anygpt.decoders.forms import AudioDecoder
from anygpt.decoders.options import Rule
from anygpt.decoders.schedules import AngularSchedule
from anygpt.decoders.targets import WaveformTargets


class StableAudioDecoder(AudioDecoder):
    """Conditions `(B, T, D)` of T5, projected, with their mask -> float32 waveforms `(C, N)` (arXiv 2407.14358).

    The transformer attends to padding, which is zeros, and to the beginning, 0 s, and the end, `audio_length_in_s`
    (by default all of the model's window). Targets are cut at the end, and latents always span the window. Training
    uses this end too, where the authors used each target's own: set it to the length of the data's sounds.
    """

    pipeline_name = "StableAudioPipeline"
    masked = True

    @property
    def sampling_rate(self) -> int:
        return self.vae.config.sampling_rate

    @property
    def seconds_per_latent(self) -> float:
        return self.vae.hop_length / self.sampling_rate

    @property
    def option_rules(self) -> dict[str, Rule]:
        """Also refuses a length beyond the window."""
        rules, most = super().option_rules, self.transformer.config.sample_size * self.seconds_per_latent
        fits, expected = rules["audio_length_in_s"]
        length = (lambda value: fits(value) and value <= most, f"{expected} to {most:.4g}")
        return rules | {"audio_length_in_s": length}

    @property
    def condition_shape(self) -> tuple[int, int]:
        return self.pipeline.tokenizer.model_max_length, self.projection_model.config.conditioning_dim

    @property
    def targets(self) -> WaveformTargets:
        length = int(self.audio_length_in_s * self.sampling_rate)
        window = self.transformer.config.sample_size * self.vae.hop_length
        return WaveformTargets(window, self.sampling_rate, self.vae.config.audio_channels, length)

    @cached_property
    def schedule(self) -> AngularSchedule:
        return AngularSchedule(self.pipeline.scheduler)

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The transformer's v-prediction, also conditioned on the beginning and the end in seconds."""
        seconds = self.pipeline.encode_duration(0.0, self.audio_length_in_s, self.device, False, len(noisy))
        places = get_1d_rotary_pos_embed(
            self.pipeline.rotary_embed_dim, noisy.shape[2] + 1, use_real=True, repeat_interleave_real=False
        )
        return self.denoiser(
            noisy,
            timesteps.to(noisy.dtype),
            encoder_hidden_states=torch.cat([condition.embeds, *seconds], dim=1),
            global_hidden_states=torch.cat(seconds, dim=2),
            rotary_embedding=[x.to(noisy.device) for x in places],
        ).sample

    def call_pipeline(self, **arguments: Any) -> Any:
        """Call the pipeline with the end in seconds, without projecting the condition again."""
        projection = self.projection_model.text_projection
        self.projection_model.text_projection = nn.Identity()
        try:
            return self.pipeline(audio_end_in_s=arguments.pop("audio_length_in_s"), output_type="np", **arguments)
        finally:
            self.projection_model.text_projection = projection
