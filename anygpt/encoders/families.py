"""What differs between encoder families, as data: the class to load, and how many features an input gives.

A new family is an entry of `FAMILIES`, keyed by the config's `model_type`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import AutoModel, PreTrainedConfig

# Given (config, processor inputs, processor outputs), one count an input.
CountFeatures = Callable[[PreTrainedConfig, dict, dict], list[int]]


@dataclass(frozen=True)
class EncoderFamily:
    """How to load an encoder and to count its features.

    Attributes:
        encoder_class: dotted path of the class to load from a checkpoint of this `model_type`; `AutoModel` if None.
        main_input: the encoder's main argument, whose first axis counts the inputs.
        count: features of each input.
    """

    main_input: str
    count: CountFeatures
    encoder_class: str | None = None

    def load_class(self) -> Any:
        if self.encoder_class is None:
            return AutoModel
        module, name = self.encoder_class.rsplit(".", 1)
        return getattr(importlib.import_module(module), name)


def _num_inputs(outputs: dict, name: str) -> int:
    return len(outputs[name])


def _patches(prefix_tokens: int) -> CountFeatures:
    """Square inputs cut into square patches, behind `prefix_tokens` class tokens; sizes read off the pixels."""

    def count(config: PreTrainedConfig, inputs: dict, outputs: dict) -> list[int]:
        height, width = outputs["pixel_values"][0].shape[-2:]
        patches = (height // config.patch_size) * (width // config.patch_size)
        return [patches + prefix_tokens] * _num_inputs(outputs, "pixel_values")

    return count


def _whisper(config: PreTrainedConfig, inputs: dict, outputs: dict) -> list[int]:
    """Whisper's second convolution halves the frames; its length is fixed by the position embedding."""
    return [config.max_source_positions] * _num_inputs(outputs, "input_features")


def _video(config: PreTrainedConfig, inputs: dict, outputs: dict) -> list[int]:
    """One feature a frame (`VideoEncoder` pools the frames' own tokens)."""
    return [clip.shape[0] for clip in outputs["pixel_values_videos"]]


_CLIP = EncoderFamily("pixel_values", _patches(1), "transformers.CLIPVisionModel")
_SIGLIP = EncoderFamily("pixel_values", _patches(0), "transformers.SiglipVisionModel")
_VIT = EncoderFamily("pixel_values", _patches(1))

FAMILIES: dict[str, EncoderFamily] = {
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "vit": _VIT,
    "dinov2": _VIT,
    "whisper": EncoderFamily("input_features", _whisper, "transformers.models.whisper.modeling_whisper.WhisperEncoder"),
    "anygpt_video_encoder": EncoderFamily("pixel_values_videos", _video, "anygpt.encoders.video.VideoEncoder"),
}
