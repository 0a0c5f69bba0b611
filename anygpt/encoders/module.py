"""`ModalEncoderModule`: an encoder, its projector, and the callbacks around them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from anygpt.encoders.projector import MultimodalProjector, MultimodalProjectorConfig, hidden_size_of
from anygpt.errors import InputError


def base_model(module: nn.Module) -> nn.Module:
    """The module itself, or the one that PEFT wraps (whose signature and config are the real ones)."""
    return module.get_base_model() if isinstance(module, PeftModel) else module


def argument_names(module: nn.Module) -> set[str]:
    """Names that a module's `forward` takes, read behind a PEFT wrapper, whose own is `(*args, **kwargs)`."""
    parameters = inspect.signature(base_model(module).forward).parameters.values()
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


class ModalEncoderModule(nn.Module):
    """One input modality: `preprocess → module → postprocess_module → projector → postprocess_projector`.

    Args:
        model: the encoder, any `PreTrainedModel` whose first output is `(items, n, features)`, PEFT-wrapped or
            not. `module` is accepted in its place.
        projector: built by `MultimodalModel`, with sizes from the two configs, when None.
        additional_args: names of inputs that only the callbacks need; they are accepted but not given to the encoder.
        preprocess_callback: `(inputs: dict) -> dict`, before the encoder.
        postprocess_module_callback: `(inputs, output) -> output`, after the encoder. Outputs are a `ModelOutput` or
            a tuple.
        postprocess_projector_callback: `(inputs, output) -> output`, after the projector. Its first entry is what
            is merged: `(items, n, H)`, or `(features, H)` packed in order.
        modality: media type in the data (`image`, `video`, `audio`); the key under which the module is given to
            `MultimodalModel` when None.

    Attributes:
        module: the encoder.
        projector: the `MultimodalProjector`.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | None = None,
        projector: MultimodalProjector | None = None,
        additional_args: Sequence[str] = (),
        preprocess_callback: Callable[[dict], dict] | None = None,
        postprocess_module_callback: Callable[[dict, Any], Any] | None = None,
        postprocess_projector_callback: Callable[[dict, Any], Any] | None = None,
        *,
        module: PreTrainedModel | PeftModel | None = None,
        modality: str | None = None,
    ):
        super().__init__()
        if (model is None) == (module is None):
            raise InputError("ModalEncoderModule takes one encoder: give either model= or module=, not both or none")
        self.module = model if model is not None else module
        self.projector = projector
        self.additional_args = tuple(additional_args)
        self.preprocess_callback = preprocess_callback
        self.postprocess_module_callback = postprocess_module_callback
        self.postprocess_projector_callback = postprocess_projector_callback
        self.modality = modality

    @property
    def config(self) -> Any:
        return base_model(self.module).config

    @property
    def input_names(self) -> set[str]:
        """Everything this module takes: the encoder's arguments and the callbacks' additional ones."""
        return argument_names(self.module) | set(self.additional_args)

    def init_projector(self, out_features: int, projection_type: str, activation: str) -> None:
        """Build the projector if there is none; check its sizes against both sides if there is.

        Raises:
            InputError: a given projector does not fit; both sizes are named.
        """
        if self.projector is None:
            self.projector = MultimodalProjector(
                MultimodalProjectorConfig(
                    in_features=hidden_size_of(self.config),
                    out_features=out_features,
                    projection_type=projection_type,
                    activation=activation,
                )
            )
            return
        config = self.projector.config
        if config.out_features not in (None, out_features):
            raise InputError(
                f"the projector gives features of size {config.out_features}, but the language model's embeddings "
                f"have size {out_features}"
            )
        # A callback may change the encoder's features (select layers, fold patches): only it knows their size then.
        if self.postprocess_module_callback is None and config.in_features is not None:
            features = hidden_size_of(self.config)
            if config.in_features != features:
                raise InputError(
                    f"the encoder gives features of size {features}, but its projector expects {config.in_features}"
                )

    def forward(self, inputs: dict[str, Any]) -> Tensor:
        """Run the hops in order.

        Args:
            inputs: arguments by name, the additional ones included.

        Returns:
            `(items, n, H)` or packed `(features, H)`, as the last callback leaves it.
        """
        if self.preprocess_callback is not None:
            inputs = self.preprocess_callback(inputs)
        accepted = argument_names(self.module)
        dtype = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), None)
        output = self.module(**{k: _cast(v, dtype) for k, v in inputs.items() if k in accepted})
        if self.postprocess_module_callback is not None:
            output = self.postprocess_module_callback(inputs, output)
        output = self.projector(output)
        if self.postprocess_projector_callback is not None:
            output = self.postprocess_projector_callback(inputs, output)
        return output if isinstance(output, Tensor) else output[0]


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    """Floating-point inputs in the encoder's own dtype, everything else as it is."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() and dtype is not None else value
