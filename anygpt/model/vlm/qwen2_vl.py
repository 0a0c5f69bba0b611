"""Qwen2-VL (arXiv 2409.12191) in parts: its vision tower without the merger, its language model, its positions.

Shape legend: `anygpt.outputs`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, GenerationMixin, Qwen2ForCausalLM
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig, Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VisionTransformerPretrainedModel,
    Qwen2VLPreTrainedModel,
    Qwen2VLTextModel,
)

from anygpt.encoders.callbacks import SavedCallback
from anygpt.errors import InputError


class Qwen2VLPatchConfig(Qwen2VLVisionConfig):
    """Qwen2-VL's vision config for an encoder whose projector merges the patches."""

    model_type = "anygpt_qwen2_vl_patches"


AutoConfig.register(Qwen2VLPatchConfig.model_type, Qwen2VLPatchConfig)


class Qwen2VLPatchEncoder(Qwen2VisionTransformerPretrainedModel):
    """Qwen2-VL's vision tower up to the merger, which is the input projector (`projection_type="merger"`)."""

    config_class = Qwen2VLPatchConfig

    def __init__(self, config: Qwen2VLPatchConfig):
        super().__init__(config)
        self.merger = nn.Identity()

    def forward(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> BaseModelOutput:
        """Encode patches `(total patches, pixels of a patch)` of `(items, 3)` grids to `(total patches, features)`."""
        return BaseModelOutput(last_hidden_state=super().forward(hidden_states, grid_thw, **kwargs).last_hidden_state)


class Qwen2VLForCausalLM(Qwen2VLPreTrainedModel, GenerationMixin):
    """Qwen2-VL's language model with its head, which transformers has only inside the whole model.

    Position ids are `(B, S)`, or `(3, B, S)` for time, height and width.
    """

    config_class = Qwen2VLTextConfig
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}
    forward = Qwen2ForCausalLM.forward

    def __init__(self, config: Qwen2VLTextConfig):
        super().__init__(config)
        self.model = Qwen2VLTextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class MRopePositions(SavedCallback):
    """The `preprocess_llm_callback` of Qwen2-VL: positions in time, height and width (M-RoPE, §2.1 of the paper).

    Text advances on all three axes at once. An image's features, one for `spatial_merge_size` patches along each axis,
    share the time position of its start and count rows and columns from there; what follows starts after the largest
    position used.
    """

    def __init__(self, spatial_merge_size: int = 2, key: str = "image"):
        self.settings = {"spatial_merge_size": spatial_merge_size, "key": key}
        self.merge, self.key = spatial_merge_size, key

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_ids: Mapping[str, int] | None,
        image_grid_thw: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute `{"position_ids": (3, B, S)}`, 0 at padding, from `(B, S)` ids and mask and `(items, 3)` grids."""
        if image_grid_thw is None:
            return {}
        if not token_ids or self.key not in token_ids:
            raise InputError(
                "positions in height and width are those of placeholders, but the model prepends; build the "
                f"MultimodalProcessor with model=, or call set_token_ids({{{self.key!r}: …}})"
            )
        grids = iter(image_grid_thw.tolist())
        positions = torch.zeros(3, *input_ids.shape, dtype=torch.long, device=input_ids.device)
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask.bool(), strict=True)):
            is_image = (ids[mask] == token_ids[self.key]).tolist()
            positions[:, row, mask] = self._of_row(is_image, grids).to(positions.device)
        return {"position_ids": positions}

    def _of_row(self, is_image: list[bool], grids: Any) -> Tensor:
        """Positions `(3, length)` of a row, given where it holds image features."""
        pieces, start, place = [], 0, 0
        while place < len(is_image):
            if not is_image[place]:
                pieces.append(torch.full((3, 1), start))
                start, place = start + 1, place + 1
                continue
            time, height, width = next(grids)
            grid = torch.cartesian_prod(
                torch.arange(time), torch.arange(height // self.merge), torch.arange(width // self.merge)
            )
            pieces.append(grid.T + start)
            start += max(height, width) // self.merge
            place += len(grid)
        return torch.cat(pieces, dim=1) if pieces else torch.zeros(3, 0, dtype=torch.long)
