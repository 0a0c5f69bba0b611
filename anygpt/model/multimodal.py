"""`MultimodalModel`: encoders, input projectors, language model, signal tokens, output projectors, decoders.

Shape legend: `anygpt.outputs`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from anygpt.composition import Composition, Reader, Reading, lowest_layers
from anygpt.decoders.module import ModalDecoderModule
from anygpt.encoders.module import ModalEncoderModule, base_model
from anygpt.errors import InputError
from anygpt.generation.checks import check_request
from anygpt.generation.decoding import generate
from anygpt.generation.events import generate_stream
from anygpt.losses.formulas import LossWeights, hide_conditions, weighted_total
from anygpt.losses.terms import compute_losses, count_losses, find_losses, loss_names
from anygpt.model import freezing, loading, saving
from anygpt.model.configuration import MultimodalConfig
from anygpt.model.language_models import check_causal
from anygpt.model.packing import read_packed
from anygpt.model.vlm import take_apart
from anygpt.outputs import MultimodalOutput
from anygpt.sequence import signal_tokens
from anygpt.sequence.merging import Merged
from anygpt.sequence.signal_tokens import SignalTokens, Spans, Tap
from anygpt.tokenizers.base import MediaTokenizer
from anygpt.tokenizers.module import ModalTokenizerModule


class MultimodalModel(Composition):
    """Any encoders, any causal language model and any diffusion decoders as one model.

    Args:
        encoders: input modules by key, in the order in which features are prepended.
        language_model: a transformers causal language model, or a `PeftModel` around one.
        decoders: output modules by key.
        tokenizers: media tokenizers by key: media that the language model reads and writes as codes.
        preprocess_llm_callback: its parameters name what it gets among the language model's arguments, `input_ids`,
            `token_ids` and encoder inputs; it returns a dict of language model arguments to add or replace.
        init_projector_type, init_activation: for encoders given without a projector.
        init_output_projector_type: for decoders given without a projector.

    Attributes:
        <key>_encoder, <key>_decoder, <key>_tokenizer, language_model, signal_tokens: the parts.
        loss_weights: weights of the loss terms.
        pack_to: length in tokens of the sequences into which rows are packed for the language model; None to not pack.
        tokenizer: set by `MultimodalProcessor(model=…)` and `from_pretrained`; generation decodes text with it.

    Raises:
        InputError: a language model without a head, a projector that does not fit the sizes on its two sides, or a
            tokenizer with another part's key.
    """

    config_class = MultimodalConfig
    main_input_name = "input_ids"

    generate = generate
    generate_stream = generate_stream
    check_request = check_request
    count_losses = count_losses
    loss_names = loss_names
    parts = property(freezing.parts_of)
    part_parameters = freezing.part_parameters
    train_only = freezing.train_only
    trainable_names = freezing.trainable_names
    summarize_parts = freezing.summarize_parts
    touch_trainable = freezing.touch_trainable
    gradient_checkpointing_enable = freezing.gradient_checkpointing_enable
    save_pretrained = saving.save_pretrained
    push_to_hub = saving.push_to_hub
    from_pretrained = classmethod(loading.from_pretrained)  # type: ignore[var-annotated]
    own_tensors = loading.own_tensors

    def __init__(
        self,
        encoders: Mapping[str, ModalEncoderModule],
        language_model: PreTrainedModel,
        decoders: Mapping[str, ModalDecoderModule] | None = None,
        tokenizers: Mapping[str, ModalTokenizerModule | MediaTokenizer] | None = None,
        *,
        preprocess_llm_callback: Callable[..., dict[str, Any]] | None = None,
        init_projector_type: str = "linear",
        init_activation: str = "gelu",
        init_output_projector_type: str = "transformer",
    ):
        super().__init__(MultimodalConfig())
        decoders, tokenizers = decoders or {}, tokenizers or {}
        tokenizers = {
            key: ModalTokenizerModule(one) if isinstance(one, MediaTokenizer) else one
            for key, one in tokenizers.items()
        }
        other = [key for key in decoders if decoders[key].signal != "codes"]
        if both := sorted(set(tokenizers) & {*encoders, *other}):
            raise InputError(
                f"{', '.join(both)} is both a tokenizer and an encoder or decoder; rename one, or give the "
                "decoder signal='codes', with which it reads the tokenizer's codes"
            )
        embedding, head = language_model.get_input_embeddings(), language_model.get_output_embeddings()
        if head is None:
            raise InputError(
                f"{type(language_model).__name__} has no language-model head; give a causal language model "
                "(AutoModelForCausalLM)"
            )
        check_causal(language_model)
        self.encoder_keys, self.decoder_keys, self.tokenizer_keys = map(tuple, (encoders, decoders, tokenizers))
        for key, encoder in encoders.items():
            encoder.modality = encoder.modality or key
            encoder.init_projector(embedding.weight.shape[1], init_projector_type, init_activation)
            self.add_module(f"{key}_encoder", encoder)
        self.language_model = language_model
        for key, decoder in decoders.items():
            num_layers = base_model(language_model).config.get_text_config().num_hidden_layers
            if decoder.signal == "codes":
                decoder.read_codes_of(key, tokenizers.get(key))
            decoder.init_projector(head.weight.shape[1], num_layers, init_output_projector_type)
            self.add_module(f"{key}_decoder", decoder)
        counts = {key: decoders[key].num_signal_tokens for key in other}
        signals = {key: decoder.signal for key, decoder in decoders.items()}
        for key, one in tokenizers.items():
            self.add_module(f"{key}_tokenizer", one)
        grids = {key: tokenizer.grid() for key, tokenizer in self.tokenizers.items()}
        self.signal_tokens = SignalTokens(counts, embedding, head, signals, grids)
        self.preprocess_llm_callback = preprocess_llm_callback
        self.loss_weights = LossWeights()
        self.pack_to: int | None = None
        self.token_ids: dict[str, int] | None = None
        self.tokenizer = None
        self.frozen = {  # `DiffusionDecoder` and `MediaTokenizer` freeze their networks by default
            part
            for part in self.parts
            if part.endswith(("_decoder", "_denoiser", "_tokenizer"))
            and not any(p.requires_grad for p in self.part_parameters(part))
        }
        self.config = MultimodalConfig.of(self)

    def resize_token_embeddings(self, *_: Any, **__: Any) -> nn.Module:
        """Raise an `InputError`: new tokens have rows in `SignalTokens`, outside the language model's matrices."""
        raise InputError(
            "the language model's matrices stay as they are: new tokens have rows of their own; to add others, call "
            "resize_token_embeddings on the language model before it is composed"
        )

    @classmethod
    def can_generate(cls) -> bool:
        return True

    @classmethod
    def from_pretrained_multimodal_model(
        cls,
        model: str | Path | PreTrainedModel,
        decoders: Mapping[str, ModalDecoderModule] | None = None,
        **loading_options: Any,
    ) -> MultimodalModel:
        """Compose the parts of an existing multimodal model, with the same placeholders and the same logits.

        Arguments and errors as in `take_apart`; `decoders` are added.
        """
        encoder, language_model, placeholder, callback = take_apart(model, **loading_options)
        composed = cls({encoder.modality: encoder}, language_model, decoders, preprocess_llm_callback=callback)
        composed.set_token_ids({encoder.modality: placeholder})
        return composed.train(language_model.training)

    def train(self, part: str | bool = True, mode: bool = True) -> MultimodalModel:
        """Unfreeze (`mode=False`: freeze) a part by name; with a bool or no argument, set torch's training mode.

        Unfreezing a PEFT-wrapped part trains its adapters, not its base.

        Raises:
            InputError: unknown part; lists the known ones.
        """
        if isinstance(part, str):
            freezing.train_part(self, part, mode)
        else:
            super().train(part)
            freezing.keep_frozen(self)
        return self

    # ------------------------------------------------------------------------------------------------- the figure

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        decoder_targets: Mapping[str, Mapping[str, Any]] | None = None,
        items_per_row: Mapping[str, list[int]] | None = None,
        return_logits: bool | None = None,
        loss_counts: Mapping[str, int] | None = None,
        generators: Mapping[str, list[torch.Generator]] | None = None,
        text_states: Reader | None = None,
        references: Any = None,
        **encoder_inputs: Any,
    ) -> MultimodalOutput:
        """Compute logits, conditions and losses from text and media.

        Args:
            input_ids: `(B, S)` int64, with one placeholder per feature if token ids are set.
            attention_mask: `(B, S)`, padded on either side; ones by default.
            labels: `(B, S)` int64, not shifted, `-100` where no loss is taken.
            decoder_targets: `{decoder key: {"captions": [str], "media": tensor}}` in the order of the batch's signal
                spans. Without captions there is no alignment, without media no denoising. `"conditions"` of the
                decoder's `encode_text` may replace captions, and its `"posterior"`, `(K, 2, C, …)`, the media. A
                decoder that edits may have `"references"`, like the media, with zeros for none.
            items_per_row: `{encoder key: inputs of each row}`, for prepending where rows differ.
            return_logits: return full logits `(B, S, V')`; by default only if there are no labels.
            loss_counts: denominators by term instead of this batch's own (see `losses.formulas.weighted_total`).
            generators: `{decoder key: one generator per target}`, for posterior samples, timesteps and noise.
            references: an argument of `generate`, ignored here: targets have their own.
            text_states: replaces the language model, as `cache.TextStates` does; gives no full logits or hidden states.
            encoder_inputs: encoders' arguments, by bare name (`pixel_values`) if only one encoder takes it, or as
                `<key>.<name>`; `<key>.features` replaces all others of an encoder (see `ModalEncoderModule.encode`).
                A tokenizer's are `<key>.media` or `<key>.codes`, for all its media in the batch.

        Raises:
            InputError: an input that no encoder or several encoders take; numbers of placeholders and features, or of
                spans and targets, that differ; `text_states` with `return_logits`.
        """
        full = labels is None if return_logits is None else return_logits
        with self.signal_tokens.attached(self.language_model) as tap:
            needed, media = full or self.loss_weights.wants_language_model, self.trained_media(encoder_inputs)
            input_ids, labels, encoder_inputs = self.write_codes(input_ids, labels, encoder_inputs, needed)
            attention_mask = hide_conditions(self, input_ids, attention_mask, labels, generators)
            features = self.encode(encoder_inputs)
            text = self.embed(input_ids, attention_mask, labels)
            merged = self.merge(text, features, items_per_row)
            batch = find_losses(self, merged, decoder_targets, media)
            tap.select, tap.most = None if full else batch.nll, signal_tokens.CHUNK
            read = text_states or MultimodalModel.read
            reading = read(self, merged, batch.spans, tap, encoder_inputs) if needed else Reading()
        conditions = {key: self.decoders[key].condition(states) for key, states in reading.states.items()}
        losses = compute_losses(self, batch, reading, conditions, generators)
        loss = weighted_total(losses, self.loss_weights, loss_counts)
        if loss is not None and self.training and torch.distributed.is_initialized():
            loss = loss + self.touch_trainable()
        return MultimodalOutput(
            loss=loss,
            losses=losses,
            logits=reading.logits if full else None,
            hidden_states=reading.hidden,
            conditions={key: condition.embeds for key, condition in conditions.items()},
            labels=merged.labels,
            attention_mask=merged.attention_mask,
            places=reading.places,
        )

    def read(self, merged: Merged, spans: Mapping[str, Spans], tap: Tap, encoder_inputs: Mapping[str, Any]) -> Reading:
        """`Composition.read`, with the rows packed if `pack_to` is set."""
        if self.pack_to is None:
            return super().read(merged, spans, tap, encoder_inputs)
        return read_packed(self, merged, spans, tap, encoder_inputs, self.pack_to)

    @torch.no_grad()
    def read_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        text_states: Reader | None = None,
        **inputs: Any,
    ) -> dict[str, Tensor]:
        """The output projectors' inputs for a batch, `{decoder key: (K, N, H)}`; arguments as in `forward`."""
        unused = ("decoder_targets", "references")
        inputs = {name: value for name, value in inputs.items() if name not in unused}
        with lowest_layers(self), self.signal_tokens.attached(self.language_model) as tap:
            input_ids, labels, inputs = self.write_codes(input_ids, labels, inputs)
            merged = self.merge(self.embed(input_ids, attention_mask, labels), self.encode(inputs))
            batch = find_losses(self, merged)
            tap.select, tap.most = batch.nll, 0
            read = text_states or MultimodalModel.read
            return read(self, merged, batch.spans, tap, inputs).states
