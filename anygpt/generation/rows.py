"""One row of a batch that is answered: its tokens so far, and the choice of the next ones."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from anygpt.generation.codes import choose_code
from anygpt.generation.events import EventEmitter
from anygpt.generation.span_rules import SpanRules


@dataclass
class Row:
    """The answer of one row so far.

    Attributes:
        rules: constraints on its next token.
        emitter, generator: of its events and its draws; None for no events, and for torch's default generator.
        answer: its tokens.
        waiting, fed: chosen tokens that the language model has yet to read, and those that it reads now.
        running: whether another token will be chosen.
        begun: key, index in the answer, and states so far of the span that is read.
        left: what the places of the begun span of codes that follow may hold.
        codes: options of the tokenizers.
        coding: the key of the span of codes that the last tokens belong to.
        conditions: the keys of spans whose states condition a decoder.
    """

    rules: SpanRules
    emitter: EventEmitter | None = None
    generator: torch.Generator | None = None
    answer: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    fed: list[int] = field(default_factory=list)
    running: bool = True
    begun: tuple[str, int, list[Tensor]] | None = None
    left: list[Any] = field(default_factory=list)
    codes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    coding: str | None = None
    conditions: Collection[str] = ()

    def choose(
        self, score: Tensor, free: Tensor | None, process: Callable, stops: Callable, config: GenerationConfig
    ) -> None:
        """Choose the next token from its `(1, V')` scores, and whatever must follow: the whole span of a decoder.

        `free` are the scores `(V',)` of a code given its span alone, for guidance.
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
