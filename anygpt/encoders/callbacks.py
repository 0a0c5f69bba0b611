"""Serializable callbacks around an encoder, as objects with JSON settings, unlike plain functions given to modules."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import ModelOutput

from anygpt.encoders.families import FAMILIES
from anygpt.errors import InputError


class SavedCallback:
    """A callback saved as `{"class", "settings"}`; `settings` are the constructor's arguments."""

    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"class": f"{type(self).__module__}.{type(self).__qualname__}", "settings": self.settings}


class EncoderCallbacks(SavedCallback, nn.Module):
    """The three callbacks of an encoder as one object, which also counts the resulting features.

    Subclasses override what they need. Their parameters are saved with the projectors and train with `<key>_projector`.
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


class LlavaCallbacks(EncoderCallbacks):
    """Features of chosen layers, with or without the class token, as in LLaVA (arXiv 2304.08485).

    `feature_layer` is an index into the encoder's hidden states, of several, which are concatenated, or None for its
    output; `select_strategy` `default` drops the class token, `full` keeps everything.
    """

    def __init__(self, feature_layer: int | list[int] | None = -2, select_strategy: str = "default", **settings: Any):
        super().__init__(feature_layer=feature_layer, select_strategy=select_strategy, **settings)
        self.layers = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer or [])
        self.drops_class_token = select_strategy == "default"

    def preprocess(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs | ({"output_hidden_states": True, "return_dict": True} if self.layers else {})

    def postprocess_module(self, inputs: dict[str, Any], output: Any) -> Any:
        layers = [output.hidden_states[layer] for layer in self.layers]
        chosen = torch.cat(layers, dim=-1) if layers else output[0]
        if self.drops_class_token:
            chosen = chosen[:, 1:]
        # Pixtral's hidden states have a single row of all images; its output's first entry no longer has that axis.
        return with_features(output, chosen[0] if output[0].dim() == 2 else chosen)

    def feature_size(self, size: int) -> int:
        return size * max(1, len(self.layers))

    def count(self, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> list[int]:
        return [n - self.drops_class_token for n in FAMILIES[config.model_type].count(config, inputs)]


def check_selection(config: PreTrainedConfig, feature_layer: int | None, drop_cls: bool | None) -> None:
    family = FAMILIES[config.model_type]
    if feature_layer is not None:
        layers = getattr(config, "num_hidden_layers", None)
        if layers is None or ((family.layout != "fixed" or family.select) and config.model_type != "pixtral"):
            raise InputError(f"feature_layer cannot be chosen of a {config.model_type!r} encoder")
        if not isinstance(feature_layer, int):
            raise InputError(f"feature_layer is {feature_layer!r}; expected the index of one layer")
        if not -layers - 1 <= feature_layer <= layers:
            raise InputError(f"feature_layer is {feature_layer}, but the encoder has {layers} layers")
    if drop_cls and not family.class_token:
        raise InputError(f"drop_cls is set, but a {config.model_type!r} encoder has no class token to leave out")
