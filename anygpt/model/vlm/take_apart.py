"""Splitting a transformers vision- or audio-language model into encoder, projector, language model and callbacks.

The parts share their tensors with the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel

from anygpt.encoders.callbacks import EncoderCallbacks
from anygpt.encoders.module import ModalEncoderModule
from anygpt.encoders.projector import MultimodalProjector, MultimodalProjectorConfig
from anygpt.encoders.selection import LlavaCallbacks
from anygpt.errors import InputError
from anygpt.model.vlm.llava import LlavaNextCallbacks
from anygpt.model.vlm.qwen2_vl import MRopePositions, Qwen2VLForCausalLM, Qwen2VLPatchConfig, Qwen2VLPatchEncoder


@dataclass
class Pieces:
    """The arguments of `MultimodalModel`.

    Attributes:
        encoders: input modules by key.
        language_model: a causal language model with its head.
        token_ids: `{encoder key: placeholder id}`.
        options: further arguments of `MultimodalModel`.
    """

    encoders: dict[str, ModalEncoderModule]
    language_model: PreTrainedModel
    token_ids: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)


def take_apart(model: str | Path | PreTrainedModel, **loading_options: Any) -> Pieces:
    """The parts of a LLaVA, LLaVA-NeXT, Qwen2-VL or Qwen2-Audio model.

    Args:
        model: hub id, folder, or the model itself.
        loading_options: of transformers' `from_pretrained`.

    Raises:
        InputError: an unsupported kind of model, or one that cannot be loaded.
    """
    if isinstance(model, (str, Path)):
        try:
            model = AutoModelForMultimodalLM.from_pretrained(
                model, **{"use_safetensors": True, "dtype": "auto"} | loading_options
            )
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"cannot load the multimodal model {str(model)!r}: {error}") from error
    kind = getattr(model.config, "model_type", None)
    if kind not in TAKERS:
        raise InputError(
            f"cannot take a {kind!r} model apart; expected {', '.join(sorted(TAKERS))}. Compose its parts yourself: "
            "MultimodalModel({key: ModalEncoderModule(tower, projector, callbacks…)}, language_model)"
        )
    pieces = TAKERS[kind](model)
    for part in (pieces.language_model, *(encoder.module for encoder in pieces.encoders.values())):
        part.anygpt_source = None  # it cannot be loaded by itself, so checkpoints must save it whole
    return pieces


def _take_llava(model: PreTrainedModel) -> Pieces:
    config = model.config
    callbacks = LlavaCallbacks(config.vision_feature_layer, config.vision_feature_select_strategy)
    return _assemble_llava(model, callbacks)


def _take_llava_next(model: PreTrainedModel) -> Pieces:
    config = model.config
    callbacks = LlavaNextCallbacks(
        config.vision_feature_layer,
        config.vision_feature_select_strategy,
        grid_pinpoints=[list(pinpoint) for pinpoint in config.image_grid_pinpoints],
        tile_size=config.vision_config.image_size,
        patch_size=config.vision_config.patch_size,
        hidden_size=config.text_config.hidden_size,
    )
    callbacks.image_newline = model.model.image_newline
    return _assemble_llava(model, callbacks)


def _assemble_llava(model: PreTrainedModel, callbacks: EncoderCallbacks) -> Pieces:
    native = model.model.multi_modal_projector
    config = MultimodalProjectorConfig(
        projection_type="mlp",
        activation=model.config.projector_hidden_act,
        in_features=native.linear_1.in_features,
        out_features=native.linear_2.out_features,
        bias=native.linear_1.bias is not None,
    )
    projector = _projector(config, {"0": native.linear_1, "2": native.linear_2})
    encoder = ModalEncoderModule(model.model.vision_tower, projector, callbacks=callbacks)
    return Pieces({"image": encoder}, _causal_language_model(model), {"image": model.config.image_token_id})


def _take_qwen2_vl(model: PreTrainedModel) -> Pieces:
    vision = model.config.vision_config
    with torch.device("meta"):
        encoder = Qwen2VLPatchEncoder(Qwen2VLPatchConfig(**_without_type(vision)))
        language_model = Qwen2VLForCausalLM(model.config.text_config)
    for name, child in model.model.visual.named_children():
        if name != "merger":
            setattr(encoder, name, child)
    config = MultimodalProjectorConfig(
        projection_type="merger",
        in_features=vision.embed_dim,
        out_features=vision.hidden_size,
        merge_size=vision.spatial_merge_size,
    )
    merger = model.model.visual.merger
    projector = _projector(config, {"norm": merger.ln_q, "mlp": merger.mlp})
    return Pieces(
        {"image": ModalEncoderModule(encoder.train(model.training), projector)},
        _fill_language_model(language_model, model),
        {"image": model.config.image_token_id},
        {"preprocess_llm_callback": MRopePositions(vision.spatial_merge_size)},
    )


def _take_qwen2_audio(model: PreTrainedModel) -> Pieces:
    linear = model.model.multi_modal_projector.linear
    config = MultimodalProjectorConfig(in_features=linear.in_features, out_features=linear.out_features)
    projector = MultimodalProjector(config)
    projector.projection = linear
    encoder = ModalEncoderModule(model.model.audio_tower, projector)
    return Pieces({"audio": encoder}, _causal_language_model(model), {"audio": model.config.audio_token_id})


def _projector(config: MultimodalProjectorConfig, children: dict[str, nn.Module]) -> MultimodalProjector:
    projector = MultimodalProjector(config)
    for name, child in children.items():
        setattr(projector.projection, name, child)
    return projector


def _causal_language_model(model: PreTrainedModel) -> PreTrainedModel:
    with torch.device("meta"):
        language_model = AutoModelForCausalLM.from_config(model.config.text_config)
    return _fill_language_model(language_model, model)


def _fill_language_model(language_model: PreTrainedModel, model: PreTrainedModel) -> PreTrainedModel:
    """Put the model's trunk and head into an empty causal language model."""
    setattr(language_model, language_model.base_model_prefix, model.model.language_model)
    language_model.set_output_embeddings(model.get_output_embeddings())
    language_model.generation_config = copy.deepcopy(model.generation_config)
    return language_model.train(model.training)


def _without_type(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name != "model_type"}


TAKERS: dict[str, Callable[[PreTrainedModel], Pieces]] = {
    "llava": _take_llava,
    "llava_next": _take_llava_next,
    "qwen2_vl": _take_qwen2_vl,
    "qwen2_audio": _take_qwen2_audio,
}
