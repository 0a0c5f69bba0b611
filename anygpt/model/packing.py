"""Packing of several rows of a batch into one sequence for the language model, to compute less padding.

Only the language model sees packed sequences; its states are unpacked into the rows of the padded batch. Rows are
separated by positions that restart at 0: without a mask, transformers' `create_causal_mask` makes attention causal
within each run of positions, and FlashAttention treats runs as separate sequences. torch's attention would also
compute what that mask hides, so on a CPU it runs row by row instead. Shape legend: `anygpt.outputs`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from anygpt.composition import Composition, Reading, evaluating
from anygpt.encoders.module import argument_names, base_model
from anygpt.errors import InputError
from anygpt.sequence.merging import Merged
from anygpt.sequence.signal_tokens import Spans, Tap

BY_ROW = "sdpa_by_row"
"""The name in transformers of an attention like `sdpa`, except that on a CPU each packed row is attended alone."""


@dataclass(frozen=True)
class Packing:
    """The mapping of the tokens of a batch `(B, S)` to `P` packed sequences of length `L`, as int64.

    Attributes:
        source: `(P, L)`, flat index into `B · S` of each packed token; 0 for padding.
        position_ids: `(P, L)`, counted within each row; padding at the end counts as a row of its own.
        place: `(B, S)`, flat index into `P · L` of each token; 0 for padding.
    """

    source: Tensor
    position_ids: Tensor
    place: Tensor

    @classmethod
    def of(cls, attention_mask: Tensor, pack_to: int) -> "Packing":
        """Pack rows by first-fit decreasing into sequences of `pack_to` tokens, or as many as the longest row has."""
        lengths = attention_mask.sum(dim=1).tolist()
        pack_to = max(pack_to, *lengths)
        sequences: list[list[int]] = []
        for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
            fits = (rows for rows in sequences if sum(lengths[i] for i in (*rows, row)) <= pack_to)
            if (chosen := next(fits, None)) is None:
                sequences.append(chosen := [])
            chosen.append(row)
        longest = max(1, *(sum(lengths[row] for row in rows) for rows in sequences))
        device, width = attention_mask.device, attention_mask.shape[1]
        source, positions = torch.zeros(2, len(sequences), longest, dtype=torch.long)
        place = torch.zeros(attention_mask.numel(), dtype=torch.long)
        kept = [row * width + mask.nonzero()[:, 0] for row, mask in enumerate(attention_mask.cpu())]
        for i, rows in enumerate(sequences):
            tokens = torch.cat([kept[row] for row in rows])
            source[i, : len(tokens)] = tokens
            place[tokens] = i * longest + torch.arange(len(tokens))
            runs = [*(lengths[row] for row in rows), longest - len(tokens)]
            positions[i] = torch.cat([torch.arange(run) for run in runs])
        return cls(source.to(device), positions.to(device), place.view(attention_mask.shape).to(device))

    def pack(self, values: Tensor) -> Tensor:
        """Convert `(B, S, …)` to `(P, L, …)`."""
        return values.flatten(0, 1)[self.source]

    def unpack(self, values: Tensor) -> Tensor:
        """Convert `(P, L, …)` to `(B, S, …)`, with arbitrary values at padding."""
        return values.flatten(0, 1)[self.place]

    def places(self, chosen: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Convert rows and positions `(M,)` of the batch to sequences and positions in them."""
        flat = self.place[chosen]
        return flat // self.source.shape[1], flat % self.source.shape[1]


