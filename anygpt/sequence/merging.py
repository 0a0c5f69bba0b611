"""Merging of encoder features into the language model's sequence: injected at placeholders, or prepended.

Shape legend: `anygpt.outputs`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
    """

    inputs_embeds: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor | None
    media_in: Tensor

    @property
    def position_ids(self) -> Tensor:
        """`(B, S)` int64, counted over unmasked tokens, so that a row's positions do not depend on its padding."""
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
    """Replace placeholders by features, in order.

    Args:
        text: the batch before merging.
        features: by encoder, `(items, n, H)`, a list of `(n, H)`, or packed `(features, H)`.
        token_ids: the placeholder of each encoder.

    Raises:
        InputError: an encoder's numbers of features and placeholders differ (the message names modality, row and both
            counts), or it has placeholders without inputs or the reverse.
    """
    embeds, media_in = text.inputs_embeds, text.media_in
    for key, token_id in token_ids.items():
        held = text.input_ids == token_id
        per_row = held.sum(dim=1).tolist()
        given = features.get(key)
        if isinstance(given, list):
            _check_whole_inputs(key, per_row, [len(item) for item in given])
            given = torch.cat(given)
        _check_counts(key, per_row, given)
        if given is None:
            continue
        embeds = embeds.masked_scatter(held[..., None], given.reshape(-1, given.shape[-1]).to(embeds.dtype))
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


def _check_whole_inputs(key: str, per_row: list[int], lengths: list[int]) -> None:
    """Raise `InputError` if a row's placeholders end inside an input."""
    ends, place = {0, *itertools.accumulate(lengths)}, 0
    for row, count in enumerate(per_row):
        place += count
        if place not in ends and sum(per_row) == sum(lengths):
            raise InputError(
                f"{key!r}: row {row} has {count} placeholder tokens, which end inside an input; the inputs have "
                f"{lengths} features"
            )


def _check_counts(key: str, per_row: list[int], features: Tensor | None) -> None:
    available = 0 if features is None else features.numel() // features.shape[-1]
    if available == sum(per_row):
        # The totals agree; an input split between rows would still put features in the wrong row.
        if features is None or features.dim() == 2:
            return
        bad = next((row for row, count in enumerate(per_row) if count % features.shape[1]), None)
        if bad is None:
            return
        raise InputError(
            f"{key!r}: row {bad} has {per_row[bad]} placeholder tokens, which is no multiple of the "
            f"{features.shape[1]} features of each input"
        )
    seen, bad = 0, max((row for row, count in enumerate(per_row) if count), default=0)
    for row, count in enumerate(per_row):
        seen += count
        if seen > available:
            bad = row
            break
    raise InputError(
        f"{key!r}: the batch has {sum(per_row)} placeholder tokens but {available} features; the counts part in row "
        f"{bad}, which has {per_row[bad]} placeholders. Each input needs exactly as many placeholders as it has "
        "features (MultimodalProcessor writes them)"
    )


def prepend(
    text: Merged, features: Mapping[str, Tensor | list[Tensor]], items_per_row: Mapping[str, list[int]] | None = None
) -> Merged:
    """Put features before the text: `[enc1][enc2]…[encN][text]`, in the order of `features`.

    In a left-padded row the features come after the padding.

    Args:
        text: the batch before merging.
        features: by encoder, `(items, n, H)` or a list of `(n, H)`.
        items_per_row: number of inputs of each row; one each by default.

    Raises:
        InputError: the inputs cannot be assigned to rows.
    """
    if not features:
        return text
    rows = text.input_ids.shape[0]
    by_row: list[list[Tensor]] = [[] for _ in range(rows)]
    for key, values in features.items():
        counts = (items_per_row or {}).get(key) or ([1] * rows if len(values) == rows else [len(values)] * (rows == 1))
        packed = isinstance(values, Tensor) and values.dim() != 3
        if packed or len(counts) != rows or sum(counts) != len(values):
            raise InputError(
                f"{key!r}: {len(values)} inputs cannot be assigned to {rows} rows; give one input a row, or say how "
                "many each row has with items_per_row (the processor does, given one list a row)"
            )
        items = iter(values)
        for row, count in enumerate(counts):
            by_row[row] += itertools.islice(items, count)
    lengths = [sum(len(part) for part in parts) for parts in by_row]
    total = text.input_ids.shape[1] + max(lengths)
    left_padded = bool((text.attention_mask[:, 0] == 0).any())

    def build(row: int, values: Tensor, media: Tensor | None, fill: float) -> Tensor:
        """One row of the result: padding, features and text."""
        start = int(text.attention_mask[row].argmax()) if left_padded else 0
        media = values.new_full((lengths[row], *values.shape[1:]), FEATURE_ID) if media is None else media
        out = values.new_full((total, *values.shape[1:]), fill)
        body = torch.cat([values[:start], media, values[start:]])
        return torch.cat([out[: total - len(body)], body] if left_padded else [body, out[: total - len(body)]])

    def rows_of(values: Tensor, media: float, fill: float) -> Tensor:
        parts = [values.new_full((n,), media) for n in lengths]
        return torch.stack([build(row, values[row], parts[row], fill) for row in range(rows)])

    embeds = torch.stack(
        [
            build(row, text.inputs_embeds[row], torch.cat(parts).to(text.inputs_embeds) if parts else None, 0)
            for row, parts in enumerate(by_row)
        ]
    )
    return Merged(
        inputs_embeds=embeds,
        input_ids=rows_of(text.input_ids, FEATURE_ID, FEATURE_ID),
        attention_mask=rows_of(text.attention_mask, 1, 0),
        labels=None if text.labels is None else rows_of(text.labels, IGNORE, IGNORE),
        media_in=text.media_in | torch.tensor([n > 0 for n in lengths], device=text.media_in.device),
    )


def pad_left(merged: Merged) -> Merged:
    """Move every row's padding to its left, as generation needs it."""
    if bool((merged.attention_mask[:, -1] == 1).all()):
        return merged
    length = merged.attention_mask.shape[1]
    # a stable sort by the mask moves padding to the front and keeps the order of the tokens
    order = merged.attention_mask.to(torch.int8).argsort(dim=1, stable=True)
    rows = torch.arange(len(order), device=order.device)[:, None].expand(-1, length)
    labels = None if merged.labels is None else merged.labels[rows, order]
    return Merged(
        merged.inputs_embeds[rows, order],
        merged.input_ids[rows, order],
        merged.attention_mask[rows, order],
        labels,
        merged.media_in,
    )
