"""Cached language-model states of rows without input media: those that labels are predicted from, and the output
projectors' inputs. If nothing below them trains (stage 2 with `signal_rows: output`), no epoch changes them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from anygpt.composition import Composition, Reading
from anygpt.errors import InputError
from anygpt.losses.terms import find_losses
from anygpt.sequence.merging import Merged
from anygpt.sequence.signal_tokens import Spans, Tap, run_after_layers

HEAD = "head"  # name of the states that labels are predicted from; a decoder's are named `<key>_decoder`


@torch.no_grad()
def read_text(
    model: Composition, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None
) -> list[dict[str, Tensor]]:
    """Compute the states of each row of a batch `(B, S)` without input media, for `TextStates.join`.

    Returns one dict per row: `head`, `(M, H)`, the last layer's states at positions that predict a label; and for each
    decoder `<key>_decoder`, `(K, N, H)`, its projector's input at the row's spans.
    """
    ends: list[Tensor] = []
    hook = model.language_model.get_decoder().register_forward_hook(lambda *given: ends.append(given[-1][0]))
    with hook, model.signal_tokens.attached(model.language_model) as tap:
        merged = model.merge(model.embed(input_ids, attention_mask, labels), {})
        batch = find_losses(model, merged)
        tap.select = batch.nll
        states = model.read(merged, batch.spans, tap, {}).states
    if not ends:
        raise InputError(
            f"{type(model.language_model).__name__} does not run what its get_decoder() gives, so its "
            "layers and its head cannot be taken apart; leave `language_model` out of the feature cache"
        )
    found = {HEAD: (ends[-1][batch.nll], batch.nll[0])}
    for key, decoder in model.decoders.items():
        nothing = merged.inputs_embeds.new_empty(0, decoder.num_signal_tokens, merged.inputs_embeds.shape[-1])
        found[f"{key}_decoder"] = (states.get(key, nothing), batch.spans[key].rows)
    return [{name: x[at == row] for name, (x, at) in found.items()} for row in range(len(input_ids))]


class TextStates(dict[str, Tensor]):
    """Cached states of a batch, its rows concatenated, which replace the language model's layers.

    Everything after the layers runs as usual, so the losses are the same.
    """

    @classmethod
    def join(cls, rows: Sequence[Mapping[str, Tensor]]) -> "TextStates":
        return cls({name: torch.cat([row[name] for row in rows]) for name in rows[0]})

    def __call__(self, model: Composition, merged: Merged, spans: Mapping[str, Spans], tap: Tap, *_: Any) -> Reading:
        """Compute logits `(1, M, V')` at positions that predict a label, and return them with each decoder's states."""
        if tap.select is None:
            raise InputError("full logits (return_logits) cannot be had from text_states; leave one of them out")
        labels = len(tap.select[0])
        wanted = {HEAD: labels} | {f"{key}_decoder": len(found) for key, found in spans.items()}
        lengths = {name: len(x) for name, x in self.items()}
        if lengths | ({} if labels else {HEAD: 0}) != wanted:
            raise InputError(f"text_states has {lengths}, but the batch needs {wanted}; they are of other rows")
        states, tap.select, logits = self[HEAD][None], None, None
        if labels:
            logits = run_after_layers(model.language_model, states)
        return Reading(logits, {key: self[f"{key}_decoder"] for key, found in spans.items() if len(found)})
