"""Assembly of answers: run the decoders in batches on finished spans, and put text and media in order.

Shape legend: `anygpt.outputs`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anygpt.composition import Composition
from anygpt.errors import InputError
from anygpt.generation.events import (
    AnswerDone,
    Closed,
    DecodingStarted,
    DecodingStep,
    EventEmitter,
    MediumDone,
    end_where_all_are_closed,
)
from anygpt.outputs import Answer, Segment
from anygpt.tokenizers.module import ModalTokenizerModule


@dataclass
class SpanStates:
    """The output projector's input for one finished span, or its codes."""

    row: int
    start: int  # index of its first token in the answer
    key: str  # of a decoder or tokenizer
    states: Tensor  # `(N, H)`, states plus token embeddings; or codes `(n,)` int64
    place: int = 0  # among the key's spans of this row
    index: int = 0  # among those of all rows


def assemble(
    model: Composition,
    sequences: Tensor,
    spans: list[SpanStates],
    decoder_kwargs: Mapping[str, Mapping[str, Any]],
    emitters: Sequence[EventEmitter] = (),
    references: Mapping[str, Sequence[Any]] | None = None,
) -> list[Answer]:
    """Run each decoder once, batched over its spans, and put text and media in order.

    A decoder that edits runs once for the first medium of each answer, then for the second, which edits the first, and
    so on; rows without a reference run separately.

    `sequences` `(B, new tokens)` contain the `spans`; `decoder_kwargs` are already checked; there is one emitter per
    row, or none at all. Closed rows get no media. `references` are those of `generate`.
    """
    media: dict[tuple[int, int], Segment] = {}
    for key in model.makers:
        found = sorted((span for span in spans if span.key == key), key=lambda span: (span.row, span.start))
        rows = [span.row for span in found]
        for index, span in enumerate(found):
            span.place, span.index = index - rows.index(span.row), index
        wanted = [span for span in found if not (emitters and emitters[span.row].closed)]
        decoder, last = model.makers[key], dict(enumerate((references or {}).get(key, ())))
        options = decoder_kwargs.get(key, {})
        draws = not isinstance(decoder, ModalTokenizerModule)
        edits = draws and decoder.edits(options)

        def turn(span: SpanStates) -> tuple[int, bool]:
            return (span.place, last.get(span.row) is None) if edits else (0, True)  # noqa: B023  # used at once

        while wanted:
            first = min(map(turn, wanted))
            now, wanted = ([span for span in wanted if (turn(span) == first) is this] for this in (True, False))
            shown = None if first[1] else [last[span.row] for span in now]
            own = _options_of(now, key, options, len(found)) if draws else options
            made = _decode_media(model, key, now, own, emitters, shown)
            media |= made
            last |= {row: segment.content for (row, _), segment in made.items()}
    answers = [_in_order(model, ids, row, media) for row, ids in enumerate(sequences.tolist())]
    for emitter, answer in zip(emitters, answers, strict=False):
        emitter.emit(AnswerDone, answer)
    end_where_all_are_closed(emitters)
    return answers


def _options_of(spans: list[SpanStates], key: str, options: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The options for these spans; options given as one per medium, `count` in all, are reduced to them."""
    own, places = dict(options), [span.index for span in spans]
    for name in ("generator", "negative_condition"):
        given = own.get(name)
        if given is None or isinstance(given, torch.Generator):
            continue
        if len(given) != count:
            raise InputError(f"{name} of {key} holds {len(given)} for {count} media; give one each, or one for all")
        own[name] = [given[place] for place in places] if isinstance(given, list) else given[places]
    return own


def _decode_media(
    model: Composition,
    key: str,
    spans: list[SpanStates],
    options: Mapping[str, Any],
    emitters: Sequence[EventEmitter],
    reference: list[Any] | None,
) -> dict[tuple[int, int], Segment]:
    """Generate the media of one decoder, `{(row, start of span): segment}`, from its spans in order; `reference` is one
    medium each to edit, or None."""
    decoder = model.makers[key]
    told = {span.row: emitters[span.row] for span in spans} if emitters else {}
    for row, emitter in told.items():
        emitter.emit(DecodingStarted, key, tuple(emitter.segments[s.start] for s in spans if s.row == row))

    def on_step(step: int, steps: int) -> None:
        for emitter in told.values():
            emitter.emit(DecodingStep, key, step, steps)
        end_where_all_are_closed(list(told.values()))

    stacked = torch.stack([span.states for span in spans])
    media = {}
    if isinstance(decoder, ModalTokenizerModule):
        contents = decoder.module.decode(stacked)
        segments = [
            Segment(decoder.modality, one, key, codes=span.states) for one, span in zip(contents, spans, strict=True)
        ]
    else:
        options = decoder.options(options)
        if isinstance(seed := options.get("seed"), (list, tuple)):
            options["seed"] = [seed[span.row] for span in spans]
        arguments = decoder.module.sampling_arguments(options, [span.place for span in spans])
        arguments |= {"reference": reference, "on_step": on_step if told else None}
        condition = decoder.condition(stacked)
        try:
            contents = decoder.module.sample(condition, **arguments)
        except Closed:  # all rows of this decoder are closed, but other rows may be open
            return {}
        finally:
            # Releases memory held by diffusers' offloading, also if a stream was closed midway.
            decoder.module.pipeline.maybe_free_model_hooks()
        made = zip(spans, contents, condition.embeds, strict=True)
        segments = [Segment(decoder.modality, one, key, embeds, span.states) for span, one, embeds in made]
    for span, segment in zip(spans, segments, strict=True):
        segment.rate = decoder.module.rate
        media[span.row, span.start] = segment
        if emitter := told.get(span.row):
            emitter.emit(MediumDone, emitter.segments[span.start], segment)
    return media


def _in_order(model: Composition, ids: list[int], row: int, media: Mapping[tuple[int, int], Segment]) -> Answer:
    answer, position = Answer(undecoded=model.tokenizer is None), 0
    for start in [*sorted(start for one, start in media if one == row), len(ids)]:
        if said := text_of(model, ids[position:start], position > 0):
            answer.segments.append(Segment("text", said))
        if segment := media.get((row, start)):
            answer.segments.append(segment)
            position = start + len(model.signal_tokens.spans[segment.key])
    return answer


def text_of(model: Composition, ids: list[int], continued: bool = False) -> str:
    """Decode ids without special tokens; empty if the model has no tokenizer.

    `continued`: they follow other ids. Llama's tokenizers drop a text's first space, so a letter is put before it.
    """
    if model.tokenizer is None:
        return ""
    before = model.tokenizer("a", add_special_tokens=False)["input_ids"] if continued else []
    decode = partial(model.tokenizer.decode, skip_special_tokens=True)
    return decode(before + ids)[len(decode(before)) :]
