"""Generation of text, then of conditions at signal spans, then of media.

transformers' `generate` prepares the cache, logits processors and stopping criteria, and calls `SpanDecoder`, a
decoding loop for greedy search and sampling that runs a span in one forward over the cache. Beam search is
transformers' own, with spans forced token by token. Shape legend: `anygpt.outputs`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessorList
from transformers.cache_utils import DynamicLayer
from transformers.generation import GenerationMode

from anygpt.composition import Composition, evaluating
from anygpt.encoders.module import argument_names, base_model
from anygpt.errors import InputError
from anygpt.generation.answering import SpanStates, assemble, text_of
from anygpt.generation.checks import check_by_row, check_options, check_references, check_request
from anygpt.generation.choosing import Row, SpanForcing, SpanRules, code_options, spans_of_codes
from anygpt.generation.events import EventEmitter, Listener, end_where_all_are_closed
from anygpt.outputs import GenerationOutput
from anygpt.sequence.merging import Merged, pad_left
from anygpt.sequence.signal_tokens import Spans, Tap

OWN_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
BEAM_MODES = (GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)


@dataclass
class SpanDecoder:
    """The decoding loop that transformers' `generate(custom_generate=…)` calls, for greedy search and sampling."""

    model: Composition = field(repr=False)  # its signal tokens are attached to the language model
    tap: Tap  # records the states that the language model's head reads
    rows: list[Row]
    prompt: Mapping[str, Any] = field(default_factory=dict, repr=False)  # what the callback added to the first forward
    guided: bool = False  # whether each row has a copy in the batch that sees only its span of codes
    spans: list[SpanStates] = field(default_factory=list)  # the result

    @torch.no_grad()
    def __call__(
        self,
        language_model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: Callable,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor:
        """Decode until every row has stopped.

        Each step feeds a chunk, aligned right: one token of each row, or all tokens of a span for rows that begin one.
        Padding at the left is masked, so that rows do not depend on each other. It would take up room in
        a sliding window, so unless all layers have a plain `DynamicLayer` cache, spans are fed token by token.

        Returns:
            `(B, new tokens)` int64, padded on the right.
        """
        chunk, mask = model_kwargs["inputs_embeds"], model_kwargs.get("attention_mask")
        past_key_values = model_kwargs.get("past_key_values")
        # because transformers drops an all-ones mask
        mask = chunk.new_ones(chunk.shape[:2], dtype=torch.long) if mask is None else mask
        pad = generation_config._pad_token_tensor
        pad = 0 if pad is None else int(pad.flatten()[0])
        for processor in logits_processor:
            # the length of each prompt's padding, which is not in the answers that processors get here
            if isinstance(getattr(processor, "prompt_ignore_length", None), Tensor):
                processor.prompt_ignore_length = 0
        at_once = all(type(layer) is DynamicLayer for layer in past_key_values.layers)

        def padded(rows: list[list[int]], fill: int, side: str) -> Tensor:
            tensors = [torch.tensor(row, dtype=torch.long, device=chunk.device) for row in rows]
            return pad_sequence(tensors, batch_first=True, padding_value=fill, padding_side=side)

        if self.guided:
            chunk, mask = torch.cat([chunk, chunk]), torch.cat([mask, torch.zeros_like(mask)])
        while True:
            outputs = self.forward(language_model, chunk, mask, past_key_values)
            past_key_values = outputs.past_key_values
            self._collect(chunk, outputs.hidden_states)
            scores = outputs.logits[0].float()  # (B, V'): the head ran only on the last position of each row
            free = scores[len(self.rows) :] if self.guided else [None] * len(self.rows)
            for index, row in enumerate(self.rows):
                if row.running and not row.waiting:  # row by row, because spans make the rows' lengths differ
                    own = scores[index : index + 1], free[index]
                    row.choose(*own, logits_processor, stopping_criteria, generation_config)
            end_where_all_are_closed([row.emitter for row in self.rows if row.emitter is not None])
            for row in self.rows:
                count = len(row.waiting) if at_once else 1
                row.fed, row.waiting = row.waiting[:count], row.waiting[count:]
            fed = [row.fed for row in self.rows]
            if not any(fed):
                for index, row in enumerate(self.rows):
                    found = spans_of_codes(self.model, row.answer)
                    self.spans += [SpanStates(index, start, key, codes) for start, key, codes in found]
                return padded([row.answer for row in self.rows], pad, "right")
            chunk = language_model.get_input_embeddings()(padded(fed, pad, "left"))
            seen = padded([[1] * len(tokens) for tokens in fed], 0, "left")
            if self.guided:
                begins = [
                    bool(row.fed) and row.coding == row.rules.key_of_first.get(row.fed[0], "") for row in self.rows
                ]
                mask[len(fed) :][torch.tensor(begins)] = 0
                coding = torch.tensor([[row.coding is not None] for row in self.rows], device=seen.device)
                chunk, seen = torch.cat([chunk, chunk]), torch.cat([seen, seen * coding])
            mask = torch.cat([mask, seen], dim=1)

    def forward(self, language_model: Any, chunk: Tensor, mask: Tensor, past_key_values: Any) -> Any:
        """Run the language model on embeddings `(B, length, H)`, and its head on the last position of each row."""
        rows, length = chunk.shape[:2]
        last = torch.full((rows,), length - 1, device=chunk.device)
        self.tap.select = (torch.arange(rows, device=chunk.device), last)
        options = dict(self.prompt) if past_key_values.get_seq_length() == 0 else {}
        if "position_ids" in argument_names(language_model):
            options["position_ids"] = self._positions(mask, length)
        return language_model(
            inputs_embeds=chunk,
            attention_mask=mask,
            past_key_values=past_key_values,
            use_cache=True,
            output_hidden_states=any(decoder.needs_all_states for decoder in self.model.decoders.values()),
            return_dict=True,
            **options,
        )

    def _positions(self, mask: Tensor, length: int) -> Tensor:
        """Positions `(B, length)` of the newest tokens, or `(3, B, length)` if the prompt has M-RoPE positions."""
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -length:]
        prompt = self.prompt.get("position_ids")
        if prompt is None:
            return positions
        if mask.shape[1] == prompt.shape[-1]:
            return prompt
        # Under M-RoPE an image has fewer positions than tokens; text continues after the largest position of any axis.
        largest = prompt.amax(dim=-1).reshape(-1, len(mask)).amax(dim=0)
        shift = largest + 1 - mask[:, : prompt.shape[-1]].sum(dim=1)
        return (positions + shift[:, None]).expand(*prompt.shape[:-1], length)

    def _collect(self, chunk: Tensor, all_states: tuple[Tensor, ...] | None) -> None:
        """Collect the states of span tokens that the last forward ran."""
        for index, row in enumerate(self.rows):
            count = len(row.fed)
            key = row.rules.key_of_first.get(row.fed[0]) if count else None
            if key in self.model.decoder_keys:
                row.begun = (key, len(row.answer) - len(row.waiting) - count, [])
            if not count or row.begun is None:
                continue
            key, start, found = row.begun
            decoder = self.model.decoders[key]
            states = decoder.select_states(self.tap.hidden, all_states)[index, -count:]
            found.append(states + chunk[index, -count:])
            span = row.rules.spans[key]
            if sum(map(len, found)) == len(span):
                # without the trigger that precedes queries, and the tokens around codes
                read = [place for place, held in enumerate(span) if isinstance(held, range)]
                states = torch.cat(found)[read or slice(-decoder.num_signal_tokens, None)]
                self.spans.append(SpanStates(index, start, key, states))
                row.begun = None


