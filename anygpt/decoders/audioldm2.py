"""Sound from AudioLDM 2: a U-Net that attends to T5's states and to what a language model makes of CLAP's and T5's."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import GenerationMixin, GPT2LMHeadModel

from anygpt.decoders.audioldm import AudioLDMDecoder
from anygpt.decoders.conditions import Condition
from anygpt.errors import InputError


class AudioLDM2Decoder(AudioLDMDecoder):
    """Conditions `(B, G + T5, D)` with their mask -> float32 waveforms `(N,)` at `sampling_rate` (arXiv 2308.05734).

    A condition is what the U-Net attends to: the `G` states that the language model generates, then T5's states, which
    have padding; `D` is the larger of both widths, and the narrower ones end in zeros. Sizes and targets are as in
    `AudioLDMDecoder`. A model for speech, which reads a transcription, is an `InputError`.
    """

    pipeline_name = "AudioLDM2Pipeline"
    masked = True

    def __init__(self, pipeline: DiffusionPipeline, **settings: Any):
        if not isinstance(pipeline.language_model, GenerationMixin):  # older repositories have the trunk alone
            with torch.device("meta"):
                whole = GPT2LMHeadModel(pipeline.language_model.config)
            whole.transformer = pipeline.language_model
            whole.tie_weights()
            pipeline.register_modules(language_model=whole.eval())
        super().__init__(pipeline, **settings)
        if self.text_encoder_2.config.model_type == "vits":
            raise InputError("AudioLDM2Decoder is for sounds and music; this pipeline speaks a transcription.")

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """Number and width of the generated states, and the width of T5's."""
        made = self.language_model.config
        return made.max_new_tokens, made.hidden_size, self.text_encoder_2.config.hidden_size

    @property
    def condition_shape(self) -> tuple[int, int]:
        count, *widths = self._sizes
        return count + self.pipeline.tokenizer_2.model_max_length, max(widths)

    def encode_text(self, captions: list[str]) -> Condition:
        """The pipeline's generated states and T5's, padded to the full length, and the mask."""
        states, mask, generated = self.pipeline.encode_prompt(captions, self.device, 1, False)
        tokens, width = self.condition_shape
        count, lacking = generated.shape[1], tokens - generated.shape[1] - states.shape[1]
        states = F.pad(states, (0, width - states.shape[2], 0, lacking))
        generated = F.pad(generated, (0, width - generated.shape[2]))
        mask = F.pad(F.pad(mask, (0, lacking)), (count, 0), value=1)
        return Condition(torch.cat([generated, states], dim=1), mask=mask.bool())

    def normalize_condition(self, condition: Tensor | Condition) -> Tensor | Condition:
        """Nothing: the states are as they are."""
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
