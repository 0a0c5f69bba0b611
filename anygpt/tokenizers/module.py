"""`ModalTokenizerModule`: a media tokenizer as one modality of a language model that reads and writes its codes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from anygpt.decoders.options import MediaMaker, Rule, are_seeds, check_options, is_integer, is_number
from anygpt.errors import InputError
from anygpt.sequence.signal_tokens import Grid
from anygpt.tokenizers.base import MediaTokenizer

MEDIA, CODES = "media", "codes"
"""Inputs of a tokenizer, `<key>.media` from its `targets` or `<key>.codes`."""
SAMPLING = {"guidance_scale": 1.0, "temperature": 1.0, "top_k": 0}
"""Options of generation and their defaults: no guidance, and codes drawn from the model's own probabilities."""
OPTIONS: dict[str, Rule] = {
    "guidance_scale": (is_number, "a finite number"),
    "temperature": (lambda value: is_number(value) and value >= 0, "a number from 0"),
    "top_k": (lambda value: is_integer(value) and value >= 0, "a whole number from 0"),
    "seed": (are_seeds, "whole numbers from 0"),
    "generator": (lambda value: isinstance(value, torch.Generator), "a torch.Generator"),
}


class ModalTokenizerModule(MediaMaker):
    """One modality whose media are spans of codes, `<key> c₁ … cₙ </key>`, in questions and answers alike.

    Args:
        model: the tokenizer, which stays frozen unless it is trained by itself.
        row_ends: end each row of the grid (its last axis) with a token, as Emu3 does.
        defaults: default options of generation, `SAMPLING`: `guidance_scale` g takes logits u + g · (c − u) from those
            with the preceding tokens, c, and without them, u (arXiv 2207.12598 for tokens); `temperature` 0 is greedy;
            `top_k` 0 keeps all codes.

    Attributes:
        module: the tokenizer.
    """

    def __init__(self, model: MediaTokenizer, row_ends: bool = False, defaults: Mapping[str, Any] | None = None):
        super().__init__()
        if not isinstance(model, MediaTokenizer):
            raise InputError(f"ModalTokenizerModule takes a MediaTokenizer, got {type(model).__name__}; wrap it first")
        if row_ends and model.delayed:
            raise InputError(
                "row_ends is set, but with delay the codes of a frame do not stand in one row; leave one out"
            )
        self.module, self.modality, self.row_ends = model, model.modality, row_ends
        self.defaults = defaults or {}

    def grid(self) -> Grid:
        """What its spans hold."""
        bounds = [(low, high) for low, high in self.module.bounds.tolist()]
        columns = self.module.shape[-1] if self.row_ends else None
        origin = getattr(getattr(self.module, "anygpt_source", None), "place", None)
        return Grid(self.module.codebook_size, bounds, columns, self.module.codebook(), origin)

    def check_values(self, options: Mapping[str, Any]) -> None:
        check_options(f"the {self.modality} tokenizer", OPTIONS, options)

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Merge a request's options over the defaults, and those over `SAMPLING`."""
        return SAMPLING | super().options(given)

    own_options = property(lambda self: self.options({}))

    def codes(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Codes `(K, n)` of inputs: `codes` as they are, or `media` encoded."""
        if len(inputs) != 1:
            raise InputError(f"the {self.modality} tokenizer is given {', '.join(inputs)}; give one of them")
        return inputs[CODES] if CODES in inputs else self.module.encode(inputs[MEDIA])
