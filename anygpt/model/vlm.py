"""Splitting a transformers vision- or audio-language model into encoder, projector, language model and callbacks.

The parts share their tensors with the model, and give the same logits. Shape legend: `anygpt.outputs`.
"""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig, Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VisionTransformerPretrainedModel,
    Qwen2VLPreTrainedModel,
    Qwen2VLTextModel,
)

from anygpt.encoders.callbacks import LlavaCallbacks, LlavaNextCallbacks, SavedCallback
from anygpt.encoders.module import ModalEncoderModule
from anygpt.encoders.projector import MultimodalProjector, MultimodalProjectorConfig
from anygpt.errors import InputError
from anygpt.parts.networks import load_network
from anygpt.parts.source import Source, load


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
    """The `preprocess_llm_callback` of Qwen2-VL: positions in time, height and width (M-RoPE, arXiv 2409.12191, §2.1).

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
                "positions in height and width are those of placeholders, but the model prepends features; build the "
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


def take_apart(
    model: str | Path | PreTrainedModel, **loading_options: Any
) -> tuple[ModalEncoderModule, PreTrainedModel, int, MRopePositions | None]:
    """The encoder of a LLaVA, LLaVA-NeXT, Qwen2-VL or Qwen2-Audio model, its language model, the placeholder's id, and
    the `preprocess_llm_callback`.

    `model` is a hub id or folder, with `loading_options` as for any part, or the model itself. A model that is not
    supported or cannot be loaded is an `InputError`.
    """
    if isinstance(model, (str, Path)):
        source = Source.of(model, loading_options)
        model = load(source, "multimodal model", lambda: _load(source))
    config = model.config
    encoder, language_model = _taker(config)(model), _language_model(model)
    for part in (language_model, encoder.module):
        part.anygpt_source = None  # it cannot be loaded by itself, so checkpoints must save it whole
    callback = MRopePositions(config.vision_config.spatial_merge_size) if config.model_type == "qwen2_vl" else None
    placeholder = config.audio_token_id if encoder.modality == "audio" else config.image_token_id
    return encoder, language_model, placeholder, callback


def _load(source: Source) -> PreTrainedModel:
    config = source.config()
    _taker(config)  # before its tensors are read
    cls = MODEL_FOR_MULTIMODAL_LM_MAPPING[type(config)]
    return load_network(cls, config, source.place, dtype=source.torch_dtype, **source.model_options())


def _taker(config: PreTrainedConfig) -> Callable[[PreTrainedModel], ModalEncoderModule]:
    if config.model_type not in TAKERS:
        raise InputError(
            f"cannot take a {config.model_type!r} model apart; expected {', '.join(sorted(TAKERS))}. Compose its parts "
            "yourself: MultimodalModel({key: ModalEncoderModule(tower, projector, callbacks…)}, language_model)"
        )
    return TAKERS[config.model_type]


def _take_llava(model: PreTrainedModel) -> ModalEncoderModule:
    config, native = model.config, model.model.multi_modal_projector
    callbacks = LlavaCallbacks(config.vision_feature_layer, config.vision_feature_select_strategy)
    if config.model_type == "llava_next":
        callbacks = LlavaNextCallbacks(
            config.vision_feature_layer,
            config.vision_feature_select_strategy,
            grid_pinpoints=[list(pinpoint) for pinpoint in config.image_grid_pinpoints],
            tile_size=config.vision_config.image_size,
            patch_size=config.vision_config.patch_size,
            hidden_size=config.text_config.hidden_size,
        )
        callbacks.image_newline = model.model.image_newline
    projector = _projector(
        {"0": native.linear_1, "2": native.linear_2},
        projection_type="mlp",
        activation=config.projector_hidden_act,
        in_features=native.linear_1.in_features,
        out_features=native.linear_2.out_features,
        bias=native.linear_1.bias is not None,
    )
    return ModalEncoderModule(model.model.vision_tower, projector, callbacks=callbacks, modality="image")


def _take_qwen2_vl(model: PreTrainedModel) -> ModalEncoderModule:
    vision, merger = model.config.vision_config, model.model.visual.merger
    settings = {name: value for name, value in vision.to_dict().items() if name != "model_type"}
    with torch.device("meta"):
        encoder = Qwen2VLPatchEncoder(Qwen2VLPatchConfig(**settings))
    for name, child in model.model.visual.named_children():
        if name != "merger":
            setattr(encoder, name, child)
    projector = _projector(
        {"norm": merger.ln_q, "mlp": merger.mlp},
        projection_type="merger",
        in_features=vision.embed_dim,
        out_features=vision.hidden_size,
        merge_size=vision.spatial_merge_size,
    )
    return ModalEncoderModule(encoder.train(model.training), projector, modality="image")


def _take_qwen2_audio(model: PreTrainedModel) -> ModalEncoderModule:
    linear = model.model.multi_modal_projector.linear
    config = MultimodalProjectorConfig(in_features=linear.in_features, out_features=linear.out_features)
    projector = MultimodalProjector(config, linear)
    return ModalEncoderModule(model.model.audio_tower, projector, modality="audio")


def _projector(children: dict[str, nn.Module], **settings: Any) -> MultimodalProjector:
    projector = MultimodalProjector(MultimodalProjectorConfig(**settings))
    for name, child in children.items():
        setattr(projector.projection, name, child)
    return projector


def _language_model(model: PreTrainedModel) -> PreTrainedModel:
    config, head = copy.deepcopy(model.config.text_config), model.get_output_embeddings()
    # Only the tensors are reliable: the whole model's config and the text config may disagree, or not say.
    config.tie_word_embeddings = head.weight is model.get_input_embeddings().weight
    with torch.device("meta"):
        is_qwen2_vl = isinstance(config, Qwen2VLForCausalLM.config_class)
        language_model = Qwen2VLForCausalLM(config) if is_qwen2_vl else AutoModelForCausalLM.from_config(config)
    setattr(language_model, language_model.base_model_prefix, model.model.language_model)
    language_model.set_output_embeddings(head)
    language_model.generation_config = copy.deepcopy(model.generation_config)
    return language_model.train(model.training)


TAKERS: dict[str, Callable[[PreTrainedModel], ModalEncoderModule]] = {
    "llava": _take_llava,
    "llava_next": _take_llava,
    "qwen2_vl": _take_qwen2_vl,
    "qwen2_audio": _take_qwen2_audio,
}
