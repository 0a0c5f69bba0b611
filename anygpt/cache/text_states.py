"""States of rows without media in, read once and used again.

Where nothing below them trains, as in stage 2 with `signal_rows: output`, the language model gives such a row the same
states in every epoch. The feature cache keeps those that are looked at: what a label is predicted from, and what the
output projectors read. Shape legend: `anygpt.outputs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from anygpt.composition import Composition, Reading
from anygpt.errors import InputError
from anygpt.losses.batch import WeightedModel, find_losses
from anygpt.sequence.merging import Merged
from anygpt.sequence.signal_tokens import Spans, Tap

HEAD = "head"
"""Name of the states that labels are predicted from; those of a decoder's spans are named `<key>_decoder`."""


@torch.no_grad()
def read_text(
    model: WeightedModel, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None
) -> list[dict[str, Tensor]]:
    """The states of each row, as `TextStates` takes them, joined over the rows of a batch.

    Args:
        model: as it is.
        input_ids, attention_mask, labels: `(B, S)` int64, as in `forward`; no row has media in.

    Returns:
        One dict a row: `head`, `(M, H)`, what the language model's layers end in where a label follows; and for
        each decoder `<key>_decoder`, `(K, N, H)`, what its projector reads at the row's spans.
    """
    ends: list[Tensor] = []
    handle = trunk_of(model.language_model).register_forward_hook(lambda module, args, output: ends.append(output[0]))
    try:
        with model.signal_tokens.attached(model.language_model) as tap:
            merged = model.merge(model.embed(input_ids, attention_mask, labels), {})
            batch = find_losses(model, merged)
            tap.select = batch.nll
            states = model.read(merged, batch.spans, tap, {}).states
    finally:
        handle.remove()
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
    """States that `read_text` gave, of all rows of a batch one after the other, in the place of the language model.

    What comes after its layers runs as ever, so the losses are the same.
    """

    @classmethod
    def join(cls, rows: Sequence[Mapping[str, Tensor]]) -> TextStates:
        """The states of a batch, from those of each of its rows."""
        return cls({name: torch.cat([row[name] for row in rows]) for name in rows[0]})

    def __call__(
        self,
        model: Composition,
        merged: Merged,
        spans: Mapping[str, Spans],
        tap: Tap,
        encoder_inputs: Mapping[str, Any],
    ) -> Reading:
        """Logits `(1, M, V')` where labels follow, and the states of each decoder's spans; no hidden states.

        Raises:
            InputError: states of other rows than the batch has, or logits are wanted everywhere.
        """
        if tap.select is None:
            raise InputError("full logits (return_logits) cannot be had from text_states; leave one of them out")
        labels = len(tap.select[0])
        wanted = {HEAD: labels} | {f"{key}_decoder": len(found) for key, found in spans.items()}
        lengths = {name: len(x) for name, x in self.items()}
        if lengths | ({} if labels else {HEAD: 0}) != wanted:
            raise InputError(f"text_states has {lengths}, but the batch needs {wanted}; they are of other rows")
        states, tap.select, logits = self[HEAD][None], None, None
        if labels:
            with replaced(trunk_of(model.language_model), lambda: LayersOutput(last_hidden_state=states)):
                logits = model.language_model(inputs_embeds=states, use_cache=False, return_dict=True).logits
        return Reading(logits, {key: self[f"{key}_decoder"] for key, found in spans.items() if len(found)})


@dataclass
class LayersOutput(BaseModelOutputWithPast):
    """The last states alone; what else a model's layers may give (router logits, cross attentions) is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def trunk_of(language_model: nn.Module) -> nn.Module:
    """A language model without its head and what comes after it."""
    return language_model.get_decoder()


@contextmanager
def replaced(module: nn.Module, result: Callable[[], Any]) -> Iterator[None]:
    """Inside the block the module gives a result without computing; what comes after it runs as ever."""
    before = vars(module).get("forward")  # accelerate's hooks put one there
    module.forward = lambda *args, **kwargs: result()
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
