"""Serializable callbacks around an encoder, as objects with JSON settings.

Plain functions given to `ModalEncoderModule` or `MultimodalModel` cannot be saved in a checkpoint; these can.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import ModelOutput


class SavedCallback:
    """A callback saved as `{"class", "settings"}`; `settings` are the constructor's arguments."""

    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"class": f"{type(self).__module__}.{type(self).__qualname__}", "settings": self.settings}


class EncoderCallbacks(SavedCallback, nn.Module):
    """The three callbacks of an encoder as one object, which also counts the resulting features.

    Subclasses override what they need. Their parameters are saved with the projectors and train with `<key>_projector`.
    `settings` are JSON values.
    """

    additional_args: tuple[str, ...] = ()

    def __init__(self, **settings: Any):
        super().__init__()
        self.settings = settings

    def preprocess(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Runs before the encoder."""
        return inputs

    def postprocess_module(self, inputs: dict[str, Any], output: Any) -> Any:
        """Runs between encoder and projector."""
        return output

    def postprocess_projector(self, inputs: dict[str, Any], output: Any) -> Any:
        """Runs after the projector."""
        return output

    def feature_size(self, size: int) -> int:
        """Input width of the projector, given the encoder's feature width."""
        return size

    def count(self, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> list[int]:
        """Number of features of each input; replaces the family's count."""
        raise NotImplementedError


def with_features(output: Any, features: Any) -> Any:
    """A `ModelOutput` or tuple with its first entry replaced; `features` itself for a tensor."""
    if isinstance(output, ModelOutput):
        return type(output)(**(dict(output) | {next(iter(output.keys())): features}))
    return features if isinstance(output, Tensor) else (features, *output[1:])
