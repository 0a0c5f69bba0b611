"""The choice of an answer's next tokens: text, whole spans within the budget, including required ones, and codes.

Shape legend: `anygpt.outputs`.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from anygpt.composition import Composition
from anygpt.errors import InputError
from anygpt.generation.events import EventEmitter


@dataclass
class SpanRules:
    """Constraints on the next token, given the answer so far."""

    spans: Mapping[str, Sequence[Any]]  # what each position of a span may hold: an id or, for a tokenizer, a range
    budget: int  # maximal number of new tokens
    require: tuple[str, ...] = ()  # decoders that every row must call at least once
    forbid: tuple[str, ...] = ()  # decoders that no row may call
    never: tuple[int, ...] = ()  # other tokens that are never generated: the encoders' placeholders
    unfree: Tensor = field(init=False)  # `(tokens,)` int64: `never`, and the insides of spans

    def __post_init__(self) -> None:
        self.key_of_first = {span[0]: key for key, span in self.spans.items()}
        places = dict.fromkeys([*self.never, *(place for span in self.spans.values() for place in span[1:])])
        ranges = (place if isinstance(place, range) else range(place, place + 1) for place in places)
        self.unfree = torch.cat([torch.empty(0).long(), *(torch.arange(one.start, one.stop) for one in ranges)])
        if both := sorted(set(self.require) & set(self.forbid)):
            raise InputError(f"{', '.join(both)} cannot be required and forbidden at once")
        if unknown := sorted(set(self.require) - set(self.spans)):
            raise InputError(
                f"{', '.join(unknown)} cannot be required, because the model does not know the signal tokens' ids; "
                "build the MultimodalProcessor with model=, or call model.signal_tokens.set_ids"
            )
        needed = sum(len(self.spans[key]) for key in self.require)
        if needed > self.budget:
            raise InputError(
                f"max_new_tokens={self.budget} has no room for the {needed} signal tokens of the required "
                f"{', '.join(self.require)}"
            )

    def missing(self, answer: list[int]) -> list[str]:
        """Required decoders that an answer has not called yet."""
        return [key for key in self.require if self.spans[key][0] not in answer]

    def room(self, answer: list[int]) -> int:
        """Tokens left apart from the spans that are still required."""
        return self.budget - len(answer) - sum(len(self.spans[key]) for key in self.missing(answer))

    def ban(self, answer: list[int], scores: Tensor) -> None:
        """Exclude tokens that may not come next from scores `(…, V')`: `unfree`, and the first ones of spans that are
        forbidden or exceed the budget."""
        missing, room = self.missing(answer), self.room(answer)
        misfits = [
            span[0]
            for key, span in self.spans.items()
            if key in self.forbid or not (key in missing or len(span) <= room)
        ]
        for banned in (self.unfree.to(scores.device), misfits):
            scores[..., banned] = -torch.inf

    def forced(self, answer: list[int], token: int, ends: bool) -> int:
        """`token`, or the first token of a required span if the answer would otherwise end without it."""
        missing = self.missing(answer)
        if not missing or token in self.key_of_first:
            return token
        return self.spans[missing[0]][0] if ends or self.room(answer) < 1 else token


class SpanForcing(LogitsProcessor):
    """`SpanRules` as a logits processor for beam search, which also forces the tokens of a span one by one."""

    def __init__(self, rules: SpanRules, eos: list[int]):
        self.rules = rules
        self.eos = eos
        self.follows = {a: b for span in rules.spans.values() for a, b in itertools.pairwise(span)}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for row, answer in enumerate(input_ids.tolist()):
            last = answer[-1] if answer else None
            token = self.follows.get(last)
            if token is None:
                self.rules.ban(answer, scores[row])
                token = self.rules.forced(answer, -1, ends=False)
                if self.rules.missing(answer):
                    scores[row, self.eos] = -torch.inf
            if token >= 0:
                scores[row] = torch.full_like(scores[row], -torch.inf).index_fill_(0, input_ids.new_tensor([token]), 0)
        return scores


def code_options(
    model: Composition, decoder_kwargs: Mapping[str, Mapping[str, Any]], rows: int
) -> list[dict[str, dict[str, Any]]]:
    """Each row's options of the tokenizers, `{key: options}`, with its own `generator` if there are seeds."""
    options: list[dict[str, dict[str, Any]]] = [{} for _ in range(rows)]
    for key, tokenizer in model.tokenizers.items():
        given = decoder_kwargs.get(key, {})
        if key in model.decoder_keys:  # the options are the decoder's
            given = {name: value for name, value in given.items() if name in ("seed", "generator")}
        given = tokenizer.options(given)
        seeds, generators = (
            found if isinstance(found, (list, tuple)) else [found] * rows
            for found in (given.get("seed"), given.get("generator"))
        )
        for row, (own, seed) in enumerate(zip(options, seeds, strict=True)):
            # a decoder takes a list with one generator per medium, not per row
            generator = generators[row % len(generators)] if seed is None else torch.Generator().manual_seed(seed)
            own[key] = given | {"generator": generator}
    return options