def mask_by_row(
    batch_size: int, q_length: int, mask_function: Callable[..., Tensor], device: Any, **options: Any
) -> Tensor | None:
    """Lengths of the packed rows `(R,)`, int64, padding included; transformers' own mask where lengths do not suffice.

    They suffice if attention within a row is causal and complete (no sliding windows, no tokens that look ahead).
    """
    packed = options.get("attention_mask") is None and not options.get("allow_is_causal_skip", True)
    if packed and not options.get("use_vmap") and torch.device(device).type == "cpu":
        sequence, place = torch.arange(batch_size)[:, None], torch.arange(q_length)[None]
        before = (place - 1).clamp(min=0)
        begins = ~mask_function(sequence, 0, place, before) | (place == 0)
        starts = begins.flatten().nonzero()[:, 0]
        lengths = torch.diff(starts, append=torch.tensor([begins.numel()]))
        firsts, of = starts % q_length, starts // q_length
        looks_back = mask_function(of, 0, firsts + lengths - 1, firsts)
        looks_ahead = mask_function(sequence, 0, before, place) & (place > 0)
        if len(starts) > batch_size and bool(looks_back.all()) and not bool(looks_ahead.any()):
            return lengths
    return sdpa_mask(batch_size=batch_size, q_length=q_length, mask_function=mask_function, device=device, **options)


@torch.compiler.disable
def attend_by_row(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' `sdpa` on `(P, H, L, D)`, for each packed row alone if the mask is `mask_by_row`'s lengths."""
    if attention_mask is None or attention_mask.dim() > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    lengths = attention_mask.tolist()
    rows = zip(*(x.transpose(0, 1).flatten(1, 2)[None].split(lengths, dim=2) for x in (query, key, value)), strict=True)
    attended = torch.cat([sdpa_attention_forward(module, *row, None, **options)[0] for row in rows], dim=1)
    return attended.view(query.shape[0], query.shape[2], *attended.shape[2:]), None


AttentionInterface.register(BY_ROW, attend_by_row)
AttentionMaskInterface.register(BY_ROW, mask_by_row)


@torch.no_grad()
def check_packing(model: Composition) -> None:
    """Make torch's attention run by row; an `InputError` if the language model attends across packed rows (OPT's mask,
    for one, ignores positions), or a callback sets its arguments."""
    language_model, kept_apart = model.language_model, False
    base = base_model(language_model)
    if base.config.get_text_config()._attn_implementation == "sdpa":
        base.set_attn_implementation(BY_ROW)  # nothing changes where rows are not packed
    if "position_ids" in argument_names(language_model) and model.preprocess_llm_callback is None:
        embeds = language_model.get_input_embeddings().weight[None, :8].detach()
        positions = torch.arange(4, device=embeds.device).repeat(2)[None]
        with evaluating(language_model):
            alone = language_model(inputs_embeds=embeds[:, 4:], position_ids=positions[:, 4:], use_cache=False).logits
            packed = language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False).logits[:, 4:]
        kept_apart = bool((packed - alone).norm() < 0.02 * alone.norm())
    if not kept_apart:
        raise InputError(
            f"rows cannot be packed (data.pack_to) for {type(language_model).__name__}, which does not keep them apart "
            "by their positions: leave it out, and set data.max_batch_tokens"
        )


def read_packed(
    model: Composition,
    merged: Merged,
    spans: Mapping[str, Spans],
    tap: Tap,
    encoder_inputs: Mapping[str, Any],
    pack_to: int,
) -> Reading:
    """`MultimodalModel.read` with rows packed into sequences of `pack_to` tokens; see `check_packing`."""
    packing = Packing.of(merged.attention_mask, pack_to)
    embeds, ids = packing.pack(merged.inputs_embeds), packing.pack(merged.input_ids)
    batch = Merged(embeds, ids, None, None, merged.media_in, packing.position_ids)
    everywhere = tap.select is None
    tap.select = None if everywhere else packing.places(tap.select)
    logits, all_states = model.run_language_model(batch, encoder_inputs)
    hidden = packing.unpack(tap.hidden)
    all_states = None if all_states is None else tuple(packing.unpack(states) for states in all_states)
    logits = packing.unpack(logits) if everywhere else logits
    states = model.read_spans(merged, spans, hidden, all_states)
    return Reading(logits, states, hidden, everywhere, places=packing.source.numel())
