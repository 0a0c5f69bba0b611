"""Options of generation for a decoder: `generate(decoder_kwargs={key: options})`."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from anygpt.decoders.conditions import Condition
from anygpt.errors import InputError

STEERING = ("num_inference_steps", "guidance_scale", "negative_prompt", "negative_condition", "seed", "generator")
"""Options of every decoder, besides its family's sizes."""
ALTERNATIVES = (("negative_prompt", "negative_condition"), ("seed", "generator"))
MAX_SEED = 2**63 - 1


def check_options(decoder: Any, options: Mapping[str, Any]) -> None:
    """Raise `InputError` for an unknown option of generation or an invalid value (None is the default), ahead of it."""
    who = f"the {decoder.modality} decoder"
    if unknown := sorted(set(options) - set(decoder.option_names), key=str):
        known = ", ".join(decoder.option_names)
        raise InputError(f"{who} has no option {', '.join(map(repr, unknown))}; it has {known}")
    given = {name: value for name, value in options.items() if value is not None}
    for one, other in ALTERNATIVES:
        if one in given and other in given:
            raise InputError(f"{who} is given both {one} and {other}; give one of them")
    for name, value in given.items():
        if expected := decoder.expected_of(name, value):
            raise InputError(f"{name} of {who} is {value!r:.80}; expected {expected}")


def expected_of(name: str, value: Any, most_steps: int, size_multiple: int) -> str | None:
    """What was expected instead of an option's value; None if it is valid, or not checked here.

    Heights and widths are multiples of `size_multiple`; there are at most `most_steps`, as in training.
    """
    if name == "num_inference_steps":
        good = is_integer(value) and 1 <= value <= most_steps
        return None if good else f"a whole number from 1 to {most_steps}"
    if name == "guidance_scale":
        return None if is_number(value) else "a finite number"
    if name == "seed":
        seeds = value if isinstance(value, (list, tuple)) else [value]
        good = all(is_integer(seed) and 0 <= seed <= MAX_SEED for seed in seeds)
        return None if good else "a whole number from 0, or a list of such with one a row"
    if name == "generator":
        good = all(isinstance(one, torch.Generator) for one in (value if isinstance(value, list) else [value]))
        return None if good else "a torch.Generator, or a list with one a sample"
    if name == "negative_condition":
        return None if isinstance(value, (torch.Tensor, Condition)) else "a tensor or a Condition"
    if name == "negative_prompt":
        return None if isinstance(value, str) and is_text(value) else "a text of whole characters"
    if name in ("height", "width"):
        good = is_integer(value) and value > 0 and value % size_multiple == 0
        return None if good else f"a multiple of {size_multiple}"
    if name == "num_frames":
        return None if is_integer(value) and value > 0 else "a whole number from 1"
    return None


def seeded(seed: int | Sequence[int], places: Sequence[int]) -> list[torch.Generator]:
    """One generator a sample, seeded by the seed (one, or one a sample) plus the sample's place in its answer."""
    seeds = [seed] * len(places) if isinstance(seed, int) else seed
    return [
        torch.Generator().manual_seed(min(int(own), MAX_SEED - max(places)) + place)
        for own, place in zip(seeds, places, strict=True)
    ]


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number within the range of a float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_text(value: str) -> bool:
    """Whether a text has no lone surrogates, which JSON and command lines may hold but tokenizers refuse."""
    return not any("\ud800" <= character <= "\udfff" for character in value)