@torch.no_grad()
def generate(
    model: Composition,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    items_per_row: Mapping[str, list[int]] | None = None,
    require: Iterable[str] = (),
    forbid: Iterable[str] = (),
    decoder_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    generation_config: GenerationConfig | None = None,
    on_event: Listener | None = None,
    stop: Sequence[str] = (),
    budgets: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    references: Mapping[str, Sequence[Any]] | None = None,
    **kwargs: Any,
) -> GenerationOutput:
    """Answer a batch of prompts with text and media.

    Args:
        input_ids, attention_mask: `(B, S)`, padded on either side.
        items_per_row: see `forward`.
        require: keys of decoders that every answer must call; missing calls are forced before the answer ends.
        forbid: keys of decoders that no answer may call.
        decoder_kwargs: `{decoder key: options}`: `num_inference_steps`, `guidance_scale`, `negative_prompt` (or
            `negative_condition`, see `sample`), `seed` (or `generator`), and the decoder's sizes: `height` and
            `width` (pixels), `num_frames`, `audio_length_in_s`. Missing options take the decoder's `defaults`, else the
            pipeline's. A `seed`, or a list with one per row, makes a row's media independent of the other rows. A
            tokenizer's options are those in `SAMPLING`, and `seed` or `generator`.
        generation_config: transformers' own; `max_new_tokens` and the like may also be given by name.
        on_event: called with each `Event` (see `generate_stream` for an iterator); not with beam search. If it raises
            `Closed`, the event's row ends; any other exception ends the generation.
        stop: texts that end a row's text (which still contains them; its events do not); not with beam search.
        budgets: maximal number of new tokens by row, in place of `max_new_tokens`; not with beam search.
        seeds: one per row, so that sampled text does not depend on the other rows; not with greedy or beam search.
        references: `{decoder key: [medium or None, one per row]}`: the last medium shown. Decoders that take references
            edit it, others start from it if their options have a `strength`; later media of an answer edit the
            previous one.
        kwargs: encoder inputs, as in `forward`, and generation options.

    Returns:
        The new tokens, and one `Answer` per row.

    Raises:
        InputError: an unknown decoder or option; a decoding mode other than greedy search, sampling and beam search;
            `on_event`, `stop`, `budgets`, `seeds` or codes with beam search.
        Closed: the listener has closed every row.
    """
    require, forbid = check_request(model, require, forbid, decoder_kwargs)
    references = references or {}
    check_references(model, references, len(input_ids))
    for key, given in (decoder_kwargs or {}).items():
        if isinstance(own := given.get("seed"), (list, tuple)) and len(own) != len(input_ids):
            raise InputError(f"{key} is given {len(own)} seeds for {len(input_ids)} rows; give one per row")
    names = {name for encoder in model.encoders.values() for name in encoder.input_names}
    inputs = {name: value for name, value in kwargs.items() if name in names or "." in name}
    left_out = {"labels", "decoder_targets", *inputs}  # the first two are for training
    options = {name: value for name, value in kwargs.items() if name not in left_out}
    config = copy.deepcopy(generation_config or base_model(model.language_model).generation_config)
    options = special_tokens(model, config) | options
    config.update(**options)
    given = {} if generation_config is None else generation_config.to_diff_dict()
    check_options(given | options, len(input_ids), stop, require)
    check_by_row("budgets", budgets, len(input_ids), 1)
    check_by_row("seeds", seeds, len(input_ids), 0)
    mode = config.get_generation_mode()
    if seeds is not None and mode == GenerationMode.GREEDY_SEARCH:
        raise InputError("seeds are for sampled text, and this is greedy search; set do_sample=True, or leave them out")
    if mode not in OWN_MODES + BEAM_MODES or (config.num_return_sequences or 1) > 1:
        raise InputError(
            f"generation mode {mode.value} with num_return_sequences={config.num_return_sequences} is not "
            "supported; use greedy search, sampling or beam search, one answer per row"
        )
    if mode in BEAM_MODES and (on_event or stop or budgets or seeds):
        raise InputError(
            f"on_event, stop, budgets and seeds are not for {mode.value}; leave them out, or set num_beams=1"
        )
    forbid = (*forbid, *(key for key in model.tokenizers if key not in model.makers))
    if mode in BEAM_MODES and (codes := sorted(set(model.tokenizers) - set(forbid))):
        raise InputError(f"beam search cannot generate codes; set num_beams=1, or forbid {', '.join(codes)}")
    sampling = code_options(model, decoder_kwargs or {}, len(input_ids))
    types, decode = {key: maker.modality for key, maker in model.makers.items()}, partial(text_of, model)
    listener, count = on_event or (lambda event: None), len(input_ids) if on_event or stop else 0
    emitters = [EventEmitter(listener, decode, types, row, stop) for row in range(count)]
    budget = config.max_new_tokens
    if budget is None:
        raise InputError("max_new_tokens is not set; give the maximum tokens of an answer, signal tokens included")
    size = max(model.language_model.get_output_embeddings().weight.shape[0], model.signal_tokens.vocabulary)
    placeholders = tuple(i for i in (model.token_ids or {}).values() if i < size)  # others have no logits
    rules = SpanRules(model.signal_tokens.spans, budget, require, forbid, placeholders)
    if generation_config is not None:
        options["generation_config"] = generation_config
    with evaluating(model):
        with model.signal_tokens.attached(model.language_model) as tap:
            input_ids, _, inputs = model.write_codes(input_ids, None, inputs)
            merged = model.merge(model.embed(input_ids, attention_mask, None), model.encode(inputs), items_per_row)
            merged = pad_left(merged)
            prompt = {"inputs_embeds": merged.inputs_embeds, "attention_mask": merged.attention_mask}
            added = model.preprocess_llm(merged, inputs, prompt)
            lengths = None
            if mode in OWN_MODES:
                rows = [Row(replace(rules, budget=own)) for own in budgets or [budget] * len(input_ids)]
                for index, row in enumerate(rows):
                    row.emitter, row.codes = emitters[index] if emitters else None, sampling[index]
                    row.conditions = model.decoder_keys
                    row.generator = (
                        torch.Generator(merged.inputs_embeds.device).manual_seed(seeds[index]) if seeds else None
                    )
                guided = any(own["guidance_scale"] != 1 for row in sampling for own in row.values())
                decoder = SpanDecoder(model, tap, rows, added, guided)
                sequences = model.language_model.generate(**prompt | added, custom_generate=decoder, **options)
                spans, lengths = decoder.spans, [len(row.answer) for row in rows]
            else:
                options |= prompt | added
                sequences, spans = _decode_with_beams(model, merged, inputs, tap, rules, options)
        answers = assemble(model, sequences, spans, decoder_kwargs or {}, emitters, references)
        return GenerationOutput(sequences=sequences, answers=answers, lengths=lengths)


