"""`MultimodalConfig`: the parts of a composition, one entry each, as JSON beside its tensors."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from anygpt.composition import Composition
from anygpt.encoders.module import base_model
from anygpt.encoders.video import VideoEncoder
from anygpt.model.parts import callback_dict, class_name, is_peft, source_dict, source_of

FORMAT_VERSION = 1


class MultimodalConfig(PreTrainedConfig):
    """The parts of a composition and how they are connected.

    Attributes:
        encoders: `{key: {"modality", "class", "source", "fingerprint", "adapter", "additional_args", "callbacks",
            "saved_callbacks", "projector"}}`; `callbacks` names functions, which must be given again on loading.
        language_model: `{"class", "source", "fingerprint", "adapter"}`, and `"vocab_size"`, the number of rows before
            signal tokens were written into its matrices, where they were.
        decoders: `{key: {"modality", "class", "source", "fingerprint", "num_signal_tokens", "hidden_layer",
            "signal", "defaults", "projector"}}`.
        encoder_keys, decoder_keys: the keys in order.
        token_ids: `{encoder key: placeholder id}`, or None for prepending.
        signal_token_ids: `{decoder key: ids}`.
        preprocess_llm_callback: the saved form of the model's; True for a function, which must be given again.
        trained: `{"stage", "updates", "parts", "losses"}` of the run that trained it.

    `source` is `{path, revision, dtype, …}` (`anygpt.model.parts.Source`), or None for a part saved whole under
    `parts/`, whose `dtypes` then lists its tensors by dtype if there are several. `fingerprint` is a hash of the part's
    tensors; `adapter` says whether a PEFT adapter is saved under `adapters/`.
    """

    model_type = "anygpt"

    def __init__(
        self,
        encoders: dict[str, dict[str, Any]] | None = None,
        language_model: dict[str, Any] | None = None,
        decoders: dict[str, dict[str, Any]] | None = None,
        encoder_keys: list[str] | None = None,
        decoder_keys: list[str] | None = None,
        token_ids: dict[str, int] | None = None,
        signal_token_ids: dict[str, list[int]] | None = None,
        preprocess_llm_callback: bool | dict[str, Any] = False,
        trained: dict[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        # transformers sorts a config's keys when it writes them, but features are prepended in the encoders' order
        self.encoder_keys = encoder_keys or list(encoders or {})
        self.decoder_keys = decoder_keys or list(decoders or {})
        self.encoders = {key: encoders[key] for key in self.encoder_keys}
        self.language_model = language_model or {}
        self.decoders = {key: decoders[key] for key in self.decoder_keys}
        self.token_ids = token_ids
        self.signal_token_ids = signal_token_ids or {}
        self.preprocess_llm_callback = preprocess_llm_callback
        self.trained = trained
        self.format_version = format_version

    @classmethod
    def of(cls, model: Composition) -> MultimodalConfig:
        """Describe a model's current state; saving adds the fingerprints."""
        callback = model.preprocess_llm_callback
        encoders = {
            key: {
                "modality": encoder.modality,
                **_part(encoder.module),
                "additional_args": list(encoder.additional_args),
                "callbacks": encoder.own_functions,
                "saved_callbacks": callback_dict(encoder.callbacks),
                "projector": encoder.projector.config.to_diff_dict(),
            }
            for key, encoder in model.encoders.items()
        }
        decoders = {
            key: {
                "modality": decoder.modality,
                **_part(decoder.module),
                "num_signal_tokens": decoder.num_signal_tokens,
                "hidden_layer": decoder.hidden_layer,
                "signal": decoder.signal,
                "defaults": decoder.defaults,
                "projector": decoder.projector.config.to_diff_dict(),
            }
            for key, decoder in model.decoders.items()
        }
        return cls(
            encoders,
            _part(model.language_model),
            decoders,
            token_ids=model.token_ids,
            signal_token_ids=model.signal_tokens.ids,
            preprocess_llm_callback=callback_dict(callback) or callback is not None,
            trained=model.config.trained,
            architectures=["MultimodalModel"],
        )


def _part(part: Any) -> dict[str, Any]:
    entry = {"class": class_name(part), "source": source_dict(source_of(part)), "adapter": is_peft(part)}
    if not isinstance(base_model(part), VideoEncoder):
        return entry
    return entry | {name: getattr(part.config, name) for name in VideoEncoder.settings}
