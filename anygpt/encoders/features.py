"""Feature counts of the encoder families, and selection of features from an encoder's output.

Counting functions take `(config, inputs)`, with inputs as the family's processor returns them, and return one count per
input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

Inputs = Mapping[str, Any]


# ------------------------------------------------------------------------------------------------------------- images


def count_patches(prefix: int = 0) -> Callable[[PreTrainedConfig, Inputs], list[int]]:
    """Counts patches and `prefix` class tokens; the image size is that of the pixels."""

    def count(config: PreTrainedConfig, inputs: Inputs) -> list[int]:
        return [prefix + _patches(config, inputs)] * len(inputs["pixel_values"])

    return count


def count_patches_and_registers(config: PreTrainedConfig, inputs: Inputs) -> list[int]:
    """A class token, register tokens (arXiv 2309.16588), patches."""
    return [1 + config.num_register_tokens + _patches(config, inputs)] * len(inputs["pixel_values"])


def _patches(config: PreTrainedConfig, inputs: Inputs) -> int:
    height, width = inputs["pixel_values"][0].shape[-2:]
    size = config.patch_size
    down, across = (size, size) if isinstance(size, int) else size
    return (height // down) * (width // across)


def count_convnext_cells(config: PreTrainedConfig, inputs: Inputs) -> list[int]:
    """DINOv3's ConvNeXt: the mean, and the cells after a stem of stride 4 and one halving per later stage."""
    height, width = inputs["pixel_values"][0].shape[-2:]
    stride = 4 * 2 ** (len(config.hidden_sizes) - 1)
    return [1 + (height // stride) * (width // stride)] * len(inputs["pixel_values"])


def count_siglip2_patches(config: PreTrainedConfig, inputs: Inputs) -> list[int]:
    """Patches of images with their own aspect ratios, from `spatial_shapes (items, 2)`, without the padding."""
    return torch.as_tensor(inputs["spatial_shapes"]).prod(dim=-1).tolist()


def count_pixtral_patches(config: PreTrainedConfig, inputs: Inputs) -> list[int]:
    """Patches of images with their own aspect ratios, from `image_sizes (items, 2)` in pixels, if given."""
    sizes = inputs.get("image_sizes")
    if sizes is None:
        return [_patches(config, inputs)] * len(inputs["pixel_values"])
    return (torch.as_tensor(sizes) // config.patch_size).prod(dim=-1).tolist()


def count_merged_patches(config: PreTrainedConfig, inputs: Inputs) -> list[int]:
    """Patches of `image_grid_thw (items, 3)`, where `spatial_merge_size²` patches become one feature."""
    return [patches // config.spatial_merge_size**2 for patches in count_patches_of_grids(config, inputs)]


def count_patches_of_grids(config: PreTrainedConfig, inputs: Inputs) -> list[int]:
    """Patches of `image_grid_thw (items, 3)`: times, rows, columns."""
    return torch.as_tensor(inputs["image_grid_thw"]).prod(dim=-1).tolist()


def pooler_output(config: PreTrainedConfig, output: Any) -> Tensor:
    """Merged patches `(total, features)` of Qwen's vision models, the output's second entry."""
    return output[1]


def unpack_single_row(config: PreTrainedConfig, output: Any) -> Tensor:
    """Features `(total, features)` from Pixtral's single row `(1, total, features)`."""
    return output[0][0]


# -------------------------------------------------------------------------------------------------------------- audio


def count_whisper_frames(config: PreTrainedConfig, inputs: Inputs) -> list[int]:
    """Whisper's fixed number of frames, that of its position embedding."""
    return [config.max_source_positions] * len(inputs["input_features"])


def count_qwen2_audio_frames(config: PreTrainedConfig, inputs: Inputs) -> list[int]:
    """Whisper's frames pooled in pairs, without padding if a mask marks it."""
    mask = _qwen2_audio_mask(inputs)
    if mask is None:
        return [config.max_source_positions // 2] * len(inputs["input_features"])
    halved = (torch.as_tensor(mask).sum(dim=-1) - 1) // 2 + 1
    return ((halved - 2) // 2 + 1).tolist()


def _qwen2_audio_mask(inputs: Inputs) -> Tensor | None:
    """Mask `(items, frames)`; only the model's own processor calls it `feature_attention_mask`."""
    mask = inputs.get("feature_attention_mask")
    return inputs.get("attention_mask") if mask is None else mask


def mask_qwen2_audio_frames(config: PreTrainedConfig, arguments: dict[str, Any]) -> dict[str, Any]:
    """Convert the mask `(items, frames)` to `(items, 1, n, n)`, which the encoder adds to the attention scores."""
    mask = arguments.get("attention_mask")
    if mask is None:
        return arguments
    features = arguments["input_features"]
    lengths = (mask.sum(dim=-1) - 1) // 2 + 1
    kept = torch.arange(features.shape[-1] // 2, device=features.device) < lengths[:, None]
    scores = torch.zeros(kept.shape, dtype=features.dtype, device=features.device)
    scores = scores.masked_fill(~kept, torch.finfo(features.dtype).min)
    return arguments | {"attention_mask": scores[:, None, None].expand(-1, 1, kept.shape[1], -1)}


def count_clap_cells(config: PreTrainedConfig, inputs: Inputs) -> list[int]:
    """Cells of a spectrogram folded to a square of patches, halved both ways after each stage but the last."""
    strides = config.patch_stride
    down, across = (strides, strides) if isinstance(strides, int) else strides
    side = config.spec_size // 2 ** (len(config.depths) - 1)
    return [(side // down) * (side // across)] * len(inputs["input_features"])


def flatten_clap_cells(config: PreTrainedConfig, output: Any) -> Tensor:
    """Reshape `(items, features, frequencies, times)` to `(items, times · frequencies, features)`, in time order."""
    return output[0].permute(0, 3, 2, 1).flatten(1, 2)


def clap_feature_size(config: PreTrainedConfig) -> int:
    """Feature width: each stage but the last doubles it."""
    return config.patch_embeds_hidden_size * 2 ** (len(config.depths) - 1)


def count_phi4_frames(config: PreTrainedConfig, inputs: Inputs) -> list[int]:
    """Counts from the feature extractor, `audio_embed_sizes (items,)`."""
    return torch.as_tensor(inputs["audio_embed_sizes"]).tolist()


def name_phi4_mask(config: PreTrainedConfig, arguments: dict[str, Any]) -> dict[str, Any]:
    """Add `mask=None`: the encoder has no default for it, and a single sound comes without one."""
    return {"mask": None} | arguments


# -------------------------------------------------------------------------------------------------------------- video


def count_tubelets(config: PreTrainedConfig, inputs: Inputs) -> list[int]:
    """Patches of `tubelet_size` frames in `(items, frames, 3, height, width)` pixels."""
    clips = inputs["pixel_values_videos"] if "pixel_values_videos" in inputs else inputs["pixel_values"]
    frames = clips[0].shape[0]
    return [frames // config.tubelet_size * _patches(config, {"pixel_values": clips})] * len(clips)
