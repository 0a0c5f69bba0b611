"""Serializable callbacks around an encoder, as objects with JSON settings, unlike plain functions given to modules."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

from anygpt.encoders.families import FAMILIES
from anygpt.encoders.projector import with_features
from anygpt.errors import InputError


class SavedCallback:
    """A callback saved as `{"class", "settings"}`; `settings` are the constructor's arguments."""

    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"class": f"{type(self).__module__}.{type(self).__qualname__}", "settings": self.settings}


class EncoderCallbacks(SavedCallback, nn.Module):
    """The three callbacks of `ModalEncoderModule` as one object, which also counts the resulting features.

    Subclasses override what they need. Their parameters are saved with the projectors and train with `<key>_projector`.
    """

    additional_args: tuple[str, ...] = ()

    def __init__(self, **settings: Any):
        super().__init__()
        self.settings = settings

    def preprocess(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs

    def postprocess_module(self, inputs: dict[str, Any], output: Any) -> Any:
        return output

    def postprocess_projector(self, inputs: dict[str, Any], output: Any) -> Any:
        return output

    def feature_size(self, size: int) -> int:
        """Input width of the projector, given the encoder's feature width."""
        return size

    def count(self, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> list[int]:
        """Number of features of each input; by default, as many as the encoder gives."""
        return FAMILIES[config.model_type].count(config, inputs)


class LlavaCallbacks(EncoderCallbacks):
    """Features of chosen layers, with or without the class token, as in LLaVA (arXiv 2304.08485).

    `feature_layer` is an index into the encoder's hidden states, a list of indices, whose states are concatenated, or
    None for its output; `select_strategy` `default` drops the class token, `full` keeps everything.
    """

    def __init__(self, feature_layer: int | list[int] | None = -2, select_strategy: str = "default", **settings: Any):
        super().__init__(feature_layer=feature_layer, select_strategy=select_strategy, **settings)
        self.layers = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer or [])
        self.drops_class_token = select_strategy == "default"

    def preprocess(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs | ({"output_hidden_states": True, "return_dict": True} if self.layers else {})

    def postprocess_module(self, inputs: dict[str, Any], output: Any) -> Any:
        layers = [output.hidden_states[layer] for layer in self.layers]
        chosen = torch.cat(layers, dim=-1) if layers else output[0]
        if self.drops_class_token:
            chosen = chosen[:, 1:]
        # Pixtral's hidden states have a single row of all images; its output's first entry no longer has that axis.
        return with_features(output, chosen[0] if output[0].dim() == 2 else chosen)

    def feature_size(self, size: int) -> int:
        return size * max(1, len(self.layers))

    def count(self, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> list[int]:
        return [n - self.drops_class_token for n in super().count(config, inputs)]


class LlavaNextCallbacks(LlavaCallbacks):
    """LLaVA-NeXT's any-resolution features: the whole image and a grid of tiles, packed row by row; `image_newline`
    `(H,)` ends each row.

    `settings` are `grid_pinpoints`, the resolutions `[[height, width], …]` that an image is fitted into, in pixels;
    `tile_size` and `patch_size` of the vision tower, in pixels; `hidden_size` of the language model; others as in
    `LlavaCallbacks`.
    """

    additional_args = ("image_sizes",)

    def __init__(self, feature_layer: int | list[int] = -2, select_strategy: str = "default", **settings: Any):
        super().__init__(feature_layer, select_strategy, **settings)
        self.grid_pinpoints, self.tile_size = settings["grid_pinpoints"], settings["tile_size"]
        self.side, width = self.tile_size // settings["patch_size"], settings["hidden_size"]
        self.image_newline = nn.Parameter(torch.randn(width) * width**-0.5)

    def num_tiles(self, image_size: Any) -> int:
        """The number of tiles of an image of `(height, width)`, the whole image included."""
        return image_size_to_num_patches(image_size, self.grid_pinpoints, self.tile_size)

    def preprocess(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Drop padding tiles: `(items, most tiles, 3, height, width)` pixels to `(all tiles, 3, height, width)`."""
        pixels = inputs["pixel_values"]
        if pixels.dim() == 5:
            numbers = [self.num_tiles(size) for size in inputs["image_sizes"].tolist()]
            pixels = torch.cat([image[:number] for image, number in zip(pixels, numbers, strict=True)])
        return super().preprocess(inputs | {"pixel_values": pixels})

    def postprocess_projector(self, inputs: dict[str, Any], output: Any) -> Any:
        """Pack `(all tiles, n, H)` into one `(features, H)` per image."""
        sizes = inputs["image_sizes"].tolist()
        images = output[0].split([self.num_tiles(size) for size in sizes])
        packed = [self.pack(image, size) for image, size in zip(images, sizes, strict=True)]
        return with_features(output, packed)

    def pack(self, tiles: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Pack `(tiles, n, H)` into `(features, H)`: the whole image, then the grid without padding, row by row."""
        grid = tiles[1:].unflatten(1, (self.side, self.side))
        grid = grid.unflatten(0, get_anyres_image_grid_shape(image_size, self.grid_pinpoints, self.tile_size))
        plane = grid.permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2)  # (H, rows, columns)
        plane = unpad_image(plane, image_size)
        newline = self.image_newline.to(plane)[:, None, None].expand(-1, plane.shape[1], 1)
        return torch.cat([tiles[0], torch.cat([plane, newline], dim=-1).flatten(1).T])

    def count(self, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> list[int]:
        counts = []
        for size in torch.as_tensor(inputs["image_sizes"]).tolist():
            rows, columns = get_anyres_image_grid_shape(size, self.grid_pinpoints, self.tile_size)
            # On the meta device, to get unpad_image's own rounding without memory.
            plane = unpad_image(torch.empty(1, rows * self.side, columns * self.side, device="meta"), size)
            counts.append(self.side**2 + plane.shape[1] * (plane.shape[2] + 1))
        return counts


def check_selection(config: PreTrainedConfig, feature_layer: int | None, drop_cls: bool | None) -> None:
    family = FAMILIES[config.model_type]
    if feature_layer is not None:
        layers = getattr(config, "num_hidden_layers", None)
        if layers is None or ((family.layout != "fixed" or family.select) and config.model_type != "pixtral"):
            why = "leave it out: only families with equally many features per input, and Pixtral, have layers to choose"
            raise InputError(f"feature_layer cannot be chosen of a {config.model_type!r} encoder; {why}")
        if not isinstance(feature_layer, int):
            raise InputError(f"feature_layer is {feature_layer!r}; expected the index of one layer")
        if not -layers - 1 <= feature_layer <= layers:
            raise InputError(f"feature_layer is {feature_layer}, but the encoder has {layers} layers")
    if drop_cls and not family.class_token:
        raise InputError(f"drop_cls is set, but a {config.model_type!r} encoder has no class token to leave out")
