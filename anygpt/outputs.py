"""Output containers, and the shape legend of the whole project.

Shape legend, used by every docstring and comment:

====  ==========================================================================
`B`   rows of a batch
`S`   sequence length after merging (text tokens and encoder features)
`N`   signal tokens of one span
`T`   condition tokens of a decoder
`D`   width of a decoder's condition
`H`   width of the language model
`P`   width of a pooled condition
`V`   size of the language model's own vocabulary
`K`   targets (signal spans) of one modality in a batch
====  ==========================================================================
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import ModelOutput

from anygpt.errors import InputError


class LossTerm(NamedTuple):
    """One sub-term of the loss: the sum over label tokens or samples (float32 scalar), and the number of summands.

    A mean of means over micro-batches or ranks is wrong as soon as their counts differ, so the division comes last.
    """

    total: Tensor
    count: int

    @property
    def mean(self) -> Tensor:
        """The local mean; zero if the count is zero."""
        return self.total / max(self.count, 1)


@dataclass
class MultimodalOutput(ModelOutput):
    """The output of `MultimodalModel.forward`.

    Attributes:
        loss: float32 scalar, the weighted sum of the terms, or None without labels and targets.
        losses: `{"<term>/<sub-term>[/<modality>]": LossTerm}`, each unweighted.
        logits: `(B, S, V')`, or None if labels are given without `return_logits`. `V'` is the smallest size that
            holds both the model's own vocabulary and the signal tokens.
        hidden_states: `(B, S, H)`, the inputs of the language model's head.
        conditions: `{decoder key: (K, T, D)}`, the projected conditions of the batch's signal spans.
        labels, attention_mask: `(B, S)` int64, after merging.
        places: number of tokens that the language model ran on, padding included.
    """

    loss: Tensor | None = None
    losses: dict[str, LossTerm] | None = None
    logits: Tensor | None = None
    hidden_states: Tensor | None = None
    conditions: dict[str, Any] | None = None
    labels: Tensor | None = None
    attention_mask: Tensor | None = None
    places: int | None = None


@dataclass
class Segment:
    """One piece of an answer.

    Attributes:
        type: `"text"`, or the modality of a decoder (`"image"`, `"video"`, `"audio"`).
        content: `str`; a `PIL.Image`; a video as uint8 `(frames, height, width, 3)`; a waveform as float32
            `(samples,)`.
        key: of the decoder that made it; None for text, as are the following.
        condition: `(T, D)`, the decoder's condition.
        states: `(N, H)`, the output projector's input: the sum of the language model's states and the token
            embeddings at the span.
        codes: `(n,)` int64, of a medium made by a tokenizer, which has neither.
        rate: samples (Hz) or frames per second; None for images too.
    """

    type: str
    content: Any
    key: str | None = None
    condition: Tensor | None = None
    states: Tensor | None = None
    rate: float | None = None
    codes: Tensor | None = None


@dataclass
class Answer:
    """One row of `MultimodalModel.generate`: its segments in the order of generation.

    `undecoded` says that the model has no tokenizer; `text` then raises an `InputError` instead of being empty.
    """

    segments: list[Segment] = field(default_factory=list)
    undecoded: bool = False

    def of(self, type: str) -> list[Any]:
        """The content of all segments of a type."""
        return [segment.content for segment in self.segments if segment.type == type]

    @property
    def text(self) -> str:
        if self.undecoded:
            raise InputError(
                "there is no text, as the model has no tokenizer: build MultimodalProcessor(model=model), or set "
                "model.tokenizer; the ids are in the output's sequences"
            )
        return "".join(self.of("text"))

    images = property(lambda self: self.of("image"))
    videos = property(lambda self: self.of("video"))
    audios = property(lambda self: self.of("audio"))


@dataclass
class GenerationOutput(ModelOutput):
    """The output of `MultimodalModel.generate`.

    Attributes:
        sequences: `(B, new tokens)` int64, right-padded with the pad token, without the prompt.
        answers: one `Answer` per row; `text`, `segments`, `images`, `videos` and `audios` list theirs.
        lengths: of the rows of `sequences` without padding; None for beam search.
    """

    sequences: torch.LongTensor | None = None
    answers: list[Answer] | None = None
    lengths: list[int] | None = None

    text = property(lambda self: [answer.text for answer in self.answers])
    segments = property(lambda self: [answer.segments for answer in self.answers])
    images = property(lambda self: [answer.images for answer in self.answers])
    videos = property(lambda self: [answer.videos for answer in self.answers])
    audios = property(lambda self: [answer.audios for answer in self.answers])
