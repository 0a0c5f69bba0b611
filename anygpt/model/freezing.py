"""Freezing and unfreezing parts, `model.train("image_projector")`, and the table of what a run trains.

Freezing clears `requires_grad` and keeps the part in eval mode through later calls of `train()`: a frozen UNet must not
run dropout, nor a frozen CLAP update its batch norm. Plain `train()`, `train(False)` and `eval()` keep torch's meaning.
"""

from typing import NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from anygpt.composition import Composition
from anygpt.errors import InputError
from anygpt.model.parts import is_peft


class PartSummary(NamedTuple):
    """A row of the table of parts: name, number of parameters, and how many of them train."""

    part: str
    parameters: int
    trainable: int


def parts_of(model: Composition) -> dict[str, list[nn.Module | nn.Parameter]]:
    """Modules and parameters by the name under which they can be frozen."""
    parts: dict[str, list[nn.Module | nn.Parameter]] = {}
    for key, encoder in model.encoders.items():
        parts[f"{key}_encoder"] = [encoder.module]
        parts[f"{key}_projector"] = [encoder.projector, *([encoder.callbacks] if encoder.callbacks else [])]
    parts["language_model"] = [model.language_model]
    parts["signal_tokens"] = [model.signal_tokens]
    parts |= {f"{key}_tokenizer": [tokenizer.module.network] for key, tokenizer in model.tokenizers.items()}
    for key, decoder in model.decoders.items():
        parts[f"{key}_decoder"] = [decoder.module]
        if decoder.module.denoiser_adapter is not None:
            layers = [x for x in decoder.module.denoiser.modules() if isinstance(x, LoraLayer)]
            parts[f"{key}_denoiser"] = [
                getattr(x, name) for x in layers for name in (*x.adapter_layer_names, "lora_dropout")
            ]
        mix = [decoder.layer_weights] if decoder.layer_weights is not None else []
        parts[f"{key}_output_projector"] = [decoder.projector, *mix]
    return parts


def part_parameters(model: Composition, part: str) -> list[nn.Parameter]:
    pieces = parts_of(model)[part]
    return [p for piece in pieces for p in ([piece] if isinstance(piece, nn.Parameter) else piece.parameters())]


def train_part(model: Composition, part: str, mode: bool) -> None:
    """Unfreeze a part, or freeze it and keep it in eval mode (see `MultimodalModel.train`)."""
    _check_known(model, [part])
    key, _, kind = part.rpartition("_")
    if mode and kind in ("decoder", "denoiser") and model.decoders[key].module.offload:
        raise InputError(f"{part} cannot train while its weights are offloaded: leave out offload of decoder {key!r}")
    for piece in parts_of(model)[part]:
        adapted = is_peft(piece)
        piece.requires_grad_(mode and not adapted)
        if mode and adapted:
            piece.set_adapter(piece.active_adapter)
    (model.frozen.discard if mode else model.frozen.add)(part)
    _set_mode(model, part, mode and model.training)


def train_only(model: Composition, parts: list[str]) -> None:
    _check_known(model, parts)
    for part in parts_of(model):
        train_part(model, part, mode=part in parts)


def _check_known(model: Composition, names: list[str]) -> None:
    parts = parts_of(model)
    if unknown := sorted(set(names) - set(parts)):
        raise InputError(f"there is no part {', '.join(map(repr, unknown))}; the parts are {', '.join(parts)}")


def _set_mode(model: Composition, part: str, mode: bool) -> None:
    for piece in parts_of(model)[part]:
        if isinstance(piece, nn.Module):
            piece.train(mode)


def keep_frozen(model: Composition) -> None:
    """Put frozen parts back into eval mode after torch's `train` changed all modules."""
    for part in parts_of(model):
        if part in model.frozen or part.endswith("_denoiser"):
            _set_mode(model, part, model.training and part not in model.frozen)
    _recompute_frozen(model)


def _recompute_frozen(model: Composition) -> None:
    """Keep gradient checkpointing active in a frozen language model, which gradients still pass through.

    transformers checkpoints a layer only in training mode, so that is set on the layer itself but not on its
    submodules, and not on layers that apply dropout themselves.
    """
    if "language_model" not in model.frozen:
        return
    for layer in model.language_model.modules():
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
            drops = any("dropout" in name and isinstance(p, float) and p for name, p in vars(layer).items())
            layer.training = model.training and not drops


def gradient_checkpointing_enable(model: Composition, gradient_checkpointing_kwargs: dict | None = None) -> None:
    """Recompute activations in the backward pass of all parts that gradients pass through."""
    for encoder in model.encoders.values():
        if any(p.requires_grad for p in encoder.module.parameters()):
            encoder.module.gradient_checkpointing_enable(gradient_checkpointing_kwargs)
    model.language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs)
    _recompute_frozen(model)
    for decoder in model.decoders.values():
        decoder.module.enable_gradient_checkpointing()


def trainable_names(model: Composition) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def summarize_parts(model: Composition) -> list[PartSummary]:
    rows = []
    for part in parts_of(model):
        parameters = part_parameters(model, part)
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        rows.append(PartSummary(part, sum(p.numel() for p in parameters), trainable))
    return rows


def touch_trainable(model: Composition) -> Tensor:
    """A zero that depends on every trainable parameter, to be added to the loss of distributed training.

    Without it a rank whose batch lacks a modality gives its projector no gradient, and the other ranks wait forever.
    """
    # FSDP2 shards only the language model's layers, which run in every batch.
    trainable = [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    zero = torch.zeros((), device=model.device)
    return torch.stack([zero, *(p.flatten()[0].float() for p in trainable)]).sum() * 0
