"""Stand-alone parts: adapters merged into their weights, signal tokens in the language model's own matrices."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from anygpt.model.parts import is_peft
from anygpt.sequence.signal_tokens import SignalTokens


def merge_adapter(part: nn.Module) -> nn.Module:
    """A copy of a part with its adapter merged into its weights; the part itself if it has no adapter."""
    if not is_peft(part):
        return part
    merged = copy.deepcopy(part).merge_and_unload()
    merged.anygpt_source = None  # its source has other weights
    return merged


@torch.no_grad()
def write_signal_rows(
    language_model: PreTrainedModel, signal: SignalTokens, other_ids: Iterable[int]
) -> PreTrainedModel:
    """A copy of a language model whose matrices hold the signal tokens' rows, so that it needs no `SignalTokens`.

    Logits equal those inside `SignalTokens.attached`, except for tokens that are never generated (the encoders'
    placeholders, learned queries), whose output rows are zero and which the generation config suppresses. Embedding
    and head are no longer tied.

    Args:
        language_model: `(V, H)` matrices, without an adapter.
        signal: with its ids set.
        other_ids: further ids of the tokenizer; those beyond the matrices get rows of zeros.
    """
    model = copy.deepcopy(language_model)
    model.anygpt_source = None
    other_ids = list(other_ids)
    before = model.get_input_embeddings().weight.shape[0]
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    said = {key: signal.ids[key][: len(rows)] for key, rows in signal.output_rows.items()}
    unsaid = sorted({*other_ids, *signal.query_ids})
    size = max([before - 1, *other_ids, *(i for ids in signal.ids.values() for i in ids)]) + 1
    if size > before:
        model.resize_token_embeddings(size, mean_resizing=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    embedding.weight[before:] = 0
    head.weight[before:] = 0
    for key, ids in signal.ids.items():
        embedding.weight[ids] = signal.input_rows[key].to(embedding.weight)
        head.weight[said[key]] = signal.output_rows[key].to(head.weight)
        if getattr(head, "bias", None) is not None:
            head.bias[said[key]] = 0
    if model.generation_config is not None and unsaid:
        model.generation_config.suppress_tokens = unsaid
    return model
