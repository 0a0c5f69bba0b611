"""Which parts train: `model.train("image_projector")`, and the table of what a run trains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from anygpt.errors import InputError
from anygpt.model.parts import is_peft


@dataclass(frozen=True)
class PartSummary:
    """One line of the table of parts."""

    part: str
    parameters: int
    trainable: int


class PartTraining:
    """Freezing by part, mixed into `MultimodalModel`.

    Freezing sets `requires_grad` and keeps the part in eval mode through later calls of `train()`: a frozen UNet
    must not run dropout, nor a frozen CLAP update its batch norm. Mode and freezing are otherwise two things:
    plain `train()`, `train(False)` and `eval()` keep torch's meaning.
    """

    def init_part_training(self) -> None:
        # a DiffusionDecoder comes frozen; plain train() must not wake its dropout
        self._frozen = {
            f"{key}_decoder"
            for key, decoder in self.decoders.items()
            if not any(p.requires_grad for p in decoder.module.parameters())
        }

    @property
    def parts(self) -> dict[str, list[nn.Module | nn.Parameter]]:
        """Everything that can be frozen by itself, by name."""
        parts: dict[str, list[nn.Module | nn.Parameter]] = {}
        for key, encoder in self.encoders.items():
            parts[f"{key}_encoder"] = [encoder.module]
            parts[f"{key}_projector"] = [encoder.projector, *([encoder.callbacks] if encoder.callbacks else [])]
        parts["language_model"] = [self.language_model]
        parts["signal_tokens"] = [self.signal_tokens]
        for key, decoder in self.decoders.items():
            parts[f"{key}_decoder"] = [decoder.module]
            mix = [decoder.layer_weights] if decoder.layer_weights is not None else []
            parts[f"{key}_output_projector"] = [decoder.projector, *mix]
        return parts

    def part_parameters(self, part: str) -> list[nn.Parameter]:
        """Each parameter of a part, once."""
        return [p for piece in self.parts[part] for p in _parameters(piece)]

    def train(self, part: str | bool = True, mode: bool = True):
        """Train or freeze one part by name; or, given a bool or nothing, set torch's training mode.

        Unfreezing a PEFT-wrapped part trains its adapters, not its base.

        Raises:
            InputError: unknown part; the known ones are listed.
        """
        if not isinstance(part, str):
            super().train(part)
            for name in self._frozen:
                self._set_eval(name)
            self._recompute_frozen()
            return self
        if part not in self.parts:
            raise InputError(f"there is no part {part!r}; the parts are {', '.join(self.parts)}")
        for piece in self.parts[part]:
            piece.requires_grad_(mode and not (isinstance(piece, nn.Module) and is_peft(piece)))
            if mode and isinstance(piece, nn.Module) and is_peft(piece):
                piece.set_adapter(piece.active_adapter)
        if mode:
            self._frozen.discard(part)
            for piece in self.parts[part]:
                if isinstance(piece, nn.Module):
                    piece.train(self.training)
        else:
            self._frozen.add(part)
            self._set_eval(part)
        return self

    def _set_eval(self, part: str) -> None:
        for piece in self.parts[part]:
            if isinstance(piece, nn.Module):
                piece.eval()

    def _recompute_frozen(self) -> None:
        """Let a frozen language model checkpoint its layers, through which gradients run all the same.

        transformers recomputes a layer only in training mode. The mode is set on the layer alone, not on what is in
        it, and not at all on layers that apply a dropout of their own.
        """
        if "language_model" not in self._frozen:
            return
        for layer in self.language_model.modules():
            if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
                drops = any("dropout" in name and isinstance(p, float) and p for name, p in vars(layer).items())
                layer.training = self.training and not drops

    def train_only(self, parts: list[str]) -> None:
        """Train exactly these parts and freeze all others."""
        unknown = sorted(set(parts) - set(self.parts))
        if unknown:
            raise InputError(f"there is no part {', '.join(unknown)}; the parts are {', '.join(self.parts)}")
        for part in self.parts:
            self.train(part, mode=part in parts)

    def trainable_names(self) -> list[str]:
        """Full names of all trainable parameters."""
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    def summarize_parts(self) -> list[PartSummary]:
        """Parameters and trainable parameters of each part."""
        return [
            PartSummary(
                part,
                sum(p.numel() for p in self.part_parameters(part)),
                sum(p.numel() for p in self.part_parameters(part) if p.requires_grad),
            )
            for part in self.parts
        ]

    def touch_trainable(self) -> Tensor:
        """A zero that depends on every trainable parameter; `forward` adds it where there are several processes.

        Ranks whose batches lack a modality must still give its projector a gradient, or the others wait for ever.
        """
        # Under FSDP2 only the layers of the language model are sharded here, and those run in every batch.
        trainable = [p for p in self.parameters() if p.requires_grad and not isinstance(p, DTensor)]
        zero = torch.zeros((), device=self.device)
        return torch.stack([zero, *(p.flatten()[0].float() for p in trainable)]).sum() * 0

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        """Recompute activations in the backward pass, in every part whose library offers it."""
        for key, encoder in self.encoders.items():
            if any(p.requires_grad for p in self.part_parameters(f"{key}_encoder")):
                encoder.module.gradient_checkpointing_enable(gradient_checkpointing_kwargs)
        self.language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs)
        self._recompute_frozen()
        for decoder in self.decoders.values():
            decoder.module.enable_gradient_checkpointing()


def _parameters(piece: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    return [piece] if isinstance(piece, nn.Parameter) else list(piece.parameters())
