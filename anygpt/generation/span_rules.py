"""Constraints on the next token of an answer: only whole spans, within the budget, and required ones included."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor

from anygpt.errors import InputError


@dataclass
class SpanRules:
    """Constraints on the next token, given the answer so far.

    Attributes:
        ids: `{decoder key: the N ids of its span}`.
        budget: maximal number of new tokens.
        require, forbid: decoders that every row must call at least once, and that no row may call.
        never: other tokens that are never generated: the encoders' placeholders.
    """

    ids: Mapping[str, list[int]]
    budget: int
    require: tuple[str, ...] = ()
    forbid: tuple[str, ...] = ()
    never: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.key_of_first = {span[0]: key for key, span in self.ids.items()}
        if both := sorted(set(self.require) & set(self.forbid)):
            raise InputError(f"{', '.join(both)} cannot be required and forbidden at once")
        if unknown := sorted(set(self.require) - set(self.ids)):
            raise InputError(
                f"{', '.join(unknown)} cannot be required, because the model does not know the signal tokens' ids; "
                "build the MultimodalProcessor with model=, or call model.signal_tokens.set_ids"
            )
        needed = sum(len(self.ids[key]) for key in self.require)
        if needed > self.budget:
            raise InputError(
                f"max_new_tokens={self.budget} has no room for the {needed} signal tokens of the required "
                f"{', '.join(self.require)}"
            )

    def missing(self, answer: list[int]) -> list[str]:
        """Required decoders that an answer has not called yet."""
        return [key for key in self.require if self.ids[key][0] not in answer]

    def room(self, answer: list[int]) -> int:
        """Tokens left beside the spans that are still required."""
        return self.budget - len(answer) - sum(len(self.ids[key]) for key in self.missing(answer))

    def banned(self, answer: list[int]) -> list[int]:
        """Tokens that may not come next: the inside of spans, and spans that are forbidden or exceed the budget."""
        missing, room = self.missing(answer), self.room(answer)
        banned = list(self.never)
        for key, span in self.ids.items():
            fits = key in missing or len(span) <= room
            banned += span[1:] if fits and key not in self.forbid else span
        return banned

    def forced(self, answer: list[int], token: int, ends: bool) -> int:
        """`token`, or the first token of a required span if the answer would otherwise end without it."""
        missing = self.missing(answer)
        if not missing or token in self.key_of_first:
            return token
        return self.ids[missing[0]][0] if ends or self.room(answer) < 1 else token


class SpanForcing(LogitsProcessor):
    """`SpanRules` as a logits processor for beam search, which also forces the tokens of a span one by one."""

    def __init__(self, rules: SpanRules, eos: list[int]):
        self.rules = rules
        self.eos = eos
        self.follows = {a: b for span in rules.ids.values() for a, b in itertools.pairwise(span)}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for row, answer in enumerate(input_ids.tolist()):
            last = answer[-1] if answer else None
            token = self.follows.get(last)
            if token is None:
                scores[row, self.rules.banned(answer)] = -torch.inf
                token = self.rules.forced(answer, -1, ends=False)
                if self.rules.missing(answer):
                    scores[row, self.eos] = -torch.inf
            if token >= 0:
                scores[row] = torch.full_like(scores[row], -torch.inf).index_fill_(0, input_ids.new_tensor([token]), 0)
        return scores
