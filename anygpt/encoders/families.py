"""Table of encoder families: the class to load, its arguments, its features and their number.

A new family is an entry of `FAMILIES`, keyed by the config's `model_type`.
"""

import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask

from anygpt.encoders.imagebind import configuration as imagebind

Inputs = Mapping[str, Any]
Count = Callable[[PreTrainedConfig, Inputs], list[int]]


# ------------------------------------------------------------------------------------------------ numbers of features


def same(name: str, count: Callable[[PreTrainedConfig, Inputs], int]) -> Count:
    """Counts the same number of features for each of the inputs `name`."""
    return lambda config, inputs: [count(config, inputs)] * len(inputs[name])


def patches(config: PreTrainedConfig, inputs: Inputs) -> int:
    """Patches of each image; the image size is that of the pixels."""
    height, width = inputs["pixel_values"][0].shape[-2:]
    down, across = _pair(config.patch_size)
    return (height // down) * (width // across)


def count_patches(config: PreTrainedConfig, inputs: Inputs) -> list[int]:
    """Patches of images of one size, plus a class token and registers (arXiv 2309.16588) if the family has them."""
    others = FAMILIES[config.model_type].class_token + getattr(config, "num_register_tokens", 0)
    return [others + patches(config, inputs)] * len(inputs["pixel_values"])


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def convnext_cells(config: PreTrainedConfig, inputs: Inputs) -> int:
    """DINOv3's ConvNeXt: the mean, and the cells after a stem of stride 4 and one halving per later stage."""
    height, width = inputs["pixel_values"][0].shape[-2:]
    stride = 4 * 2 ** (len(config.hidden_sizes) - 1)
    return 1 + (height // stride) * (width // stride)


def efficientnet_cells(config: PreTrainedConfig, inputs: Inputs) -> int:
    """Cells after the stem and each stage of stride 2; an odd side is rounded up in `depthwise_padding` blocks only."""
    sides, block = [side // 2 for side in inputs["pixel_values"][0].shape[-2:]], 0
    for stride, repeats in zip(config.strides, config.num_block_repeats, strict=True):
        sides = [(side + (block in config.depthwise_padding)) // stride if stride > 1 else side for side in sides]
        block += math.ceil(config.depth_coefficient * repeats)
    return sides[0] * sides[1]


def clap_cells(config: PreTrainedConfig, inputs: Inputs) -> int:
    """Cells of a spectrogram folded to a square of patches, halved both ways after each stage but the last."""
    down, across = _pair(config.patch_stride)
    side = config.spec_size // 2 ** (len(config.depths) - 1)
    return (side // down) * (side // across)


def count_tubelets(config: PreTrainedConfig, inputs: Inputs) -> list[int]:
    """Patches of `tubelet_size` frames in `(items, frames, 3, height, width)` pixels."""
    clips = inputs["pixel_values_videos" if "pixel_values_videos" in inputs else "pixel_values"]
    return [len(clips[0]) // config.tubelet_size * patches(config, {"pixel_values": clips})] * len(clips)


def products(name: str) -> Count:
    """Counts the cells of grids, `(items, axes)`."""
    return lambda config, inputs: torch.as_tensor(inputs[name]).prod(dim=-1).tolist()


def count_pixtral_patches(config: PreTrainedConfig, inputs: Inputs) -> list[int]:
    """Patches of images with their own aspect ratios, from `image_sizes (items, 2)` in pixels, if given."""
    if inputs.get("image_sizes") is None:
        return [patches(config, inputs)] * len(inputs["pixel_values"])
    return (torch.as_tensor(inputs["image_sizes"]) // config.patch_size).prod(dim=-1).tolist()


def count_merged_patches(config: PreTrainedConfig, inputs: Inputs) -> list[int]:
    """Patches of `image_grid_thw (items, 3)`, where `spatial_merge_size²` patches become one feature."""
    return [n // config.spatial_merge_size**2 for n in products("image_grid_thw")(config, inputs)]


def count_qwen2_audio_frames(config: PreTrainedConfig, inputs: Inputs) -> list[int]:
    """Whisper's frames pooled in pairs, without padding if a mask `(items, frames)` marks it."""
    # only the model's own processor calls the mask feature_attention_mask
    mask = inputs.get("feature_attention_mask", inputs.get("attention_mask"))
    if mask is None:
        return [config.max_source_positions // 2] * len(inputs["input_features"])
    halved = (torch.as_tensor(mask).sum(dim=-1) - 1) // 2 + 1
    return ((halved - 2) // 2 + 1).tolist()


def mask_qwen2_audio_frames(config: PreTrainedConfig, arguments: dict[str, Any]) -> dict[str, Any]:
    """Convert the mask `(items, frames)` to that of the encoder's attention, over half as many states."""
    mask = arguments.get("attention_mask")
    if mask is None:
        return arguments
    states = arguments["input_features"].mT[:, ::2]  # of their number, dtype and device
    kept = torch.arange(states.shape[1], device=mask.device) < (mask.sum(dim=-1, keepdim=True) - 1) // 2 + 1
    return arguments | {"attention_mask": create_bidirectional_mask(config, states, kept)}


def count_frames(config: PreTrainedConfig, inputs: Inputs) -> list[int]:
    """Features of each clip: one per frame, or all image features of each frame."""
    clips = inputs["pixel_values_videos"]
    if config.pool_frames:
        return [clip.shape[0] for clip in clips]
    image = config.image_encoder
    counts = [FAMILIES[image.model_type].count(image, {"pixel_values": clip}) for clip in clips]
    return [sum(frames) - bool(config.drop_cls) * len(frames) for frames in counts]


@dataclass(frozen=True)
class EncoderFamily:
    """How to load and call an encoder, and how to read and count its features.

    Attributes:
        main_input: name of the main input in the processor's output; its first axis counts the inputs unless packed.
        count: `(config, inputs) -> [features of each input]`, for inputs as the processor returns them; `count_patches`
            by default.
        encoder_class: dotted path of the class to load from a checkpoint of this `model_type`; `AutoModel` if None.
        arguments: `{processor's name: encoder's argument}`, where they differ.
        prepare: `(config, arguments) -> arguments`, for changes beyond renaming.
        select: `(config, output) -> (items, n, features) | (total, features)`; the output's first entry if None.
        feature_size: `config -> int`, where it is not `hidden_size`.
        layout: `fixed`, the same number of features for each input; `padded`, `(items, n, features)` with the first
            `count` valid; `packed`, `(total, features)` with inputs concatenated.
        cut_by: the encoder's argument with the mask of padding `(items, length)`, if features depend on the padding
            nevertheless: inputs are then cut and run one by one.
        counted_by: outputs of the processor that the encoder does not take (that only `count` reads, if any).
        pool_size: `config -> int`, features per clip, which a pooled projector averages; all of the input's if None.
        processor_options: processor arguments needed to obtain everything that `count` and `prepare` read.
        class_token: whether the first feature is a class token.
        names: tensor name prefixes in checkpoints of models around the encoder (such as with heads); see `Whole`.
        optional: constructor arguments by tensor name prefix, applied if the checkpoint has no such tensors.
    """

    main_input: str | None = "pixel_values"
    count: Count | None = count_patches
    encoder_class: str | None = None
    arguments: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[PreTrainedConfig, dict[str, Any]], dict[str, Any]] | None = None
    select: Callable[[PreTrainedConfig, Any], Tensor] | None = None
    feature_size: Callable[[PreTrainedConfig], int] | None = None
    layout: str = "fixed"
    cut_by: str | None = None
    counted_by: tuple[str, ...] = ()
    pool_size: Callable[[PreTrainedConfig], int] | None = None
    processor_options: Mapping[str, Any] = field(default_factory=dict)
    class_token: bool = False
    names: Mapping[str, str | None] = field(default_factory=dict)
    optional: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def load_class(self) -> Any:
        return AutoModel if self.encoder_class is None else pkgutil.resolve_name(self.encoder_class)


# ---------------------------------------------------------------------------------------------------------- the table


def _under(model: str, *heads: str) -> dict[str, str | None]:
    return {f"{model}.": "", **dict.fromkeys(heads)}


_OLD_VISION = {"vision_model.": "", "visual_projection.": None}
_QWEN_ARGUMENTS = {"pixel_values": "hidden_states", "image_grid_thw": "grid_thw"}
_MODELS = "transformers.models."

FAMILIES: dict[str, EncoderFamily] = {
    # images
    "clip_vision_model": EncoderFamily(
        encoder_class="transformers.CLIPVisionModel", class_token=True, names=_OLD_VISION
    ),
    "siglip_vision_model": EncoderFamily(
        encoder_class="transformers.SiglipVisionModel", counted_by=("num_crops",), names=_OLD_VISION
    ),
    "siglip2_vision_model": EncoderFamily(
        count=products("spatial_shapes"),
        encoder_class="transformers.Siglip2VisionModel",
        layout="padded",
        names=_OLD_VISION,
    ),
    "vit": EncoderFamily(
        class_token=True,
        names=_under("vit", "classifier.", "decoder.", "vit.embeddings.mask_token", "embeddings.mask_token"),
        optional={"pooler.": {"add_pooling_layer": False}},
    ),
    "dinov2": EncoderFamily(class_token=True, names=_under("dinov2", "classifier.")),
    "dinov2_with_registers": EncoderFamily(class_token=True, names=_under("dinov2_with_registers", "classifier.")),
    "dinov3_vit": EncoderFamily(class_token=True),
    "dinov3_convnext": EncoderFamily(
        count=same("pixel_values", convnext_cells), feature_size=lambda config: config.hidden_sizes[-1]
    ),
    "efficientnet": EncoderFamily(
        count=same("pixel_values", efficientnet_cells),
        encoder_class="transformers.EfficientNetModel",
        select=lambda config, output: output[0].flatten(2).mT,
        feature_size=lambda config: config.hidden_dim,
        names=_under("efficientnet", "classifier."),
    ),
    "internvl_vision": EncoderFamily(class_token=True, counted_by=("num_patches",)),
    "pixtral": EncoderFamily(  # a single row of all images
        count=count_pixtral_patches, select=lambda config, output: output[0][0], layout="packed"
    ),
    "qwen2_vl_vision": EncoderFamily(  # the second entry holds the merged patches
        count=count_merged_patches,
        encoder_class=f"{_MODELS}qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel",
        arguments=_QWEN_ARGUMENTS,
        select=lambda config, output: output[1],
        layout="packed",
    ),
    "qwen2_5_vl_vision": EncoderFamily(
        count=count_merged_patches,
        encoder_class=f"{_MODELS}qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel",
        arguments=_QWEN_ARGUMENTS,
        select=lambda config, output: output[1],
        feature_size=lambda config: config.out_hidden_size,
        layout="packed",
    ),
    "anygpt_qwen2_vl_patches": EncoderFamily(
        count=products("image_grid_thw"),
        encoder_class="anygpt.model.vlm.Qwen2VLPatchEncoder",
        arguments=_QWEN_ARGUMENTS,
        feature_size=lambda config: config.embed_dim,
        layout="packed",
    ),
    # audio
    "whisper": EncoderFamily(
        "input_features",
        same("input_features", lambda config, inputs: config.max_source_positions),
        f"{_MODELS}whisper.modeling_whisper.WhisperEncoder",
        names={
            "model.encoder.": "",
            "encoder.": "",
            **dict.fromkeys(("model.decoder.", "decoder.", "proj_out.", "projector.", "classifier.", "layer_weights")),
        },
    ),
    "qwen2_audio_encoder": EncoderFamily(
        "input_features",
        count_qwen2_audio_frames,
        arguments={"feature_attention_mask": "attention_mask"},
        prepare=mask_qwen2_audio_frames,
        layout="padded",
        processor_options={"return_attention_mask": True, "padding": "max_length"},
    ),
    "clap_audio_model": EncoderFamily(
        "input_features",
        same("input_features", clap_cells),
        "transformers.ClapAudioModel",
        # (items, features, frequencies, times) in time order
        select=lambda config, output: output[0].permute(0, 3, 2, 1).flatten(1, 2),
        feature_size=lambda config: config.patch_embeds_hidden_size * 2 ** (len(config.depths) - 1),
        names={"audio_model.": "", "audio_projection.": None},
    ),
    "phi4_multimodal_audio": EncoderFamily(
        "audio_input_features",
        lambda config, inputs: torch.as_tensor(inputs["audio_embed_sizes"]).tolist(),
        f"{_MODELS}phi4_multimodal.modeling_phi4_multimodal.Phi4MultimodalAudioModel",
        arguments={"audio_input_features": "hidden_states", "audio_attention_mask": "mask"},
        # the encoder has no default for the mask, and a single sound comes without one
        prepare=lambda config, arguments: {"mask": None} | arguments,
        layout="padded",
        cut_by="mask",
        counted_by=("audio_embed_sizes",),
    ),
    # video
    "videomae": EncoderFamily(
        "pixel_values_videos",
        count_tubelets,
        arguments={"pixel_values_videos": "pixel_values"},
        names=_under("videomae", "classifier.", "fc_norm.", "decoder.", "encoder_to_decoder.", "mask_token"),
    ),
    "anygpt_video_encoder": EncoderFamily("pixel_values_videos", count_frames, "anygpt.encoders.video.VideoEncoder"),
    # one tower of several
    "imagebind": EncoderFamily(
        imagebind.MAIN_INPUT,
        imagebind.count_features,
        "anygpt.encoders.imagebind.ImageBindEncoder",
        pool_size=lambda config: config.features_per_clip,
    ),
}
UNKNOWN = EncoderFamily(None, None)
"""For encoders of other families, whose first output is taken as `(items, n, features)`."""
