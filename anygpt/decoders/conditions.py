"""What a decoder is conditioned on, and the generators that its noise comes from.

Shapes: `B` batch, `T` condition tokens, `D` condition dim, `P` pooled dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from anygpt.errors import InputError

Generators: TypeAlias = torch.Generator | list[torch.Generator] | None


@dataclass(eq=False)
class Condition:
    """What a decoder is conditioned on: embeds `(B, T, D)`, and where it has them pooled `(B, P)`, mask `(B, T)`."""

    embeds: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def of(cls, condition: Condition | Tensor) -> Condition:
        """A plain tensor means `Condition(embeds=tensor)`."""
        return condition if isinstance(condition, cls) else cls(embeds=condition)

    def __len__(self) -> int:
        return self.embeds.shape[0]

    def __getitem__(self, rows: slice | list[int] | Tensor) -> Condition:
        """The samples of `rows`; the batch dimension stays, so an `int` is not taken."""
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Condition:
        """Moved to `device`; floating-point tensors also cast to `dtype`. Differentiable."""
        return self._map(lambda x: x.to(device=device, dtype=dtype if x.is_floating_point() else None))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        return Condition(*(None if x is None else function(x) for x in (self.embeds, self.pooled, self.mask)))


def check_generators(generator: Generators, batch_size: int) -> None:
    """A list of generators must hold one a sample.

    Raises:
        InputError: it holds another number.
    """
    if isinstance(generator, list) and len(generator) != batch_size:
        raise InputError(f"{len(generator)} generators for {batch_size} samples: give one, or one a sample.")


def check_condition(
    condition: Condition, decoder: str, batch_size: int | None, shape: tuple[int, int], pooled_dim: int | None
) -> None:
    """Raise an `InputError` for a condition that is not `(B, T, D)`, or whose pooled part is not `(B, P)`."""
    given, expected = tuple(condition.embeds.shape), (batch_size or len(condition), *shape)
    if given != expected:
        raise InputError(
            f"The condition of {decoder} is {given}, expected (batch, tokens, dim) = {expected}: "
            "make the output projector for this decoder's condition_shape, with one condition a sample."
        )
    pooled = None if condition.pooled is None else tuple(condition.pooled.shape)
    if pooled_dim is not None and pooled != (expected[0], pooled_dim):
        raise InputError(
            f"The pooled condition of {decoder} is {pooled}, expected (batch, dim) = {(expected[0], pooled_dim)}: give "
            "Condition(embeds, pooled)."
        )
