"""Splitting a transformers vision- or audio-language model into encoder, projector, language model and callbacks.

The parts share their tensors with the model.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel

from anygpt.encoders.callbacks import LlavaCallbacks, LlavaNextCallbacks
from anygpt.encoders.module import ModalEncoderModule
from anygpt.encoders.projector import MultimodalProjector, MultimodalProjectorConfig
from anygpt.errors import InputError, refusing
from anygpt.model.vlm.qwen2_vl import MRopePositions, Qwen2VLForCausalLM, Qwen2VLPatchConfig, Qwen2VLPatchEncoder
from anygpt.parts.files import Weights
from anygpt.parts.networks import check_report, without_report


class Pieces(NamedTuple):
    """The arguments of `MultimodalModel`, and the placeholder's id by encoder key."""

    encoders: dict[str, ModalEncoderModule]
    language_model: PreTrainedModel
    token_ids: dict[str, int]
    preprocess_llm_callback: Any = None


def take_apart(model: str | Path | PreTrainedModel, **loading_options: Any) -> Pieces:
    """The parts of a LLaVA, LLaVA-NeXT, Qwen2-VL or Qwen2-Audio model.

    `model` is a hub id or folder, with `loading_options` of transformers' `from_pretrained`, or the model itself. An
    unsupported kind is an `InputError`, and so is one that cannot be loaded.
    """
    if isinstance(model, (str, Path)):
        options = {"use_safetensors": True, "dtype": "auto", "trust_remote_code": False} | loading_options
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        weights, faults = Weights(Path(model), {}), (OSError, ValueError, KeyError, RuntimeError, SafetensorError)
        with (
            refusing(f"cannot load the multimodal model {str(model)!r}", faults),
            without_report("transformers.modeling_utils", "LOAD REPORT"),
        ):
            model, info = AutoModelForMultimodalLM.from_pretrained(model, **options)
        others = [f"{name} {tuple(found)}, expected {tuple(own)}" for name, found, own in info["mismatched_keys"]]
        report = {
            "lacks": info["missing_keys"],
            "has in another shape": others,
            "has left over": info["unexpected_keys"],
        }
        check_report(weights, type(model), report)
    config = model.config
    kind = getattr(config, "model_type", None)
    if kind not in TAKERS:
        raise InputError(
            f"cannot take a {kind!r} model apart; expected {', '.join(sorted(TAKERS))}. Compose its parts yourself: "
            "MultimodalModel({key: ModalEncoderModule(tower, projector, callbacks…)}, language_model)"
        )
    encoder, language_model = TAKERS[kind](model), _language_model(model)
    for part in (language_model, encoder.module):
        part.anygpt_source = None  # it cannot be loaded by itself, so checkpoints must save it whole
    if kind == "qwen2_audio":
        return Pieces({"audio": encoder}, language_model, {"audio": config.audio_token_id})
    callback = MRopePositions(config.vision_config.spatial_merge_size) if kind == "qwen2_vl" else None
    return Pieces({"image": encoder}, language_model, {"image": config.image_token_id}, callback)


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
    return ModalEncoderModule(model.model.vision_tower, projector, callbacks=callbacks)


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
    return ModalEncoderModule(encoder.train(model.training), projector)


def _take_qwen2_audio(model: PreTrainedModel) -> ModalEncoderModule:
    linear = model.model.multi_modal_projector.linear
    projector = _projector({}, in_features=linear.in_features, out_features=linear.out_features)
    projector.projection = linear
    return ModalEncoderModule(model.model.audio_tower, projector)


def _projector(children: dict[str, nn.Module], **settings: Any) -> MultimodalProjector:
    projector = MultimodalProjector(MultimodalProjectorConfig(**settings))
    for name, child in children.items():
        setattr(projector.projection, name, child)
    return projector


def _language_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model's trunk and head in a causal language model."""
    config, head = copy.deepcopy(model.config.text_config), model.get_output_embeddings()
    # Only the tensors tell: the whole model's config and the text's may disagree, or say nothing.
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
