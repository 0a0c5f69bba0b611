"""What training leaves out at random, for classifier-free guidance (arXiv 2207.12598).

Shape legend: `anygpt.outputs`.
"""

from collections.abc import Mapping

import torch
from torch import Generator, Tensor

from anygpt.composition import Composition
from anygpt.sequence.merging import IGNORE


def dropped(share: float, count: int, generators: list[Generator] | None) -> list[bool]:
    """Whether to drop each of `count` targets' conditions, with probability `share`, drawn from its generator."""
    return [bool(share) and torch.rand((), generator=g).item() < share for g in generators or [None] * count]


def hide_conditions(
    model: Composition,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    generators: Mapping[str, list[Generator]] | None,
) -> Tensor | None:
    """Mask all but the codes of a share `caption_dropout` of the rows `(B, S)` that answer with codes, in training.

    So nothing is learned of these rows' texts. A row's draw is from the generator of its first medium.
    """
    share, signals = model.loss_weights.caption_dropout, model.signal_tokens
    if not (share and model.training and labels is not None and model.tokenizer_keys):
        return attention_mask
    draws, codes = torch.ones_like(input_ids, dtype=torch.float32), torch.zeros_like(input_ids, dtype=torch.bool)
    for key in model.tokenizer_keys:
        begins = (labels == signals.ids[key][0]) & (input_ids == labels)
        own = (generators or {}).get(key) or [None] * int(begins.sum())
        draws[begins] = draws.new_tensor([torch.rand((), generator=g).item() for g in own])
        codes |= (labels != IGNORE) & (signals.row_of(input_ids, key) >= 0)
    first = (draws < 1).int().argmax(dim=1, keepdim=True)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return torch.where(draws.gather(1, first) < share, mask * codes, mask)
