"""States of rows without media in, read once and used again.

Where nothing below them trains, as in stage 2 with `signal_rows: output`, the language model gives such a row the same
states in every epoch. The feature cache keeps those that are looked at: what a label is predicted from, and what the
output projectors read. Shape legend: `anygpt.outputs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from anygpt.errors import InputError
from anygpt.losses.terms import LossRows

HEAD = "head"
"""Name of the states that labels are predicted from; those of a decoder's spans are named `<key>_decoder`."""


class TextStates:
    """Reading and using them, mixed into `MultimodalModel`."""

    @torch.no_grad()
    def read_text(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None) -> list[dict[str, Tensor]]:
        """The states of each row, as `forward(text_states=…)` takes them, joined over the rows of a batch.

        Args:
            input_ids, attention_mask, labels: `(B, S)` int64, as in `forward`; no row has media in.

        Returns:
            One dict a row: `head`, `(M, H)`, what the language model's layers end in where a label follows; and for
            each decoder `<key>_decoder`, `(K, N, H)`, what its projector reads at the row's spans.
        """
        ends: list[Tensor] = []
        trunk = trunk_of(self.language_model)
        handle = trunk.register_forward_hook(lambda module, args, output: ends.append(output[0]))
        try:
            with self.signal_tokens.attached(self.language_model) as tap:
                merged = self.merge(self.embed(input_ids, attention_mask, labels), {})
                rows = self.loss_rows(merged.input_ids, merged.attention_mask, merged.labels, merged.media_in)
                tap.select = rows.nll
                _, all_states = self.run_language_model(merged, {})
                spans = self.read_spans(merged, rows.spans, tap.hidden, all_states)
        finally:
            handle.remove()
        if not ends:
            raise InputError(
                f"{type(self.language_model).__name__} does not run what its get_decoder() gives, so its "
                "layers and its head cannot be taken apart; leave `language_model` out of the feature cache"
            )
        found = {HEAD: (ends[-1][rows.nll], rows.nll[0])}
        for key, decoder in self.decoders.items():
            nothing = merged.inputs_embeds.new_empty(0, decoder.num_signal_tokens, merged.inputs_embeds.shape[-1])
            found[f"{key}_decoder"] = (spans.get(key, nothing), rows.spans[key].rows)
        return [{name: x[at == row] for name, (x, at) in found.items()} for row in range(len(input_ids))]

    def use_text_states(self, given: Mapping[str, Tensor], rows: LossRows) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits `(1, M, V')` where labels follow, and the states of each decoder's spans.

        Call inside `signal_tokens.attached`, the tap selecting nothing.

        Raises:
            InputError: states of other rows than the batch has.
        """
        wanted = {HEAD: len(rows.nll[0])} | {f"{key}_decoder": len(spans) for key, spans in rows.spans.items()}
        lengths = {name: len(x) for name, x in given.items()}
        if lengths != wanted:
            raise InputError(f"text_states has {lengths}, but the batch needs {wanted}; they are of other rows")
        states = given[HEAD][None]
        with replaced(trunk_of(self.language_model), lambda: LayersOutput(last_hidden_state=states)):
            logits = self.language_model(inputs_embeds=states, use_cache=False, return_dict=True).logits
        return logits, {key: given[f"{key}_decoder"] for key, spans in rows.spans.items() if len(spans)}


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
