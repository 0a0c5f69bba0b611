"""Generation options of decoders and tokenizers: `generate(decoder_kwargs={key: options})`."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from anygpt.decoders.conditions import Condition
from anygpt.errors import InputError

ALTERNATIVES = (("negative_prompt", "negative_condition"), ("seed", "generator"))
MAX_SEED = 2**63 - 1
Rule: TypeAlias = tuple[Callable[[Any], bool], str]
"""A test of an option's value, and a description of what is expected."""


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number within the range of a float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_text(value: Any) -> bool:
    """Whether a value is a text without lone surrogates, which JSON may hold but tokenizers refuse."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def are_seeds(value: Any) -> bool:
    seeds = value if isinstance(value, (list, tuple)) else [value]
    return all(is_integer(seed) and 0 <= seed <= MAX_SEED for seed in seeds)


def are_generators(value: Any) -> bool:
    generators = value if isinstance(value, list) else [value]
    return bool(generators) and all(isinstance(one, torch.Generator) for one in generators)


STEERING: dict[str, Rule] = {
    "guidance_scale": (is_number, "a finite number"),
    "negative_prompt": (is_text, "a text of whole characters"),
    "negative_condition": (lambda value: isinstance(value, (torch.Tensor, Condition)), "a tensor or a Condition"),
    "seed": (are_seeds, "a whole number from 0, or a list with one per row"),
    "generator": (are_generators, "a torch.Generator, or a list with one per sample"),
}
"""Options of every decoder, besides its steps and its family's sizes."""


def check_options(who: str, rules: Mapping[str, Rule], options: Mapping[str, Any]) -> None:
    """Raise `InputError` for an option that has no rule, or whose value (None is the default) breaks its rule."""
    if unknown := sorted(set(options) - set(rules), key=str):
        raise InputError(f"{who} has no option {', '.join(map(repr, unknown))}; it has {', '.join(rules)}")
    given = {name: value for name, value in options.items() if value is not None}
    for one, other in ALTERNATIVES:
        if one in given and other in given:
            raise InputError(f"{who} is given both {one} and {other}; give one of them")
    for name, value in given.items():
        fits, expected = rules[name]
        if not fits(value):
            raise InputError(f"{name} of {who} is {value!r:.80}; expected {expected}")


def check_rate(rate: Any) -> float:
    """The frame rate; an `InputError` if it is not valid."""
    if not is_number(rate) or rate <= 0:
        raise InputError(f"frame_rate is {rate!r:.80}, expected a number above 0")
    return rate


class MediaMaker(nn.Module):
    """A module that makes media of one modality, with default options of generation that are saved with the model."""

    modality: str

    def check_values(self, options: Mapping[str, Any]) -> None:
        """Raise an `InputError` for options that the module cannot use, leaving defaults aside."""
        raise NotImplementedError

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise an `InputError` for a request's options that the module cannot use together with the defaults."""
        self.check_values(dict.fromkeys(options) | self.options(options))

    @property
    def defaults(self) -> dict[str, Any]:
        """A copy of the default options of generation."""
        return dict(self._defaults)

    @defaults.setter
    def defaults(self, options: Mapping[str, Any]) -> None:
        if by_request := {"seed", "generator", "negative_condition"} & set(options):
            raise InputError(f"the defaults of {self.modality} cannot set {', '.join(sorted(by_request))}")
        self.check_values(options)
        self._defaults = dict(options)

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Merge a request's options over the defaults; None stands for the default."""
        given = {name: value for name, value in given.items() if value is not None}
        replaced = {name for pair in ALTERNATIVES for name in pair if set(pair) & set(given)}
        return {name: value for name, value in self._defaults.items() if name not in replaced} | given


def seeded(seed: int | Sequence[int], places: Sequence[int]) -> list[torch.Generator]:
    """One generator per sample, seeded by the seed (one, or one per sample) plus the sample's place in its answer."""
    seeds = [seed] * len(places) if isinstance(seed, int) else seed
    return [
        torch.Generator().manual_seed(min(int(own), MAX_SEED - max(places)) + place)
        for own, place in zip(seeds, places, strict=True)
    ]
