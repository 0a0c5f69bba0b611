"""Deterministic calls of encoder processors that draw from global random states."""

import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

SEED = 0


@contextmanager
def _fixed_draws() -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            random.seed(SEED)
            np.random.seed(SEED)
            torch.manual_seed(SEED)
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def call(processor: Any, arguments: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Call a processor so that an input's tensors depend neither on the rest of the batch nor on the process.

    If it drew random numbers (CLAP crops long sounds at random), call it again for each medium (argument `name`).
    """

    def states() -> tuple[Any, ...]:
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().numpy().tobytes()

    with _fixed_draws():
        before = states()
        output = dict(processor(**arguments))
        drew = states() != before
    media = arguments.get(name)
    if not drew or not isinstance(media, list) or len(media) < 2 or isinstance(media[0], (int, float)):
        return output
    alone = []
    for medium in media:
        with _fixed_draws():
            alone.append(dict(processor(**{**arguments, name: [medium]})))
    return {key: _joined([one[key] for one in alone]) for key in output}


def accepted(function: Callable, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a processor names in its signature, or in the `TypedDict` of its keyword arguments."""
    owner = getattr(function, "__self__", None)
    names = set(inspect.signature(function).parameters)
    names |= set(getattr(getattr(owner, "valid_kwargs", None), "__annotations__", ()))
    return {name: value for name, value in options.items() if name in names}


def _joined(values: list[Any]) -> Any:
    if isinstance(values[0], torch.Tensor):
        return torch.cat(values)
    return np.concatenate(values) if isinstance(values[0], np.ndarray) else [item for value in values for item in value]
