"""Which parts train: `model.train("image_projector")`, and the table of what a run trains.

Freezing sets `requires_grad` and keeps the part in eval mode through later calls of `train()`: a frozen UNet must not
run dropout, nor a frozen CLAP update its batch norm. Mode and freezing are otherwise two things: plain `train()`,
`train(False)` and `eval()` keep torch's meaning.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from anygpt.composition import Composition
from anygpt.errors import InputError
from anygpt.model.parts import is_peft


@dataclass(frozen=True)
class PartSummary:
    """One line of the table of parts."""

    part: str
    parameters: int
    trainable: int


def frozen_decoders(model: Composition) -> set[str]:
    """Decoders that came frozen, as a `DiffusionDecoder` does: plain `train()` must not wake their dropout."""
    return {
        f"{key}_decoder"
        for key, decoder in model.decoders.items()
        if not any(p.requires_grad for p in decoder.module.parameters())
    }


def parts_of(model: Composition) -> dict[str, list[nn.Module | nn.Parameter]]:
    """Everything that can be frozen by itself, by name."""
    parts: dict[str, list[nn.Module | nn.Parameter]] = {}
    for key, encoder in model.encoders.items():
        parts[f"{key}_encoder"] = [encoder.module]
        parts[f"{key}_projector"] = [encoder.projector, *([encoder.callbacks] if encoder.callbacks else [])]
    parts["language_model"] = [model.language_model]
    parts["signal_tokens"] = [model.signal_tokens]
    for key, decoder in model.decoders.items():
        parts[f"{key}_decoder"] = [decoder.module]
        mix = [decoder.layer_weights] if decoder.layer_weights is not None else []
        parts[f"{key}_output_projector"] = [decoder.projector, *mix]
    return parts


def part_parameters(model: Composition, part: str) -> list[nn.Parameter]:
    """Each parameter of a part, once."""
    return [p for piece in parts_of(model)[part] for p in _parameters(piece)]


def train_part(model: Composition, part: str, mode: bool) -> None:
    """Unfreeze a part, or freeze it and keep it in eval mode. See `MultimodalModel.train`."""
    pieces = _known(model, [part])[part]
    for piece in pieces:
        adapted = isinstance(piece, nn.Module) and is_peft(piece)
        piece.requires_grad_(mode and not adapted)
        if mode and adapted:
            piece.set_adapter(piece.active_adapter)
    if mode:
        model.frozen.discard(part)
        _set_mode(pieces, model.training)
    else:
        model.frozen.add(part)
        _set_mode(pieces, False)


def keep_frozen(model: Composition) -> None:
    """Put frozen parts back into eval mode, after torch's `train` changed the mode of everything."""
    for part in model.frozen:
        _set_mode(parts_of(model)[part], False)
    _recompute_frozen(model)


def _set_mode(pieces: list[nn.Module | nn.Parameter], mode: bool) -> None:
    for piece in pieces:
        if isinstance(piece, nn.Module):
            piece.train(mode)


def _known(model: Composition, names: list[str]) -> dict[str, list[nn.Module | nn.Parameter]]:
    parts = parts_of(model)
    if unknown := sorted(set(names) - set(parts)):
        raise InputError(f"there is no part {', '.join(map(repr, unknown))}; the parts are {', '.join(parts)}")
    return parts


def _recompute_frozen(model: Composition) -> None:
    """Let a frozen language model checkpoint its layers, through which gradients run all the same.

    transformers recomputes a layer only in training mode. The mode is set on the layer alone, not on what is in
    it, and not at all on layers that apply a dropout of their own.
    """
    if "language_model" not in model.frozen:
        return
    for layer in model.language_model.modules():
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
            drops = any("dropout" in name and isinstance(p, float) and p for name, p in vars(layer).items())
            layer.training = model.training and not drops


def train_only(model: Composition, parts: list[str]) -> None:
    """Train exactly these parts and freeze all others."""
    for part in _known(model, parts):
        train_part(model, part, mode=part in parts)


def trainable_names(model: Composition) -> list[str]:
    """Full names of all trainable parameters."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def summarize_parts(model: Composition) -> list[PartSummary]:
    """Parameters and trainable parameters of each part."""
    return [
        PartSummary(
            part,
            sum(p.numel() for p in part_parameters(model, part)),
            sum(p.numel() for p in part_parameters(model, part) if p.requires_grad),
        )
        for part in parts_of(model)
    ]


def touch_trainable(model: Composition) -> Tensor:
    """A zero that depends on every trainable parameter, for losses where there are several processes.

    Ranks whose batches lack a modality must still give its projector a gradient, or the others wait for ever.
    """
    # Under FSDP2 only the layers of the language model are sharded here, and those run in every batch.
    trainable = [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    zero = torch.zeros((), device=model.device)
    return torch.stack([zero, *(p.flatten()[0].float() for p in trainable)]).sum() * 0


def touched(model: Composition, loss: Tensor | None) -> Tensor | None:
    """A loss in training through every trainable parameter, where there are several processes."""
    if loss is None or not model.training or not torch.distributed.is_initialized():
        return loss
    return loss + touch_trainable(model)


def gradient_checkpointing_enable(model: Composition, gradient_checkpointing_kwargs: dict | None = None) -> None:
    """Recompute activations in the backward pass, in every part whose library offers it."""
    for key, encoder in model.encoders.items():
        if any(p.requires_grad for p in part_parameters(model, f"{key}_encoder")):
            encoder.module.gradient_checkpointing_enable(gradient_checkpointing_kwargs)
    model.language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs)
    _recompute_frozen(model)
    for decoder in model.decoders.values():
        decoder.module.enable_gradient_checkpointing()


def _parameters(piece: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    return [piece] if isinstance(piece, nn.Parameter) else list(piece.parameters())
