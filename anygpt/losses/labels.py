"""The label tokens of a batch: their likelihood, and how far adapters move the language model's predictions.

Shape legend: `anygpt.outputs`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from anygpt.composition import Composition, Reading, evaluating
from anygpt.errors import InputError
from anygpt.losses.formulas import kl_divergence, token_nll
from anygpt.sequence import signal_tokens
from anygpt.sequence.merging import Merged


@dataclass
class Labels:
    """The label tokens of a batch: rows and positions `(M,)` int64 of the states that predict them, and their ids;
    `reading` is None while losses are only counted."""

    model: Composition
    merged: Merged
    alone: Tensor
    """`(B,)` bool, rows without media."""
    rows: Tensor
    positions: Tensor
    values: Tensor
    has: ClassVar[frozenset[str]] = frozenset()
    reading: Reading | None = None

    def nll(self) -> Tensor:
        """NLL of each label, `(M,)`."""
        weights, signals = self.model.loss_weights, self.model.signal_tokens
        factor = torch.ones_like(self.values, dtype=torch.float32)
        for key in self.model.tokenizer_keys:
            factor[signals.row_of(self.values, key) >= 0] = weights.media_weight
        return factor * self._of_logits(lambda logits, values: token_nll(logits, values, weights.label_smoothing))

    def _of_logits(self, formula: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """`formula(logits, values)`; logits that are not given are computed in chunks, again in the backward pass."""
        signals, places = self.model.signal_tokens, (self.rows, self.positions)

        def chunk(states: Tensor, values: Tensor) -> Tensor:
            return formula(signals.run_head(self.model.language_model, states), values)

        logits = self.reading.logits[places] if self.reading.everywhere else self.reading.logits[0]
        if len(logits) == len(self.values):
            return formula(logits, self.values)
        parts = (x.split(signal_tokens.CHUNK) for x in (self.reading.hidden[places], self.values))
        return torch.cat([checkpoint(chunk, *part, use_reentrant=False) for part in zip(*parts, strict=True)])

    def retention(self) -> Tensor:
        """KL divergence at each label in rows without media, 0 in others, `(M,)`; in chunks as `nll`.

        An `InputError` without adapters, or without the model's states (`text_states`).
        """
        signals, kept = self.model.signal_tokens, self.alone[self.rows]
        places = self.rows[kept], self.positions[kept]
        check_retention(self.model)
        if self.reading.hidden is None:
            raise InputError("loss.retention cannot be computed from text_states; set one of them to none")

        def divergence(before: Tensor, now: Tensor) -> Tensor:
            return kl_divergence(logits_before(self.model, before), signals.run_head(self.model.language_model, now))

        states = (states_before(self.model, self.merged, *places), self.reading.hidden[places])
        values = torch.zeros_like(self.values, dtype=torch.float32)
        if bool(kept.any()):
            parts = zip(*(x.split(signal_tokens.CHUNK) for x in states), strict=True)
            values[kept] = torch.cat([checkpoint(divergence, *part, use_reentrant=False) for part in parts])
        return values


def check_retention(model: Composition) -> None:
    """Raise an `InputError` if the language model has no adapters, so that there is nothing to compare."""
    if not isinstance(model.language_model, PeftModel):
        raise InputError(
            "loss.retention compares the language model with itself without its LoRA adapters, and it has none; set it "
            "to 0, or use it in a stage with lora"
        )
    if any(getattr(one, "bias", "none") != "none" for one in model.language_model.peft_config.values()):
        raise InputError("loss.retention cannot undo the biases that an adapter trains; set it to 0")


@contextmanager
def without_adapters(network: nn.Module) -> Iterator[None]:
    """Run a PEFT model without its adapters; PEFT would leave frozen ones trainable."""
    before = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    try:
        with network.disable_adapter():
            yield
    finally:
        for parameter, trains in before:
            parameter.requires_grad_(trains)


@torch.no_grad()
def states_before(model: Composition, merged: Merged, rows: Tensor, positions: Tensor) -> Tensor:
    """The states that the head reads at rows and positions `(M,)`, without adapters and dropout, `(M, H)`.

    Only these rows are run. If there are none, a single process does nothing; with several, each runs the first row,
    since the others may wait for a sharded model's parameters.
    """
    chosen, index = rows.unique(return_inverse=True)
    if not len(chosen) and torch.distributed.is_initialized():
        chosen = torch.zeros_like(rows.new_empty(1))
    elif not len(chosen):
        return merged.inputs_embeds.new_empty(0, merged.inputs_embeds.shape[-1])
    ids, network = merged.input_ids[chosen].clamp(min=0), model.language_model
    with evaluating(model), without_adapters(network), model.signal_tokens.attached(network) as tap:
        tap.select, tap.most = (index, positions), 0  # no logits
        model.run_language_model(model.embed(ids, merged.attention_mask[chosen], None), {})
        return tap.hidden[index, positions]


@torch.no_grad()
def logits_before(model: Composition, states: Tensor) -> Tensor:
    """Logits `(M, V')` of states `(M, H)`; the lowest number for signal tokens, which the model did not know."""
    signals = model.signal_tokens
    with without_adapters(model.language_model):
        logits = signals.run_head(model.language_model, states)
    ids = [i for key in signals.ids for i in signals.row_ids(key)]
    own = torch.tensor(ids, dtype=torch.long, device=logits.device)
    return logits.index_fill(-1, own, torch.finfo(logits.dtype).min)
