"""Where encoders stand inside whole models: a table by the `model_type` of the folder's config.

An entry says which part of the config is the encoder's and how its tensors are called in the files, in the layouts
that the hub has and that transformers writes today. The encoder's own family is then that of its config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, ViTConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from anygpt.encoders.imagebind import processor_for


@dataclass(frozen=True)
class Whole:
    """An encoder inside a whole model.

    Attributes:
        config: the encoder's config out of the whole model's, for a modality.
        names: new beginning of a tensor's name by the one in the files, the longest that fits; None for tensors of the
            rest of the model. A tensor that fits nowhere is left over, an error. Or a function of the encoder's config.
        heard: whether the encoder reads sounds (None: one encoder for each modality).
        processor: makes the processor of a modality, where the folder holds none.
        image_processor: class to read the folder's settings with, where the model's own makes more than the tower takes
            (tiles).
    """

    config: Callable[[PreTrainedConfig, str], PreTrainedConfig]
    names: Mapping[str, str | None] | Callable[[PreTrainedConfig], Mapping[str, str | None]]
    heard: bool | None = False
    processor: Callable[[str], Any] | None = None
    image_processor: type | None = None


def _tower(name: str, *others: str) -> dict[str, str | None]:
    """A tower under `model.<name>.` or `<name>.`, in a model of which the rest is not read."""
    rest = ("model.", "lm_head.", "language_model.", "multi_modal_projector.", *others)
    return {f"model.{name}.": "", f"{name}.": "", **dict.fromkeys(rest)}


def _vit_of_mae(config: PreTrainedConfig, _: str) -> PreTrainedConfig:
    """A masked autoencoder's encoder is a ViT; its own class would leave out patches at random."""
    return ViTConfig(**{k: v for k, v in config.to_dict().items() if k != "model_type"})


def _vision(config: PreTrainedConfig, _: str) -> PreTrainedConfig:
    return config.vision_config


def _audio(config: PreTrainedConfig, _: str) -> PreTrainedConfig:
    return config.audio_config


_DUAL_IMAGE = {
    "vision_model.": "",
    **dict.fromkeys(("text_model.", "visual_projection.", "text_projection.", "logit_", "classifier.")),
}
WHOLE_MODELS: dict[str, Whole] = {
    "clip": Whole(_vision, _DUAL_IMAGE),
    "siglip": Whole(_vision, _DUAL_IMAGE),
    "siglip2": Whole(_vision, _DUAL_IMAGE),
    "llava": Whole(_vision, _tower("vision_tower")),
    "llava_next": Whole(_vision, _tower("vision_tower", "image_newline"), image_processor=CLIPImageProcessorPil),
    "llava_onevision": Whole(_vision, _tower("vision_tower", "image_newline"), image_processor=SiglipImageProcessorPil),
    "mistral3": Whole(_vision, _tower("vision_tower")),
    "gemma3": Whole(_vision, _tower("vision_tower")),
    "paligemma": Whole(_vision, _tower("vision_tower")),
    "internvl": Whole(_vision, _tower("vision_tower")),
    "qwen2_vl": Whole(_vision, _tower("visual")),
    "qwen2_5_vl": Whole(_vision, _tower("visual")),
    "vit_mae": Whole(_vit_of_mae, {"vit.": "", "decoder.": None}),
    "clap": Whole(
        _audio,
        {
            "audio_model.": "",
            **dict.fromkeys(("text_model.", "audio_projection.", "text_projection.", "logit_scale_")),
        },
        heard=True,
    ),
    "qwen2_audio": Whole(_audio, _tower("audio_tower"), heard=True),
    "phi4_multimodal": Whole(
        _audio,
        {"model.embed_tokens_extend.audio_embed.encoder.": "", **dict.fromkeys(("model.", "lm_head."))},
        heard=True,
    ),
    "imagebind": Whole(
        lambda config, modality: config.encoder_of(modality),
        lambda config: config.left_out(),
        heard=None,
        processor=processor_for,
    ),
}
