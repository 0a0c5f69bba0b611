"""Where encoders stand inside whole models: a table by the `model_type` of the folder's config.

An entry says which part of the config is the encoder's and how its tensors are called in the files, in the layouts
that the hub has and that transformers writes today. The encoder's own family is then that of its config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter

from transformers import PreTrainedConfig, ViTConfig


@dataclass(frozen=True)
class Whole:
    """An encoder inside a whole model.

    Attributes:
        modality: what the encoder reads: `image` (frames of clips too) or `audio`.
        config: the encoder's config out of the whole model's.
        names: new beginning of a tensor's name by the one in the files, the longest that fits; None for tensors of the
            rest of the model. A tensor that fits nowhere is left over, an error.
    """

    modality: str
    config: Callable[[PreTrainedConfig], PreTrainedConfig]
    names: Mapping[str, str | None]


def _tower(name: str, *others: str) -> dict[str, str | None]:
    """A tower under `model.<name>.` or `<name>.`, in a model of which the rest is not read."""
    rest = ("model.", "lm_head.", "language_model.", "multi_modal_projector.", *others)
    return {f"model.{name}.": "", f"{name}.": "", **dict.fromkeys(rest)}


def _vit_of_mae(config: PreTrainedConfig) -> PreTrainedConfig:
    """A masked autoencoder's encoder is a ViT; its own class would leave out patches at random."""
    return ViTConfig(**{k: v for k, v in config.to_dict().items() if k != "model_type"})


_VISION, _AUDIO = attrgetter("vision_config"), attrgetter("audio_config")
_DUAL_IMAGE = {
    "vision_model.": "",
    **dict.fromkeys(("text_model.", "visual_projection.", "text_projection.", "logit_", "classifier.")),
}
WHOLE_MODELS: dict[str, Whole] = {
    "clip": Whole("image", _VISION, _DUAL_IMAGE),
    "siglip": Whole("image", _VISION, _DUAL_IMAGE),
    "siglip2": Whole("image", _VISION, _DUAL_IMAGE),
    "llava": Whole("image", _VISION, _tower("vision_tower")),
    "llava_next": Whole("image", _VISION, _tower("vision_tower", "image_newline")),
    "llava_onevision": Whole("image", _VISION, _tower("vision_tower", "image_newline")),
    "mistral3": Whole("image", _VISION, _tower("vision_tower")),
    "gemma3": Whole("image", _VISION, _tower("vision_tower")),
    "paligemma": Whole("image", _VISION, _tower("vision_tower")),
    "internvl": Whole("image", _VISION, _tower("vision_tower")),
    "qwen2_vl": Whole("image", _VISION, _tower("visual")),
    "qwen2_5_vl": Whole("image", _VISION, _tower("visual")),
    "vit_mae": Whole("image", _vit_of_mae, {"vit.": "", "decoder.": None}),
    "clap": Whole(
        "audio",
        _AUDIO,
        {
            "audio_model.": "",
            **dict.fromkeys(("text_model.", "audio_projection.", "text_projection.", "logit_scale_")),
        },
    ),
    "qwen2_audio": Whole("audio", _AUDIO, _tower("audio_tower")),
    "phi4_multimodal": Whole(
        "audio",
        _AUDIO,
        {"model.embed_tokens_extend.audio_embed.encoder.": "", **dict.fromkeys(("model.", "lm_head."))},
    ),
}
