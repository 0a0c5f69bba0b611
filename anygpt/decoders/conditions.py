"""Conditions of decoders, and checks of conditions and random generators.

Shapes: `B` batch, `T` condition tokens, `D` condition dim, `P` pooled dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from anygpt.errors import InputError

Generators: TypeAlias = torch.Generator | list[torch.Generator] | None


@dataclass(eq=False)
class Condition:
    """What a decoder is conditioned on: embeds `(B, T, D)` and, if it has them, pooled `(B, P)` and mask `(B, T)`.

    The mask of an encoding is bool, True for real tokens, False for padding. That of an output projector, which always
    predicts `T` tokens, is logits: how sure it is that a token is real.
    """

    embeds: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def of(cls, condition: "Condition | Tensor") -> "Condition":
        """Wrap a plain tensor as `Condition(embeds=tensor)`."""
        return condition if isinstance(condition, cls) else cls(embeds=condition)

    @property
    def real(self) -> Tensor:
        """`(B, T)` bool, at least one per row: all tokens without a mask, the likeliest if no logit is positive."""
        if self.mask is None:
            return torch.ones(self.embeds.shape[:2], dtype=torch.bool, device=self.embeds.device)
        if not self.mask.is_floating_point():
            return self.mask.bool()
        return self.mask >= self.mask.amax(dim=1, keepdim=True).clamp(max=0)

    def __len__(self) -> int:
        return self.embeds.shape[0]

    def __getitem__(self, rows: slice | list[int] | Tensor) -> "Condition":
        """The samples of `rows`, with the batch dimension kept."""
        return self._map(lambda tensor: tensor[rows])

    def replaced(self, rows: list[bool], by: "Condition") -> "Condition":
        """The samples, with those that `rows` marks replaced by the only sample of `by`."""
        parts = ((self.embeds, by.embeds), (self.pooled, by.pooled), (self.mask, by.mask))
        both = Condition(*(None if x is None else torch.cat([x, y.to(x)]) for x, y in parts))
        return both[[len(self) if marked else i for i, marked in enumerate(rows)]]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Condition":
        """Move to `device`, and cast floating-point tensors to `dtype`. Differentiable."""
        return self._map(lambda x: x.to(device=device, dtype=dtype if x.is_floating_point() else None))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Condition":
        return Condition(*(None if x is None else function(x) for x in (self.embeds, self.pooled, self.mask)))


def check_generators(generator: Generators, batch_size: int) -> None:
    """Raise an `InputError` for a list of generators without exactly one per sample."""
    if isinstance(generator, list) and len(generator) != batch_size:
        raise InputError(f"{len(generator)} generators for {batch_size} samples: give one, or one per sample")


def check_condition(condition: Condition, decoder: Any, batch_size: int | None) -> None:
    """Raise an `InputError` for a condition whose embeds, pooled part or mask do not fit the decoder."""
    name, rows, (tokens, dim) = type(decoder).__name__, batch_size or len(condition), decoder.condition_shape
    if condition.mask is not None and not decoder.masked:
        raise InputError(f"the condition has a mask, but {name} attends to every token: give it none")
    shapes: dict[str, tuple[int, ...]] = {"embeds": (rows, tokens, dim)}
    if decoder.pooled_dim is not None:
        shapes["pooled"] = (rows, decoder.pooled_dim)
    if condition.mask is not None:
        shapes["mask"] = (rows, tokens)
    for part, expected in shapes.items():
        tensor = getattr(condition, part)
        given = None if tensor is None else tuple(tensor.shape)
        if given != expected:
            raise InputError(
                f"the {part} of a condition of {name} is {given}, expected the shape {expected}: make the output "
                "projector for this decoder, and give one condition per sample"
            )
