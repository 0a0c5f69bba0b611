"""Sound from AudioLDM and AudioLDM 2."""

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import GenerationMixin, GPT2LMHeadModel

from anygpt.decoders.conditions import Condition, Generators
from anygpt.decoders.forms import AudioDecoder
from anygpt.decoders.targets import AudioTargets
from anygpt.errors import InputError


def vocoder_loss(made: Tensor, waveform: Tensor) -> Tensor:
    """Squared error of `(B, N)` waveforms, relative to the power of the target: `(B,)`.

    It penalises phase, so it suits only sounds whose spectrograms determine the phases, like ToyWorld's; others need
    HiFi-GAN's losses (arXiv 2010.05646). A distance between spectrograms trains far more slowly, because a tone that is
    still missing gives it no gradient.
    """
    error = (made - waveform.float()).square().sum(1)
    return error / waveform.float().square().sum(1).clamp(min=1e-8)


class AudioLDMDecoder(AudioDecoder):
    """Conditions `(B, 1, D)`, unit vectors of CLAP's text projection -> float32 waveforms `(N,)` at `sampling_rate`.

    With `normalize_waveform`, target waveforms are centred and scaled to a peak of 0.5, as in AudioLDM's training.
    """

    pipeline_name = "AudioLDMPipeline"

    def __init__(self, pipeline: DiffusionPipeline, *, normalize_waveform: bool = True, **settings: Any):
        super().__init__(pipeline, **settings)
        self.normalize_waveform = normalize_waveform

    @property
    def sampling_rate(self) -> int:
        return self.vocoder.config.sampling_rate

    @property
    def _hop_length(self) -> int:
        return math.prod(self.vocoder.config.upsample_rates)

    @property
    def seconds_per_latent(self) -> float:
        return self.pipeline.vae_scale_factor * (self._hop_length / self.sampling_rate)

    @property
    def condition_shape(self) -> tuple[int, int]:
        return 1, self.text_encoder.config.projection_dim

    @property
    def targets(self) -> AudioTargets:
        """Log-mels of as many frames as the pipeline generates, with waveforms where the vocoder trains."""
        factor = self.pipeline.vae_scale_factor
        frames = math.ceil(int(self.audio_length_in_s / (self._hop_length / self.sampling_rate)) / factor) * factor
        options = {"normalize": self.normalize_waveform, "waveforms": "vocoder" in self.trains}
        return AudioTargets.of_vocoder(self.vocoder.config, frames, **options)

    def encode_prompt(self, captions: list[str], **more: Any) -> Tensor | Condition:
        """The normalised CLAP projection, `(B, 1, D)`."""
        return self.pipeline._encode_prompt(captions, self.device, 1, False).unsqueeze(1)

    def normalize_condition(self, condition: Tensor | Condition) -> Tensor | Condition:
        """Scale to unit length, as the pipeline does with CLAP's projection."""
        if isinstance(condition, Tensor):
            return F.normalize(condition, dim=-1)
        return replace(condition, embeds=F.normalize(condition.embeds, dim=-1))

    def reconstruction_losses(self, media: list | Tensor, generator: Generators = None) -> dict[str, Tensor]:
        """Adds the vocoder's loss on the targets' own spectrograms (`vocoder_loss`)."""
        if "vocoder" not in self.trains:
            return super().reconstruction_losses(media, generator)
        media = (media if isinstance(media, Tensor) else self.targets(media)).to(self.device)
        mels, waveforms = media.split([self.targets.num_mel_bins, self.targets.hop_length], dim=-1)
        losses = super().reconstruction_losses(mels, generator) if "vae" in self.trains else {}
        made = self.vocoder(mels[:, 0].to(self.dtype)).float()
        return losses | {"vocoder": vocoder_loss(made, waveforms.flatten(1))}

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The U-Net combines the condition with the time embedding, as class labels; it has no cross-attention."""
        labels = condition.embeds.squeeze(1)
        return self.denoiser(noisy, timesteps, encoder_hidden_states=None, class_labels=labels).sample

    def prompt_arguments(self, condition: Condition, negative: Condition | None) -> dict[str, Any]:
        """Both conditions `(B, D)`, as this pipeline takes them."""
        arguments = super().prompt_arguments(condition, negative)
        return {name: None if embeds is None else embeds.squeeze(1) for name, embeds in arguments.items()}


class AudioLDM2Decoder(AudioLDMDecoder):
    """Conditions `(B, G + T5, D)` with their mask -> float32 waveforms `(N,)` at `sampling_rate` (arXiv 2308.05734).

    A condition is what the U-Net attends to: the `G` states that the language model generates, then T5's states, which
    have padding; `D` is the larger of both widths, and narrower states end in zeros. Sizes and targets are as in
    `AudioLDMDecoder`.
    """

    pipeline_name = "AudioLDM2Pipeline"
    masked = True

    def __init__(self, pipeline: DiffusionPipeline, **settings: Any):
        if not isinstance(pipeline.language_model, GenerationMixin):  # older repositories only have the trunk
            with torch.device("meta"):
                whole = GPT2LMHeadModel(pipeline.language_model.config)
            whole.transformer = pipeline.language_model
            whole.tie_weights()
            pipeline.register_modules(language_model=whole.eval())
        super().__init__(pipeline, **settings)
        if self.text_encoder_2.config.model_type == "vits":
            raise InputError("AudioLDM2Decoder is for sounds and music; this pipeline speaks a transcription")

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """Number and width of the generated states, and the width of T5's."""
        made = self.language_model.config
        return made.max_new_tokens, made.hidden_size, self.text_encoder_2.config.hidden_size

    @property
    def condition_shape(self) -> tuple[int, int]:
        count, *widths = self._sizes
        return count + self.pipeline.tokenizer_2.model_max_length, max(widths)

    def encode_prompt(self, captions: list[str], **more: Any) -> Tensor | Condition:
        """The pipeline's generated states and T5's, padded to the full length, and the mask.

        Captions are encoded one by one: the language model would read a batch's padding as text.
        """
        tokens, width = self.condition_shape
        rows, masks = [], []
        for caption in captions:
            states, mask, generated = self.pipeline.encode_prompt([caption], self.device, 1, False)
            count, lacking = generated.shape[1], tokens - generated.shape[1] - states.shape[1]
            states = F.pad(states, (0, width - states.shape[2], 0, lacking))
            rows.append(torch.cat([F.pad(generated, (0, width - generated.shape[2])), states], dim=1))
            masks.append(F.pad(F.pad(mask, (0, lacking)), (count, 0), value=1))
        return Condition(torch.cat(rows), mask=torch.cat(masks).bool())

    def normalize_condition(self, condition: Tensor | Condition) -> Tensor | Condition:
        """Return the states unchanged: this pipeline does not normalise them."""
        return condition

    def _split(self, condition: Condition) -> tuple[Tensor, Tensor, Tensor]:
        """The generated states, T5's states, and their mask."""
        at, first, second = self._sizes
        return condition.embeds[:, :at, :first], condition.embeds[:, at:, :second], condition.real[:, at:].long()

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The U-Net's prediction, from both kinds of states by cross-attention."""
        generated, states, mask = self._split(condition)
        return self.denoiser(
            noisy,
            timesteps,
            encoder_hidden_states=generated,
            encoder_hidden_states_1=states,
            encoder_attention_mask_1=mask,
        ).sample

    def prompt_arguments(self, condition: Condition, negative: Condition | None) -> dict[str, Any]:
        names = ("generated_prompt_embeds", "prompt_embeds", "attention_mask")
        arguments: dict[str, Any] = dict(zip(names, self._split(condition), strict=True))
        if negative is not None:
            arguments |= {f"negative_{name}": x for name, x in zip(names, self._split(negative), strict=True)}
        return arguments
