"""Constraints on the next token of an answer: only whole spans, within the budget, and required ones included."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from anygpt.errors import InputError


@dataclass
class SpanRules:
    """Constraints on the next token, given the answer so far.

    Attributes:
        spans: `{key: what each place of its span may hold}`: an id or, of a tokenizer's codes, a range.
        budget: maximal number of new tokens.
        require, forbid: decoders that every row must call at least once, and that no row may call.
        never: other tokens that are never generated: the encoders' placeholders.
        unfree: `(tokens,)` int64, those and the insides of spans, which are not chosen freely.
    """

    spans: Mapping[str, Sequence[Any]]
    budget: int
    require: tuple[str, ...] = ()
    forbid: tuple[str, ...] = ()
    never: tuple[int, ...] = ()
    unfree: Tensor = field(init=False)

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
        """Tokens left beside the spans that are still required."""
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
