"""Merging of encoder features into the language model's sequence: injected at placeholders, or prepended.

Shape legend: `anygpt.outputs`.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from anygpt.errors import InputError

FEATURE_ID = -1  # marks a prepended feature in `Merged.input_ids`; no tokenizer uses it
IGNORE = -100  # torch's and transformers' ignore index for labels


@dataclass
class Merged:
    """A batch after merging.

    Attributes:
        inputs_embeds: `(B, S, H)`.
        input_ids: `(B, S)` int64; `FEATURE_ID` at prepended features.
        attention_mask: `(B, S)` int64.
        labels: `(B, S)` int64 or None; `-100` at features.
        media_in: `(B,)` bool, whether the row contains any feature.
        packed_positions: `(B, S)` int64, where several rows of a batch are packed into each, without a mask.
    """

    inputs_embeds: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor | None
    media_in: Tensor
    packed_positions: Tensor | None = None

    @property
    def position_ids(self) -> Tensor:
        """`(B, S)` int64, counted over unmasked tokens, so that a row's positions do not depend on its padding."""
        if self.packed_positions is not None:
            return self.packed_positions
        return (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)


def without_right_padding(mask: Any) -> Any:
    """Replace a `(B, S)` attention mask by ones if it hides only right padding; return any other mask unchanged.

    With causal attention no token attends to padding on its right, and the outputs at padding are not read. Given a
    mask of ones, transformers passes torch no mask (`_ignore_causal_mask_sdpa`), so that a kernel skips half of the
    scores, and FlashAttention, which takes no mask, can be used on a GPU.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not bool((mask[:, 1:] <= mask[:, :-1]).all()):
        return mask
    return torch.ones_like(mask)


def inject(text: Merged, features: Mapping[str, Tensor | list[Tensor]], token_ids: Mapping[str, int]) -> Merged:
    """Replace placeholders (`token_ids`, by encoder) by features, in order.

    Features are `(items, n, H)`, a list of `(n, H)`, or packed `(features, H)`, by encoder. Where their number is not
    that of the placeholders, an `InputError` names modality, row and both counts.
    """
    embeds, media_in = text.inputs_embeds, text.media_in
    for key, token_id in token_ids.items():
        held = text.input_ids == token_id
        per_row = held.sum(dim=1).tolist()
        given = features.get(key, embeds.new_empty(0, embeds.shape[-1]))
        packed = isinstance(given, Tensor) and given.dim() == 2
        lengths = [] if packed else [len(item) for item in given]
        given = torch.cat(given) if isinstance(given, list) else given.flatten(0, -2)
        _check_counts(key, per_row, lengths, len(given))
        if len(given):
            embeds = embeds.index_put((held,), given.to(embeds.dtype))
            media_in = media_in | held.any(dim=1)
    without = sorted(set(features) - set(token_ids))
    if without:
        raise InputError(
            f"inputs for {', '.join(map(repr, without))} were given, but no placeholder token is set for them, so "
            "their features would be dropped; name every encoder in set_token_ids"
        )
    labels = text.labels
    if labels is not None:
        placeholders = torch.tensor(list(token_ids.values()), device=labels.device)
        labels = labels.masked_fill(torch.isin(text.input_ids, placeholders), IGNORE)
    return Merged(embeds, text.input_ids, text.attention_mask, labels, media_in)


def _check_counts(key: str, per_row: list[int], lengths: list[int], available: int) -> None:
    """Check that an encoder's placeholders, `per_row`, are as many as its features, and end with whole inputs.

    `lengths` are the features of each input, empty for packed ones, whose bounds are not known.
    """
    total, ends = sum(per_row), {0, *itertools.accumulate(lengths)}
    seen = enumerate(itertools.accumulate(per_row))
    wrong = [row for row, count in seen if count > available or (lengths and count not in ends)]
    if wrong or total != available:
        bad = wrong[0] if wrong else max((row for row, count in enumerate(per_row) if count), default=0)
        raise InputError(
            f"{key!r}: the batch has {total} placeholder tokens but {available} features, of inputs of "
            f"{lengths or 'any length'}; they part where row {bad} has {per_row[bad]} placeholders. Each input "
            "needs exactly as many placeholders as it has features (MultimodalProcessor writes them)"
        )


def prepend(
    text: Merged, features: Mapping[str, Tensor | list[Tensor]], items_per_row: Mapping[str, list[int]] | None = None
) -> Merged:
    """Put features before the text: `[enc1][enc2]…[encN][text]`, in the order of `features`.

    In a left-padded row the features come after the padding. Features are `(items, n, H)` or a list of `(n, H)`, by
    encoder; `items_per_row` is the number of inputs of each row, by default one each, without which rows of others are
    an `InputError`.
    """
    if not features:
        return text
    embeds, mask = text.inputs_embeds, text.attention_mask
    rows, length = text.input_ids.shape
    by_row: list[list[Tensor]] = [[embeds.new_zeros(0, embeds.shape[-1])] for _ in range(rows)]
    for key, values in features.items():
        counts = (items_per_row or {}).get(key) or ([1] * rows if len(values) == rows else [len(values)] * (rows == 1))
        packed = isinstance(values, Tensor) and values.dim() != 3
        if packed or len(counts) != rows or sum(counts) != len(values):
            raise InputError(
                f"{key!r}: {len(values)} inputs cannot be assigned to {rows} rows; give one input per row, or say how "
                "many each row has with items_per_row (the processor does, given one list per row)"
            )
        items = iter(values)
        for row, count in enumerate(counts):
            by_row[row] += itertools.islice(items, count)
    media = [torch.cat(parts).to(embeds) for parts in by_row]
    counts = torch.tensor([len(values) for values in media], device=embeds.device)
    media = pad_sequence(media, batch_first=True)  # (B, M, H)
    present = torch.arange(media.shape[1], device=embeds.device) < counts[:, None]
    left_padded = bool((mask[:, 0] == 0).any())
    start = mask.argmax(dim=1, keepdim=True) * left_padded
    before = torch.arange(length, device=embeds.device) < start
    # in this order: padding at the left, features, text, padding at the right
    places = torch.cat([torch.where(present, 1, 0 if left_padded else 3), torch.where(before, 0, 2)], dim=1)
    new = torch.full_like(present, FEATURE_ID, dtype=text.input_ids.dtype)
    labels = None if text.labels is None else torch.cat([torch.full_like(new, IGNORE), text.labels], dim=1)
    joined = Merged(
        torch.cat([media, embeds], dim=1),
        torch.cat([new, text.input_ids], dim=1),
        torch.cat([present.to(mask.dtype), mask], dim=1),
        labels,
        text.media_in | (counts > 0),
    )
    return _sorted(joined, places)


def _sorted(merged: Merged, places: Tensor) -> Merged:
    """The batch with each row's positions in the order of `places` `(B, S)`, equal ones as they were."""
    order = places.argsort(dim=1, stable=True)
    rows = torch.arange(len(order), device=order.device)[:, None]
    labels = None if merged.labels is None else merged.labels[rows, order]
    embeds, ids, mask = (v[rows, order] for v in (merged.inputs_embeds, merged.input_ids, merged.attention_mask))
    return Merged(embeds, ids, mask, labels, merged.media_in)


def pad_left(merged: Merged) -> Merged:
    """Move every row's padding to its left, as generation needs it."""
    return merged if bool((merged.attention_mask[:, -1] == 1).all()) else _sorted(merged, merged.attention_mask)
