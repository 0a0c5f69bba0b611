"""Callbacks that can be saved: what a vision-language model does around its parts, as objects with JSON settings.

A plain function given to `ModalEncoderModule` or `MultimodalModel` cannot be written into a checkpoint; these can.
Shape legend: `anygpt.outputs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import ModelOutput


class SavedCallback:
    """A callback that a checkpoint holds as `{"class", "settings"}`; `settings` are its constructor's arguments."""

    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"class": f"{type(self).__module__}.{type(self).__qualname__}", "settings": self.settings}


class EncoderCallbacks(SavedCallback, nn.Module):
    """The three callbacks of an encoder as one object, and the number of features that come out.

    Subclasses override what they need. Parameters of their own are saved with the projectors and train with
    `<key>_projector`.

    Args:
        settings: JSON values; the constructor's keyword arguments.
    """

    additional_args: tuple[str, ...] = ()

    def __init__(self, **settings: Any):
        super().__init__()
        self.settings = settings

    def preprocess(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Before the encoder."""
        return inputs

    def postprocess_module(self, inputs: dict[str, Any], output: Any) -> Any:
        """Between encoder and projector."""
        return output

    def postprocess_projector(self, inputs: dict[str, Any], output: Any) -> Any:
        """After the projector."""
        return output

    def feature_size(self, size: int) -> int:
        """The width of what the projector gets, from that of what the encoder gives."""
        return size

    def count(self, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> list[int]:
        """Features of each input, in place of the family's own count."""
        raise NotImplementedError


def with_features(output: Any, features: Any) -> Any:
    """A `ModelOutput` or tuple with its first entry replaced; a tensor is replaced itself."""
    if isinstance(output, ModelOutput):
        return type(output)(**(dict(output) | {next(iter(output.keys())): features}))
    return features if isinstance(output, Tensor) else (features, *output[1:])
