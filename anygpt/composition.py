"""`Composition`: the parts of a multimodal model, and the steps that `forward` and `generate` share.

Losses, generation, the cache and the processor are functions that take a composition; `MultimodalModel`, which uses
them, adds its constructor, `forward`, saving and loading. Shape legend: `anygpt.outputs`.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anygpt.decoders.module import ModalDecoderModule
from anygpt.encoders.module import ModalEncoderModule, argument_names
from anygpt.errors import InputError
from anygpt.sequence.merging import Merged, inject, prepend, without_right_padding
from anygpt.sequence.signal_tokens import SignalTokens, Spans, Tap
from anygpt.tokenizers.module import CODES, MEDIA, ModalTokenizerModule


@dataclass
class Reading:
    """The language model's outputs for a merged batch; empty if no loss needs them.

    Attributes:
        logits: `(B, S, V')`, or `(1, M, V')` at the positions that the tap selected.
        states: `{decoder key: (K, N, H)}`, the inputs of each output projector.
        hidden: `(B, S, H)`, the inputs of the language model's head.
        everywhere: whether `logits` covers all positions.
        places: number of positions that the model ran on, padding included; 0 if it did not run.
    """

    logits: Tensor | None = None
    states: dict[str, Tensor] = field(default_factory=dict)
    hidden: Tensor | None = None
    everywhere: bool = False
    places: int = 0


class Composition(PreTrainedModel):
    """Encoders, a language model with its signal tokens, decoders, and media tokenizers; see `MultimodalModel` for the
    attributes."""

    encoder_keys: tuple[str, ...]
    decoder_keys: tuple[str, ...]
    tokenizer_keys: tuple[str, ...]
    language_model: PreTrainedModel
    signal_tokens: SignalTokens
    loss_weights: Any
    token_ids: dict[str, int] | None
    tokenizer: PreTrainedTokenizerBase | None
    end_of_turn: int | None = None
    """The token with which the processor's chat template ends an answer."""
    preprocess_llm_callback: Any
    frozen: set[str]

    @property
    def encoders(self) -> dict[str, ModalEncoderModule]:
        """The input modules by key, in order; a new dict each time, so that no tensor is registered twice."""
        return {key: getattr(self, f"{key}_encoder") for key in self.encoder_keys}

    @property
    def decoders(self) -> dict[str, ModalDecoderModule]:
        """The output modules by key, in order; a new dict each time, so that no tensor is registered twice."""
        return {key: getattr(self, f"{key}_decoder") for key in self.decoder_keys}

    @property
    def tokenizers(self) -> dict[str, ModalTokenizerModule]:
        """The media tokenizers by key, in order; a new dict each time, so that no tensor is registered twice."""
        return {key: getattr(self, f"{key}_tokenizer") for key in self.tokenizer_keys}

    @property
    def readers(self) -> dict[str, ModalEncoderModule | ModalTokenizerModule]:
        """Whatever reads media, by key."""
        return self.encoders | self.tokenizers

    @property
    def makers(self) -> dict[str, ModalDecoderModule | ModalTokenizerModule]:
        """Whatever makes media, by key."""
        decoders, decode = self.decoders, {key: one for key, one in self.tokenizers.items() if one.module.can_decode}
        return decoders | {key: one for key, one in decode.items() if key not in decoders}

    @property
    def input_modalities(self) -> tuple[str, ...]:
        """Media types that the model reads, as transformers' any-to-any pipeline names them."""
        return ("text", *dict.fromkeys(reader.modality for reader in self.readers.values()))

    @property
    def output_modalities(self) -> tuple[str, ...]:
        """Media types that the model makes."""
        return ("text", *dict.fromkeys(maker.modality for maker in self.makers.values()))

    @property
    def device(self) -> torch.device:
        return self.language_model.get_input_embeddings().weight.device

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_token_ids(self, token_ids: Mapping[str, int] | None) -> None:
        """Inject features at the placeholder tokens `{encoder key: id}`, or prepend them if None.

        An unknown encoder, or one id for two encoders, is an `InputError`.
        """
        if token_ids is not None:
            if unknown := sorted(set(token_ids) - set(self.encoder_keys)):
                raise InputError(f"set_token_ids names {unknown}; the encoders are {list(self.encoder_keys)}")
            if len(set(token_ids.values())) != len(token_ids):
                raise InputError(f"every encoder needs a placeholder token of its own, got {dict(token_ids)}")
        self.token_ids = dict(token_ids) if token_ids is not None else None

    def assign_inputs(self, inputs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Sort keyword arguments by encoder: `<key>.<name>` goes to that encoder, a bare name to the one that takes it;
        an `InputError` if none or several do."""
        by_encoder: dict[str, dict[str, Any]] = {key: {} for key in self.encoder_keys}
        for full_name, value in inputs.items():
            if value is None:
                continue
            key, _, name = full_name.rpartition(".")
            takers = [k for k, encoder in self.encoders.items() if name in encoder.input_names and key in ("", k)]
            if not takers:
                known = ", ".join(f"{k}: {sorted(encoder.input_names)}" for k, encoder in self.encoders.items())
                raise InputError(
                    f"no encoder takes the input {full_name!r}; the encoders take {known or 'nothing: there are none'}"
                    ". Inputs that only a callback needs are named in ModalEncoderModule(additional_args=…)"
                )
            if len(takers) > 1:
                raise InputError(
                    f"the input {name!r} could go to {' or '.join(map(repr, takers))}; write it as "
                    f"{' or '.join(repr(f'{k}.{name}') for k in takers)}"
                )
            by_encoder[takers[0]][name] = value
        return by_encoder

    def encode(self, inputs: Mapping[str, Any]) -> dict[str, Tensor | list[Tensor]]:
        """Run the encoders that have inputs: `{key: (items, n, H) or packed (features, H)}`, in the encoders' order."""
        by_encoder = self.assign_inputs(inputs)
        return {key: encoder(by_encoder[key]) for key, encoder in self.encoders.items() if by_encoder[key]}

    def trained_media(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The inputs of tokenizers that train, by key."""
        given = {key: inputs.get(f"{key}.{MEDIA}") for key, one in self.tokenizers.items() if one.module.trains}
        return {key: media for key, media in given.items() if media is not None}

    def write_codes(
        self, input_ids: Tensor, labels: Tensor | None, inputs: Mapping[str, Any], needed: bool = True
    ) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        """Write the codes of the tokenizers' inputs, or any if not `needed`, into ids and labels; returns both and
        other inputs."""
        codes, others = {}, dict(inputs)
        for key, tokenizer in self.tokenizers.items():
            own = {name: value for name in (CODES, MEDIA) if (value := others.pop(f"{key}.{name}", None)) is not None}
            if own:
                low, media = self.signal_tokens.grids[key].bounds, next(iter(own.values()))
                codes[key] = tokenizer.codes(own) if needed else torch.tensor([[at for at, _ in low]] * len(media))
        return *self.signal_tokens.write_codes(input_ids, labels, codes), others

    def embed(self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> Merged:
        """Embed tokens, signal tokens included. Call inside `signal_tokens.attached`."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        embeds = self.language_model.get_input_embeddings()(input_ids)
        return Merged(embeds, input_ids, attention_mask, labels, torch.zeros(len(input_ids), dtype=torch.bool))

    def merge(
        self, text: Merged, features: Mapping[str, Any], items_per_row: Mapping[str, list[int]] | None = None
    ) -> Merged:
        """Insert features into the sequence: injected if token ids are set, else prepended."""
        if unknown := sorted(set(items_per_row or ()) - set(self.readers), key=str):
            raise InputError(f"items_per_row names {', '.join(map(repr, unknown))}; there are {list(self.readers)}")
        text.media_in = text.media_in.to(text.inputs_embeds.device)
        if self.token_ids is None:
            return prepend(text, features, items_per_row)
        return inject(text, features, self.token_ids)

    def read(self, merged: Merged, spans: Mapping[str, Spans], tap: Tap, encoder_inputs: Mapping[str, Any]) -> Reading:
        """Logits selected by `tap`, and the output projectors' inputs. Call inside `signal_tokens.attached`."""
        logits, all_states = self.run_language_model(merged, encoder_inputs)
        states = self.read_spans(merged, spans, tap.hidden, all_states)
        return Reading(logits, states, tap.hidden, tap.select is None, merged.input_ids.numel())

    def run_language_model(
        self, merged: Merged, encoder_inputs: Mapping[str, Any]
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Run the language model, its head only where `tap` selects. Call inside `signal_tokens.attached`.

        Returns logits, `(B, S, V')` or `(1, M, V')` at the selected positions; and the `(B, S, H)` states of all layers
        if a decoder reads others than the last.
        """
        arguments = {
            "inputs_embeds": merged.inputs_embeds,
            "attention_mask": merged.attention_mask,
            "position_ids": merged.position_ids,
            "use_cache": False,
            "output_hidden_states": any(decoder.needs_all_states for decoder in self.decoders.values()),
            "return_dict": True,
        }
        if "position_ids" not in argument_names(self.language_model):
            del arguments["position_ids"]
        arguments |= self.preprocess_llm(merged, encoder_inputs, arguments)
        arguments["attention_mask"] = without_right_padding(arguments["attention_mask"])
        output = self.language_model(**arguments)
        return output.logits, output.hidden_states if arguments["output_hidden_states"] else None

    def preprocess_llm(
        self, merged: Merged, encoder_inputs: Mapping[str, Any], arguments: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The language model arguments that `preprocess_llm_callback` adds or replaces."""
        if self.preprocess_llm_callback is None:
            return {}
        media = {name.rpartition(".")[2]: value for name, value in encoder_inputs.items()}
        known = {"input_ids": merged.input_ids, "token_ids": self.token_ids, **media, **arguments}
        wanted = inspect.signature(self.preprocess_llm_callback).parameters
        return self.preprocess_llm_callback(**{name: value for name, value in known.items() if name in wanted})

    def read_spans(
        self, merged: Merged, spans: Mapping[str, Spans], last: Tensor, all_states: tuple[Tensor, ...] | None
    ) -> dict[str, Tensor]:
        """Each output projector's input `(K, N, H)`: states at its spans plus the token embeddings there."""
        return {
            key: spans[key].gather(decoder.select_states(last, all_states)) + spans[key].gather(merged.inputs_embeds)
            for key, decoder in self.decoders.items()
            if key in spans and len(spans[key])
        }


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and at the end of the block back in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def lowest_layers(model: Composition) -> Iterator[None]:
    """Leave out the language model's layers above those whose states the decoders read.

    One more layer runs, since a language model normalizes the last state. Classes whose code asks the config for the
    number of layers once run that many of them; others, such as Gemma 3n or Jamba, need the number elsewhere, and run
    whole.
    """
    decoder, read = model.language_model.get_decoder(), [one.hidden_layer for one in model.decoders.values()]
    config, code = decoder.config, ""
    with suppress(OSError, TypeError):  # a class without a file
        code = inspect.getsource(type(decoder))
    layers, numbers = config.num_hidden_layers, [k for k in read if isinstance(k, int) and k >= 0]
    if code.count("self.config.num_hidden_layers") == 1 and len(numbers) == len(read):
        config.num_hidden_layers = min(layers, max(numbers, default=layers) + 1)
    try:
        yield
    finally:
        config.num_hidden_layers = layers


Reader = Callable[[Composition, Merged, Mapping[str, Spans], Tap, Mapping[str, Any]], Reading]
"""`Composition.read`, or a stand-in that returns cached states."""
