"""`MultimodalConfig`: the parts of a composition, one entry each, as JSON beside its tensors."""

from typing import Any

from transformers import PreTrainedConfig

from anygpt.composition import Composition
from anygpt.encoders.module import base_model
from anygpt.encoders.video import VideoEncoder
from anygpt.model.parts import KINDS, adapter_of, callback_dict, check_adapter, class_name, source_of

FORMAT_VERSION = 1
OF_DECODERS = ("modality", "num_signal_tokens", "hidden_layer", "signal", "defaults")
OF_TOKENIZERS = ("modality", "row_ends", "defaults")


class MultimodalConfig(PreTrainedConfig):
    """The parts of a composition and how they are connected.

    Attributes:
        encoders: `{key: {"modality", "class", "source", "fingerprint", "adapter", "additional_args", "callbacks",
            "saved_callbacks", "projector"}}`; `callbacks` names functions, which must be given again on loading.
        language_model: `{"class", "source", "fingerprint", "adapter"}`; also `"vocab_size"`, the number of rows of its
            matrices before signal tokens were written into them, if they were.
        decoders: `{key: {"modality", "class", "source", "fingerprint", "adapter", "num_signal_tokens",
            "hidden_layer", "signal", "defaults", "projector"}}`.
        tokenizers: `{key: {"modality", "class", "source", "fingerprint", "adapter", "row_ends", "defaults"}}`.
        encoder_keys, decoder_keys, tokenizer_keys: the keys in order; needed because transformers sorts dicts in JSON.
        token_ids: `{encoder key: placeholder id}`, or None for prepending.
        signal_token_ids: `{decoder or tokenizer key: ids}`, see `SignalTokens`.
        preprocess_llm_callback: the model's callback in saved form; True for a function, which must be given again.
        trained: `{"stage", "updates", "parts", "losses"}` of the run that trained it.

    `source` is a `Source` as a dict, or None for a part saved whole under `parts/`, whose `dtypes` then lists its
    tensors by dtype if there are several. `fingerprint` is a hash of the part's tensors; `adapter` says whether a PEFT
    adapter is saved under `adapters/`.
    """

    model_type = "anygpt"

    encoders: dict[str, dict[str, Any]] | None = None
    language_model: dict[str, Any] | None = None
    decoders: dict[str, dict[str, Any]] | None = None
    tokenizers: dict[str, dict[str, Any]] | None = None
    encoder_keys: list[str] | None = None
    decoder_keys: list[str] | None = None
    tokenizer_keys: list[str] | None = None
    token_ids: dict[str, int] | None = None
    signal_token_ids: dict[str, list[int]] | None = None
    preprocess_llm_callback: bool | dict[str, Any] = False
    trained: dict[str, Any] | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for kind in KINDS:
            entries = getattr(self, f"{kind}s") or {}
            keys = getattr(self, f"{kind}_keys") or list(entries)
            setattr(self, f"{kind}_keys", keys)
            setattr(self, f"{kind}s", {key: entries[key] for key in keys})
        self.language_model, self.signal_token_ids = self.language_model or {}, self.signal_token_ids or {}

    @classmethod
    def of(cls, model: Composition) -> "MultimodalConfig":
        """Describe a model's current state; saving adds the fingerprints."""
        callback = model.preprocess_llm_callback
        encoders = {
            key: _module(encoder, ("modality",))
            | {
                "additional_args": list(encoder.additional_args),
                "callbacks": encoder.own_functions,
                "saved_callbacks": callback_dict(encoder.callbacks),
            }
            for key, encoder in model.encoders.items()
        }
        return cls(
            encoders=encoders,
            language_model=_part(model.language_model),
            decoders={key: _module(decoder, OF_DECODERS) for key, decoder in model.decoders.items()},
            tokenizers={key: _module(one, OF_TOKENIZERS) for key, one in model.tokenizers.items()},
            token_ids=model.token_ids,
            signal_token_ids=model.signal_tokens.ids,
            preprocess_llm_callback=callback_dict(callback) or callback is not None,
            trained=model.config.trained,
            architectures=["MultimodalModel"],
        )

    @property
    def parts(self) -> dict[str, dict[str, Any]]:
        """The entries of the parts, named as in `part_modules`."""
        entries = {f"{key}_{kind}": entry for kind in KINDS for key, entry in getattr(self, f"{kind}s").items()}
        return {"language_model": self.language_model, **entries}


def _module(module: Any, names: tuple[str, ...]) -> dict[str, Any]:
    entry = _part(module.module) | {name: getattr(module, name) for name in names}
    projector = getattr(module, "projector", None)
    return entry if projector is None else entry | {"projector": projector.config.to_diff_dict()}


def _part(part: Any) -> dict[str, Any]:
    check_adapter(part)
    source = source_of(part)
    entry: dict[str, Any] = {"class": class_name(part), "source": source.to_dict() if source else None}
    entry["adapter"] = adapter_of(part) is not None
    if isinstance(base_model(part), VideoEncoder):
        entry |= {name: getattr(part.config, name) for name in VideoEncoder.settings}
    return entry
