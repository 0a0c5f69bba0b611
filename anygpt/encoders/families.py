"""Table of encoder families: the class to load, its arguments, its features and their number.

A new family is an entry of `FAMILIES`, keyed by the config's `model_type`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import AutoModel, PreTrainedConfig

from anygpt.encoders import features
from anygpt.encoders.imagebind import configuration as imagebind


@dataclass(frozen=True)
class EncoderFamily:
    """How to load and call an encoder, and how to read and count its features.

    Attributes:
        main_input: name of the main input in the processor's output; its first axis counts the inputs unless packed.
        count: `(config, inputs) -> [features of each input]`, for inputs as the processor returns them.
        encoder_class: dotted path of the class to load from a checkpoint of this `model_type`; `AutoModel` if None.
        arguments: `{processor's name: encoder's argument}`, where they differ.
        prepare: `(config, arguments) -> arguments`, for changes beyond renaming.
        select: `(config, output) -> (items, n, features) | (total, features)`; the output's first entry if None.
        feature_size: `config -> int`, where it is not `hidden_size`.
        layout: `fixed`, the same number of features for each input; `padded`, `(items, n, features)` with the first
            `count` valid; `packed`, `(total, features)` with inputs concatenated.
        counted_by: inputs that only `count` reads, not the encoder.
        pool_size: `config -> int`, features per clip, which a pooled projector averages; all of the input's if None.
        processor_options: processor arguments needed to obtain everything that `count` and `prepare` read.
        class_token: whether the first feature is a class token.
        names: tensor name prefixes in checkpoints of models around the encoder (such as with heads); see `Whole`.
        optional: constructor arguments by tensor name prefix, applied if the checkpoint has no such tensors.
    """

    main_input: str | None
    count: Callable[[PreTrainedConfig, Mapping[str, Any]], list[int]] | None
    encoder_class: str | None = None
    arguments: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[PreTrainedConfig, dict[str, Any]], dict[str, Any]] | None = None
    select: Callable[[PreTrainedConfig, Any], Tensor] | None = None
    feature_size: Callable[[PreTrainedConfig], int] | None = None
    layout: str = "fixed"
    counted_by: tuple[str, ...] = ()
    pool_size: Callable[[PreTrainedConfig], int] | None = None
    processor_options: Mapping[str, Any] = field(default_factory=dict)
    class_token: bool = False
    names: Mapping[str, str | None] = field(default_factory=dict)
    optional: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def load_class(self) -> Any:
        """The encoder's class, or `AutoModel`."""
        if self.encoder_class is None:
            return AutoModel
        module, name = self.encoder_class.rsplit(".", 1)
        return getattr(importlib.import_module(module), name)


def _under(model: str, *heads: str) -> dict[str, str | None]:
    """Names for a model with heads beside its trunk `model`."""
    return {f"{model}.": "", **dict.fromkeys(heads)}


_OLD_VISION = {"vision_model.": "", "visual_projection.": None}
_NO_POOLER = {"pooler.": {"add_pooling_layer": False}}
_QWEN_ARGUMENTS = {"pixel_values": "hidden_states", "image_grid_thw": "grid_thw"}


def count_frames(config: PreTrainedConfig, inputs: features.Inputs) -> list[int]:
    """Features of each clip: one per frame, or all image features of each frame."""
    clips = inputs["pixel_values_videos"]
    if config.pool_frames:
        return [clip.shape[0] for clip in clips]
    image = config.image_encoder
    counts = [FAMILIES[image.model_type].count(image, {"pixel_values": clip}) for clip in clips]
    return [sum(frames) - bool(config.drop_cls) * len(frames) for frames in counts]


