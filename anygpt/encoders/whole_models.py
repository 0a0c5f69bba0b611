"""Table of whole models that contain encoders, by the `model_type` of the folder's config; tensors are named as on the
Hub and as transformers writes them today."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, ViTConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from anygpt.encoders.imagebind import processor_for


@dataclass(frozen=True)
class Whole:
    """An encoder inside a whole model, whose config determines its family.

    Attributes:
        config: extracts the encoder's config from the whole model's, for a modality.
        names: `{prefix in the files: new prefix}`, the longest match wins; None for tensors of the rest of the model.
            A tensor without a match is an error. Or a function of the encoder's config that returns such a mapping.
        processor: builds the processor of a modality if the folder has none.
        image_processor: class for the folder's settings, where the model's own makes tiles, which the tower does not
        take.
    """

    config: Callable[[PreTrainedConfig, str], PreTrainedConfig]
    names: Mapping[str, str | None] | Callable[[PreTrainedConfig], Mapping[str, str | None]]
    processor: Callable[[str], Any] | None = None
    image_processor: type | None = None


def _tower(name: str, *others: str) -> dict[str, str | None]:
    rest = ("model.", "lm_head.", "language_model.", "multi_modal_projector.", *others)
    return {f"model.{name}.": "", f"{name}.": "", **dict.fromkeys(rest)}


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
    "vit_mae": Whole(  # as a ViT, since its own class drops patches at random
        lambda config, _: ViTConfig(**{k: v for k, v in config.to_dict().items() if k != "model_type"}),
        {"vit.": "", "decoder.": None},
    ),
    "clap": Whole(
        _audio,
        {"audio_model.": "", **dict.fromkeys(("text_model.", "audio_projection.", "text_projection.", "logit_scale_"))},
    ),
    "qwen2_audio": Whole(_audio, _tower("audio_tower")),
    "phi4_multimodal": Whole(
        _audio,
        {"model.embed_tokens_extend.audio_embed.encoder.": "", **dict.fromkeys(("model.", "lm_head."))},
    ),
    "imagebind": Whole(
        lambda config, modality: config.encoder_of(modality),
        lambda config: config.left_out(),
        processor=processor_for,
    ),
}