def choose_code(logits: Tensor, free: Tensor | None, allowed: range, options: Mapping[str, Any]) -> int:
    """The next code's id, among those `allowed`, from its logits `(V',)` given all that precedes it and, for guidance,
    from those given only its span."""
    scores = logits[allowed.start : allowed.stop].log_softmax(dim=-1)
    if free is not None:
        base = free[allowed.start : allowed.stop].log_softmax(dim=-1)
        scores = base + options["guidance_scale"] * (scores - base)
    if options["temperature"] == 0:
        return allowed.start + int(scores.argmax())
    if 0 < options["top_k"] < len(scores):
        scores = scores.masked_fill(scores < scores.topk(options["top_k"]).values[-1], -torch.inf)
    generator = options["generator"]
    shares = (scores / options["temperature"]).softmax(dim=-1).to("cpu" if generator is None else generator.device)
    return allowed.start + int(torch.multinomial(shares, 1, generator=generator))


def spans_of_codes(model: Composition, answer: Sequence[int]) -> Iterator[tuple[int, str, Tensor]]:
    """Yield index, tokenizer key and codes `(n,)` of each whole span of codes in an answer."""
    for key in (key for key in model.tokenizer_keys if key not in model.decoder_keys):
        span, first = model.signal_tokens.spans.get(key), model.signal_tokens.ids.get(key, [0])[-1]
        for start, token in enumerate(answer):
            if span and token == span[0] and len(answer) >= start + len(span):
                pairs = zip(answer[start:], span, strict=False)
                yield start, key, torch.tensor([one - first for one, place in pairs if isinstance(place, range)])


@dataclass
class Row:
    """The answer of one row so far."""

    rules: SpanRules
    emitter: EventEmitter | None = None
    generator: torch.Generator | None = None  # of its draws; None for torch's default
    answer: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)  # chosen tokens that the language model has yet to read
    fed: list[int] = field(default_factory=list)  # those that it reads now
    running: bool = True  # whether another token will be chosen
    begun: tuple[str, int, list[Tensor]] | None = None  # key, index in the answer, and states so far of the span read
    left: list[Any] = field(default_factory=list)  # what the remaining positions of the begun span of codes may hold
    codes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # options of the tokenizers
    coding: str | None = None  # the key of the span of codes that the last tokens belong to
    conditions: Collection[str] = ()  # the keys of spans whose states condition a decoder

    def choose(
        self, score: Tensor, free: Tensor | None, process: Callable, stops: Callable, config: GenerationConfig
    ) -> None:
        """Choose the next token from its `(1, V')` scores, and what must follow it: the rest of a decoder's span.

        `free` are the scores `(V',)` of a code given only its span, for guidance.
        """
        rules, key = self.rules, None
        if self.left:
            options = self.codes[self.coding]
            new = [choose_code(score[0], free if options["guidance_scale"] != 1 else None, self.left.pop(0), options)]
        else:
            new = [self.choose_freely(score, process, config)]
            key = rules.key_of_first.get(new[0])
            self.left = list(rules.spans[key][1:]) if key else []
            self.coding = key if key in self.codes else None
        while self.left and not isinstance(self.left[0], range):
            new.append(self.left.pop(0))
        self.answer += new
        said = torch.tensor([self.answer], dtype=torch.long, device=score.device)
        self.running = bool(self.left) or (len(self.answer) < rules.budget and not bool(stops(said, None).any()))
        # A span that ends the answer is still fed, because its states condition the decoder.
        self.waiting = list(new) if self.running or (key or self.coding) in self.conditions else []
        if self.emitter is not None:
            if key or not self.coding:
                self.emitter.said(rules.spans[key] if key else new, key)
            if self.emitter.stopped:
                self.running, self.waiting = False, []
            if not self.running:
                self.emitter.end_text()
            if self.emitter.closed:
                self.running, self.waiting = False, []

    def choose_freely(self, score: Tensor, process: Callable, config: GenerationConfig) -> int:
        """Choose a token outside spans."""
        rules, said = self.rules, torch.tensor([self.answer], dtype=torch.long, device=score.device)
        rules.ban(self.answer, score)
        score = process(said, score)
        if config.do_sample:
            token = int(torch.multinomial(score.softmax(dim=-1), 1, generator=self.generator))
        else:
            token = int(score.argmax(dim=-1))
        eos = config._eos_token_tensor
        return rules.forced(self.answer, token, ends=eos is not None and token in eos.flatten().tolist())
