"""LLaVA-NeXT's (LLaVA: arXiv 2304.08485) processing around its vision tower. Shape legend: `anygpt.outputs`."""

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

from anygpt.encoders.callbacks import LlavaCallbacks, with_features


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
        return image_size_to_num_patches(_pair(image_size), self.grid_pinpoints, self.tile_size)

    def preprocess(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Drop padding tiles: `(items, most tiles, 3, height, width)` pixels to `(all tiles, 3, height, width)`."""
        pixels = inputs["pixel_values"]
        if pixels.dim() == 5:
            numbers = [self.num_tiles(size) for size in inputs["image_sizes"]]
            pixels = torch.cat([image[:number] for image, number in zip(pixels, numbers, strict=True)])
        return super().preprocess(inputs | {"pixel_values": pixels})

    def postprocess_projector(self, inputs: dict[str, Any], output: Any) -> Any:
        """Pack `(all tiles, n, H)` into one `(features, H)` an image."""
        sizes = [_pair(size) for size in inputs["image_sizes"]]
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
        for size in map(_pair, inputs["image_sizes"]):
            rows, columns = get_anyres_image_grid_shape(size, self.grid_pinpoints, self.tile_size)
            # On the meta device, to get unpad_image's own rounding without memory.
            plane = unpad_image(torch.empty(1, rows * self.side, columns * self.side, device="meta"), size)
            counts.append(self.side**2 + plane.shape[1] * (plane.shape[2] + 1))
        return counts


def _pair(size: Any) -> tuple[int, int]:
    """`(height, width)` as a tuple of integers, which transformers' functions compare."""
    height, width = size
    return int(height), int(width)