FAMILIES: dict[str, EncoderFamily] = {
    # images
    "clip_vision_model": EncoderFamily(
        "pixel_values",
        features.count_patches(prefix=1),
        "transformers.CLIPVisionModel",
        class_token=True,
        names=_OLD_VISION,
    ),
    "siglip_vision_model": EncoderFamily(
        "pixel_values", features.count_patches(), "transformers.SiglipVisionModel", names=_OLD_VISION
    ),
    "siglip2_vision_model": EncoderFamily(
        "pixel_values",
        features.count_siglip2_patches,
        "transformers.Siglip2VisionModel",
        layout="padded",
        names=_OLD_VISION,
    ),
    "vit": EncoderFamily(
        "pixel_values",
        features.count_patches(prefix=1),
        class_token=True,
        names=_under("vit", "classifier.", "decoder.", "vit.embeddings.mask_token", "embeddings.mask_token"),
        optional=_NO_POOLER,
    ),
    "dinov2": EncoderFamily(
        "pixel_values", features.count_patches(prefix=1), class_token=True, names=_under("dinov2", "classifier.")
    ),
    "dinov2_with_registers": EncoderFamily(
        "pixel_values",
        features.count_patches_and_registers,
        class_token=True,
        names=_under("dinov2_with_registers", "classifier."),
    ),
    "dinov3_vit": EncoderFamily("pixel_values", features.count_patches_and_registers, class_token=True),
    "dinov3_convnext": EncoderFamily(
        "pixel_values", features.count_convnext_cells, feature_size=lambda config: config.hidden_sizes[-1]
    ),
    "internvl_vision": EncoderFamily("pixel_values", features.count_patches(prefix=1), class_token=True),
    "pixtral": EncoderFamily(
        "pixel_values", features.count_pixtral_patches, select=features.unpack_single_row, layout="packed"
    ),
    "qwen2_vl_vision": EncoderFamily(
        "pixel_values",
        features.count_merged_patches,
        "transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel",
        arguments=_QWEN_ARGUMENTS,
        select=features.pooler_output,
        layout="packed",
    ),
    "qwen2_5_vl_vision": EncoderFamily(
        "pixel_values",
        features.count_merged_patches,
        "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel",
        arguments=_QWEN_ARGUMENTS,
        select=features.pooler_output,
        feature_size=lambda config: config.out_hidden_size,
        layout="packed",
    ),
    "anygpt_qwen2_vl_patches": EncoderFamily(
        "pixel_values",
        features.count_patches_of_grids,
        "anygpt.model.vlm.qwen2_vl.Qwen2VLPatchEncoder",
        arguments=_QWEN_ARGUMENTS,
        feature_size=lambda config: config.embed_dim,
        layout="packed",
    ),
    # audio
    "whisper": EncoderFamily(
        "input_features",
        features.count_whisper_frames,
        "transformers.models.whisper.modeling_whisper.WhisperEncoder",
        names={
            "model.encoder.": "",
            "encoder.": "",
            **dict.fromkeys(("model.decoder.", "decoder.", "proj_out.", "projector.", "classifier.", "layer_weights")),
        },
    ),
    "qwen2_audio_encoder": EncoderFamily(
        "input_features",
        features.count_qwen2_audio_frames,
        arguments={"feature_attention_mask": "attention_mask"},
        prepare=features.mask_qwen2_audio_frames,
        layout="padded",
        processor_options={"return_attention_mask": True, "padding": "max_length"},
    ),
    "clap_audio_model": EncoderFamily(
        "input_features",
        features.count_clap_cells,
        "transformers.ClapAudioModel",
        select=features.flatten_clap_cells,
        feature_size=features.clap_feature_size,
        names={"audio_model.": "", "audio_projection.": None},
    ),
    "phi4_multimodal_audio": EncoderFamily(
        "audio_input_features",
        features.count_phi4_frames,
        "transformers.models.phi4_multimodal.modeling_phi4_multimodal.Phi4MultimodalAudioModel",
        arguments={"audio_input_features": "hidden_states", "audio_attention_mask": "mask"},
        prepare=features.name_phi4_mask,
        layout="padded",
        counted_by=("audio_embed_sizes",),
    ),
    # video
    "videomae": EncoderFamily(
        "pixel_values_videos",
        features.count_tubelets,
        arguments={"pixel_values_videos": "pixel_values"},
        names=_under("videomae", "classifier.", "fc_norm.", "decoder.", "encoder_to_decoder.", "mask_token"),
    ),
    # one tower of several
    "imagebind": EncoderFamily(
        imagebind.MAIN_INPUT,
        imagebind.count_features,
        "anygpt.encoders.imagebind.ImageBindEncoder",
        pool_size=lambda config: config.features_per_clip,
    ),
    "anygpt_video_encoder": EncoderFamily("pixel_values_videos", count_frames, "anygpt.encoders.video.VideoEncoder"),
}
UNKNOWN = EncoderFamily(None, None)
"""For encoders of other families, whose first output is taken as `(items, n, features)`."""