def _decode_with_beams(
    model: Composition, merged: Merged, inputs: Mapping[str, Any], tap: Tap, rules: SpanRules, options: dict[str, Any]
) -> tuple[Tensor, list[SpanStates]]:
    """Run transformers' beam search with `SpanForcing`, then one forward over the result for the spans' states."""
    eos = options.get("eos_token_id")
    eos = list(eos) if isinstance(eos, (list, tuple)) else [] if eos is None else [eos]
    processors = LogitsProcessorList([*(options.pop("logits_processor", None) or []), SpanForcing(rules, eos)])
    sequences = model.language_model.generate(logits_processor=processors, **options)
    embeds = model.language_model.get_input_embeddings()(sequences)
    whole = Merged(
        torch.cat([merged.inputs_embeds, embeds], dim=1),
        torch.cat([merged.input_ids, sequences], dim=1),
        torch.cat([merged.attention_mask, torch.ones_like(sequences)], dim=1),
        None,
        merged.media_in,
    )
    tap.select = (torch.zeros(0, dtype=torch.long, device=sequences.device),) * 2  # no logits
    _, all_states = model.run_language_model(whole, inputs)
    prompt = merged.input_ids.shape[1]
    found = {key: model.signal_tokens.find_spans(sequences, key) for key in model.decoders}
    shifted = {key: Spans(span.rows, span.positions + prompt) for key, span in found.items()}
    spans = []
    for key, states in model.read_spans(whole, shifted, tap.hidden, all_states).items():
        ends = (found[key].positions[:, -1] + 1).tolist()  # the positions read are the last of the span
        length = len(model.signal_tokens.ids[key])
        for row, end, state in zip(found[key].rows.tolist(), ends, states, strict=True):
            spans.append(SpanStates(row, end - length, key, state))
    return sequences, spans


def special_tokens(model: Composition, config: GenerationConfig) -> dict[str, Any]:
    """End and padding tokens: from the generation config, else the language model's own, else the tokenizer. The token
    with which the chat template ends a turn is added, since base models in ChatML have another end token."""

    def first(name: str) -> Any:
        sources = (config, base_model(model.language_model).generation_config, model.tokenizer)
        return next((value for source in sources if (value := getattr(source, name, None)) is not None), None)

    ends, pad = first("eos_token_id"), first("pad_token_id")
    if ends is None:
        return {} if pad is None else {"pad_token_id": pad}
    ends = [*ends] if isinstance(ends, (list, tuple)) else [ends]
    if model.end_of_turn not in (None, *ends):
        ends.append(model.end_of_turn)
    return {"eos_token_id": ends, "pad_token_id": ends[0] if pad is None else pad}
