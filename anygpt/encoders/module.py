"""`ModalEncoderModule`: an encoder, its projector, and the callbacks around them."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedConfig, PreTrainedModel

from anygpt.encoders.callbacks import EncoderCallbacks
from anygpt.encoders.families import FAMILIES, UNKNOWN, EncoderFamily
from anygpt.encoders.projector import (
    FIXED_LAYOUT_ONLY,
    MultimodalProjector,
    MultimodalProjectorConfig,
    first_of,
    hidden_size_of,
    with_features,
)
from anygpt.errors import InputError

FEATURES = "features"  # input that replaces all others: precomputed input of the projector (see `encode`)
CALLBACKS = ("preprocess_callback", "postprocess_module_callback", "postprocess_projector_callback")


class EncoderRefusal(InputError):
    """An encoder's forward refuses its inputs."""


def base_model(module: nn.Module) -> nn.Module:
    """The module without its PEFT wrapper, which hides the real signature and config."""
    return module.get_base_model() if isinstance(module, PeftModel) else module


def argument_names(module: nn.Module) -> set[str]:
    """Parameter names of a module's `forward`, without its PEFT wrapper, which takes `(*args, **kwargs)`."""
    parameters = inspect.signature(base_model(module).forward).parameters.values()
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


class ModalEncoderModule(nn.Module):
    """One input modality: `preprocess → module → postprocess_module → projector → postprocess_projector`.

    Adaptation to the encoder's family (`anygpt.encoders.FAMILIES`) happens next to the encoder: callbacks see inputs
    under the processor's names, and features in the output's first entry.

    Args:
        model: the encoder, a `PreTrainedModel` of a known family or one whose first output is `(items, n, features)`,
            possibly PEFT-wrapped; `module` is an alias and the attribute. One that reads tokens is refused.
        projector: if None, built by `MultimodalModel` with sizes from the two configs.
        additional_args: names of inputs for the callbacks alone; not passed to the encoder.
        preprocess_callback: `(inputs: dict) -> dict`, called before the encoder.
        postprocess_module_callback: `(inputs, output) -> output`, a `ModelOutput` or a tuple, after the encoder.
        postprocess_projector_callback: `(inputs, output) -> output`, after the projector. Its first entry is what
            is merged: `(items, n, H)`, a list of `(n, H)`, or `(features, H)` packed in order.
        modality: media type in the data (`image`, `video`, `audio`); if None, the module's key in `MultimodalModel`.
        callbacks: the three callbacks in serializable form, in place of functions. Without either, those set by
            `load_encoder` from `feature_layer`, `drop_cls` or the whole model's config.
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
        callbacks: EncoderCallbacks | None = None,
    ):
        super().__init__()
        if (model is None) == (module is None):
            raise InputError("ModalEncoderModule takes one encoder: give either model= or module=")
        self.module = model if model is not None else module
        if tokens := sorted(argument_names(self.module) & {"input_ids", "decoder_input_ids"}):
            raise InputError(
                f"{type(base_model(self.module)).__name__} reads {tokens[0]}, so it is no encoder of media; give its "
                "media part alone (CLIPVisionModel in place of CLIPModel, whisper.get_encoder() in place of "
                "WhisperModel, …)"
            )
        if callbacks is None:
            callbacks = getattr(base_model(self.module), "anygpt_callbacks", None)
        functions = (preprocess_callback, postprocess_module_callback, postprocess_projector_callback)
        self.projector = projector
        self.callbacks = callbacks
        if callbacks is not None:
            if any(functions):
                raise InputError(
                    "callback functions cannot be combined with callbacks=, which an encoder that was loaded with "
                    "feature_layer, drop_cls or its whole model's selection has, too: give a subclass of "
                    f"{type(callbacks).__name__} as callbacks=, or load it without them"
                )
            additional_args = (*additional_args, *callbacks.additional_args)
            functions = (callbacks.preprocess, callbacks.postprocess_module, callbacks.postprocess_projector)
        self.additional_args = tuple(dict.fromkeys(additional_args))
        self.preprocess_callback, self.postprocess_module_callback, self.postprocess_projector_callback = functions
        self.modality = modality

    @property
    def config(self) -> Any:
        return base_model(self.module).config

    @property
    def family(self) -> EncoderFamily:
        return FAMILIES.get(self.config.model_type, UNKNOWN)

    @property
    def input_names(self) -> set[str]:
        """Names of all accepted inputs: the encoder's arguments, the processor's names for them, the callbacks' own."""
        names = argument_names(self.module) | {*self.additional_args, FEATURES}
        return names | {*self.family.arguments, *self.family.counted_by}

    @property
    def own_functions(self) -> list[str]:
        """Names of the callbacks that are plain functions, which cannot be saved."""
        return [] if self.callbacks else [name for name in CALLBACKS if getattr(self, name) is not None]

    @property
    def feature_size(self) -> int:
        """Input width of the projector, unless callback functions change it; an `InputError` if it is unknown."""
        size = (self.family.feature_size or hidden_size_of)(self.config)
        return self.callbacks.feature_size(size) if self.callbacks else size

    @property
    def projector_sizes(self) -> dict[str, int | None]:
        """Arguments of `MultimodalProjectorConfig` that the encoder determines."""
        pool = self.family.pool_size
        return {"in_features": self.feature_size, "pool_size": pool(self.config) if pool else None}

    def init_projector(self, out_features: int, projection_type: str, activation: str) -> None:
        """Build the projector if there is none; if there is one whose sizes do not fit, an `InputError` names them."""
        if self.projector is None:
            built: dict[str, Any] = {"projection_type": projection_type, "activation": activation}
            built |= self.projector_sizes | {"out_features": out_features}
            self.projector = MultimodalProjector(MultimodalProjectorConfig(**built))
        config = self.projector.config
        if config.out_features not in (None, out_features):
            raise InputError(
                f"the projector gives features of size {config.out_features}, but the language model's embeddings "
                f"have size {out_features}"
            )
        # A function may change the encoder's features (select layers, fold patches): only it knows their size then.
        known = "postprocess_module_callback" not in self.own_functions and config.in_features is not None
        if known and config.in_features != self.feature_size:
            raise InputError(
                f"the encoder gives features of size {self.feature_size}, but its projector expects "
                f"{config.in_features}"
            )
        if config.projection_type in FIXED_LAYOUT_ONLY and self.family.layout != "fixed":
            raise InputError(
                f"a {config.projection_type} projector needs inputs of one size, but {self.config.model_type!r} gives "
                "each input features of its own number; use 'linear' or 'mlp'"
            )

    def forward(self, inputs: dict[str, Any]) -> Tensor | list[Tensor]:
        """Encode and project `inputs`: arguments by name, or `features` alone, `(items, n, features)` or a list of
        outputs of `encode`.

        Returns `(items, n, H)`; a list of `(n, H)` if the number of features varies; or packed `(features, H)` if the
        last callback returns that.
        """
        if FEATURES in inputs:
            if len(inputs) > 1:
                raise InputError(f"features replace all other inputs, but there are {', '.join(inputs)} as well")
            return self._project(inputs[FEATURES])
        inputs, output = self._encode(inputs)
        output = self.projector(output)
        if self.family.layout != "fixed":
            counts = map(self.projector.config.features_after, self.family.count(self.config, inputs))
            output = with_features(output, self._split(output, list(counts)))
        if self.postprocess_projector_callback is not None:
            output = self.postprocess_projector_callback(inputs, output)
        return output if isinstance(output, list) else first_of(output)

    def encode(self, inputs: dict[str, Any]) -> list[Tensor]:
        """Input of the projector for each input, `(n, features)`, without padding.

        `forward(inputs)` equals `forward({"features": encode(inputs)})` if no callback follows the projector.
        """
        inputs, output = self._encode(inputs)
        if self.family.layout != "fixed":
            return self._split(output, self.family.count(self.config, inputs))
        return list(first_of(output))

    def _project(self, features: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        if isinstance(features, Tensor):
            return self.projector(features)
        if self.projector.config.projection_type in FIXED_LAYOUT_ONLY:
            return self.projector(torch.stack(features))
        counts = [self.projector.config.features_after(len(item)) for item in features]
        return list(self.projector(torch.cat(features)).split(counts))

    def _encode(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """The inputs and the encoder's output, with the features first, after the callbacks around the encoder."""
        family, dtype = self.family, next((p.dtype for p in self.module.parameters() if p.is_floating_point()), None)
        if self.preprocess_callback is not None:
            inputs = self.preprocess_callback(inputs)
        known = argument_names(self.module) | {"output_hidden_states", "return_dict"}  # often not in the signature
        arguments = {family.arguments.get(name, name): value for name, value in inputs.items()}
        arguments = {
            name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in arguments.items()
            if name in known
        }
        if family.prepare:
            arguments = family.prepare(self.config, arguments)
        try:
            output = self._run(arguments)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except (RuntimeError, ValueError, IndexError) as error:  # of another size, too short, …
            reason = str(error).strip().split("\n")[0][:300]
            name = type(base_model(self.module)).__name__
            raise EncoderRefusal(f"the {self.modality!r} encoder's {name} refuses it: {reason}") from error
        if family.select:
            output = with_features(output, family.select(self.config, output))
        if self.postprocess_module_callback is not None:
            output = self.postprocess_module_callback(inputs, output)
        return inputs, output

    def _run(self, arguments: dict[str, Any]) -> Any:
        mask = arguments.get(self.family.cut_by or "")
        if mask is None:
            return self.module(**arguments)
        cuts = [(slice(i, i + 1), slice(length)) for i, length in enumerate(mask.sum(dim=1).tolist())]
        arguments = arguments | {self.family.cut_by: None}  # as one input alone
        outputs = [self.module(**tree_map_only(Tensor, lambda x, cut=cut: x[cut], arguments)) for cut in cuts]
        return with_features(outputs[0], pad_sequence([first_of(one)[0] for one in outputs], batch_first=True))

    def _split(self, output: Any, counts: list[int]) -> list[Tensor]:
        features = first_of(output)
        if self.family.layout == "packed":
            return list(features.split(counts))
        return [item[:count] for item, count in zip(features, counts, strict=True)]


def count_features(
    config: PreTrainedConfig,
    callbacks: EncoderCallbacks | None,
    projector: MultimodalProjectorConfig,
    inputs: Mapping[str, Any],
) -> list[int] | None:
    """Number of projected features of each input, given the processor's output; None for an unknown family."""
    if config.model_type not in FAMILIES:
        return None
    counts = callbacks.count(config, inputs) if callbacks else FAMILIES[config.model_type].count(config, inputs)
    return [projector.features_after(count) for count in counts]
